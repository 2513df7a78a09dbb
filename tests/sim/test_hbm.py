"""The timing model of HBM2 against the figures it is made from."""

from pathlib import Path

import numpy as np
import pytest
from skipopu.sim import build
from skipopu.sim.hbm import HbmTiming
from skipopu.sim.native import MemoryTiming, NativeSim, StopReason

READER = (Path(__file__).parent / "reader.v").read_text()
SIZE = 1 << 25
BEAT, BURST = 64, 1024
BURSTS, STRIDE, FIRST, BEATS = 0, 4, 8, 12


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKIPOPU_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield build.cache_root()


@pytest.fixture(scope="module")
def memory():
    return np.zeros(SIZE, np.uint8)


def cycles(memory, bursts, stride=BURST, first=0, beats=16, **options):
    """Core cycles from the first request to the last beat of a run of reads."""
    timing = MemoryTiming(hbm=HbmTiming(**options))
    with NativeSim(READER, 1, 512, memories=[memory], timing=timing) as sim:
        for register, value in ((STRIDE, stride), (FIRST, first), (BEATS, beats), (BURSTS, bursts)):
            sim.csr_write(register, value)
        assert sim.run(10_000_000) is StopReason.IRQ
        return sim.csr_read(0)


def rate(memory, bursts=8192, beats=16, core_mhz=225, **options):
    """Bytes per second."""
    return bursts * beats * BEAT * core_mhz * 1e6 / cycles(memory, bursts, beats=beats, core_mhz=core_mhz, **options)


def test_a_sequential_stream_runs_at_shuhais_rate(memory):
    assert rate(memory) == pytest.approx(13.27e9, rel=0.005)
    assert rate(memory, refresh_ns=0) == pytest.approx(14.4e9, rel=0.01)
    assert rate(memory, lateral_share=0.5) == pytest.approx(13.27e9 / 2, rel=0.02)


@pytest.mark.parametrize("switch_ns", [0, 15.6])
def test_idle_latencies_are_shuhais(memory, switch_ns):
    core_ns = 1000 / 225

    def latency(first_addresses):
        """Nanoseconds of the last of single-beat reads, each alone."""
        timing = MemoryTiming(hbm=HbmTiming(switch_ns=switch_ns, refresh_interval_ns=1e9, refresh_ns=0))
        with NativeSim(READER, 1, 512, memories=[memory], timing=timing) as sim:
            for address in first_addresses:
                for register, value in ((FIRST, address), (BEATS, 1), (BURSTS, 1)):
                    sim.csr_write(register, value)
                assert sim.run(10_000) is StopReason.IRQ
            return sim.csr_read(0) * core_ns

    # A beat is two accesses, and the answer waits for a clock edge: at most three core cycles on top.
    for addresses, expected in (([0], 122.2), ([0, 128], 106.7), ([0, SIZE // 2], 137.8)):
        assert 0 <= latency(addresses) - expected - switch_ns <= 3 * core_ns, (addresses, expected)


def test_short_and_scattered_reads_are_slow(memory):
    sequential = rate(memory)
    # One row after another in the same banks: every access opens a row.
    conflict = rate(memory, bursts=512, beats=1, stride=1 << 14)
    assert conflict < 0.25 * sequential
    # Whole records of 16 KiB in any order are as good as a stream.
    assert rate(memory, bursts=1024, stride=BURST) > 0.97 * sequential


def test_refresh_costs_its_share(memory):
    assert rate(memory, refresh_ns=540) == pytest.approx(14.4e9 * (1 - 575 / 3900), rel=0.01)


@pytest.mark.parametrize("options, message", [
    ({"core_mhz": 0}, "core_mhz must be positive"), ({"lateral_share": 0}, r"lateral_share must be in \(0, 1\]"),
    ({"hit_ns": 130}, "latencies must be column <= hit <= closed <= miss"),
    ({"refresh_ns": 2000}, "refresh_ns must be 0..1950"),
])
def test_refuses_impossible_parameters(options, message):
    with pytest.raises(ValueError, match=message):
        HbmTiming(**options)
