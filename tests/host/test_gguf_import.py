"""GGUF files: sound ones come back bit for bit, damaged and foreign ones give one clear line."""

import hashlib
import struct

import gguf
import numpy as np
import pytest
from skipopu.golden.random_model import random_model, write_gguf
from skipopu.host.errors import ModelError
from skipopu.host.gguf_file import GgufFile
from skipopu.host.gguf_import import load_gguf
from skipopu.host.model import Llama3Scaling, Model, rope_inv_freq

PARTS = ("values", "codes", "scale", "minimum")


def assert_same_tensors(got, expected):
    assert got.config == expected.config
    assert got.tensors.keys() == expected.tensors.keys()
    for name, tensor in expected.tensors.items():
        assert got.tensors[name].kind == tensor.kind, name
        for part in PARTS:
            ours, theirs = getattr(got.tensors[name], part), getattr(tensor, part)
            assert (ours is None) == (theirs is None) and (ours is None or np.array_equal(ours, theirs)), (name, part)


@pytest.mark.parametrize(("kind", "seed"), [("q4_0", 0), ("q4_1", 1), ("q8_0", 2), ("f16", 3), ("f32", 4)])
def test_a_written_model_comes_back_bit_for_bit(tmp_path, kind, seed):
    model = random_model(seed, kinds=[kind], bos_id=1, eos_ids=(2, 5))
    write_gguf(model, tmp_path / "m.gguf")
    got = load_gguf(tmp_path / "m.gguf")
    assert_same_tensors(got, model)
    assert got.identity == hashlib.sha256((tmp_path / "m.gguf").read_bytes()).hexdigest()


@pytest.mark.parametrize("kind", ["q4_g128", "q4m_g64"])
def test_larger_groups_are_written_as_groups_of_32(tmp_path, kind):
    model = random_model(5, kinds=[kind], mlp=160)
    write_gguf(model, tmp_path / "m.gguf")
    got = load_gguf(tmp_path / "m.gguf")
    for name, tensor in model.tensors.items():
        assert np.array_equal(got.tensors[name].dequantise(), tensor.dequantise()), name


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0"])
def test_values_equal_those_of_the_gguf_package(tmp_path, kind):
    """The packing here is ours in both directions; the package's own dequantiser is the witness."""
    write_gguf(random_model(7, kinds=[kind], layers=1), tmp_path / "m.gguf")
    got = load_gguf(tmp_path / "m.gguf").tensors["layers.0.down"].dequantise()
    theirs = {entry.name: entry for entry in gguf.GGUFReader(tmp_path / "m.gguf").tensors}["blk.0.ffn_down.weight"]
    assert np.array_equal(got, gguf.quants.dequantize(theirs.data, theirs.tensor_type))


def test_bfloat16_widens(tmp_path):
    values = np.array([[1.0, -2.5, 3.25, 0.0]], np.float32)
    writer = gguf.GGUFWriter(tmp_path / "b.gguf", "llama")
    bfloat16 = gguf.GGMLQuantizationType.BF16
    writer.add_tensor("x", gguf.quants.quantize(values, bfloat16), raw_dtype=bfloat16)
    _finish(writer)
    assert np.array_equal(GgufFile(tmp_path / "b.gguf").tensors["x"].read().dequantise(), values)


def test_llama3_frequencies_come_through_rope_freqs(tmp_path):
    plain = random_model(2)
    scaling = Llama3Scaling(factor=8, low_freq_factor=1, high_freq_factor=4, original_max_position_embeddings=1000)
    model = Model(config=plain.config, tensors=plain.tensors, rope_inv_freq=rope_inv_freq(plain.config, scaling))
    write_gguf(model, tmp_path / "m.gguf")
    got = load_gguf(tmp_path / "m.gguf").rope_inv_freq
    assert np.allclose(got, model.rope_inv_freq, rtol=1e-6)
    assert not np.allclose(got, plain.rope_inv_freq, rtol=1e-2)


def _finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_variant(path, *, architecture="llama", metadata=(), tensors=(), drop=()):
    """A small model's file with replaced, added or dropped entries; metadata values are int, float or str."""
    write_gguf(random_model(1, layers=1, kinds=["q8_0"]), path)
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(path.with_suffix(".new"), architecture)
    values = {key: field.contents() for key, field in reader.fields.items()
              if not key.startswith("GGUF.") and key != "general.architecture"}
    for key, value in (values | dict(metadata)).items():
        if value is not None:
            {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
    kept = {entry.name: (np.array(entry.data), entry.tensor_type) for entry in reader.tensors if entry.name not in drop}
    for name, (data, kind) in (kept | dict(tensors)).items():
        writer.add_tensor(name, data, raw_dtype=kind)
    _finish(writer)
    return path.with_suffix(".new")


F32, Q8_0, Q4_K, I32 = (gguf.GGMLQuantizationType[name] for name in ("F32", "Q8_0", "Q4_K", "I32"))
NAN_SCALE = np.concatenate([np.full((64, 1), np.nan, np.float16).view(np.uint8), np.zeros((64, 32), np.uint8)], axis=1)
KEY_ROWS = "blk.0.attn_k.weight"


@pytest.mark.parametrize(("variant", "message"), [
    ({"architecture": "qwen2"}, "architecture 'qwen2' is not supported; supported: llama$"),
    ({"metadata": {"llama.block_count": None}}, "metadata llama.block_count is missing"),
    ({"metadata": {"llama.block_count": "one"}}, "metadata llama.block_count must be a number, not 'one'"),
    ({"metadata": {"llama.block_count": 2}}, "9 tensors are missing, first 'layers.1.attn_norm'"),
    ({"metadata": {"llama.attention.head_count": 0}}, "head_count must be at least 1, not 0"),
    ({"metadata": {"llama.attention.key_length": 15}}, "value_length must be 15, not 16"),
    ({"metadata": {"llama.rope.dimension_count": 8}}, "rope.dimension_count must be 16, not 8"),
    ({"metadata": {"llama.expert_count": 8}}, "expert_count must be 0, not 8"),
    ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "rope scaling 'yarn' is not supported; supported: none"),
    ({"metadata": {"tokenizer.ggml.model": "t5"}}, "metadata tokenizer.ggml.tokens must be a list of strings"),
    ({"metadata": {"general.name": "x", "tokenizer.ggml.eos_token_id": "x"}}, "eos_ids must be a token .* not 'x'"),
    ({"metadata": {"llama.context_length": 0.5}}, "context must be a whole number from 1 to 2147483647, not 0.5"),
    ({"drop": [KEY_ROWS]}, "1 tensors are missing, first 'layers.0.k'"),
    ({"drop": ["token_embd.weight"]}, "token_embd.weight .* is missing"),
    ({"tensors": {"blk.0.attn_q.bias": (np.zeros(64, np.float32), F32)}}, "attn_q.bias is not part of a plain Llama"),
    ({"tensors": {KEY_ROWS: (np.zeros((16, 64), np.float32), F32)}}, r"layers.0.k: shape must be \[32, 64\], not \["),
    ({"tensors": {KEY_ROWS: (np.zeros((32, 64), np.int32), I32)}}, "type I32 is not supported; supported are F32, F16"),
    ({"tensors": {KEY_ROWS: (np.zeros((32, 144), np.uint8), Q4_K)}}, "type Q4_K is not supported; supported are F32"),
    ({"tensors": {KEY_ROWS: (NAN_SCALE, Q8_0)}}, "attn_k.weight: q8_0 scale holds NaN or infinity .64 of 64"),
    ({"tensors": {"output_norm.weight": (np.full(64, np.inf, np.float32), F32)}}, "output_norm.weight: f32 values"),
    ({"tensors": {"rope_freqs.weight": (np.zeros(8, np.float32), F32)}}, "rope_freqs.weight must be 8 positive"),
])
def test_unusable_models_are_refused(tmp_path, variant, message):
    path = _write_variant(tmp_path / "m.gguf", **variant)
    with pytest.raises(ModelError, match=message) as caught:
        load_gguf(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


HEAD = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k"


def _tensor_entry(dimensions, kind, offset=0):
    return (b"GGUF" + struct.pack("<IQQ", 3, 1, 0) + struct.pack("<Q", 1) + b"t"
            + struct.pack(f"<I{len(dimensions)}QIQ", len(dimensions), *dimensions, kind, offset))


@pytest.mark.parametrize(("content", "message"), [
    (b"", "cannot be read"),
    (b"GG", "the file ends at byte 2, but 4 bytes are due at byte 0"),
    (b"PK\x03\x04" + bytes(60), r"starts with b'GGUF', this one with b'PK\\x03\\x04'"),
    (b"GGUF" + struct.pack("<I", 1) + bytes(60), "GGUF version must be 2 or 3, not 1"),
    (b"GGUF" + struct.pack(">I", 3) + bytes(60), "GGUF version must be 2 or 3, not 50331648"),
    (HEAD + struct.pack("<I", 99), "metadata value of type 99"),
    (HEAD + struct.pack("<IIQ", 9, 9, 1) + bytes(60), "metadata value of type 9"),
    (HEAD + struct.pack("<IIQ", 9, 4, 1 << 60), "4611686018427387904 bytes are due"),
    (HEAD + struct.pack("<IIQ", 9, 8, 1 << 60) + bytes(80), "it is truncated or damaged"),
    (HEAD + struct.pack("<IQ", 8, 1 << 63), "9223372036854775808 bytes are due"),
    (_tensor_entry([], 0), "tensor t: dimensions must be 1 to 4, not 0"),
    (_tensor_entry([32] * 5, 0), "tensor t: dimensions must be 1 to 4, not 5"),
    (_tensor_entry([32], 250), "tensor t: unknown tensor type 250; supported are F32, F16, BF16, Q4_0, Q4_1, Q8_0"),
    (_tensor_entry([33], 8), r"tensor t: Q8_0 needs rows of a multiple of 32 values, not \[33\]"),
    (_tensor_entry([0], 0), r"tensor t: F32 needs rows of a multiple of 1 values, not \[0\]"),
    (_tensor_entry([1 << 40, 1 << 40], 0), "tensor t ends at byte .*, the file at"),
    (_tensor_entry([32], 0, 1 << 62), "tensor t ends at byte .*, the file at"),
])
def test_damaged_files_are_refused(tmp_path, content, message):
    path = tmp_path / "damaged.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        load_gguf(path)
    assert str(caught.value).startswith(str(path))


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(ModelError, match="cannot be read .No such file"):
        load_gguf(tmp_path / "absent.gguf")
    with pytest.raises(ModelError, match="cannot be read"):
        load_gguf(tmp_path)


def test_every_truncation_is_refused(tmp_path):
    write_gguf(random_model(5, layers=1, hidden=32, mlp=32, vocab=32), tmp_path / "m.gguf")
    content = (tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    last = max(entry.data_offset + entry.n_bytes for entry in gguf.GGUFReader(tmp_path / "m.gguf").tensors)
    for size in [*range(200), *range(200, last, 97), last - 1]:
        cut.write_bytes(content[:size])
        with pytest.raises(ModelError):
            load_gguf(cut)


@pytest.mark.parametrize("seed", [1, 2])
def test_random_damage_loads_or_is_refused(tmp_path, seed):
    """Any byte of the header may be wrong: the answer is a model or a ModelError, soon, never another exception."""
    write_gguf(random_model(5, layers=1, hidden=32, mlp=32, vocab=32), tmp_path / "m.gguf")
    content = np.fromfile(tmp_path / "m.gguf", np.uint8)
    header = gguf.GGUFReader(tmp_path / "m.gguf").data_offset
    rng, damaged, refused = np.random.default_rng(seed), tmp_path / "damaged.gguf", 0
    for _ in range(250):
        copy = content.copy()
        copy[rng.integers(0, header, rng.integers(1, 4))] = rng.integers(0, 256)
        copy.tofile(damaged)
        try:
            load_gguf(damaged)
        except ModelError:
            refused += 1
    assert 50 < refused < 250
