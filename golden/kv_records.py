"""How KV records lie in memory, by format (`docs/kv-memory.md`, Formats).

FP16 records are aligned to one exponent per head's key or value when they are read. Narrow ones are aligned when they
are stored: a sign and a magnitude for every element, cut into a high plane of 8 bits and, for B12, a low plane of 4.
"""

from __future__ import annotations

import numpy as np
from skipopu.hw.config import OverlayConfig
from skipopu.hw.isa import KvFormat

from .arithmetic import align_kv, half_parts

__all__ = ["KV_MANTISSA_BITS", "narrow", "pack_records", "unpack_records"]

KV_MANTISSA_BITS = 13  #: with the sign, of what the array multiplies
_BITS = {KvFormat.B12: 12, KvFormat.B8: 8}  #: with the sign, of what is stored


def narrow(bits: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """FP16 bits (uint16) [..., dims] -> int32 (magnitudes [..., dims] of ``width`` bits with a sign, exponents [...]).

    Value = magnitude * 2^(exponent - 13 - width). Halves are rounded up, what is too large becomes the largest.
    """
    significand, field = half_parts(bits)
    top = field.max(-1)
    dropped = np.minimum(top[..., None] - field + 12 - width, 16)  # beyond 12 nothing is left
    magnitude = (2 * np.abs(significand) + (1 << dropped)) >> dropped + 1
    return np.minimum(magnitude, (1 << width - 1) - 1), top


def pack_records(config: OverlayConfig, bits: np.ndarray, record_format: KvFormat) -> np.ndarray:
    """FP16 bits (uint16) [records, 2, heads, dims], keys and values -> uint8 [records, port beats, bytes of a beat]."""
    count, beat = len(bits), config.port_bits // 8
    if record_format == KvFormat.FP16:
        return np.ascontiguousarray(bits).view(np.uint8).reshape(count, -1, beat)
    width = _BITS[record_format]
    magnitude, exponent = narrow(bits, width)
    code = (magnitude << 12 - width) + (bits >> 15).astype(np.int32) * 2048  # 12 bits, the sign in front
    low = (code % 16).reshape(count, -1, 2)
    parts = [exponent.transpose(0, 2, 1), code >> 4]
    if record_format == KvFormat.B12:
        parts.append(low[..., 0] + 16 * low[..., 1])
    whole = []
    for part in parts:
        flat = part.reshape(count, -1).astype(np.uint8)
        whole.append(np.pad(flat, ((0, 0), (0, -flat.shape[1] % beat))))
    return np.concatenate(whole, 1).reshape(count, -1, beat)


def unpack_records(config: OverlayConfig, beats: np.ndarray, record_format: KvFormat, heads: int,
                   head_beats: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [records, port beats, bytes of a beat] -> int32 (13-bit mantissas [records, 2, heads, dims], exponents).

    head_beats : port beats of a head in FP16; beats behind the record are not read
    """
    count, beat, units = len(beats), config.port_bits // 8, heads * head_beats
    flat = beats.reshape(count, -1)
    if record_format == KvFormat.FP16:
        return align_kv(np.ascontiguousarray(flat[:, : 2 * units * beat]).view(np.uint16).reshape(count, 2, heads, -1))
    begin = -(-heads // config.beat_elements) * beat
    end = begin + units * beat
    code = flat[:, begin:end].astype(np.int32) * 16
    if record_format == KvFormat.B12:
        packed = flat[:, end : end + units * beat // 2]
        code += np.stack((packed % 16, packed // 16), -1).reshape(count, -1)
    mantissa = (code % 2048) << KV_MANTISSA_BITS - 12
    exponent = (flat[:, : 2 * heads] % 32).reshape(count, heads, 2).transpose(0, 2, 1).astype(np.int32)
    return np.where(code >= 2048, -mantissa, mantissa).reshape(count, 2, heads, -1), exponent
