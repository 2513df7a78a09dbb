"""Compiled programs on the bit-exact functional machine: near the float reference, same bits however chunked."""

import numpy as np
import pytest
from skipopu.golden.random_model import random_model
from skipopu.golden.reference import ReferenceModel
from skipopu.host.compiler import compile_model
from skipopu.host.devices import open_device
from skipopu.host.errors import DeviceError
from skipopu.host.runtime import Accelerator
from skipopu.hw.config import PRESETS, preset
from skipopu.hw.registers import DebugBuffer, address, debug_address

# Root mean square of a row's error, in units of that of the logits: 13-bit mantissas of keys and values,
# each 2^-13 of the largest of its group, through two layers of steep random attention.
BOUND = 0.01

KINDS = ("q8_0", "q4_0", "q4_1")
CASES = [(kind, {}) for kind in KINDS] + [
    ("q4_0", {"heads": 6, "kv_heads": 2, "vocab": 101}),
    ("q4_1", {"heads": 7, "kv_heads": 1, "head_dim": 32, "layers": 1}),
    ("q8_0", {"heads": 2, "kv_heads": 2, "head_dim": 128}),
    ("q4_1", {"heads": 4, "kv_heads": 4, "head_dim": 8, "hidden": 96, "mlp": 160}),
]


def loaded(model, config, **options):
    compiled = compile_model(model, config, **options)
    return Accelerator(open_device("functional", config, compiled.map.memory * config.port_bits // 8), compiled)


def tokens_of(model, count, seed=0):
    return np.random.default_rng(seed).integers(0, model.config.vocab, count).tolist()


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "ulx3s"])  # which holds small models only
@pytest.mark.parametrize(("kind", "geometry"), CASES, ids=str)
def test_logits_are_near_the_reference(name, kind, geometry):
    config = preset(name)
    model = random_model(11, kinds=(kind,), **geometry)
    tokens = tokens_of(model, min(config.tile_tokens // 2 + 9, 50))
    got = np.concatenate(list(loaded(model, config).evaluate(tokens)))
    want = ReferenceModel(model).forward(tokens).numpy()
    error = np.sqrt(np.square(got - want).mean(axis=1) / np.square(want).mean())
    assert error.max() < BOUND, f"row {error.argmax()} of {len(error)}"


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_chunks_of_any_length_give_the_same_bits(seed):
    model, config = random_model(seed, kinds=KINDS), preset("tiny")
    tokens = tokens_of(model, 37, seed)
    whole = np.concatenate(list(loaded(model, config).evaluate(tokens)))
    accelerator, rows, rng = loaded(model, config), [], np.random.default_rng(seed)
    while accelerator.position < len(tokens):
        count = min(int(rng.integers(1, 5)), len(tokens) - accelerator.position)
        accelerator.run(tokens[accelerator.position : accelerator.position + count], 0, count)
        rows.append(accelerator.logits())
    np.testing.assert_array_equal(np.concatenate(rows).view(np.uint32), whole.view(np.uint32))


def test_decode_continues_a_prefill_bit_for_bit():
    model, config = random_model(4, kinds=KINDS), preset("sim")
    tokens = tokens_of(model, 70)
    whole = np.concatenate(list(loaded(model, config).evaluate(tokens)))
    accelerator = loaded(model, config)
    assert accelerator.prefill(tokens[:66]) == whole[65].argmax()
    np.testing.assert_array_equal(accelerator.logits(), whole[65:66])
    for index in range(66, 70):
        assert accelerator.step(tokens[index]) == whole[index].argmax()
        np.testing.assert_array_equal(accelerator.logits(), whole[index : index + 1])


def test_what_memory_held_before_does_not_matter():
    model, config = random_model(5, kinds=KINDS), preset("tiny")
    tokens = tokens_of(model, 19)
    first = loaded(model, config)
    compiled = first.compiled
    noisy = open_device("functional", config, first.device.memory_bytes)
    for port in range(config.ports):
        noisy.write_memory(port, 0, np.random.default_rng(port).integers(0, 256, noisy.memory_bytes, dtype=np.uint8))
    second = Accelerator(noisy, compiled)
    for a, b in zip(first.evaluate(tokens), second.evaluate(tokens)):
        np.testing.assert_array_equal(a, b)


def test_another_model_can_follow_on_the_same_device():
    config = preset("tiny")
    models = [random_model(seed, kinds=KINDS) for seed in (6, 7)]
    compiled = [compile_model(model, config) for model in models]
    size = max(item.map.memory for item in compiled) * config.port_bits // 8
    device = open_device("functional", config, size)
    tokens = tokens_of(models[0], 9)
    fresh = [np.concatenate(list(loaded(model, config).evaluate(tokens))) for model in models]
    for index in (0, 1, 0):
        got = np.concatenate(list(Accelerator(device, compiled[index]).evaluate(tokens)))
        np.testing.assert_array_equal(got, fresh[index])


def test_a_fault_of_the_machine_reaches_the_user():
    accelerator = loaded(random_model(8, kinds=KINDS), preset("tiny"))
    device = accelerator.device
    device.csr_write(address("MEMORY_LIMIT"), accelerator.map.address("logits"))
    with pytest.raises(DeviceError, match=r"MEMORY_RANGE .* \(head, head\): storel .*; reset"):
        accelerator.prefill([1, 2, 3])
    accelerator.reset()
    assert 0 <= accelerator.prefill([1, 2, 3]) < 96


def test_counters_and_debug_view():
    model = random_model(9, kinds=("q4_1",))
    accelerator = loaded(model, preset("tiny"))
    accelerator.prefill([3])
    regions = accelerator.map.regions
    weights = sum(size for name, (_, size) in regions.items() if name.split(".")[-1] in
                  ("q", "k", "v", "o", "gate_up", "down", "head"))
    read = accelerator.stats[-1].counters["bytes_read"]
    assert weights * accelerator.config.superbeat_bytes < read < 2 * weights * accelerator.config.superbeat_bytes
    device = accelerator.device
    device.csr_write(address("DEBUG_ADDRESS"), debug_address(DebugBuffer.ABUF, 0, 1))
    word = np.uint32(device.csr_read(address("DEBUG_DATA"))).view(np.float32)
    assert word == device.machine.abuf[0, 1] != 0
    device.csr_write(address("DEBUG_ADDRESS"), debug_address(DebugBuffer.ABUF, accelerator.config.abuf_rows, 0))
    with pytest.raises(DeviceError, match="4096"):
        device.csr_read(address("DEBUG_DATA"))
