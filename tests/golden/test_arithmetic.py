"""The golden arithmetic against exact rational arithmetic and against float64, as `docs/numerics.md` words it."""

from fractions import Fraction

import numpy as np
import pytest
from exact import block_by_text, exact, rounded
from skipopu.golden import arithmetic, functions
from skipopu.golden.arithmetic import LARGEST, LOWEST, add, align, align_kv, from_int, half_parts, mul, scale2, to_half

CORNERS = np.array([
    0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x00800000, 0x80800000, 0x00800001, 0x00FFFFFF, 0x01000000,
    0x7F7FFFFF, 0xFF7FFFFF, 0x7F7FFFFE, 0x7F000000, 0x7F800000, 0x7FFFFFFF, 0xFFC00000, 0x3F800000, 0xBF800000,
    0x3F800001, 0x3F7FFFFF, 0x3FFFFFFF, 0x33800000, 0x33800001, 0x337FFFFF, 0xB3800000, 0x33000000, 0x3FC00000,
    0x1FB504F3, 0x20000000, 0x1FFFFFFF, 0x5F800000, 0x5F3504F3, 0x4B800000, 0xCB800001,
], np.uint32).view(np.float32)


def random_bits(rng, count, low=0, high=256):
    fields = rng.integers(low, high, count, dtype=np.uint32) << np.uint32(23)
    return fields | rng.integers(0, 1 << 23, count, dtype=np.uint32) | rng.integers(0, 2, count, dtype=np.uint32) << 31


def pairs(seed):
    rng = np.random.default_rng(seed)
    a, b = (part.ravel().view(np.uint32) for part in np.meshgrid(CORNERS, CORNERS))
    near = random_bits(rng, 500, 100, 103)
    sets = [(a, b), (random_bits(rng, 500), random_bits(rng, 500)), (near, random_bits(rng, 500, 74, 104)),
            (near, near ^ np.uint32(0x80000000) ^ rng.integers(0, 8, 500, dtype=np.uint32)),
            (random_bits(rng, 500, 30, 100), random_bits(rng, 500, 20, 100)),
            (random_bits(rng, 300, 0, 4), random_bits(rng, 300, 0, 30))]
    return [np.concatenate(part) for part in zip(*sets)]


def check(got, want, *operands):
    """FP32 in float64 against Fractions; zeros are +0."""
    assert got.dtype == np.float64
    for index, (g, w) in enumerate(zip(got.ravel().tolist(), want)):
        assert Fraction(g) == w, f"{index}: {[np.ravel(item)[index] for item in operands]}: got {g}, want {float(w)}"
    assert not np.signbit(got[got == 0]).any()
    np.testing.assert_array_equal(got.astype(np.float32).astype(np.float64), got)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("operation", [mul, add])
def test_fp32_operations_round_the_exact_result(operation, seed):
    a, b = pairs(seed)
    wide = [arithmetic.widen(part.view(np.float32)) for part in (a, b)]
    values = [[exact(int(bits)) for bits in part] for part in (a, b)]
    want = [rounded(x * y if operation is mul else x + y) for x, y in zip(*values)]
    check(operation(*wide), want, *wide)


def test_widen_reads_every_exponent():
    rng = np.random.default_rng(3)
    bits = np.concatenate((CORNERS.view(np.uint32), random_bits(rng, 500), random_bits(rng, 50, 255),
                           random_bits(rng, 50, 0, 1)))
    assert [Fraction(x) for x in arithmetic.widen(bits.view(np.float32))] == [exact(int(item)) for item in bits]


def test_scale2_moves_the_exponent():
    x = np.array([1.5, -1.5, 1.0, LARGEST, 2.0**-126, -(2.0**-126), 0.0, 3.0, 1.0, -1.0])
    n = np.array([3, -126, -127, 1, -1, 0, 200, 127, 128, 300])
    check(scale2(x, n), [rounded(Fraction(v) * Fraction(2) ** int(k)) for v, k in zip(x, n)], x, n)


def test_from_int_rounds_once():
    rng = np.random.default_rng(4)
    ties = [((1 << 24) + odd << k) + (1 << (k - 1)) + low for k in (1, 2, 10, 28, 38) for odd in (0, 1)
            for low in (-1, 0, 1)]
    values = [0, 1, -1, (1 << 47) - 1, -(1 << 47), (1 << 63) - 1, (1 << 53) + 1, (1 << 62) + (1 << 38) + 1, *ties,
              *(-item for item in ties),
              *(int(rng.integers(-1 << 62, 1 << 62)) >> int(s) for s in rng.integers(0, 60, 500))]
    exponents = rng.integers(-200, 120, len(values))
    array = np.array(values, np.int64)
    for n in (np.zeros(len(values), np.int64), exponents):
        check(from_int(array, n), [rounded(v * Fraction(2) ** int(k)) for v, k in zip(values, n)], array, n)


@pytest.mark.parametrize("bits", [16, 15])
@pytest.mark.parametrize("block", [8, 32])
def test_align_follows_the_text(block, bits):
    rng = np.random.default_rng(block)
    rows = random_bits(rng, 40 * block, 100, 140).reshape(40, block).view(np.float32).astype(np.float64)
    rows[0] = 0
    rows[1], rows[1, 3] = 0, -1.0
    rows[2] = 2.0 - 2.0**-23  # rounds up to the next power of two: saturates
    rows[3, 1], rows[3, 0] = 2.0**-126, LARGEST
    rows[4], rows[4, 5] = 0, LOWEST
    rows[5], rows[5, 0], rows[5, 1] = 0, 1.0, 2.0 ** (1 - bits)  # exactly one half: rounds up
    rows[6], rows[6, 0], rows[6, 1] = 0, 1.0, -(2.0 ** (1 - bits))
    mantissa, exponent, total = align(rows.reshape(20, 2 * block), block, *([] if bits == 16 else [bits]))
    assert mantissa.shape == (20, 2, block) and exponent.shape == total.shape == (20, 2)
    for index, row in enumerate(rows):
        e, m = block_by_text([Fraction(v) for v in row], bits)
        at = divmod(index, 2)
        assert (exponent[at], mantissa[at].tolist(), total[at]) == (e, m, sum(m)), f"block {index}"


def test_to_half_rounds_saturates_and_counts():
    table = [(0.0, 0, 0), (1.0, 0x3C00, 0), (1 + 2.0**-11, 0x3C00, 0), (1 + 3 * 2.0**-11, 0x3C02, 0),
             (1 + 2.0**-11 + 2.0**-23, 0x3C01, 0), (65504.0, 0x7BFF, 0), (65519.0, 0x7BFF, 0), (65520.0, 0x7BFF, 1),
             (-1e30, 0xFBFF, 1), (2.0**-24, 1, 0), (2.0**-25, 0, 0), (3 * 2.0**-25, 2, 0), (2.0**-14, 0x0400, 0),
             (-(2.0**-14) + 2.0**-26, 0x8400, 0), (LARGEST, 0x7BFF, 1)]
    for value, bits, clipped in table:
        got, count = to_half(np.array([value]))
        assert (int(got[0]), count) == (bits, clipped), value
    assert to_half(np.array([1e5, -1e5, 1.0]))[1] == 2


def test_half_parts_of_all_bits():
    bits = np.arange(1 << 16, dtype=np.uint16)
    significand, field = half_parts(bits)
    value = np.ldexp(significand.astype(float), field - 25)
    ordinary = (bits >> 10 & 31) < 31
    np.testing.assert_array_equal(value[ordinary], bits.view(np.float16)[ordinary])
    assert value[0x7C00] == 65536 and field.min() == 1 and field.max() == 31


def test_align_kv_follows_the_text():
    rng = np.random.default_rng(7)
    bits = rng.integers(0, 1 << 16, (60, 16)).astype(np.uint16)
    bits[0], bits[1], bits[2] = 0, 0x8001, 0x3C00
    bits[3] = np.arange(16) << 11  # every distance of exponents
    bits[4], bits[4, 0] = 0x03FF, 0x7BFF
    mantissa, exponent = align_kv(bits)
    for row, m, es in zip(bits.tolist(), mantissa.tolist(), exponent.tolist()):
        fields = [max(b >> 10 & 31, 1) for b in row]
        assert es == max(fields)
        want = []
        for b, field in zip(row, fields):
            significand = b & 1023 | (1024 if b >> 10 & 31 else 0)
            k = (Fraction(2 * significand, 2 ** (es - field)) + Fraction(1, 2)).__floor__()
            want.append(-k if b >> 15 else k)
        assert m == want
    assert abs(mantissa).max() <= 4094


HALVES = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
HALVES = HALVES[np.isfinite(HALVES)].astype(np.float64)


@pytest.mark.parametrize("name, keep, truth, bound", [
    ("exp2", lambda x: np.abs(x) < 126, np.exp2, 23.2),
    ("recip", lambda x: x != 0, lambda x: 1 / x, 23.5),
    ("rsqrt", lambda x: x > 0, lambda x: x**-0.5, 23.9),
    ("sigm", lambda x: x < 126, lambda x: 1 / (1 + np.exp2(x)), 22.1),
])
def test_functions_over_all_fp16_arguments(name, keep, truth, bound):
    """The bound is what the docstring of the module promises, in bits; half a bit better would make it wrong."""
    x = HALVES[keep(HALVES)]
    want = truth(x)
    error = np.abs(getattr(functions, name)(x) - want) / want if name != "recip" else np.abs(functions.recip(x) * x - 1)
    worst = -np.log2(error.max())
    assert bound <= worst < bound + 0.5, f"{worst} at {x[error.argmax()]}"


@pytest.mark.parametrize("name, x, want", [
    ("exp2", 0.0, 1.0), ("exp2", 127.0, 2.0**127), ("exp2", 128.0, LARGEST), ("exp2", 255.99, LARGEST),
    ("exp2", 256.0, LARGEST), ("exp2", LARGEST, LARGEST), ("exp2", -126.0, 2.0**-126), ("exp2", -126.5, 0.0),
    ("exp2", -256.0, 0.0), ("exp2", -257.0, 0.0), ("exp2", LOWEST, 0.0), ("exp2", -(2.0**-60), 1.0),
    ("recip", 0.0, LARGEST), ("recip", 1.0, 1.0), ("recip", -4.0, -0.25), ("recip", LARGEST, 0.0),
    ("recip", 2.0**-126, 2.0**126), ("recip", 2.0**125, 2.0**-125),
    ("rsqrt", 0.0, LARGEST), ("rsqrt", -1.0, LARGEST), ("rsqrt", 1.0, 1.0), ("rsqrt", 4.0, 0.5),
    ("rsqrt", 2.0**-126, 2.0**63), ("rsqrt", 0.25, 2.0),
    ("sigm", LOWEST, 1.0), ("sigm", LARGEST, 0.0), ("sigm", 127.0, 0.0), ("sigm", 125.0, 2.0**-125),
    ("sigm", -126.0, 1.0),
])
def test_corners_of_functions(name, x, want):
    got = getattr(functions, name)(np.array([x]))[0]
    assert got == want or abs(got / want - 1) < 2.0**-23, got
    assert (got == 0) == (want == 0)


@pytest.mark.parametrize("name, low, high, rising", [
    ("exp2", -2.0, 2.0, True), ("recip", 1.0, 2.0, False), ("rsqrt", 1.0, 4.0, False), ("sigm", -4.0, 4.0, False),
])
def test_functions_are_smooth_across_segments(name, low, high, rising):
    """Neighbouring values never step against the slope by more than two units in the last place."""
    y = getattr(functions, name)(np.linspace(low, high, 200_001).astype(np.float32).astype(np.float64))
    steps = np.diff(y) / y[:-1] * (1 if rising else -1)
    assert steps.min() > -(2.0**-21), steps.min()


@pytest.mark.parametrize("table, f", [
    (functions.EXP2, lambda x: 2**x), (functions.RECIP, lambda x: 1 / (1 + x)),
    (functions.RSQRT_EVEN, lambda x: (1 + x) ** -0.5), (functions.RSQRT_ODD, lambda x: (2 + 2 * x) ** -0.5),
])
def test_tables_hold_value_and_derivatives(table, f):
    x, h = (np.arange(128) + 0.5) / 128, 1e-4
    c0, c1, c2 = table
    np.testing.assert_allclose(c0 / 2**30, f(x), rtol=0, atol=2.0**-30)
    np.testing.assert_allclose(c1 / 2**22, (f(x + h) - f(x - h)) / (2 * h), rtol=0, atol=2.0**-23 + 2e-8)
    np.testing.assert_allclose(c2 / 2**14, (f(x + h) - 2 * f(x) + f(x - h)) / (2 * h * h), rtol=0, atol=2.0**-14)
