"""Function blocks equal their models, and the models stay within the documented error of the true functions."""

import numpy as np
import pytest
from lanes import Lanes, check_lanes, spread_floats
from skipopu.hw.blocks.functions import CURVES, Exp2, QuadTable, Recip, Rsqrt, Sigmoid, coefficients, quad_model
from skipopu.sim.bench import bench, run_bench
from test_fp import CORNERS, from_float64, to_float64

COUNT = 10_000


def arguments(seed):
    """FP32 bits: corners, segment ends, all exponents, and those in which the functions are not constant."""
    generator = np.random.default_rng(seed)
    ends = (np.arange(129)[:, None] / 128 + np.array([0, 2.0**-23])).ravel()
    ends = np.concatenate([ends - np.array([[2.0**-23], [0]]), ends + 1, 1.5 + ends, -ends, -1 - ends], axis=None)
    limits = np.array([k + d for k in (-256, -150, -127, -126, -125, -33, -32, -31, -30, 0, 126, 127, 128, 255, 256)
                       for d in (-1, -2.0**-16, -2.0**-20, 0, 2.0**-20, 2.0**-16, 0.5)])
    return np.concatenate([CORNERS, from_float64(ends), from_float64(limits), spread_floats(generator, COUNT),
                           spread_floats(generator, 2 * COUNT, 95, 136)]).astype(np.uint32)


async def check(dut, block, seed):
    a = arguments(seed)
    await check_lanes(dut, inputs={"a": a}, outputs={"o": block.model(a)}, seed=seed)


@bench(seed=[1], timeout_cycles=100_000)
async def exp2(dut, seed):
    await check(dut, Exp2, seed)


@bench(seed=[2], timeout_cycles=100_000)
async def recip(dut, seed):
    await check(dut, Recip, seed)


@bench(seed=[3], timeout_cycles=100_000)
async def rsqrt(dut, seed):
    await check(dut, Rsqrt, seed)


@bench(seed=[4], timeout_cycles=100_000)
async def sigmoid(dut, seed):
    await check(dut, Sigmoid, seed)


@pytest.mark.parametrize("block, coroutine", [(Exp2, exp2), (Recip, recip), (Rsqrt, rsqrt), (Sigmoid, sigmoid)])
def test_function_equals_model(block, coroutine):
    run_bench(Lanes(block), coroutine)


# Largest errors over all FP16 inputs, relative and (for results up to 1) absolute: docs/numerics.md and the docstrings
# quote them. Results below ``smallest`` are flushed.
ERRORS = [
    (Exp2, np.exp2, 2.0**-126, 9.76e-8, 7.47e-8),
    (Recip, lambda x: 1 / x, 0, 8.06e-8, 7.64e-8),
    (Rsqrt, lambda x: 1 / np.sqrt(x), 0, 5.97e-8, 4.09e-8),
    (Sigmoid, lambda x: 1 / (1 + np.exp2(x)), 2.0**-125, 2.21e-7, 1.88e-7),
]


def half_inputs():
    """Every FP16 value, exponent field 31 read as an ordinary exponent, as float64."""
    bits = np.arange(1 << 16)
    field = (bits >> 10) & 31
    significand = (bits & 1023) + 1024 * (field > 0)
    return np.where(bits >> 15, -1.0, 1.0) * np.ldexp(significand.astype(np.float64), np.maximum(field, 1) - 25)


@pytest.mark.parametrize("block, function, smallest, relative, absolute", ERRORS)
def test_error_over_all_fp16_inputs(block, function, smallest, relative, absolute):
    x = half_inputs()
    with np.errstate(all="ignore"):
        true = function(x)
    defined = np.isfinite(true) & (np.abs(true) >= smallest) & (np.abs(true) < 2.0**128)
    true, result = true[defined], to_float64(block.model(from_float64(x)))[defined]
    error = np.abs(result - true)
    # The quoted numbers are the errors rounded up to three digits: neither exceeded nor stale.
    assert 0.99 * relative < (error / np.abs(true)).max() <= relative
    assert 0.99 * absolute < error[np.abs(true) <= 1].max() <= absolute


def test_out_of_range_arguments():
    x = from_float64(np.array([0.0, -0.0, -1.0, 127.99, 128.0, 1e9, -126.0, -126.5, -1e9]))
    largest = 0x7F7FFFFF
    assert Exp2.model(x)[4:].tolist() == [largest, largest, 0x00800000, 0, 0]
    assert Exp2.model(x)[:3].tolist() == [0x3F800000, 0x3F800000, 0x3F000000]
    assert Recip.model(x)[:2].tolist() == [largest, largest]
    assert Rsqrt.model(x)[:3].tolist() == [largest] * 3
    assert Sigmoid.model(x)[[5, 8]].tolist() == [0, 0x3F7FFFFF]


@pytest.mark.parametrize("curve, down", [("exp2", 7), ("recip", 6), ("rsqrt", 6), ("rsqrt_half", 6)])
def test_significand_needs_no_second_normalisation(curve, down):
    fraction = np.arange(1 << 23, dtype=np.int64)
    s = (quad_model(curve, fraction) + (1 << down >> 1)) >> down
    assert s.min() >= 1 << 23 and s.max() <= 1 << 24


@pytest.mark.parametrize("curve", CURVES)
def test_coefficients_are_the_rounded_derivatives(curve):
    x = (np.arange(128) + 0.5) / 128
    log2 = np.log(2)
    value, first, second = {
        "exp2": (2**x, log2 * 2**x, log2**2 * 2**x),
        "recip": (1 / (1 + x), -((1 + x)**-2), 2 * (1 + x)**-3),
        "rsqrt": ((1 + x)**-0.5, -0.5 * (1 + x)**-1.5, 0.75 * (1 + x)**-2.5),
        "rsqrt_half": ((2 + 2 * x)**-0.5, -((2 + 2 * x)**-1.5), 3 * (2 + 2 * x)**-2.5),
    }[curve]
    exact = np.stack([value * 2**30, first * 2**22, second / 2 * 2**14], axis=1)
    assert np.abs(coefficients(curve) - exact).max() < 0.50001


def test_table_refuses_three_curves():
    with pytest.raises(ValueError, match="a table holds one or two curves, not 3"):
        QuadTable("exp2", "recip", "rsqrt", bias=0)
