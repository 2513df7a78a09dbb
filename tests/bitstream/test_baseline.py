"""The conventional dot product rounds every step as numpy's float16 does."""

import numpy as np
import pytest
from amaranth.sim import Simulator
from skipopu.bitstream.baseline import HalfAdd, HalfDot, HalfMul

SMALLEST = 2.0**-14  # of the normal numbers
CORNERS = np.array([0x0000, 0x8000, 0x0400, 0x0401, 0x8400, 0x07FF, 0x3BFF, 0x3C00, 0x3C01, 0xBC00, 0x3FFF, 0x4000,
                    0x1400, 0x1000, 0x0C01, 0x7BFF, 0xFBFF, 0x7800, 0x77FF, 0x5C01, 0x0001, 0x83FF], np.uint16)


def pairs(seed, count):
    generator = np.random.default_rng(seed)
    a, b = (x.ravel() for x in np.meshgrid(CORNERS, CORNERS))
    fraction, field, sign = generator.integers(0, 1024, (2, count)), generator.integers(0, 31, (2, count)), \
        generator.integers(0, 2, (2, count))
    near = np.clip(field[0] + generator.integers(-3, 4, count), 0, 30)  # exponents close to each other, for sums
    field[1] = np.where(generator.integers(0, 2, count), near, field[1])
    values = (sign << 15 | field << 10 | fraction).astype(np.uint16)
    return np.concatenate([a, values[0]]), np.concatenate([b, values[1]])


def run(dut, rows):
    """Result of every row of inputs, a new row in every cycle."""
    found = []

    async def bench(context):
        for cycle in range(len(rows) + dut.latency):
            for port, values in zip((dut.a, dut.b), rows[min(cycle, len(rows) - 1)]):
                if np.ndim(values):
                    for element, value in zip(port, values):
                        context.set(element, int(value))
                else:
                    context.set(port, int(values))
            if cycle >= dut.latency:
                found.append(context.get(dut.o))
            await context.tick()

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return np.array(found, np.uint16)


def numpy_result(operation, a, b):
    """(bits, where they are meant): float16 arithmetic with subnormal operands and results as zero, saturating."""
    flush = lambda x: np.where(np.abs(x) < SMALLEST, np.float16(0), x)  # noqa: E731
    with np.errstate(all="ignore"):
        result = operation(flush(a.view(np.float16)), flush(b.view(np.float16)))
    # The two ways to decide what is subnormal, before and after rounding, differ just below the smallest number.
    meant = np.abs(result) != np.float16(SMALLEST)
    return (np.clip(flush(result), -65504, 65504) + np.float16(0)).astype(np.float16).view(np.uint16), meant


@pytest.mark.parametrize(("unit", "operation"), [(HalfMul, np.multiply), (HalfAdd, np.add)])
def test_model_rounds_as_float16_does(unit, operation):
    a, b = pairs(1, 400_000)
    expected, meant = numpy_result(operation, a, b)
    got = unit.model(a, b)
    wrong = np.flatnonzero((got != expected) & meant)
    assert meant.sum() > 390_000 and not len(wrong), [f"{x:04x}" for x in (a[wrong[0]], b[wrong[0]], got[wrong[0]])]


@pytest.mark.parametrize("unit", [HalfMul, HalfAdd])
def test_hardware_equals_model(unit):
    a, b = pairs(2, 4000)
    got, expected = run(unit(), list(zip(a, b))), unit.model(a, b)
    wrong = np.flatnonzero(got != expected)
    assert not len(wrong), [f"{x:04x}" for x in (a[wrong[0]], b[wrong[0]], got[wrong[0]], expected[wrong[0]])]


def test_dot_product_equals_model_and_float16():
    a, b = np.random.default_rng(3).standard_normal((2, 150, 8)).astype(np.float16)
    bits = [x.view(np.uint16) for x in (a, b)]
    expected = HalfDot.model(*bits)
    assert np.array_equal(run(HalfDot(lanes=8), list(zip(*bits))), expected)
    terms = a * b
    while terms.shape[-1] > 1:
        terms = terms[:, ::2] + terms[:, 1::2]
    assert np.abs(expected.view(np.float16) - terms[:, 0]).max() <= 8 * SMALLEST  # the flushed products
    assert np.count_nonzero(expected == terms[:, 0].view(np.uint16)) > 140


def test_refuses_lanes_that_are_no_tree():
    with pytest.raises(ValueError, match="lanes must be a power of two, not 12"):
        HalfDot(lanes=12)
