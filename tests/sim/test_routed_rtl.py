"""Routed models on the RTL: every corner of the routes, in both KV modes, equals the functional level bit for bit."""

import numpy as np
import pytest
from skipopu.golden.routed_cases import LAYERS, routed_case, routed_names
from skipopu.host.compare import compare
from skipopu.host.compiler import compile_model
from skipopu.host.devices import open_device
from skipopu.host.plan import KvSizes
from skipopu.host.routes import RandomRoutes
from skipopu.host.runtime import Accelerator
from skipopu.hw.config import preset
from skipopu.sim.native import MemoryTiming

CONFIG = preset("tiny")
STALLS = ("stall_ar", "stall_r", "stall_aw", "stall_w", "stall_b")
TIMINGS = (MemoryTiming(), MemoryTiming(read_latency=1, write_latency=1), MemoryTiming(read_latency=300),
           MemoryTiming(**dict.fromkeys(STALLS, 0.5), seed=2))
STATED = ("instructions", "dropped", "saturations", "weights_read", "kv_read", "kv_written", "bytes_read",
          "bytes_written")


def pair_of(case, timing=TIMINGS[0], force=None, fused=True, kv=None):
    """The case on the functional level and on the RTL."""
    compiled = compile_model(case.model, CONFIG, case.model.config.context, case.routers, fused=fused, kv=kv)
    size = compiled.map.memory * CONFIG.port_bits // 8
    devices = open_device("functional", CONFIG, size), open_device("rtl", CONFIG, size, timing=timing)
    return [Accelerator(device, compiled, timeout=120, watchdog=100_000, force=case.force if force is None else force)
            for device in devices]


def assert_equal(pair, prompt, count):
    """Logits, records, routes and all of memory; counters that do not depend on time."""
    functional, rtl = pair
    with rtl.device:
        *_, result = compare(functional, rtl, prompt, count)
        assert result.difference is None, str(result.difference)
        np.testing.assert_array_equal(rtl.decisions, functional.decisions)
        for port, memory in enumerate(functional.device.memories):
            np.testing.assert_array_equal(rtl.device.memory(port)[:len(memory)], memory, err_msg=f"port {port}")
        for first, second in zip(functional.stats, rtl.stats, strict=True):
            assert {name: second.counters[name] for name in STATED} == {name: first.counters[name] for name in STATED}


@pytest.mark.parametrize("name", routed_names())
def test_routed_cases(name):
    case = routed_case(name, CONFIG)
    assert_equal(pair_of(case, TIMINGS[routed_names().index(name) % len(TIMINGS)]), case.prompt, 4)


@pytest.mark.parametrize("kv_format", ["12", "8"])
@pytest.mark.parametrize("name", [f"{corner}, {kv}" for kv in ("dense", "reuse") for corner in (
    "random", "one token executes", "alternating layers", "chunk boundary", "own decisions")])
def test_narrow_records(name, kv_format):
    """With the whole history buffer, or without."""
    case, number = routed_case(name, CONFIG), routed_names().index(name)
    sizes = KvSizes(format=kv_format, buffer=(0, None)[(number // 2 + (kv_format == "8")) % 2])
    assert_equal(pair_of(case, TIMINGS[number % len(TIMINGS)], kv=sizes), case.prompt, 4)


@pytest.mark.parametrize("seed", range(6))
def test_random_routes_under_random_stalls(seed):
    case = routed_case(f"random, {('dense', 'reuse')[seed % 2]}", CONFIG)
    stalls = np.random.default_rng(seed).random(5) * 0.8
    timing = MemoryTiming(**dict(zip(STALLS, stalls)), read_latency=1 + 40 * seed, seed=seed)
    assert_equal(pair_of(case, timing, RandomRoutes(0.15 * seed, seed)), case.prompt[:9], 3)


@pytest.mark.parametrize("kv", ["dense", "reuse"])
def test_reductions_in_passes_of_their_own(kv):
    case = routed_case(f"own decisions, {kv}", CONFIG)
    assert_equal(pair_of(case, fused=False), case.prompt, 2)


def test_routes_change_neither_program_nor_image():
    """Whatever is skipped: after loading, only arguments, tokens and forced routes are written."""
    case = routed_case("random, reuse", CONFIG)
    functional, rtl = pair_of(case)
    with rtl.device:
        before = [rtl.device.memory(port)[: rtl.map.image * CONFIG.port_bits // 8].copy()
                  for port in range(CONFIG.ports)]
        rtl.run(case.prompt[:4])
        rtl.run(case.prompt[4:5], 0, 1)
        assert rtl.decisions.shape == (LAYERS, 2, 5) and not rtl.decisions.all()
        for port, image in enumerate(before):
            np.testing.assert_array_equal(rtl.device.memory(port)[: len(image)], image)


def test_a_skipped_block_costs_a_few_cycles_an_instruction():
    """All tokens skip everything behind layer 0: what is left of a layer is dropped instructions and one short pass."""
    case = routed_case("nobody skips, reuse", CONFIG)
    cycles = {}
    for skipping in (False, True):
        routes = np.full((LAYERS, 2, 16), not skipping)
        _, rtl = pair_of(case, force=routes)
        with rtl.device:
            rtl.run(case.prompt[:1])
            rtl.run(case.prompt[1:2])
            cycles[skipping] = rtl.stats[-1].counters["cycles"]
            dropped = rtl.stats[-1].counters["dropped"]
    weights = sum(size for name, (_, size) in rtl.map.regions.items()
                  if name.rpartition(".")[2] in ("q", "k", "v", "o", "gate_up", "down"))
    assert dropped > 15 * LAYERS
    assert cycles[True] < cycles[False] - weights * 0.7
