"""Our own quantiser: exact where it can be, at least as close as the plain method elsewhere."""

import gguf
import numpy as np
import pytest
from skipopu.golden.random_model import random_model
from skipopu.host.errors import ModelError
from skipopu.host.model import BASE, GROUPS
from skipopu.host.quantise import quantise, requantised

GROUP_KINDS = ["q8_0", "q4_0", "q4_1"]


@pytest.mark.parametrize("kind", GROUP_KINDS)
@pytest.mark.parametrize("values", [np.zeros(32), np.full(32, 0.75), np.full(32, -0.75)], ids=["zero", "plus", "minus"])
def test_constant_groups_are_exact(kind, values):
    tensor = quantise(values[None].astype(np.float32), kind)
    tolerance = 0.75 / 127 if kind == "q8_0" else 0  # 0.75 / 127 is not a float16
    assert np.abs(tensor.dequantise() - values).max() <= tolerance


@pytest.mark.parametrize(("kind", "low", "high", "minimum"), [
    ("q8_0", -127, 127, 0), ("q4_0", -8, 7, 0), ("q4_1", 0, 15, -2.5)])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_full_range_on_the_grid_is_exact(kind, low, high, minimum, sign):
    codes = np.resize(np.linspace(low, high, 32).round() if kind == "q8_0" else np.arange(low, high + 1), 32)
    values = (sign * (codes * 0.25 + minimum)).astype(np.float32)[None]
    assert np.array_equal(quantise(values, kind).dequantise(), values)


@pytest.mark.parametrize("kind", GROUP_KINDS)
@pytest.mark.parametrize("seed", [1, 2])
def test_error_is_not_above_the_plain_method(kind, seed):
    values = np.random.default_rng(seed).standard_t(5, (64, 256)).astype(np.float32)
    theirs = gguf.GGMLQuantizationType[kind.upper()]
    plain = gguf.quants.dequantize(gguf.quants.quantize(values, theirs), theirs)
    ours, plain_error = (np.square(got - values).mean() for got in (quantise(values, kind).dequantise(), plain))
    assert ours <= plain_error * (0.95 if kind != "q8_0" else 1.001), (ours, plain_error)


@pytest.mark.parametrize("kind", GROUP_KINDS)
def test_the_largest_values_do_not_overflow(kind):
    values = np.resize(np.array([65504, -65504, 1], np.float32), (1, 32))
    error = np.abs(quantise(values, kind).dequantise() - values).max()
    assert error <= 65504 / (100 if kind == "q8_0" else 7)


@pytest.mark.parametrize("kind", ["q4_g64", "q4_g128", "q4m_g64", "q4m_g128"])
def test_larger_groups_fit_their_own_scale(kind):
    """The fit of each group alone, also of the shorter group at the end of a row; coarser than groups of 32."""
    values = np.random.default_rng(4).standard_t(5, (6, 288)).astype(np.float32)
    tensor, size = quantise(values, kind), GROUPS[kind]
    for first in range(0, 288, size):
        alone = quantise(values[:, first:first + size], kind)
        assert np.array_equal(alone.codes, tensor.codes[:, first:first + size])
        assert np.array_equal(alone.scale[:, 0], tensor.scale[:, first // size])
    fine, coarse = (np.square(item.dequantise() - values).sum() for item in (quantise(values, BASE[kind]), tensor))
    assert fine < coarse < 0.05 * np.square(values).sum()


def test_requantised_models_are_others():
    model = random_model(3, kinds=("f16",))
    found = requantised(model, "q4_g128")
    assert {tensor.kind for tensor in found.tensors.values()} == {"f32", "f16", "q4_g128"}
    assert found.identity != model.identity and requantised(model, "q4_g64").identity != found.identity
    assert found.layer(1)["up"].codes.tolist() == quantise(model.layer(1)["up"].dequantise(), "q4_g128").codes.tolist()
    assert found.head is found.tensors["embedding" if model.config.tied_head else "head"] and found.head.kind == "f16"


def test_more_rows_than_a_chunk_give_the_same_rows():
    values = np.random.default_rng(3).standard_normal((2100, 32)).astype(np.float32)
    whole, tail = quantise(values, "q4_1"), quantise(values[2048:], "q4_1")
    assert np.array_equal(whole.dequantise()[2048:], tail.dequantise())


@pytest.mark.parametrize(("values", "kind", "message"), [
    (np.full((1, 32), np.nan), "q4_1", "finite and at most 65504"),
    (np.full((1, 32), 65600.0), "f16", "finite and at most 65504"),
    (np.zeros((1, 33)), "q8_0", r"multiple of 32\] for q8_0, not \[1, 33\]"),
    (np.zeros(32), "q4_0", r"multiple of 32\] for q4_0, not \[32\]"),
    (np.zeros((1, 32)), "q6_k", "f32, f16, q8_0, q4_0, q4_1, q4_g64, .*, not 'q6_k'"),
])
def test_refuses(values, kind, message):
    with pytest.raises(ModelError, match=message):
        quantise(values, kind)
