"""The overlay's number formats, as `docs/numerics.md` words them: FP32, block alignment, FP16.

FP32 values travel as float64 arrays that hold them exactly ("FP32 in float64"): products and sums are formed in float64
and rounded once by `round32`. Rounding through float64 equals rounding the exact result, as 53 >= 2 * 24 + 2.
"""

from __future__ import annotations

import numpy as np

__all__ = ["LARGEST", "LOWEST", "TINY", "add", "align", "align_kv", "from_int", "half_parts", "mul", "round32",
           "scale2", "to_half", "widen", "widen_half"]

LARGEST = (2.0 - 2.0**-23) * 2.0**127  #: largest finite FP32
LOWEST = -LARGEST  #: a masked score
TINY = 2.0**-126  #: smallest magnitude that is not flushed
HALF_LARGEST = 65504.0
HALF_OVERFLOW = 65520.0  #: magnitudes from here round beyond the largest FP16
NO_EXPONENT = -127  #: exponent of an all-zero block


def round32(exact: np.ndarray) -> np.ndarray:
    """Round to FP32, nearest even; below 2^-126 and zero: +0; beyond the largest: the largest. FP32 in float64."""
    kept = np.where(np.abs(exact) < TINY, 0.0, exact)
    np.minimum(kept, LARGEST, out=kept)
    np.maximum(kept, LOWEST, out=kept)
    return kept.astype(np.float32).astype(np.float64)


def mul(a: np.ndarray, b: np.ndarray | np.float64) -> np.ndarray:
    """FP32 product; FP32 in float64."""
    return round32(np.multiply(a, b))


def add(a: np.ndarray, b: np.ndarray | np.float64) -> np.ndarray:
    """FP32 sum; FP32 in float64."""
    return round32(np.add(a, b))


def scale2(x: np.ndarray, n: np.ndarray) -> np.ndarray:
    """x * 2^n: the exponent moves; flushed and clamped as all of FP32. n : integers, |n| below 512."""
    return round32(np.ldexp(x, n))


def from_int(value: np.ndarray, n: np.ndarray | int) -> np.ndarray:
    """value * 2^n rounded to FP32. value : int64 or whole float64; FP32 in float64."""
    if value.dtype == np.int64:
        # Beyond 53 bits the conversion to float64 would round by itself: fold the low bits into one sticky bit.
        wide = np.abs(value) >> 53 != 0
        value = np.where(wide, value >> 10 << 10 | ((value & 1023) != 0).astype(np.int64) << 10, value)
    return round32(np.ldexp(value.astype(np.float64), n))


def widen(stored: np.ndarray) -> np.ndarray:
    """Any FP32 bits as an operand: exponent field 0 is zero, 255 an ordinary exponent. float32 -> FP32 in float64."""
    bits = stored.view(np.uint32)
    field = (bits >> 23 & 255).astype(np.int32)
    magnitude = np.ldexp((bits & 0x7FFFFF | 0x800000).astype(np.float64), field - 150)
    return np.where(field == 0, 0.0, np.where(bits >> 31, -magnitude, magnitude))


def widen_half(bits: np.ndarray) -> np.ndarray:
    """FP16 bits (uint16) as an FP32 operand: exponent field 0 is zero, 31 an ordinary exponent. FP32 in float64."""
    significand, field = half_parts(bits)
    return np.where(bits >> 10 & 31, np.ldexp(significand.astype(np.float64), field - 25), 0.0)


def align(x: np.ndarray, block: int, bits: int = 16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shared exponents: x ~ mantissa * 2^(exponent - bits + 2).

    x : FP32 in float64 [..., blocks * block]; bits : 16, or 15 for queries and probabilities
    Returns mantissas int16 [..., blocks, block], exponents int16 [..., blocks] (-127 for an all-zero block), sums of
    the mantissas int32 [..., blocks]. Magnitudes round half up and saturate at 32767, or 16383.
    """
    x = x.reshape(*x.shape[:-1], -1, block)
    magnitude = np.abs(x)
    top = magnitude.max(-1)
    exponent = np.where(top == 0, NO_EXPONENT, np.frexp(top)[1] - 1)
    magnitude *= np.ldexp(1.0, bits - 2 - exponent)[..., None]
    magnitude += 0.5
    np.floor(magnitude, out=magnitude)
    np.minimum(magnitude, 2.0 ** (bits - 1) - 1, out=magnitude)
    mantissa = np.copysign(magnitude, x).astype(np.int16)
    return mantissa, exponent.astype(np.int16), mantissa.sum(-1, dtype=np.int32)


def to_half(x: np.ndarray) -> tuple[np.ndarray, int]:
    """FP16 bits (uint16), nearest even with subnormals, magnitude clamped at 65504; and how many were clamped."""
    clipped = int(np.count_nonzero(np.abs(x) >= HALF_OVERFLOW))
    return np.clip(x, -HALF_LARGEST, HALF_LARGEST).astype(np.float16).view(np.uint16), clipped


def half_parts(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """FP16 bits (uint16) -> int32 (signed significand, field at least 1): value = significand * 2^(field - 25)."""
    field = (bits >> 10 & 31).astype(np.int32)
    significand = (bits & 1023).astype(np.int32) | (field > 0).astype(np.int32) << 10
    return np.where(bits >> 15, -significand, significand), np.maximum(field, 1)


def align_kv(bits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """One exponent per head: FP16 bits (uint16) [..., dims] -> int32 13-bit mantissas [..., dims], exponents [...]."""
    significand, field = half_parts(bits)
    top = field.max(-1)
    shift = top[..., None] - field
    magnitude = ((np.abs(significand) << 1) + (1 << shift >> 1)) >> shift
    return np.where(significand < 0, -magnitude, magnitude), top
