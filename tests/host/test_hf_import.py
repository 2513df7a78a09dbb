"""Hugging Face folders: shards, dtypes, row order, and one clear line for each way to be wrong."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from skipopu.golden.random_model import random_model
from skipopu.host.errors import ModelError
from skipopu.host.hf_import import interleave_rows, load_hf
from skipopu.host.load import load_model

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "head_dim": 16,
          "num_key_value_heads": 2, "intermediate_size": 96, "vocab_size": 96, "max_position_embeddings": 128,
          "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "tie_word_embeddings": True, "bos_token_id": 1,
          "eos_token_id": [2, 3]}
NAMES = {"attn_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj",
         "o": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj",
         "down": "mlp.down_proj"}
MODEL = random_model(1, kinds=["f32"])  # tied, and of the geometry in CONFIG
UP = "model.layers.1.mlp.up_proj.weight"


def hf_tensors():
    """MODEL's weights under Hugging Face's names and in its row order."""
    tensors = {"model.embed_tokens.weight": MODEL.tensors["embedding"],
               "model.norm.weight": MODEL.tensors["final_norm"]}
    for index in range(2):
        for ours, theirs in NAMES.items():
            tensors[f"model.layers.{index}.{theirs}.weight"] = MODEL.layer(index)[ours]
    plain = {name: torch.tensor(tensor.dequantise()) for name, tensor in tensors.items()}
    for name in plain:
        if "q_proj" in name or "k_proj" in name:
            plain[name] = plain[name].unflatten(0, (-1, 8, 2)).transpose(1, 2).flatten(0, 2).contiguous()
    return plain


def write_folder(folder, *, config=None, tensors=None, index=None, files=None):
    """A folder with CONFIG and MODEL, changed; a config or tensor given as None is left out."""
    merged = CONFIG | (config or {})
    folder.joinpath("config.json").write_text(json.dumps({key: value for key, value in merged.items() if value != ...}))
    merged = hf_tensors() | (tensors or {})
    merged = {name: tensor for name, tensor in merged.items() if tensor is not None}
    for file, pick in (files or {"model.safetensors": lambda name: True}).items():
        save_file({name: tensor for name, tensor in merged.items() if pick(name)}, folder / file)
    if index is not None:
        folder.joinpath("model.safetensors.index.json").write_text(json.dumps(index))


def test_plain_weights_come_back_exactly(tmp_path):
    write_folder(tmp_path)
    model = load_hf(tmp_path, linear="f32", embedding="f32")
    for name, tensor in MODEL.tensors.items():
        assert np.array_equal(model.tensors[name].dequantise(), tensor.dequantise()), name
    assert (model.config.bos_id, model.config.eos_ids, model.config.tied_head) == (1, (2, 3), True)
    assert (model.config.head_dim, model.config.kv_heads, model.config.context) == (16, 2, 128)


def test_default_kinds_and_their_error(tmp_path):
    write_folder(tmp_path)
    model = load_hf(tmp_path)
    kinds = {name.rpartition(".")[2]: tensor.kind for name, tensor in model.tensors.items()}
    assert kinds == {"embedding": "q8_0", "attn_norm": "f32", "mlp_norm": "f32", "final_norm": "f32",
                     **dict.fromkeys(["q", "k", "v", "o", "gate", "up", "down"], "q4_1")}
    for name, limit in ("layers.0.q", 0.1), ("layers.1.down", 0.1), ("embedding", 0.01):
        exact, got = MODEL.tensors[name].dequantise(), model.tensors[name].dequantise()
        assert 0 < np.std(got - exact) / np.std(exact) < limit, name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_short_floats_widen(tmp_path, dtype):
    tensors = {name: tensor.to(dtype) for name, tensor in hf_tensors().items()}
    write_folder(tmp_path, tensors=tensors)
    got = load_hf(tmp_path, linear="f32").tensors["layers.1.up"].dequantise()
    assert np.array_equal(got, tensors[UP].float().numpy())


def test_shards_are_joined_and_change_the_identity(tmp_path):
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    single.mkdir()
    sharded.mkdir()
    write_folder(single)
    where = {name: f"model-{1 + ('layers.1' in name)}.safetensors" for name in hf_tensors()}
    write_folder(sharded, index={"weight_map": where}, files={
        "model-1.safetensors": lambda name: "layers.1" not in name,
        "model-2.safetensors": lambda name: "layers.1" in name})
    first, second = load_model(single), load_model(sharded)
    for name, tensor in first.tensors.items():
        assert np.array_equal(tensor.dequantise(), second.tensors[name].dequantise()), name
    assert len(first.identity) == 64
    assert len({first.identity, second.identity, load_hf(single, linear="q4_0").identity}) == 3


def test_interleaving_rows():
    assert interleave_rows(2, 8).tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_rope_parameters_of_both_generations(tmp_path):
    llama3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    write_folder(tmp_path, config={"rope_theta": 500.0, "rope_scaling": llama3 | {"type": "llama3"}})
    old = load_hf(tmp_path).rope_inv_freq
    write_folder(tmp_path, config={"rope_theta": ..., "rope_parameters": llama3 | {"rope_type": "llama3",
                                                                                   "rope_theta": 500.0}})
    assert np.array_equal(load_hf(tmp_path).rope_inv_freq, old)
    assert old[-1] == pytest.approx(500.0 ** (-14 / 16) / 8)


@pytest.mark.parametrize(("change", "message"), [
    ({"config": {"model_type": "gpt2"}}, "model_type 'gpt2' is not supported; supported: llama"),
    ({"config": {"hidden_size": ...}}, "hidden_size must be a whole number of at least 1, not None"),
    ({"config": {"hidden_size": "64"}}, "hidden_size must be a whole number of at least 1, not '64'"),
    ({"config": {"num_hidden_layers": 10**9}}, "layers must be a whole number from 1 to 1024, not 1000000000"),
    ({"config": {"num_attention_heads": 0}}, "num_attention_heads must be a whole number of at least 1, not 0"),
    ({"config": {"head_dim": 15}}, "head_dim must be an even number from 8 to 128, not 15"),
    ({"config": {"head_dim": 160}}, "head_dim must be an even number from 8 to 128, not 160"),
    ({"config": {"rms_norm_eps": None}}, "rms_eps must be a positive number, not None"),
    ({"config": {"hidden_act": "gelu"}}, "hidden_act must be 'silu', not 'gelu'"),
    ({"config": {"attention_bias": True}}, "attention_bias must be False, not 'True'"),
    ({"config": {"quantization_config": {"quant_method": "awq"}}}, "quantization_config must be None, not .*awq"),
    ({"config": {"rope_scaling": {"rope_type": "yarn"}}}, "'yarn' is not supported; supported: default, llama3"),
    ({"config": {"rope_scaling": {"rope_type": "llama3"}}}, "factor must be a positive number, not None"),
    ({"config": {"rope_parameters": {"partial_rotary_factor": 0.5}}}, "partial_rotary_factor must be 1.0, not 0.5"),
    ({"config": {"rope_scaling": 8}}, "the rope parameters must be an object, not 8"),
    ({"config": {"eos_token_id": 96}}, "eos_ids must be a token from 0 to 95, not 96"),
    ({"tensors": {UP: None}}, "1 tensors are missing, first 'layers.1.up'"),
    ({"tensors": {UP: torch.zeros(96, 32)}}, r"up_proj.weight: shape must be \[96, 64\], not \[96, 32\]"),
    ({"tensors": {UP: torch.zeros(96, 64, dtype=torch.int8)}}, "type I8 is not supported; supported are F32, F16"),
    ({"tensors": {UP: torch.full((96, 64), torch.nan)}}, "up_proj.weight: weights must be finite and at most 65504"),
    ({"tensors": {"model.norm.weight": torch.full((64,), torch.inf)}}, "model.norm.weight: f32 values holds NaN"),
    ({"tensors": {"model.layers.0.mlp.up_proj.bias": torch.zeros(96)}}, "up_proj.bias is not part of a plain Llama"),
    ({"index": {"weight_map": {"x": "../outside.safetensors"}}}, "in the same folder, not '../outside.safetensors'"),
    ({"index": {"weight_map": {"x": "/etc/x.safetensors"}}}, "files in the same folder, not '/etc/x.safetensors'"),
    ({"index": {"weight_map": {"x": "..\\x.safetensors"}}}, "files in the same folder"),
    ({"index": {"weight_map": {"x": 3}}}, "files in the same folder, not 3"),
    ({"index": {"weight_map": []}}, "weight_map must map tensor names to files"),
    ({"index": {"weight_map": {"x": "absent.safetensors"}}}, "absent.safetensors: not a readable safetensors file"),
])
def test_unusable_folders_are_refused(tmp_path, change, message):
    write_folder(tmp_path, **change)
    with pytest.raises(ModelError, match=message) as caught:
        load_hf(tmp_path)
    assert str(caught.value).startswith(str(tmp_path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("file", "content", "message"), [
    ("config.json", b"{", "config.json: not readable as JSON"),
    ("config.json", b"\xff\xfe", "config.json: not readable as JSON"),
    ("config.json", b"[" * 100_000, "config.json: not readable as JSON"),
    ("config.json", b"[1]", "config.json: must hold a JSON object, not list"),
    ("config.json", b"{}", "config.json is missing or empty"),
    ("model.safetensors", b"", "not a readable safetensors file"),
    ("model.safetensors", b"\xff" * 64, "not a readable safetensors file"),
    ("generation_config.json", b"3", "generation_config.json: must hold a JSON object, not int"),
    ("tokenizer.json", b"{}", "tokenizer.json: not a usable tokenizer"),
])
def test_damaged_files_are_refused(tmp_path, file, content, message):
    write_folder(tmp_path)
    tmp_path.joinpath(file).write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        load_hf(tmp_path)
    assert "\n" not in str(caught.value)


def test_truncated_weights_are_refused(tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "model.safetensors"
    content = path.read_bytes()
    for size in 4, 100, len(content) // 2, len(content) - 1:
        path.write_bytes(content[:size])
        with pytest.raises(ModelError, match="not a readable safetensors file"):
            load_hf(tmp_path)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(ModelError, match="config.json is missing or empty"):
        load_hf(tmp_path)
    write_folder(tmp_path, files={"other.safetensors": lambda name: True})
    with pytest.raises(ModelError, match="model.safetensors: not a readable safetensors file"):
        load_hf(tmp_path)
