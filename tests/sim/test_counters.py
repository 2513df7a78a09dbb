"""The RTL's counters against accounts of others: the memories' own statistics, the program, and each other."""

import pytest
from skipopu.golden.random_model import random_model
from skipopu.host.compiler import compile_model
from skipopu.host.device import read_register
from skipopu.host.devices import open_device
from skipopu.host.passes.walk import Arguments, walk
from skipopu.host.runtime import Accelerator
from skipopu.hw.config import preset
from skipopu.hw.isa import MatmulMode
from skipopu.sim.native import MemoryTiming

CONFIG = preset("tiny")
BEAT = CONFIG.port_bits // 8
RUNS = (([1, 2, 3, 4], 4), ([5], 1), ([7, 9], 0))  # tokens, head rows
TIMINGS = {"default": MemoryTiming(), "narrow": MemoryTiming(bandwidth=0.2),
           "stalled": MemoryTiming(stall_ar=0.5, stall_r=0.5, stall_aw=0.5, stall_w=0.5, stall_b=0.5)}
UNITS = ("load", "compute", "vector", "store")


@pytest.fixture(scope="module", params=[("q4_1",), ("q8_0",), ("q4_0", "q4_1", "q8_0")], ids=str)
def compiled(request):
    return compile_model(random_model(8, kinds=request.param), CONFIG, context=32)


def measure(compiled, timing):
    """Per run of RUNS: (arguments, counters, simulated cycles from start to end, port statistics before and after)."""
    found = []
    with open_device("rtl", CONFIG, compiled.map.memory * BEAT, timing=TIMINGS[timing]) as device:
        accelerator = Accelerator(device, compiled)
        for tokens, head_rows in RUNS:
            for port in range(CONFIG.ports):
                device.sim.stats(port, clear=True)
            arguments, begin = Arguments(accelerator.position, len(tokens), 0, head_rows), device.sim.cycle
            accelerator.run(tokens, 0, head_rows)
            ports = [(device.sim.stats(port), read_register(device, "BEATS_READ", port),
                      read_register(device, "BEATS_WRITTEN", port)) for port in range(CONFIG.ports)]
            found.append((arguments, tokens, accelerator.stats[-1].counters, device.sim.cycle - begin, ports))
    return found


@pytest.mark.parametrize("timing", TIMINGS)
def test_counters_agree_with_other_accounts(compiled, timing):
    for arguments, tokens, counters, elapsed, ports in measure(compiled, timing):
        program = list(walk(compiled.program, arguments, tokens))
        assert counters["instructions"] == len(program)
        for stats, beats_read, beats_written in ports:
            assert (beats_read * BEAT, beats_written * BEAT) == (stats.bytes_read, stats.bytes_written)
        assert counters["bytes_read"] == sum(stats.bytes_read for stats, *_ in ports)
        assert counters["bytes_written"] == sum(stats.bytes_written for stats, *_ in ports)
        # One cycle per row of one tile of 4-bit codes; 8-bit codes are two.
        assert counters["array_active"] == sum(
            f["heads"] * f["n_tiles"] * f["k_tiles"] * f["groups"] * f["rows"] * (1 + (f["mode"] == MatmulMode.W8))
            for _, mnemonic, _, f in program if mnemonic == "matmul")
        assert_plausible(counters, elapsed)


def assert_plausible(counters, elapsed):
    cycles = counters["cycles"]
    assert elapsed - 300 < cycles <= elapsed  # register accesses before and after take the rest
    for name in (*(f"{what}_{unit}" for what in ("busy", "hazard_wait") for unit in UNITS), "memory_blocked"):
        assert 0 < counters[name] <= cycles, name
    assert counters["array_active"] + counters["weight_starved"] + counters["drain_blocked"] <= counters["busy_compute"]
    assert counters["stream_wait"] <= counters["busy_vector"]
    assert counters["memory_blocked"] <= counters["busy_load"]
    assert cycles * CONFIG.superbeat_bytes >= counters["bytes_read"] + counters["bytes_written"]


def test_counters_start_from_zero_with_every_run(compiled):
    """The same run twice counts the same: nothing is left of the run before."""
    with open_device("rtl", CONFIG, compiled.map.memory * BEAT) as device:
        accelerator = Accelerator(device, compiled)
        counters = []
        for _ in range(3):
            accelerator.clear()
            accelerator.run([4, 5, 6], 2, 1)
            counters.append(accelerator.stats[-1].counters)
    assert counters[1] == counters[2]
    assert {name: value for name, value in counters[0].items() if "bytes" in name} == \
           {name: value for name, value in counters[1].items() if "bytes" in name}


def test_slower_memory_shows_as_starvation(compiled):
    fast, slow = (measure(compiled, timing)[1][2] for timing in ("default", "narrow"))
    assert slow["array_active"] == fast["array_active"] and slow["bytes_read"] == fast["bytes_read"]
    assert slow["cycles"] > 3 * fast["cycles"]
    more = slow["cycles"] - fast["cycles"]
    assert 0.9 * more < slow["weight_starved"] - fast["weight_starved"] <= more
