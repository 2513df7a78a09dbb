"""The overlay's functions: quadratic segments in integers, as `docs/numerics.md` words them.

Arguments and results are FP32 values carried in float64 arrays. Largest relative errors over all finite FP16 arguments
with an ordinary result, measured against float64 by `tests/golden/test_arithmetic.py`: exp2 2^-23.2, recip 2^-23.5,
rsqrt 2^-23.9, sigm 2^-22.1.
"""

from __future__ import annotations

from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal, localcontext

import numpy as np

from .arithmetic import LARGEST, mul, round32

__all__ = ["exp2", "recip", "rsqrt", "sigm"]

SEGMENTS = 128
Table = tuple[np.ndarray, np.ndarray, np.ndarray]


def _table(taylor: Callable[[Decimal], tuple[Decimal, Decimal, Decimal]]) -> Table:
    """Coefficients of all segments from f, f' and f''/2 at their middles; nearest, halves away from zero."""
    rows = []
    with localcontext() as context:
        context.prec = 50
        for i in range(SEGMENTS):
            terms = taylor((2 * i + 1) / Decimal(2 * SEGMENTS))
            rows.append([int((term * 2**scale).to_integral_value(ROUND_HALF_UP))
                         for term, scale in zip(terms, (30, 22, 14))])
    c0, c1, c2 = np.array(rows, np.int64).T
    return c0, c1, c2


def _exponential(x: Decimal) -> tuple[Decimal, Decimal, Decimal]:
    log2 = Decimal(2).ln()
    y = (x * log2).exp()
    return y, y * log2, y * log2 * log2 / 2


def _reciprocal(x: Decimal) -> tuple[Decimal, Decimal, Decimal]:
    y = 1 / (1 + x)
    return y, -y * y, y * y * y


def _root(x: Decimal) -> tuple[Decimal, Decimal, Decimal]:
    y = 1 / (1 + x).sqrt()
    return y, -y / (1 + x) / 2, y / (1 + x) / (1 + x) * 3 / 8


def _half_root(x: Decimal) -> tuple[Decimal, Decimal, Decimal]:
    a, b, c = _root(x)
    root2 = Decimal(2).sqrt()
    return a / root2, b / root2, c / root2


EXP2, RECIP, RSQRT_EVEN, RSQRT_ODD = (_table(f) for f in (_exponential, _reciprocal, _root, _half_root))


def _quad(table: Table, fraction: np.ndarray) -> np.ndarray:
    """The segment's parabola at a 23-bit fraction (int64): 30 fraction bits."""
    c0, c1, c2 = table
    i, d = fraction >> 16, (fraction & 0xFFFF) - 32768
    return c0[i] + (c1[i] * d >> 15) + (c2[i] * (d * d >> 14) >> 16)


def _split(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(fraction 0 .. 2^23 - 1, exponent) of positive x = (1 + fraction * 2^-23) * 2^exponent."""
    mantissa, exponent = np.frexp(x)
    return (np.ldexp(mantissa, 24)).astype(np.int64) - (1 << 23), exponent.astype(np.int64) - 1


def exp2(z: np.ndarray) -> np.ndarray:
    """2^z; z from 256: the largest number, below -256: 0."""
    fixed = np.floor(np.minimum(np.maximum(z, -257.0), 256.0) * 2.0**23).astype(np.int64)
    y = _quad(EXP2, fixed & 0x7FFFFF)
    return round32(np.ldexp(((y + 64) >> 7).astype(np.float64), (fixed >> 23) - 23))


def recip(x: np.ndarray) -> np.ndarray:
    """1 / x; 0: the largest number."""
    zero = x == 0
    fraction, exponent = _split(np.where(zero, 1.0, np.abs(x)))
    s = (_quad(RECIP, fraction) + 32) >> 6
    return np.where(zero, LARGEST, round32(np.copysign(np.ldexp(s.astype(np.float64), -exponent - 24), x)))


def rsqrt(x: np.ndarray) -> np.ndarray:
    """1 / sqrt(x); 0 and below: the largest number."""
    bad = x <= 0
    fraction, exponent = _split(np.where(bad, 1.0, x))
    y = np.where(exponent & 1, _quad(RSQRT_ODD, fraction), _quad(RSQRT_EVEN, fraction))
    return np.where(bad, LARGEST, round32(np.ldexp(((y + 32) >> 6).astype(np.float64), -(exponent >> 1) - 24)))


def sigm(z: np.ndarray) -> np.ndarray:
    """1 / (1 + 2^z)."""
    u = exp2(-np.abs(z))
    fraction = np.minimum(np.floor(u * 2.0**30).astype(np.int64) >> 7, (1 << 23) - 1)
    r = ((_quad(RECIP, fraction) + 32) >> 6) * 2.0**-24
    return np.where(z > 0, mul(u, r), r)
