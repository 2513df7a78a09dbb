"""The number formats in rational arithmetic, word for word from `docs/numerics.md`: slow, and hard to get wrong."""

from fractions import Fraction

import numpy as np

__all__ = ["block_by_text", "exact", "rounded", "significand"]

LARGEST = (2 - Fraction(1, 2**23)) * 2**127


def exact(value):
    """The number that FP32 bits mean: exponent field 0 is zero, 255 an ordinary exponent."""
    bits = int(np.float32(value).view(np.uint32)) if not isinstance(value, int) else value
    field, magnitude = bits >> 23 & 255, Fraction(bits & 0x7FFFFF | 0x800000)
    return Fraction(0) if field == 0 else (-1 if bits >> 31 else 1) * magnitude * Fraction(2) ** (field - 150)


def rounded(value):
    """Nearest 24-bit number, ties to even; flushed below 2^-126 before rounding; clamped. A Fraction."""
    magnitude = abs(value)
    if magnitude < Fraction(1, 2**126):
        return Fraction(0)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= Fraction(2) ** exponent > magnitude
    unit = Fraction(2) ** (exponent - 23)
    result = min(round(magnitude / unit) * unit, LARGEST)  # round() of a Fraction goes to even
    return result if value > 0 else -result


def block_by_text(values, bits=16):
    """e, mantissas of a block of Fractions, word for word from the text; 15 bits for queries and probabilities."""
    magnitudes = [abs(v) for v in values]
    if not any(magnitudes):
        return -127, [0] * len(values)
    top = max(magnitudes)
    e = top.numerator.bit_length() - top.denominator.bit_length()
    e -= Fraction(2) ** e > top
    places, limit = {16: (14, 32767), 15: (13, 16383)}[bits]
    m = [min((v * Fraction(2) ** (places - e) + Fraction(1, 2)).__floor__(), limit) for v in magnitudes]
    return e, [-k if v < 0 else k for k, v in zip(m, values)]


def significand(half):
    """(signed significand, exponent field at least 1) of a float16."""
    bits = int(np.float16(half).view(np.uint16))
    field = bits >> 10 & 31
    magnitude = bits & 1023 | (1024 if field else 0)
    return -magnitude if bits >> 15 else magnitude, max(field, 1)
