"""The cycle model against the RTL, on random geometries, configurations, memories, contexts and skipped modules."""

from dataclasses import replace

import numpy as np
import pytest
from skipopu.golden.random_model import random_model
from skipopu.host.compiler import compile_model
from skipopu.host.devices import open_device
from skipopu.host.errors import CompileError
from skipopu.host.model import BASE, GROUPS
from skipopu.host.passes.walk import Arguments
from skipopu.host.performance.cycles import predict
from skipopu.host.performance.history import KvHistory
from skipopu.host.performance.memory import HbmMemory, IdealMemory
from skipopu.host.plan import KV_FORMATS, KvSizes
from skipopu.host.routes import RandomRoutes, always_executing, words_of_routes
from skipopu.host.runtime import Accelerator
from skipopu.host.timeline import spans
from skipopu.hw.config import OverlayConfig, preset
from skipopu.sim.hbm import HbmTiming
from skipopu.sim.native import MemoryTiming

TOLERANCE = 0.02
MICRO = OverlayConfig(  # as small as it gets, and another shape than tiny in all that takes time
    name="micro", lanes=4, columns=8, ports=2, port_bits=32, vector_lanes=2, tokens=2, acc_rows=8, abuf_rows=2048,
    mbuf_rows=1024, kvbuf_heads=21, router_rows=256, history_tokens=128, history_layers=4, buffer_beats=64,
    kvout_rows=512, state_rows=32, fifo_beats=64, burst_beats=32, outstanding=4, queue_depth=8, cache_words=32)
CONFIGS = {config.name: config for config in (preset("tiny"), MICRO)}
POINTS = 22  # of each configuration
SERIAL = replace(MICRO, name="serial", passes=4, compact=True)  # what the smallest boards have
SERIAL_TOLERANCE = 0.04  # logits that leave slowly while the head is read are 3% off


def geometry(rng, config):
    """A random model of the right size for a configuration."""
    largest = 7 if config.name == "tiny" else 3
    head_dim = int(rng.choice([16, 32]))
    kv_heads = int(rng.integers(1, 4 if config.name == "tiny" else 3))
    heads = kv_heads * int(rng.integers(1, 4))
    return {"layers": int(rng.integers(1, 4)), "hidden": 32 * int(rng.integers(1, largest)), "kv_heads": kv_heads,
            "heads": heads + heads % 2 * kv_heads * (head_dim < 32), "head_dim": head_dim,
            "mlp": 32 * int(rng.integers(1, largest)), "vocab": int(rng.integers(50, 300)), "context": 128}


def memory(rng, config):
    """(timing of the simulator, the same for the model from a cycle on)"""
    match rng.integers(3):
        case 0:
            return MemoryTiming(), lambda begin: IdealMemory()
        case 1:
            read, write, rate = int(rng.integers(2, 200)), int(rng.integers(1, 40)), float(rng.choice([1, 0.7, 0.4]))
            return (MemoryTiming(read_latency=read, write_latency=write, bandwidth=rate),
                    lambda begin: IdealMemory(read, write, rate))
    return MemoryTiming(hbm=HbmTiming()), lambda begin: HbmMemory(config.ports, config.port_bits // 8, HbmTiming(),
                                                                  begin, ahead=config.fifo_beats)


def case(seed, config):
    """(compiled, position, tokens, head rows, forced routes, timing, channel) of a random point."""
    rng = np.random.default_rng((seed, config.lanes))
    groups = np.random.default_rng((seed, 1))
    while True:
        kv = str(rng.choice(["", "dense", "reuse"]))
        context = int(rng.integers(16, 100))
        base = str(rng.choice(["q4_0", "q4_1", "q8_0"]))
        kind = str(groups.choice([kind for kind in GROUPS if BASE[kind] == base]))
        model = random_model(seed, kinds=(kind,), **geometry(rng, config))
        try:
            compiled = compile_model(model, config, context, always_executing(model, kv) if kv else None,
                                     check=False, fused=bool(rng.random() < 0.8),
                                     kv=KvSizes(buffer=None if seed % 2 else 0, format=list(KV_FORMATS)[seed % 3]))
            break
        except CompileError:
            continue
    count = 1 if rng.random() < 0.5 else compiled.map.chunk
    position = int(rng.integers(0, context - count + 1))
    if kv == "reuse":  # records of the past have to be there: the runs before it are made
        position = min(position, 3 * compiled.map.chunk)
    force = RandomRoutes(float(rng.choice([0, 0.25, 0.5])), seed) if kv else None
    tokens = rng.integers(0, model.config.vocab, count).tolist()
    return compiled, position, tokens, int(rng.random() < 0.5), force, *memory(rng, config)


def simulate(compiled, position, tokens, head_rows, force, timing):
    """(counters, cycle of the first instruction, its spans)"""
    config = compiled.config
    with open_device("rtl", config, compiled.map.memory * config.port_bits // 8, timing=timing) as device:
        accelerator = Accelerator(device, compiled, force=force)
        if compiled.map.kv == "reuse":
            for first in range(0, position, compiled.map.chunk):
                accelerator.run([0] * min(compiled.map.chunk, position - first))
        accelerator.position = position
        device.sim.record()
        accelerator.run(tokens, 0, head_rows)
        events = device.sim.events()
        return accelerator.stats[-1].counters, int(events["cycle"][0]), spans(compiled.program, events)


def arguments(compiled, position, count, head_rows, force):
    words = words_of_routes(force.bits(compiled.map.layers, position, count)) if force else []
    return Arguments(position, count, 0, head_rows, tuple(zip(words[::2], words[1::2])))


def predicted(compiled, position, tokens, head_rows, force, channel):
    history, chunk = None, compiled.map.chunk
    if compiled.map.kv == "reuse":  # with the runs before
        history = KvHistory(compiled.config)
        for first in range(0, position, chunk):
            history.replay(compiled.program, arguments(compiled, first, min(chunk, position - first), 0, force))
    return predict(compiled.config, compiled.program, arguments(compiled, position, len(tokens), head_rows, force),
                   tokens=tokens, channel=channel, program_at=compiled.map.address("program"), history=history)


@pytest.mark.parametrize("seed", range(POINTS))
@pytest.mark.parametrize("name", CONFIGS)
def test_cycles_and_bytes_are_those_of_the_rtl(name, seed):
    config = CONFIGS[name]
    *point, timing, channel = case(seed, config)
    counters, first, _ = simulate(*point, timing)
    lead = predicted(*point, channel(0)).spans[0].dispatch  # refreshes go by the cycles since reset
    found = predicted(*point, channel(first - lead - 1))
    assert found.cycles == pytest.approx(counters["cycles"], rel=TOLERANCE), f"seed {seed}"
    assert found.bytes_read(config) == counters["bytes_read"]
    assert found.beats_written * config.port_bits // 8 == counters["bytes_written"]
    assert (found.weight_superbeats, found.kv_beats, found.kv_buffered, found.kv_written, found.array_rows) == tuple(
        counters[key] for key in ("weights_read", "kv_read", "kv_buffered", "kv_written", "array_active"))


@pytest.mark.parametrize("seed", range(8))
def test_a_machine_in_passes(seed):
    *point, timing, channel = case(seed, SERIAL)
    counters, first, _ = simulate(*point, timing)
    lead = predicted(*point, channel(0)).spans[0].dispatch
    found = predicted(*point, channel(first - lead - 1))
    assert found.cycles == pytest.approx(counters["cycles"], rel=SERIAL_TOLERANCE), f"seed {seed}"
    assert found.bytes_read(SERIAL) == counters["bytes_read"]


def test_every_instruction_is_where_it_is_in_the_rtl():
    """With ideal memory not only the sum is right: dispatch, begin and end of each instruction, to a few cycles."""
    model = random_model(1, kinds=("q4_0",), vocab=96)
    compiled = compile_model(model, preset("tiny"), 64)
    point = compiled, 37, [5], 1, None
    _, first, real = simulate(*point, MemoryTiming())
    found = predicted(*point, IdealMemory())
    assert [(span.pc, span.unit) for span in found.spans] == [(span.pc, span.unit) for span in real]
    lead = found.spans[0].dispatch
    for got, expected in zip(found.spans, real):
        for name in ("dispatch", "start", "done"):
            assert abs(getattr(got, name) - lead - (getattr(expected, name) - first)) <= 4, (name, got, expected)
