"""Make a Model from a GGUF file of architecture ``llama``, without requantising anything."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np

from .chat import ChatTemplate
from .errors import ModelError
from .gguf_file import GgufFile
from .model import Model, ModelConfig, QuantTensor, rope_inv_freq, tensor_name
from .tokenizer import Tokenizer

__all__ = ["load_gguf"]

LAYER_NAMES = {"attn_norm": "attn_norm", "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
               "mlp_norm": "ffn_norm", "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
ARCHITECTURES = ("llama",)


def load_gguf(path: str | Path) -> Model:
    """Read a GGUF file into a Model; linear weights are F32, F16, BF16, Q4_0, Q4_1 or Q8_0.

    Raises ModelError, one line that begins with the path, if the file is damaged or describes a model that the
    overlay does not compute: another architecture, experts, biases, a scaled RoPE other than ``rope_freqs``.
    """
    file = GgufFile(path)
    try:
        return _build(file)
    except ModelError as error:
        raise ModelError(f"{file.path}: {error}") from None
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:  # a metadata value of an unforeseen type
        raise ModelError(f"{file.path}: metadata is damaged ({type(error).__name__}: {error})") from error


def _build(file: GgufFile) -> Model:
    config = _config(file)
    names = {"token_embd": "embedding", "output_norm": "final_norm", "output": "head"} | {
        f"blk.{layer}.{theirs}": tensor_name(layer, ours)
        for layer in range(config.layers) for ours, theirs in LAYER_NAMES.items()}
    tensors: dict[str, QuantTensor] = {}
    for name, entry in file.tensors.items():
        if name == "rope_freqs.weight":
            continue
        ours = names.get(name.removesuffix(".weight"))
        if ours is None or not name.endswith(".weight"):
            raise ModelError(f"tensor {name} is not part of a plain Llama "
                             "(biases, experts and adapters are not supported)")
        tensor = entry.read()
        if ours.endswith("norm") and tensor.kind == "f16":
            tensor = QuantTensor("f32", values=tensor.dequantise())
        tensors[ours] = tensor
    tokenizer = Tokenizer.from_gguf(file.metadata) if "tokenizer.ggml.model" in file.metadata else None
    template = file.metadata.get("tokenizer.chat_template")
    chat = None
    if isinstance(template, str) and tokenizer is not None:
        chat = ChatTemplate(template, bos=tokenizer.piece(config.bos_id),
                            eos=tokenizer.piece(config.eos_ids[0] if config.eos_ids else None))
    with file.path.open("rb") as stream:
        identity = hashlib.file_digest(stream, "sha256").hexdigest()
    return Model(config=config, tensors=tensors, rope_inv_freq=_inv_freq(file, config), tokenizer=tokenizer, chat=chat,
                 identity=identity, source=str(file.path))


def _number(file: GgufFile, key: str, default: Any = None) -> Any:
    """``llama.<key>``: one number. Raises ModelError if it is neither there nor has a default."""
    value = file.metadata.get(f"llama.{key}", default)
    if value is None:
        raise ModelError(f"metadata llama.{key} is missing")
    if isinstance(value, list):
        if not value or any(item != value[0] for item in value):
            raise ModelError(f"metadata llama.{key} must be the same in all layers, not {value[:4]}")
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ModelError(f"metadata llama.{key} must be a number, not {value!r}")
    return value


def _config(file: GgufFile) -> ModelConfig:
    metadata = file.metadata
    if (architecture := metadata.get("general.architecture")) not in ARCHITECTURES:
        raise ModelError(f"architecture {architecture!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    embedding = file.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ModelError("tensor token_embd.weight [vocabulary, hidden] is missing")
    hidden, heads = _number(file, "embedding_length"), _number(file, "attention.head_count")
    if not isinstance(heads, int) or heads < 1:
        raise ModelError(f"metadata llama.attention.head_count must be at least 1, not {heads!r}")
    head_dim = _number(file, "attention.key_length", hidden // heads)
    context = _number(file, "context_length")
    only = {"attention.value_length": head_dim, "rope.dimension_count": head_dim, "expert_count": 0,
            "attention.sliding_window": 0}
    for key, expected in only.items():
        if (value := _number(file, key, expected)) != expected:
            raise ModelError(f"metadata llama.{key} must be {expected}, not {value}")
    bos, *eos = (metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos", "eot"))
    return ModelConfig(
        layers=_number(file, "block_count"), hidden=hidden, heads=heads,
        kv_heads=_number(file, "attention.head_count_kv", heads), head_dim=head_dim,
        mlp=_number(file, "feed_forward_length"), vocab=embedding.shape[0], context=context,
        rope_theta=_number(file, "rope.freq_base", 10000.0), rms_eps=_number(file, "attention.layer_norm_rms_epsilon"),
        tied_head="output.weight" not in file.tensors, bos_id=bos,
        eos_ids=tuple(token for at, token in enumerate(eos) if token is not None and token not in eos[:at]),
        name=str(metadata.get("general.name") or file.path.stem))


def _inv_freq(file: GgufFile, config: ModelConfig) -> np.ndarray:
    scaling = file.metadata.get("llama.rope.scaling.type", "none")
    if scaling != "none":
        raise ModelError(f"rope scaling {scaling!r} is not supported; supported: none, or llama3 as tensor rope_freqs")
    inv_freq = rope_inv_freq(config)
    if (entry := file.tensors.get("rope_freqs.weight")) is None:
        return inv_freq
    factors = entry.read().dequantise()
    if factors.shape != inv_freq.shape or not (factors > 0).all():
        raise ModelError(f"tensor rope_freqs.weight must be {inv_freq.size} positive numbers, "
                         f"not {list(factors.shape)}")
    return (inv_freq / factors).astype(np.float32)
