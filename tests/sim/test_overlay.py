"""Whole models on the RTL: every key, value, logit and token equals the functional level bit for bit.

One build of configuration `tiny` serves all models: a new model is a new program. Memories stall, lag and starve in
different ways; that may change when things happen, never what comes out.
"""

import dataclasses

import numpy as np
import pytest
from skipopu.golden.random_model import random_model
from skipopu.host.compare import compare
from skipopu.host.compiler import compile_model
from skipopu.host.devices import open_device
from skipopu.host.layout import pad_to
from skipopu.host.model import GROUP, GROUPS, Model, QuantTensor
from skipopu.host.plan import KV_FORMATS, KvSizes
from skipopu.host.runtime import Accelerator
from skipopu.hw.config import preset
from skipopu.sim.native import MemoryTiming
from test_cycles import MICRO

CONFIG = preset("tiny")
CONTEXT = 64
QUANTISED = tuple(GROUPS)
STALLS = ("stall_ar", "stall_r", "stall_aw", "stall_w", "stall_b")
HALF = dict.fromkeys(STALLS, 0.5)

TIMINGS = {
    "ideal": MemoryTiming(read_latency=1, write_latency=1),
    "default": MemoryTiming(),
    "far": MemoryTiming(read_latency=300, write_latency=200),
    "narrow": MemoryTiming(bandwidth=0.15),
    "one burst": MemoryTiming(max_outstanding=1, read_latency=20),
    "half stalled": MemoryTiming(**HALF, seed=2),
    "mostly stalled": MemoryTiming(**dict.fromkeys(STALLS, 0.85), seed=3),
    "late answers": MemoryTiming(stall_r=0.8, stall_b=0.9, read_latency=1, seed=4),
    "stalled writes": MemoryTiming(stall_aw=0.9, stall_w=0.9, write_latency=100, seed=5),
    # Ports far apart from each other, and a slow fetch: one entry per port, then the fetch port's.
    "unlike ports": [MemoryTiming(read_latency=1), MemoryTiming(**HALF, read_latency=150, bandwidth=0.5),
                     MemoryTiming(stall_ar=0.9, read_latency=60)],
}

# (what is special, arguments of random_model, prompt length)
CORNERS = [
    ("smallest", {"layers": 1, "hidden": 2, "heads": 1, "kv_heads": 1, "head_dim": 8, "mlp": 2, "vocab": 1,
                  "kinds": ["f16"]}, 8),
    ("longest heads", {"layers": 1, "heads": 2, "kv_heads": 2, "head_dim": 128}, 21),
    ("odd everything", {"hidden": 21, "mlp": 45, "heads": 3, "kv_heads": 3, "head_dim": 10, "vocab": 33,
                        "kinds": ["f16"]}, 19),
    ("padded heads of quantised groups", {"heads": 8, "kv_heads": 2, "head_dim": 12, "kinds": ["q4_1"]}, 9),
    ("one KV head, one token at a time", {"layers": 1, "heads": 16, "kv_heads": 1, "head_dim": 8}, 17),
    ("as many heads as there are states", {"layers": 1, "heads": 32, "kv_heads": 32, "head_dim": 8}, 8),
    ("fullest KV buffer", {"layers": 1, "heads": 4, "kv_heads": 4, "head_dim": 122, "hidden": 32, "kinds": ["f16"]}, 8),
    ("vocabulary one over a tile, tied", {"vocab": CONFIG.columns + 1, "tied_head": True}, 16),
    ("vocabulary one under a tile", {"vocab": 2 * CONFIG.columns - 1, "tied_head": False}, 15),
    ("three layers", {"layers": 3, "hidden": 32, "mlp": 32, "heads": 2, "kv_heads": 1, "head_dim": 16}, 50),
]


def random_geometry(seed):
    """(arguments of random_model, prompt length, timing) over the range of sizes that fits `tiny`."""
    rng = np.random.default_rng(seed)
    plain = seed % 3 == 0  # f16 alone takes sizes that are no multiple of a quantised group
    unit = 1 if plain else GROUP
    width = heads = 0  # width: columns of o
    while not 0 < width <= 512 or width % unit or heads > 32:
        half, kv_heads, groups = (int(rng.integers(*limits)) for limits in ((4, 65), (1, 9), (1, 9)))
        heads, width = kv_heads * groups, 2 * half * kv_heads * groups
    kinds = ["f16"] if plain else rng.choice([*QUANTISED, "f16"], rng.integers(1, 4), replace=False).tolist()
    geometry = {
        "layers": int(rng.integers(1, 3)), "hidden": pad_to(int(rng.integers(1, 130)), unit), "kinds": kinds,
        "heads": heads, "kv_heads": kv_heads, "head_dim": 2 * half, "tied_head": bool(rng.integers(2)),
        "mlp": pad_to(int(rng.integers(1, 200)), unit), "vocab": int(rng.integers(2, 200)),
        "rope_theta": float(rng.choice([100.0, 10000.0, 500000.0])),
    }
    return geometry, int(rng.integers(8, 34)), str(rng.choice(list(TIMINGS)))


def with_gain(model, name, factor):
    """The model with the values of one norm multiplied."""
    norm = QuantTensor("f32", values=model.tensors[name].values * np.float32(factor))
    return Model(config=model.config, tensors={**model.tensors, name: norm}, identity=model.identity)


def pair_of(model, timing, context=CONTEXT, config=CONFIG, **options):
    """The model on the functional level and on the RTL."""
    compiled = compile_model(model, config, context, **options)
    size = compiled.map.memory * config.port_bits // 8
    devices = open_device("functional", config, size), open_device("rtl", config, size, timing=TIMINGS[timing])
    return [Accelerator(device, compiled, timeout=120, watchdog=100_000) for device in devices]


def tokens_of(model, count, seed):
    return np.random.default_rng(seed).integers(0, model.config.vocab, count).tolist()


def assert_equal(pair, prompt, count):
    """Every logit of prompt and answer, every record of keys and values, then all of memory, and what was counted."""
    functional, rtl = pair
    with rtl.device:
        *_, result = compare(functional, rtl, prompt, count)
        assert result.difference is None, str(result.difference)
        assert result.logits == (len(prompt) + count - 1) * functional.vocab
        assert_same_state(pair)


def assert_same_state(pair):
    """All of memory, and the counters that do not depend on time."""
    functional, rtl = pair
    for port, memory in enumerate(functional.device.memories):
        np.testing.assert_array_equal(rtl.device.memory(port)[: len(memory)], memory, err_msg=f"memory of port {port}")
    for first, second in zip(functional.stats, rtl.stats, strict=True):
        for name in ("instructions", "saturations", "bytes_read", "bytes_written"):
            assert second.counters[name] == first.counters[name], (name, first, second)


@pytest.mark.parametrize("index", range(len(CORNERS)), ids=[name for name, *_ in CORNERS])
def test_corner_geometries(index):
    _, geometry, length = CORNERS[index]
    model = random_model(100 + index, **geometry)
    assert_equal(pair_of(model, list(TIMINGS)[index % len(TIMINGS)]), tokens_of(model, length, index), 5)


@pytest.mark.parametrize("seed", range(16))
def test_random_geometries(seed):
    geometry, length, timing = random_geometry(seed)
    model = random_model(seed, **geometry)
    assert_equal(pair_of(model, timing), tokens_of(model, length, seed), 4)


@pytest.mark.parametrize(("seed", "dsp"), [
    (20, "dsp48e2"), *(pytest.param(seed, dsp, marks=pytest.mark.slow) for seed, dsp in [
        (21, "dsp48e2"), (22, "dsp48e2"), (20, "mult18x18d"), (21, "mult18x18d"), (22, "mult18x18d")])])
def test_multipliers_of_a_device(seed, dsp):
    geometry, length, timing = random_geometry(seed)
    model = random_model(seed, **geometry)
    assert_equal(pair_of(model, timing, config=dataclasses.replace(CONFIG, dsp=dsp)), tokens_of(model, length, seed), 4)


@pytest.mark.parametrize("kv_format", KV_FORMATS)
def test_a_full_kv_buffer_of_any_size(kv_format):
    """As many heads as it holds, no power of two; tiles of which the last is not full."""
    model = random_model(14, layers=1, heads=7, kv_heads=7, head_dim=12, kinds=["f16"])
    pair = pair_of(model, "half stalled", config=MICRO, kv=KvSizes(format=kv_format))
    assert model.config.kv_heads * model.config.head_dim // MICRO.lanes == MICRO.kvbuf_heads
    assert_equal(pair, tokens_of(model, 18, 14), 3)


@pytest.mark.parametrize("timing", TIMINGS)
def test_memory_timing_changes_no_bit(timing):
    model = random_model(7, kinds=QUANTISED)
    assert_equal(pair_of(model, timing), tokens_of(model, 18, 7), 5)


@pytest.mark.parametrize(("name", "factor"), [
    ("layers.0.attn_norm", 1e5),   # keys and values beyond FP16, scores that leave one token alive
    ("layers.1.mlp_norm", 3e4), ("layers.1.attn_norm", -1e-4), ("layers.0.mlp_norm", 0.0), ("final_norm", 1e30),
    ("final_norm", 0.0),           # all logits equal: the first index wins
])
def test_extreme_values(name, factor):
    model = with_gain(random_model(9, kinds=QUANTISED), name, factor)
    assert_equal(pair_of(model, "default"), tokens_of(model, 10, 9), 4)


def test_generation_computes_only_the_logits_asked_for():
    """Prefill without head, head of a chunk's last row, decode: the path that generates text, up to a full context."""
    model = random_model(12)
    pair, prompt = pair_of(model, "half stalled", context=24), tokens_of(model, 15, 12)
    functional, rtl = pair
    with rtl.device:
        expected, rows = [], []
        for token in functional.generate(prompt, 50, stop=()):
            expected.append(token)
            rows.append(functional.logits())
        for token, row, want in zip(rtl.generate(prompt, 50, stop=()), rows, expected, strict=True):
            assert token == want
            np.testing.assert_array_equal(rtl.logits().view(np.uint32), row.view(np.uint32))
        assert rtl.finish == "context" and rtl.position == 24
        assert [(run.tokens, run.head_rows) for run in rtl.stats[:5]] == [(4, 0), (4, 0), (4, 0), (3, 1), (1, 1)]
        assert_same_state(pair)


def test_a_second_model_on_the_same_device():
    """Nothing of the model before is left in the machine, whatever its sizes were."""
    models = [random_model(seed, **geometry) for seed, geometry in ((31, {"heads": 8, "head_dim": 32}), (32, {}))]
    compiled = [compile_model(model, CONFIG, 32) for model in models]
    size = max(item.map.memory for item in compiled) * CONFIG.port_bits // 8
    with open_device("rtl", CONFIG, size) as device:
        for item in (*compiled, compiled[0]):
            rtl = Accelerator(device, item, watchdog=100_000)
            functional = Accelerator(open_device("functional", CONFIG, size), item)
            prompt = tokens_of(models[0], 9, 3)
            *_, result = compare(functional, rtl, prompt, 3)
            assert result.difference is None, str(result.difference)


def test_a_broken_result_would_be_seen():
    """The comparison itself: one flipped bit of the image on one side shows at the instruction that first uses it."""
    model = random_model(13, kinds=["q8_0"])
    pair = pair_of(model, "ideal")
    functional, rtl = pair
    address, _ = rtl.map.regions["layers.1.down"]
    at = (address + 3) * CONFIG.port_bits // 8
    with rtl.device:
        rtl.device.write_memory(1, at, rtl.device.read_memory(1, at, 1) ^ 1)
        *_, result = compare(functional, rtl, tokens_of(model, 8, 13), 2)
    assert result.difference is not None and result.difference.tensor == "layers.1.down"
