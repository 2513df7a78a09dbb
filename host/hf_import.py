"""Make a Model from a Hugging Face folder: ``config.json`` and safetensors, quantised here.

Linear weights become Q4_1 (4 bits, groups of 32 with scale and minimum), embedding and head Q8_0 unless told otherwise.
Rows of Q and K move from Hugging Face's halves (i, i + head_dim / 2) to adjacent pairs (2i, 2i + 1).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from .chat import ChatTemplate
from .errors import ModelError
from .model import (
    Llama3Scaling,
    Model,
    ModelConfig,
    QuantTensor,
    rope_inv_freq,
    tensor_name,
    tensor_shapes,
)
from .quantise import quantise
from .tokenizer import Tokenizer, read_json, token_text

__all__ = ["interleave_rows", "load_hf"]

LAYER_NAMES = {"attn_norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
               "v": "self_attn.v_proj", "o": "self_attn.o_proj", "mlp_norm": "post_attention_layernorm",
               "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
MODEL_TYPES = ("llama",)
DTYPES = ("F32", "F16", "BF16")
# config.json keys that change the arithmetic, with the only value the overlay computes; absent means that value
ONLY = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "partial_rotary_factor": 1.0,
        "quantization_config": None}


def interleave_rows(heads: int, head_dim: int) -> np.ndarray:
    """Row order, int [heads * head_dim], that turns rotate-half Q or K rows into adjacent rotary pairs."""
    within = np.arange(head_dim).reshape(2, head_dim // 2).T.reshape(-1)
    return (np.arange(heads)[:, None] * head_dim + within).reshape(-1)


def load_hf(folder: str | Path, *, linear: str = "q4_1", embedding: str = "q8_0") -> Model:
    """Read and quantise a Hugging Face folder of ``model_type`` llama.

    linear, embedding : kind of QuantTensor for the linear layers, and for embedding and head
    Raises ModelError, one line that begins with the folder, if a file is missing or damaged, or the model needs
    something the overlay does not compute.
    """
    folder = Path(folder)
    try:
        raw = read_json(folder / "config.json")
        if not raw:
            raise ModelError("config.json is missing or empty")
        config, inv_freq = _config(raw, folder)
        files = _weight_files(folder)
        tensors = _tensors(config, files, linear, embedding)
        tokenizer = Tokenizer.from_folder(folder) if (folder / "tokenizer.json").exists() else None
        return Model(config=config, tensors=tensors, rope_inv_freq=inv_freq, tokenizer=tokenizer,
                     chat=_chat(folder) if tokenizer else None, source=str(folder),
                     identity=_identity([folder / "config.json", *files], linear, embedding))
    except ModelError as error:
        raise ModelError(str(error) if str(folder) in str(error) else f"{folder}: {error}") from None


def _config(raw: dict[str, Any], folder: Path) -> tuple[ModelConfig, np.ndarray]:
    if (model_type := raw.get("model_type")) not in MODEL_TYPES:
        raise ModelError(f"config.json: model_type {model_type!r} is not supported; supported: "
                         f"{', '.join(MODEL_TYPES)}")
    for key, only in ONLY.items():
        if raw.get(key, only) != only:
            raise ModelError(f"config.json: {key} must be {only!r}, not {str(raw[key])[:80]!r}")

    def whole(key: str, default: int | None = None) -> int:
        value = raw.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"config.json: {key} must be a whole number of at least 1, not {value!r}")
        return value

    # transformers 5 writes rope_parameters; before, rope_theta stood alone and rope_scaling held the rest
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelError(f"config.json: the rope parameters must be an object, not {rope!r}")
    hidden, heads = whole("hidden_size"), whole("num_attention_heads")
    generation = read_json(folder / "generation_config.json")
    eos = generation.get("eos_token_id", raw.get("eos_token_id"))
    eos_list = eos if isinstance(eos, list) else [] if eos is None else [eos]
    config = ModelConfig(
        layers=whole("num_hidden_layers"), hidden=hidden, heads=heads, kv_heads=whole("num_key_value_heads", heads),
        head_dim=whole("head_dim", hidden // heads), mlp=whole("intermediate_size"), vocab=whole("vocab_size"),
        context=whole("max_position_embeddings", 2048), rms_eps=raw.get("rms_norm_eps", 1e-6),
        rope_theta=rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
        tied_head=raw.get("tie_word_embeddings", False) is True,
        bos_id=raw.get("bos_token_id"), eos_ids=tuple(eos_list),
        name=str(raw.get("_name_or_path") or folder.resolve().name))
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ModelError(f"config.json: partial_rotary_factor must be 1.0, not {rope['partial_rotary_factor']!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return config, rope_inv_freq(config)
    if kind != "llama3":
        raise ModelError(f"config.json: rope scaling {kind!r} is not supported; supported: default, llama3")
    scaling = Llama3Scaling(**{key: rope.get(key) for key in Llama3Scaling.__annotations__})  # type: ignore[arg-type]
    return config, rope_inv_freq(config, scaling)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of the model: those the index lists, or the single one."""
    index = read_json(folder / "model.safetensors.index.json")
    if not index:
        return [folder / "model.safetensors"]
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError("model.safetensors.index.json: weight_map must map tensor names to files")
    for name in weight_map.values():
        # a plain name cannot leave the folder, whatever the folder holds
        if not isinstance(name, str) or not name.endswith(".safetensors") or "/" in name or "\\" in name:
            raise ModelError("model.safetensors.index.json: weight_map must name safetensors files in the same folder, "
                             f"not {name!r}")
    return [folder / name for name in sorted(set(weight_map.values()))]


def _read_tensors(files: list[Path]) -> Iterator[tuple[str, np.ndarray]]:
    for path in files:
        try:
            with safe_open(path, framework="pt") as content:  # numpy has no bfloat16
                for name in content.keys():  # noqa: SIM118 the handle is not a dict
                    if (dtype := content.get_slice(name).get_dtype()) not in DTYPES:
                        raise ModelError(f"{path}: tensor {name}: type {dtype} is not supported; supported are "
                                         f"{', '.join(DTYPES)}")
                    yield name, content.get_tensor(name).float().numpy()
        except (SafetensorError, OSError, ValueError) as error:
            if isinstance(error, ModelError):
                raise
            raise ModelError(f"{path}: not a readable safetensors file ({error})") from None


def _tensors(config: ModelConfig, files: list[Path], linear: str, embedding: str) -> dict[str, QuantTensor]:
    names = {"model.embed_tokens": "embedding", "model.norm": "final_norm", "lm_head": "head"} | {
        f"model.layers.{layer}.{theirs}": tensor_name(layer, ours)
        for layer in range(config.layers) for ours, theirs in LAYER_NAMES.items()}
    shapes = tensor_shapes(config)
    tensors: dict[str, QuantTensor] = {}
    for name, values in _read_tensors(files):
        ours = names.get(name.removesuffix(".weight"))
        if name.endswith("rotary_emb.inv_freq") or ours == "head" and config.tied_head:
            continue
        if ours is None or not name.endswith(".weight"):
            raise ModelError(f"tensor {name} is not part of a plain Llama "
                             "(biases, experts and adapters are not supported)")
        if values.shape != shapes[ours]:
            raise ModelError(f"tensor {name}: shape must be {list(shapes[ours])}, not {list(values.shape)}")
        if ours.endswith((".q", ".k")):
            values = values[interleave_rows(len(values) // config.head_dim, config.head_dim)]
        kind = "f32" if values.ndim == 1 else embedding if ours in ("embedding", "head") else linear
        try:
            tensors[ours] = quantise(values, kind)
        except ModelError as error:
            raise ModelError(f"tensor {name}: {error}") from None
    return tensors


def _chat(folder: Path) -> ChatTemplate | None:
    settings = read_json(folder / "tokenizer_config.json")
    source = settings.get("chat_template")
    if (path := folder / "chat_template.jinja").exists():
        source = path.read_text("utf-8", "replace")
    if not isinstance(source, str):
        return None
    return ChatTemplate(source, bos=token_text(settings, "bos_token"), eos=token_text(settings, "eos_token"))


def _identity(files: list[Path], linear: str, embedding: str) -> str:
    """SHA-256 over the sources and over what was made of them."""
    digest = hashlib.sha256(f"hf {linear} {embedding}".encode())
    for path in files:
        with path.open("rb") as stream:
            digest.update(path.name.encode() + hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
