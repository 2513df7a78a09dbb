"""FP32 blocks equal their models in every corner, and the models equal float64 arithmetic rounded once."""

import operator

import numpy as np
import pytest
from amaranth.hdl import Module, signed, unsigned
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from lanes import Lanes, check_lanes, spread_floats
from skipopu.hw.blocks.fp import LARGEST, FpAdd, FpMul, FromInt, fields_model, scale2, scale2_model
from skipopu.sim.bench import bench, bench_parameters, run_bench

COUNT = 10_000
CORNERS = np.array([
    0x00000000, 0x80000000, 0x00000001, 0x807FFFFF,  # zero, and subnormals, which are read as zero
    0x00800000, 0x80800000, 0x00800001, 0x00FFFFFF, 0x01000000, 0x80FFFFFF,  # around the smallest normal number
    0x7F7FFFFF, 0xFF7FFFFF, 0x7F7FFFFE, 0x7F000000, 0xFF000000, 0x7F800000, 0x7FFFFFFF, 0xFFC00000,  # the largest
    0x3F800000, 0xBF800000, 0x3F800001, 0x3F7FFFFF, 0x3FFFFFFF, 0xBF800001, 0x40000000, 0x3FC00000, 0x3F000000,
    0x33000000, 0x33800000, 0x34000000, 0xB3000000, 0xB3800000, 0xB4000000, 0x33800001, 0xB37FFFFF,  # 1 +- ulp / 2
    0x32800000, 0x32000000, 0x31800000, 0xB2800000, 0xB2000000, 0xB2FFFFFF, 0x32FFFFFF, 0x4B800000, 0xCB800001,
    0x1FB504F3, 0x20000000, 0x1FFFFFFF, 0x5F800000, 0x5F3504F3, 0xDF7FFFFF, 0x007FFFFF,  # products at the limits
], np.uint32)


def operands(seed, count=COUNT):
    """Pairs of FP32 bits: all pairs of corners, exponents spread, close, 24..27 apart, and near cancellation."""
    generator = np.random.default_rng(seed)
    a, b = (x.ravel() for x in np.meshgrid(CORNERS, CORNERS))
    spread = [spread_floats(generator, count) for _ in range(2)]
    middle = [spread_floats(generator, count, 50, 200) for _ in range(2)]
    close = [spread_floats(generator, count, 100, 104) for _ in range(2)]
    far = spread_floats(generator, count, 100, 101), spread_floats(generator, count, 124, 129)
    left = spread_floats(generator, count, 1, 30)
    cancel = left, (left ^ 0x80000000) + generator.integers(-4, 5, count).astype(np.uint32)
    pairs = [(a, b), spread, middle, close, far, far[::-1], cancel]
    return tuple(np.concatenate(x).astype(np.uint32) for x in zip(*pairs))


def to_float64(bits):
    negative, field, significand = fields_model(bits)
    return np.where(negative, -1.0, 1.0) * np.ldexp(significand.astype(np.float64), field - 150)


def from_float64(value):
    """Round once to float32, flush, clamp; the oracle of the format."""
    with np.errstate(over="ignore"):
        rounded = np.asarray(value, np.float64).astype(np.float32)
    limit = np.array(LARGEST, np.uint32).view(np.float32)
    rounded = np.clip(rounded, -limit, limit)
    return np.where(np.abs(value) < 2.0**-126, np.float32(0), rounded).astype(np.float32).view(np.uint32)


def integers(seed, width, count=COUNT):
    """Signed integers of ``width`` bits, corners first and every length, and exponents for them."""
    generator = np.random.default_rng(seed)
    top = 1 << (width - 1)
    ones = [(1 << k) + d for k in range(width - 1) for d in (-1, 0, 1)]
    ties = [((1 << 24) + odd) << k | 1 << (k - 1) | low
            for k in (1, 2, 20, max(width - 26, 1)) for odd in (0, 1) for low in (0, 1)]
    corners = [x for v in [0, top - 1, *ones, *ties] if v < top for x in (v, -v)] + [-top]
    length = generator.integers(1, width, count)
    values = generator.integers(0, 1 << 63, count) >> (63 - length)
    a = np.concatenate([np.array(corners, np.int64), np.where(generator.random(count) < 0.5, values, -values)])
    n = generator.integers(-512, 512, len(a))
    n = np.where(generator.random(len(a)) < 0.7, generator.integers(-180, 130, len(a)), n)
    return a, n


@bench(seed=[1], timeout_cycles=100_000)
async def multiplies(dut, seed):
    a, b = operands(seed)
    await check_lanes(dut, inputs={"a": a, "b": b}, outputs={"o": FpMul.model(a, b)}, seed=seed)


@bench(seed=[2], timeout_cycles=100_000)
async def adds(dut, seed):
    a, b = operands(seed)
    await check_lanes(dut, inputs={"a": a, "b": b}, outputs={"o": FpAdd.model(a, b)}, seed=seed)


@bench(seed=[3], timeout_cycles=100_000)
async def converts(dut, seed):
    is_signed = bench_parameters()["signed"]
    a, n = integers(seed, len(dut.a) // 4 + (not is_signed))
    a = a if is_signed else np.maximum(a, 0)
    await check_lanes(dut, inputs={"a": a, "n": n}, outputs={"o": FromInt.model(a, n)}, seed=seed)


@bench(seed=[4], timeout_cycles=100_000)
async def scales(dut, seed):
    a, n = scale_operands(seed)
    await check_lanes(dut, inputs={"a": a, "n": n}, outputs={"o": scale2_model(a, n)}, seed=seed)


def scale_operands(seed):
    generator = np.random.default_rng(seed)
    a = np.concatenate([np.repeat(CORNERS, 256), spread_floats(generator, COUNT)])
    return a, np.concatenate([np.tile(np.arange(-128, 128), len(CORNERS)), generator.integers(-128, 128, COUNT)])


class Scale2(wiring.Component):
    """``scale2`` behind a register."""

    latency = 1

    def __init__(self):
        super().__init__({"a": In(32), "n": In(signed(8)), "en": In(1), "o": Out(32)})

    def elaborate(self, platform):
        m = Module()
        with m.If(self.en):
            m.d.sync += self.o.eq(scale2(self.a, self.n))
        return m


def test_multiplier_equals_model():
    run_bench(Lanes(FpMul), multiplies)


def test_adder_equals_model():
    run_bench(Lanes(FpAdd), adds)


@pytest.mark.parametrize("shape", [signed(17), signed(32), signed(33), signed(48), signed(64), unsigned(63)], ids=str)
def test_integer_conversion_equals_model(shape):
    run_bench(Lanes(lambda: FromInt(shape)), converts, parameters={"signed": shape.signed})


def test_scale2_equals_model():
    run_bench(Lanes(Scale2), scales)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block, operation", [(FpMul, operator.mul), (FpAdd, operator.add)])
def test_model_is_float64_rounded_once(block, operation, seed):
    a, b = operands(seed, 100_000)
    expected = from_float64(operation(to_float64(a), to_float64(b)))
    np.testing.assert_array_equal(block.model(a, b), expected)


def test_integer_model_is_float64_rounded_once():
    a, n = integers(5, 53, 200_000)
    np.testing.assert_array_equal(FromInt.model(a, n), from_float64(np.ldexp(a.astype(np.float64), n)))


def test_integer_model_rounds_64_bits_once():
    """float64 cannot hold these integers; Python's true division of integers rounds correctly, to 24 bits if asked."""
    a, _ = integers(6, 64, 3_000)
    for value, bits in zip(a.tolist(), FromInt.model(a, np.zeros_like(a)).tolist()):
        down = max(abs(value).bit_length() - 24, 0)
        kept, rest = divmod(abs(value), 1 << down)
        kept += 2 * rest > 1 << down or (2 * rest == 1 << down and kept & 1)
        assert np.uint32(bits).view(np.float32) == np.float32((-1 if value < 0 else 1) * (kept << down))


def test_scale2_model_is_float64_scaled():
    a, n = scale_operands(7)
    np.testing.assert_array_equal(scale2_model(a, n), from_float64(np.ldexp(to_float64(a), n)))


def test_zero_results_are_positive():
    one, minus_one, minus_zero = 0x3F800000, 0xBF800000, 0x80000000
    assert FpAdd.model(one, minus_one) == FpAdd.model(minus_zero, minus_zero) == FpMul.model(0, minus_one) == 0


def test_from_int_refuses_odd_widths():
    with pytest.raises(ValueError, match="width must be 17..64, not 65"):
        FromInt(65)
