"""Small random Llamas, made from a seed, to compare the levels on many geometries; and their GGUF files.

Weights are scaled so that every module adds about as much to the residual stream as it carries, attention prefers some
tokens, and logits spread over a few units: errors anywhere show in the output, none is drowned.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import gguf
import numpy as np
from skipopu.host.model import GROUP, Model, ModelConfig, QuantTensor, rope_inv_freq, tensor_shapes
from skipopu.host.quantise import quantise

__all__ = ["random_model", "write_gguf"]

# the standard deviation of a linear layer's outputs for inputs of about one
GAIN = {"q": 1.5, "k": 1.5, "down": 2.0, "head": 2.5}


def random_model(seed: int, *, kinds: Sequence[str] = ("q4_1", "q4_0", "q8_0", "f16"),
                 embedding: str | None = None, **geometry: object) -> Model:
    """A random model; the same seed and arguments give the same model on every machine.

    kinds : kinds of QuantTensor, one drawn for each linear tensor; embedding : kind of embedding and head, or drawn
    geometry : fields of ModelConfig that replace the small defaults
    """
    rng = np.random.default_rng(seed)
    defaults = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp": 96, "vocab": 96,
                "context": 128, "rms_eps": float(np.float32(1e-5)), "tied_head": bool(seed % 2),
                "name": f"random-{seed}"}
    config = ModelConfig(**(defaults | geometry))  # type: ignore[arg-type]
    embedding = embedding or str(rng.choice(kinds))
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        part = name.rpartition(".")[2]
        if part.endswith("norm"):
            tensors[name] = QuantTensor("f32", values=rng.uniform(0.5, 1.5, shape).astype(np.float32))
            continue
        gain = GAIN.get(part, 1.0)
        if part == "embedding":  # rows of length 1 would drown in the layers, unless the head reads them too
            gain = GAIN["head"] if config.tied_head else shape[-1] ** 0.5
        values = rng.standard_normal(shape, np.float32) * np.float32(gain / shape[-1] ** 0.5)
        tensors[name] = quantise(values, embedding if part in ("embedding", "head") else str(rng.choice(kinds)))
    return Model(config=config, tensors=tensors, identity=f"random-{seed}")


def _pack(tensor: QuantTensor) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """A tensor's bytes in its GGUF type: uint8 [rows, bytes], or its plain values."""
    kind = gguf.GGMLQuantizationType[tensor.kind.upper()]
    if tensor.codes is None:
        return tensor.values, kind
    groups = tensor.codes.reshape(*tensor.scale.shape, GROUP)
    if tensor.kind != "q8_0":
        nibbles = (groups + (8 if tensor.kind == "q4_0" else 0)).astype(np.uint8)
        groups = nibbles[..., :16] | nibbles[..., 16:] << 4
    halves = [part[..., None].view(np.uint8) for part in (tensor.scale, tensor.minimum) if part is not None]
    return np.concatenate([*halves, groups.view(np.uint8)], axis=-1).reshape(len(groups), -1), kind


def write_gguf(model: Model, path: str | Path) -> None:
    """Write a model as a GGUF file of architecture ``llama``, without a tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(config.name)
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.mlp)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.rms_eps)
    writer.add_vocab_size(config.vocab)
    if config.bos_id is not None:
        writer.add_bos_token_id(config.bos_id)
    for token, add in zip(config.eos_ids, (writer.add_eos_token_id, writer.add_eot_token_id)):
        add(token)
    parts = {"embedding": "token_embd", "final_norm": "output_norm", "head": "output", "attn_norm": "attn_norm",
             "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output", "mlp_norm": "ffn_norm",
             "gate": "ffn_gate", "up": "ffn_up", "down": "ffn_down"}
    for name, tensor in model.tensors.items():
        prefix, _, part = name.rpartition(".")
        data, kind = _pack(tensor)
        writer.add_tensor(f"{prefix.replace('layers', 'blk')}.{parts[part]}.weight".lstrip("."), data, raw_dtype=kind)
    plain = rope_inv_freq(config)
    if not np.array_equal(plain, model.rope_inv_freq):
        writer.add_tensor("rope_freqs.weight", plain / model.rope_inv_freq)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
