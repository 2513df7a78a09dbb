"""Parts of the RTL that are not clocked while nothing happens in them: the same machine, cycle for cycle."""

import numpy as np
import pytest
from skipopu.golden.routed_cases import routed_case
from skipopu.host.compiler import compile_model
from skipopu.host.devices import open_device
from skipopu.host.plan import KvSizes
from skipopu.host.routes import RandomRoutes
from skipopu.host.runtime import Accelerator
from skipopu.hw.config import preset
from skipopu.hw.top import SLEEPERS
from skipopu.sim.native import MemoryTiming

CONFIG = preset("tiny")
STALLS = ("stall_ar", "stall_r", "stall_aw", "stall_w", "stall_b")
TIMINGS = {"default": MemoryTiming(), "near": MemoryTiming(read_latency=1, write_latency=1),
           "far": MemoryTiming(read_latency=300, write_latency=200),
           "stalled": MemoryTiming(**dict.fromkeys(STALLS, 0.6), seed=5), "starved": MemoryTiming(bandwidth=0.1)}


def run(compiled, case, timing, sleepless):
    """(events, clocks per sleeper, stats, logits, memories, cycles) of the prompt and four tokens."""
    size = compiled.map.memory * CONFIG.port_bits // 8
    with open_device("rtl", CONFIG, size, timing=TIMINGS[timing]) as device:
        sim = device.sim
        sim.sleepless(sleepless)
        sim.record()
        accelerator = Accelerator(device, compiled, timeout=120, watchdog=100_000, force=RandomRoutes(0.3, 1))
        logits = [accelerator.prefill(case.prompt), *(accelerator.step(token) for token in case.prompt[:4])]
        return (sim.events(), sim.clocks(), [stats.counters for stats in accelerator.stats], np.stack(logits),
                [memory.copy() for memory in device.memories], sim.cycle)


@pytest.mark.parametrize("kv_format", ["fp16", "8"])
@pytest.mark.parametrize("timing", TIMINGS)
def test_sleeping_changes_nothing(timing, kv_format):
    case = routed_case(f"random, {('dense', 'reuse')[kv_format == '8']}", CONFIG)
    compiled = compile_model(case.model, CONFIG, case.model.config.context, case.routers,
                             kv=KvSizes(format=kv_format, buffer=None))
    (events, clocks, *sleeping), (all_events, all_clocks, *awake) = (
        run(compiled, case, timing, sleepless) for sleepless in (False, True))
    np.testing.assert_array_equal(events, all_events)
    for ours, theirs in zip(sleeping, awake, strict=True):
        np.testing.assert_equal(ours, theirs)
    cycles = sleeping[-1]
    assert all_clocks == dict.fromkeys(SLEEPERS, cycles)
    for part, count in clocks.items():
        assert 0 < count < 0.9 * cycles, f"{part} slept in {cycles - count} of {cycles} cycles"
