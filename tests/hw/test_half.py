"""FP16 and fixed-point conversions equal their models, and the models equal numpy and exact arithmetic."""

from fractions import Fraction
from math import floor

import numpy as np
import pytest
from amaranth.hdl import Module, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from lanes import Lanes, check_lanes, spread_floats
from skipopu.hw.blocks.half import ToFixed, ToHalf, half_parts, half_parts_model, widen, widen_model
from skipopu.sim.bench import bench, bench_parameters, run_bench
from test_fp import CORNERS, from_float64, to_float64

COUNT = 10_000
FORMATS = [(24, 56), (30, 30), (24, 44)]  # sum of squares, probability, router score


def half_arguments(seed):
    """FP32 bits: corners, every FP16 number and midpoint of the extremes with its neighbours, and random ones."""
    generator = np.random.default_rng(seed)
    near = np.array([65503, 65504, 65519, 65520, 65521, 65535, 65536, 2.0**-14, 2.0**-24, 2.0**-25, 2.0**-26, 1, 2049])
    middle = np.ldexp(np.arange(0, 4098) + 0.5 * (np.arange(4098) % 2), -25)  # subnormal numbers and their ties
    ties = np.ldexp(2 * np.arange(1024, 2048) + 1.0, -11)
    exact = from_float64(np.concatenate([near, middle, ties]))
    around = np.concatenate([exact, exact + 1, np.maximum(exact, 1) - 1])
    return np.concatenate([CORNERS, around, around | 0x80000000, spread_floats(generator, COUNT),
                           spread_floats(generator, 2 * COUNT, 98, 145)]).astype(np.uint32)


def fixed_arguments(seed, fraction, limit):
    """Nonnegative FP32 bits: corners, integers and a half in the last place, around the clamp, and random ones."""
    generator = np.random.default_rng(seed)
    halves = np.ldexp(np.arange(200) / 2, -fraction)
    clamp = np.ldexp(1.0, limit - fraction) * np.array([0.5, 1, 2])
    exact = from_float64(np.concatenate([halves, clamp]))
    around = np.concatenate([exact, exact + 1, np.maximum(exact, 1) - 1, CORNERS])
    top = 127 + limit - fraction
    close = spread_floats(generator, COUNT, top - limit - 3, top + 2)
    bits = np.concatenate([around, spread_floats(generator, COUNT), close])
    return (bits & 0x7FFFFFFF).astype(np.uint32)


class HalfParts(wiring.Component):
    """``half_parts`` and ``widen`` behind registers."""

    latency = 1

    def __init__(self):
        super().__init__({"bits": In(16), "en": In(1), "sig": Out(signed(12)), "es": Out(5), "wide": Out(32)})

    def elaborate(self, platform):
        m = Module()
        with m.If(self.en):
            sig, es = half_parts(self.bits)
            m.d.sync += [self.sig.eq(sig), self.es.eq(es), self.wide.eq(widen(self.bits))]
        return m


@bench(seed=[1], timeout_cycles=50_000)
async def converts_to_half(dut, seed):
    a = half_arguments(seed)
    bits, saturated = ToHalf.model(a)
    await check_lanes(dut, inputs={"a": a}, outputs={"o": bits, "saturated": saturated}, seed=seed)


@bench(seed=[2], timeout_cycles=50_000)
async def converts_to_fixed(dut, seed):
    fraction, limit = bench_parameters()["format"]
    a = fixed_arguments(seed, fraction, limit)
    await check_lanes(dut, inputs={"a": a}, outputs={"o": ToFixed.model(a, fraction, limit)}, seed=seed)


@bench(timeout_cycles=50_000)
async def splits(dut):
    bits = np.arange(1 << 16)
    sig, es = half_parts_model(bits)
    await check_lanes(dut, count=16, inputs={"bits": bits}, outputs={"sig": sig, "es": es, "wide": widen_model(bits)})


def test_half_equals_model():
    run_bench(Lanes(ToHalf), converts_to_half)


@pytest.mark.parametrize("fraction, limit", FORMATS)
def test_fixed_equals_model(fraction, limit):
    run_bench(Lanes(lambda: ToFixed(fraction, limit)), converts_to_fixed, parameters={"format": [fraction, limit]})


def test_half_parts_equal_model():
    run_bench(Lanes(HalfParts, count=16), splits)


def test_half_model_is_numpy_saturated():
    a = half_arguments(3)
    a = a[((a >> 23) & 0xFF) < 255]
    bits, saturated = ToHalf.model(a)
    with np.errstate(over="ignore"):
        expected = np.where(a & 0x7F800000, a, a & 0x80000000).astype(np.uint32).view(np.float32).astype(np.float16)
    np.testing.assert_array_equal(saturated, np.isinf(expected))
    limited = np.where(np.isinf(expected), np.copysign(65504, expected), expected).astype(np.float16)
    np.testing.assert_array_equal(bits, limited.view(np.uint16))


def test_exponent_field_255_saturates():
    bits, saturated = ToHalf.model(np.array([0x7F800000, 0xFFC00000]))
    assert bits.tolist() == [0x7BFF, 0xFBFF] and saturated.all()


def test_half_parts_model_is_numpy_for_finite_numbers():
    bits = np.arange(1 << 16)
    sig, es = half_parts_model(bits)
    finite = (bits >> 10 & 31) < 31
    expected = bits.astype(np.uint16).view(np.float16).astype(np.float64)
    np.testing.assert_array_equal(np.ldexp(sig.astype(np.float64), es - 25)[finite], expected[finite])
    assert half_parts_model(0x7C01) == (1025, 31)


def test_widening_is_exact_for_normal_numbers():
    bits = np.arange(1 << 16)
    field = bits >> 10 & 31
    normal = (field > 0) & (field < 31)
    expected = bits.astype(np.uint16).view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(widen_model(bits)[normal], expected[normal].view(np.uint32))
    assert not widen_model(bits)[field == 0].any()
    assert to_float64(widen_model(np.array([0x7C00, 0xFFFF]))).tolist() == [65536, -131008]


@pytest.mark.parametrize("fraction, limit", FORMATS)
def test_fixed_model_is_exact_arithmetic(fraction, limit):
    a = fixed_arguments(4, fraction, limit)[:4000]
    for value, fixed in zip(to_float64(a).tolist(), ToFixed.model(a, fraction, limit).tolist()):
        assert fixed == min(floor(Fraction(value) * 2**fraction + Fraction(1, 2)), 2**limit)


@pytest.mark.parametrize("fraction, limit, message", [
    (24, 63, "limit must be 24..62, not 63"),
    (200, 30, r"2\^\(limit - fraction\) must be an FP32 number, not 2\^-170"),
])
def test_fixed_refuses_formats_out_of_range(fraction, limit, message):
    with pytest.raises(ValueError, match=message):
        ToFixed(fraction, limit)
