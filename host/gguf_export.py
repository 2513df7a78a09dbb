"""Write models as GGUF files, quantised as they are: what `gguf_import` reads, and other tools too.

GGUF has no groups beyond 32: a scale that more weights share is written for every 32 of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np

from .model import GROUP, Model, QuantTensor, rope_inv_freq

__all__ = ["write_gguf"]


def _pack(tensor: QuantTensor) -> tuple[np.ndarray, gguf.GGMLQuantizationType]:
    """A tensor's bytes in its GGUF type: uint8 [rows, bytes], or its plain values."""
    tensor = tensor.narrowed()
    kind = gguf.GGMLQuantizationType[tensor.kind.upper()]
    if tensor.codes is None:
        assert tensor.values is not None
        return tensor.values, kind
    assert tensor.scale is not None
    groups = tensor.codes.reshape(*tensor.scale.shape, GROUP)
    if tensor.kind != "q8_0":
        nibbles = (groups + (8 if tensor.kind == "q4_0" else 0)).astype(np.uint8)
        groups = nibbles[..., :16] | nibbles[..., 16:] << 4
    halves = [part[..., None].view(np.uint8) for part in (tensor.scale, tensor.minimum) if part is not None]
    return np.concatenate([*halves, groups.view(np.uint8)], axis=-1).reshape(len(groups), -1), kind


def write_gguf(model: Model, path: str | Path, metadata: Mapping[str, str | int | bool | list] | None = None) -> None:
    """Write a model as a GGUF file of architecture ``llama``, its tensors as they are.

    metadata : more of it, such as a tokenizer's; lists hold strings or whole numbers
    """
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
    for key, value in (metadata or {}).items():
        {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string, list: writer.add_array}[type(value)](
            key, value)  # type: ignore[operator]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
