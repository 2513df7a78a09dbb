"""The bench of KV records: patterns, what moves, tables and pictures, and its mistakes in one line each."""

import dataclasses
import json
import re

import numpy as np
import pytest
from skipopu.golden.device import FunctionalDevice
from skipopu.golden.random_model import random_model, write_gguf
from skipopu.host import devices
from skipopu.host.compiler import compile_model
from skipopu.host.errors import CapacityError, CompileError, DeviceError, RequestError, RouterError
from skipopu.host.kv_bench import Pattern, geometry, make_pattern, measure
from skipopu.host.kv_report import draw_cost, draw_shares, table
from skipopu.host.load import load_model
from skipopu.host.routers import Routers, save_routers
from skipopu.host.session import open_accelerator
from skipopu.hw.config import ConfigError, preset
from skipopu.sim.device import RtlDevice
from test_cli import Call, Counting

CONFIG, LAYERS = preset("tiny"), 4
MODEL = geometry(LAYERS, 2, 16)  # records of 16 beats, 128 bytes
RECORD = 128


class Careless(FunctionalDevice):
    """Takes another key for every record that its buffer holds."""

    def execute(self, run):
        def disturb(pc, item, values, writes):
            if item.mnemonic == "loadkv" and self.machine.counters["kv_buffered"]:
                self.machine._matrix.tiles[-1].key[:] += 1
        self.machine.observer = disturb
        return super().execute(run)


@pytest.fixture
def call(capsys):
    return Call(capsys)


def rows_of(contexts, patterns, buffers=(0, None), device="functional", **options):
    return list(measure(CONFIG, MODEL, contexts, patterns, buffers, device, **options))


@pytest.mark.parametrize("kv_format, record", [("12", 1 + 8 + 4), ("8", 1 + 8)])
def test_narrow_records_move_their_bytes(kv_format, record):
    pattern = make_pattern("random", LAYERS, 40, 0.25, 3)
    for row in rows_of((40,), [pattern], kv_format=kv_format):
        assert row.memory_bytes + row.buffer_bytes_served == LAYERS * 40 * record * 8
        assert row.storage_saved == pytest.approx(0.25)


# ---- patterns


@pytest.mark.parametrize("skip", [0.0, 0.25, 0.6])
@pytest.mark.parametrize("name", ["random", "alternate", "layerwise"])
def test_patterns_leave_out_what_was_asked_but_never_layer_0(name, skip):
    pattern = make_pattern(name, 20, 256, skip, 3)
    assert 1 - pattern.stored.mean() == pytest.approx(skip, abs=1e-9) and pattern.stored[0].all()
    if name == "layerwise":
        assert (pattern.stored == pattern.stored[:, :1]).all()
    else:
        assert 1 - pattern.stored[:, :128].mean() == pytest.approx(skip, abs=1e-3)
    wanted = np.arange(20) % 2 == 0 if name == "alternate" else np.ones(20, bool)
    assert (pattern.attends == wanted[:, None]).all()


def test_random_patterns_depend_on_the_seed_only():
    first, again, other = (make_pattern("random", 5, 100, 0.3, seed).stored for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()
    assert (make_pattern("alternate", 5, 100, 0.3, 1).stored == first).all()


def test_decisions_of_routers_are_taken_as_they_are():
    decisions = np.random.default_rng(0).random((5, 70)) < 0.5
    pattern = make_pattern("routers", 5, 60, decisions=decisions)
    assert pattern.stored[0].all() and (pattern.stored[1:] == decisions[1:, :60]).all()
    assert (pattern.attends == pattern.stored).all()


@pytest.mark.parametrize(("arguments", "error", "message"), [
    (("randon", 4, 10), RequestError, "a pattern is one of dense, random, .* not 'randon'"),
    (("random", 4, 10, 1.5), RouterError, "rate must be 0..1, not 1.5"),
    (("random", 4, 10, 0.8), RequestError, "of 4 layers at most 75.0% can be, not 80.0%"),
    (("routers", 4, 10), RequestError, "give --model and --routers"),
    (("routers", 4, 10, 0.25, 0, np.ones((4, 9), bool)), RequestError, "give --model and --routers"),
])
def test_impossible_patterns(arguments, error, message):
    with pytest.raises(error, match=message):
        make_pattern(*arguments)


# ---- what moves


def test_dense_records_are_all_read_and_stored():
    rows = rows_of((20, 7), [make_pattern("dense", LAYERS, 20)])
    assert [(row.tokens, row.memory_bytes, row.storage_saved, row.hit_rate) for row in rows] == [
        (7, LAYERS * 8 * RECORD, 0, 0), (20, LAYERS * 20 * RECORD, 0, 0)]  # whole rows of both ports


def test_bytes_of_skipped_records_come_from_the_buffer_as_far_as_it_reaches():
    """Every layer but the first is skipped: with room for all, memory is read once."""
    stored = np.zeros((LAYERS, 32), bool)
    stored[0] = True
    rows = rows_of((8, 24, 32), [Pattern("layer 0", stored, np.ones_like(stored))], (0, 4096, 1024))
    assert [(row.tokens, row.buffer_bytes // RECORD, row.memory_bytes // RECORD, row.buffer_bytes_served // RECORD)
            for row in rows] == [(8, 0, 32, 0), (8, 8, 8, 24), (8, 32, 8, 24),
                                 (24, 0, 96, 0), (24, 8, 72, 24), (24, 32, 24, 72),
                                 (32, 0, 128, 0), (32, 8, 104, 24), (32, 32, 32, 96)]
    assert {row.storage_saved for row in rows} == {0.75}
    for context in (8, 24, 32):
        assert len({row.result for row in rows if row.tokens == context}) == 1


def test_results_follow_context_and_routes():
    patterns = [make_pattern("random", LAYERS, 40, 0.4, seed) for seed in (1, 2)]
    rows = rows_of((20, 40), patterns)
    assert len({row.result for row in rows}) == 4
    assert sum(row.buffer_bytes_served for row in rows) > 0


def test_alternate_shares_the_records_of_random_but_reads_half_of_the_layers():
    random, alternate = (make_pattern(name, LAYERS, 64) for name in ("random", "alternate"))
    rows = rows_of((64,), [random, alternate])
    assert [row.memory_bytes + row.buffer_bytes_served for row in rows] == [256 * RECORD] * 2 + [128 * RECORD] * 2
    assert rows[1].hit_rate > rows[3].hit_rate > 0 == rows[0].hit_rate


def test_shares_are_of_the_peak_where_the_device_has_a_clock(monkeypatch):
    monkeypatch.setitem(devices.DEVICES, "counting", "test_cli:Counting")
    row = rows_of((32,), [make_pattern("random", LAYERS, 32)], (None,), "counting")[0]
    peak = row.cycles * CONFIG.superbeat_bytes
    assert row.cycles % 10 == 0 and issubclass(Counting, FunctionalDevice)
    assert row.physical_share == row.memory_bytes / peak
    assert row.effective_share == (row.memory_bytes + row.buffer_bytes_served) / peak > row.physical_share


def test_a_result_that_depends_on_the_buffer_is_an_error(monkeypatch):
    monkeypatch.setitem(devices.DEVICES, "careless", "test_kv_bench:Careless")
    with pytest.raises(RequestError, match="pattern random, 32 tokens: results depend on the buffer: .* with 0 bytes"):
        rows_of((32,), [make_pattern("random", LAYERS, 32)], device="careless")


@pytest.mark.parametrize(("contexts", "buffers", "error", "message"), [
    ((300,), (0,), CapacityError, "history_tokens .* at least 300 but is 256; use configuration sim or sim16 or u280"),
    ((32,), (0, 5000), CompileError, "the history buffer of configuration tiny has 4096 bytes; ask for 0..4096"),
])
def test_beyond_the_configuration(contexts, buffers, error, message):
    with pytest.raises(error, match=message):
        rows_of(contexts, [make_pattern("random", LAYERS, max(contexts))], buffers)


def test_ports_that_are_no_power_of_two():
    with pytest.raises(ConfigError, match="ports must be a power of two, not 3"):
        dataclasses.replace(CONFIG, ports=3)


# ---- memory of simulated hardware


def test_memory_timing_is_for_simulated_hardware_and_known():
    with pytest.raises(DeviceError, match="memory must be ideal or hbm, not 'ddr'"):
        RtlDevice(CONFIG, 4096, memory="ddr")
    with pytest.raises(DeviceError, match="device functional has no memory timing to choose; --memory is for sim"):
        open_accelerator("functional", compile_model(random_model(1), CONFIG, 16), memory="hbm")


# ---- the command

SMALL = ("--config", "tiny", "--layers", 4, "--kv-heads", 2, "--head-dim", 16)


def test_the_command_prints_a_table_and_json(call, tmp_path):
    out, _ = call.good("bench", "kv", *SMALL, "--tokens", "16,64", "--pattern", "dense,random", "-o", tmp_path)
    lines = out.splitlines()
    assert lines[0].split()[:3] == ["pattern", "tokens", "buffer"] and len(lines) == 1 + 2 + 4 + 1
    assert "simulated" in lines[-1] and re.search(r"random +64 +4 KiB .* 25.0% ", out)
    saved = json.loads((tmp_path / "kv.json").read_text())
    found = call.json("bench", "kv", *SMALL, "--tokens", "16,64", "--pattern", "dense,random")
    assert found == saved and len(found["rows"]) == 6
    for row in found["rows"]:
        assert {"tokens", "pattern", "buffer_bytes", "memory_bytes", "buffer_bytes_served", "physical_share",
                "effective_share", "hit_rate", "storage_saved"} <= set(row)
    assert set(found["labels"].values()) == {"simulated"}
    for name in ("cost.png", "shares.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "kv.md").read_text().count("\n|") == 1 + 6


def test_decisions_of_a_models_routers(call, tmp_path):
    write_gguf(random_model(2, layers=3), tmp_path / "m.gguf")
    model = load_model(str(tmp_path / "m.gguf"))
    rng = np.random.default_rng(0)
    save_routers(tmp_path / "r.safetensors", Routers(
        kv="reuse", base=model.identity, difference=rng.standard_normal((3, 2, 64)).astype(np.float16),
        bias=np.zeros((3, 2), np.float32)))
    np.savez(tmp_path / "text.npz", tokens=rng.integers(0, 96, (3, 20)))
    arguments = ("bench", "kv", "--config", "tiny", "-m", tmp_path / "m.gguf", "--pattern", "routers", "--tokens", 50)
    found = call.json(*arguments, "--routers", tmp_path / "r.safetensors", "--sequences", tmp_path / "text.npz")
    assert (found["layers"], found["kv_heads"]) == (3, 2) and 0.1 < found["rows"][0]["storage_saved"] < 0.6
    assert "needs --routers and the --sequences that they read" in call.bad(*arguments)


@pytest.mark.parametrize(("arguments", "message"), [
    (("--tokens", "many"), "--tokens takes whole numbers of at least 1 with commas, not 'many'"),
    (("--tokens", "0"), "--tokens takes whole numbers of at least 1 with commas, not '0'"),
    (("--buffer", "1k"), "--buffer takes whole numbers of at least 0 with commas, not '1k'"),
    (("--buffer", "9999"), "the history buffer of configuration tiny has 4096 bytes; ask for 0..4096, not 9999"),
    (("--tokens", "512", "--pattern", "random"), "history_tokens (positions with KV reuse) must be at least 512"),
    (("--pattern", "odd"), "a pattern is one of dense, random, layerwise, alternate, routers, not 'odd'"),
    (("--device", "funktional"), "unknown device 'funktional', did you mean 'functional'?"),
    (("--memory", "hbm"), "device functional has no memory timing to choose"),
    (("--config", "tinny"), "unknown configuration 'tinny'"),
    (("--kv-heads", "65"), "does not fit configuration tiny: state_rows"),
])
def test_mistakes_are_one_line(call, arguments, message):
    assert message in call.bad("bench", "kv", *SMALL, "--tokens", "16", *arguments)


def test_tables_and_pictures_know_levels_with_a_clock(monkeypatch, tmp_path):
    monkeypatch.setitem(devices.DEVICES, "counting", "test_cli:Counting")
    rows = rows_of((16, 32), [make_pattern(name, LAYERS, 32) for name in ("dense", "random")], device="counting")
    assert table(rows)[1].split()[-3:] == [f"{rows[0].cycles:,}", f"{rows[0].physical_share:.1%}",
                                           f"{rows[0].effective_share:.1%}"]
    for draw in (draw_cost, draw_shares):
        draw(tmp_path / "picture.png", rows, CONFIG)
        assert (tmp_path / "picture.png").stat().st_size > 10_000
