"""How far dot products of FP16 numbers are from exact: ours, and those of conventional FP16 units.

Both vectors are normal (mean 0, variance 1), rounded to FP16; exact is their dot product in float64. An error's size is
taken relative to the results' size: mean |result - exact| / mean |exact|. The mean of the single ratios is no stable
number, since results near zero are as frequent as others (the mean of 1 / |exact| diverges); its median is.
"""

from dataclasses import dataclass

import numpy as np
from skipopu.golden.arithmetic import align, align_kv, from_int
from skipopu.hw.formats import ATTENTION_BITS, KV_BITS, KV_FRACTION

from .baseline import HalfAdd, HalfDot, HalfMul

__all__ = ["DotError", "dot_errors"]

_BATCH = 10_000


@dataclass(frozen=True)
class DotError:
    """Errors as fractions (0.01 is one percent)."""

    mean_relative: float  #: mean |error| / mean |exact|
    rms: float  #: root mean square of the error / of exact
    median_ratio: float  #: median of |error| / |exact|
    mean_ratio: float  #: mean of |error| / |exact|; varies by tens of percent between seeds


def dot_errors(*, terms=64, block=32, trials=100_000, seed=1):
    """DotError by name: ``ours``; ``tree`` and ``cascade`` of FP16 adders behind FP16 multipliers.

    terms : elements of a dot product, a power of two; block : elements that share an exponent, a divisor of terms
    """
    generator = np.random.default_rng(seed)
    exact, results = [], {"ours": [], "tree": [], "cascade": []}
    for _ in range(-(-trials // _BATCH)):
        q, k = generator.standard_normal((2, _BATCH, terms)).astype(np.float16)
        exact.append((q.astype(np.float64) * k.astype(np.float64)).sum(-1))
        results["ours"].append(_ours(q, k, block))
        bits = q.view(np.uint16), k.view(np.uint16)
        results["tree"].append(HalfDot.model(*bits).view(np.float16))
        results["cascade"].append(_cascade(*bits).view(np.float16))
    exact = np.concatenate(exact)[:trials]
    return {name: _compare(np.concatenate(found)[:trials].astype(np.float64), exact)
            for name, found in results.items()}


def _ours(q, k, block):
    """Query and key as the overlay multiplies them: docs/numerics.md."""
    mantissa, exponent, _ = align(q.astype(np.float64), block, ATTENTION_BITS)
    key, key_exponent = align_kv(k.view(np.uint16))
    largest = exponent.max(-1).astype(np.int64)
    dots = (mantissa.astype(np.int64) * key.reshape(mantissa.shape)).sum(-1) << KV_FRACTION
    total = (dots >> np.minimum(largest[:, None] - exponent, 63)).sum(-1)
    return from_int(total, largest + key_exponent - (ATTENTION_BITS - 2 + KV_BITS + 13 + KV_FRACTION))


def _cascade(q, k):
    products = HalfMul.model(q, k)
    total = products[:, 0]
    for term in products.T[1:]:
        total = HalfAdd.model(total, term)
    return total


def _compare(found, exact):
    found, exact = found[exact != 0], exact[exact != 0]
    error, size = np.abs(found - exact), np.abs(exact)
    return DotError(*map(float, (error.mean() / size.mean(), np.sqrt((error**2).mean() / (size**2).mean()),
                                 np.median(error / size), (error / size).mean())))
