"""ModelConfig, QuantTensor and Model: what they accept, what they refuse, and what a tensor's value is."""

import numpy as np
import pytest
from skipopu.golden.random_model import random_model
from skipopu.host.errors import ModelError
from skipopu.host.model import (
    BASE,
    GROUPS,
    Llama3Scaling,
    Model,
    ModelConfig,
    QuantTensor,
    rope_inv_freq,
    tensor_shapes,
)

GEOMETRY = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp": 96, "vocab": 96,
            "context": 128}


@pytest.mark.parametrize(("change", "message"), [
    ({"layers": 0}, "layers must be a whole number from 1 to 1024, not 0"),
    ({"layers": 1 << 40}, "layers must be a whole number from 1 to 1024"),
    ({"hidden": 64.0}, "hidden must be a whole number .* not 64.0"),
    ({"mlp": True}, "mlp must be a whole number .* not True"),
    ({"vocab": "96"}, "vocab must be a whole number .* not '96'"),
    ({"kv_heads": 3}, "kv_heads must divide the 4 heads, not be 3"),
    ({"head_dim": 15}, "head_dim must be an even number from 8 to 128, not 15"),
    ({"head_dim": 6}, "head_dim must be an even number from 8 to 128, not 6"),
    ({"head_dim": 130}, "head_dim must be an even number from 8 to 128, not 130"),
    ({"rms_eps": 0.0}, "rms_eps must be a positive number, not 0.0"),
    ({"rms_eps": "1e-5"}, "rms_eps must be a positive number, not '1e-5'"),
    ({"rope_theta": float("nan")}, "rope_theta must be a positive number, not nan"),
    ({"bos_id": 96}, "bos_id must be a token from 0 to 95, not 96"),
    ({"eos_ids": (2, -1)}, "eos_ids must be a token from 0 to 95, not -1"),
])
def test_config_refuses(change, message):
    with pytest.raises(ModelError, match=message):
        ModelConfig(**(GEOMETRY | change))


@pytest.mark.parametrize("head_dim", [8, 128])
def test_config_accepts_the_limits_of_head_dim(head_dim):
    config = ModelConfig(**(GEOMETRY | {"head_dim": head_dim}))
    assert (config.q_rows, config.kv_rows) == (4 * head_dim, 2 * head_dim)


def test_values_of_each_kind():
    def row(*start):
        return np.array([[*start] + [0] * (32 - len(start))], np.int8)

    scale, minimum = np.array([[0.5]], np.float16), np.array([[-3]], np.float16)
    q8 = QuantTensor("q8_0", codes=row(-128, 127, 1), scale=scale).dequantise()
    q40 = QuantTensor("q4_0", codes=row(-8, 7, 1), scale=scale).dequantise()
    q41 = QuantTensor("q4_1", codes=row(0, 15, 1), scale=scale, minimum=minimum).dequantise()
    assert q8.dtype == q40.dtype == q41.dtype == np.float32
    assert q8[0, :4].tolist() == [-64, 63.5, 0.5, 0]
    assert q40[0, :4].tolist() == [-4, 3.5, 0.5, 0]
    assert q41[0, :4].tolist() == [-3, 4.5, -2.5, -3]
    assert QuantTensor("f16", values=np.array([1.5], np.float16)).dequantise().dtype == np.float32


def test_each_group_has_its_own_scale():
    codes = np.ones((2, 64), np.int8)
    scale = np.array([[1, 2], [3, 4]], np.float16)
    values = QuantTensor("q4_0", codes=codes, scale=scale).dequantise()
    assert values[:, [0, 31, 32, 63]].tolist() == [[1, 1, 2, 2], [3, 3, 4, 4]]
    assert QuantTensor("q4_0", codes=codes, scale=scale).take_rows(np.array([1])).dequantise()[0, 40] == 4


@pytest.mark.parametrize("kind, columns, scales", [("q4_g64", 160, 3), ("q4_g128", 160, 2), ("q4m_g128", 128, 1)])
def test_larger_groups_have_the_values_of_repeated_scales(kind, columns, scales):
    """The last group of a row may be shorter."""
    rng, group = np.random.default_rng(1), GROUPS[kind]
    codes = rng.integers(*((0, 16) if "m" in kind else (-8, 8)), (3, columns), dtype=np.int8)
    parts = {"scale": rng.standard_normal((3, scales)).astype(np.float16)}
    if "m" in kind:
        parts["minimum"] = rng.standard_normal((3, scales)).astype(np.float16)
    tensor = QuantTensor(kind, codes=codes, **parts)
    of_column = {name: part.astype(np.float32).repeat(group, axis=1)[:, :columns] for name, part in parts.items()}
    values = codes * of_column["scale"] + of_column.get("minimum", np.float32(0))
    assert np.array_equal(tensor.dequantise(), values)
    narrow = tensor.narrowed()
    assert (narrow.kind, narrow.scale.shape) == (BASE[kind], (3, columns // 32))
    assert np.array_equal(narrow.dequantise(), values) and narrow.narrowed() is narrow


CODES, SCALE = np.zeros((2, 64), np.int8), np.ones((2, 2), np.float16)


@pytest.mark.parametrize(("kind", "parts", "message"), [
    ("q5_0", {}, "kind must be one of f32, f16, q8_0, q4_0, q4_1, q4_g64, q4_g128, q4m_g64, q4m_g128, not 'q5_0'"),
    ("q8_0", {"codes": CODES}, "q8_0 tensor has exactly codes, scale: check scale"),
    ("q8_0", {"codes": CODES, "scale": SCALE, "minimum": SCALE}, "exactly codes, scale: check minimum"),
    ("q4_1", {"codes": CODES, "scale": SCALE}, "exactly codes, scale, minimum: check minimum"),
    ("q8_0", {"codes": CODES.astype(np.int16), "scale": SCALE}, "codes must be int8, not int16"),
    ("q8_0", {"codes": CODES, "scale": SCALE.astype(np.float32)}, "scale must be float16, not float32"),
    ("q8_0", {"codes": CODES[:, :48], "scale": SCALE}, r"codes must be \[rows, a multiple of 32\], not \[2, 48\]"),
    ("q8_0", {"codes": CODES, "scale": SCALE[:1]}, r"must be \[2, 2\], not \[1, 2\]"),
    ("q4_0", {"codes": CODES + np.int8(8), "scale": SCALE}, "codes must be -8..7, not 8..8"),
    ("q4_1", {"codes": CODES - np.int8(1), "scale": SCALE, "minimum": SCALE}, "codes must be 0..15, not -1..-1"),
    ("q8_0", {"codes": CODES, "scale": SCALE * np.float16(np.nan)}, "scale holds NaN or infinity .4 of 4"),
    ("q4_1", {"codes": CODES, "scale": SCALE, "minimum": SCALE * np.float16(np.inf)}, "minimum holds NaN or infinity"),
    ("f32", {"values": np.array([1, np.inf], np.float32)}, "f32 values holds NaN or infinity .1 of 2"),
])
def test_tensor_refuses(kind, parts, message):
    with pytest.raises(ModelError, match=message):
        QuantTensor(kind, **parts)


def _with(model, **changes):
    tensors = {name: tensor for name, tensor in (dict(model.tensors) | changes).items() if tensor is not None}
    return Model(config=model.config, tensors=tensors)


def test_model_refuses_wrong_tensors():
    model = random_model(0)
    plain = QuantTensor("f32", values=np.zeros(3, np.float32))
    half = QuantTensor("f16", values=np.ones(64, np.float16))
    for changes, message in [
        ({"layers.1.k": None}, "1 tensors are missing, first 'layers.1.k'"),
        ({"layers.2.k": plain}, "unexpected tensor 'layers.2.k'"),
        ({"final_norm": plain}, r"tensor final_norm: shape must be \[64\], not \[3\]"),
        ({"layers.0.attn_norm": half}, "tensor layers.0.attn_norm: a norm must be f32, not f16"),
    ]:
        with pytest.raises(ModelError, match=message):
            _with(model, **changes)
    with pytest.raises(ModelError, match="rope_inv_freq must be 8 positive float32 numbers"):
        Model(config=model.config, tensors=model.tensors, rope_inv_freq=np.zeros(8, np.float32))


@pytest.mark.parametrize("tied", [True, False])
def test_head_is_the_embedding_only_if_tied(tied):
    model = random_model(3, tied_head=tied)
    assert (model.head is model.tensors["embedding"]) == tied
    assert ("head" in tensor_shapes(model.config)) != tied
    assert model.layer(1)["down"] is model.tensors["layers.1.down"]


def test_rope_frequencies():
    config = ModelConfig(**(GEOMETRY | {"head_dim": 8, "rope_theta": 10000.0}))
    assert np.allclose(rope_inv_freq(config), [1, 0.1, 0.01, 0.001])
    scaling = Llama3Scaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=1000)
    scaled = rope_inv_freq(config, scaling)
    # turns within the original context: 159 and 15.9 (kept), 1.59 (between), 0.159 (fully stretched)
    smooth = (1000 * 0.01 / (2 * np.pi) - 1) / 3
    assert np.allclose(scaled, [1, 0.1, 0.01 * ((1 - smooth) / 8 + smooth), 0.001 / 8])


def test_llama3_scaling_refuses():
    good = {"factor": 8, "low_freq_factor": 1, "high_freq_factor": 4, "original_max_position_embeddings": 8192}
    with pytest.raises(ModelError, match="factor must be a positive number, not None"):
        Llama3Scaling(**(good | {"factor": None}))
    with pytest.raises(ModelError, match="high_freq_factor must be above low_freq_factor 1, not 1"):
        Llama3Scaling(**(good | {"high_freq_factor": 1}))
