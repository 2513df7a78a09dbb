"""The unit of the comparison computes what it is compared for."""

import random

import numpy as np
import pytest
from amaranth.sim import Simulator
from skipopu.bitstream.pe_unit import PeUnit
from skipopu.hw.blocks.dot import skew
from skipopu.hw.blocks.fp import FromInt
from skipopu.hw.formats import KV_FRACTION

LANES, BLOCK = 8, 4


def cases(seed=3):
    """(mantissas, words [2][lanes], gaps, exponents): corners, then random ones."""
    rng = random.Random(seed)
    for m in (-16383, 16383):
        for k in (-4094, 4094):
            yield [m] * LANES, [[k] * LANES, [-k] * LANES], [0, 0], [0, 100]
    yield [0] * LANES, [[0] * LANES] * 2, [63, 0], [-45, 3]
    for _ in range(40):
        yield ([rng.randint(-16383, 16383) for _ in range(LANES)],
               [[rng.randint(-4094, 4094) for _ in range(LANES)] for _ in range(2)],
               [rng.choice([0, 0, 1, 5, 30, 63]) for _ in range(LANES // BLOCK)],
               [rng.randint(-60, 20) for _ in range(2)])


def expected(mantissas, words, gaps, exponents):
    def dot(column, first):
        return sum(m * k for m, k in zip(mantissas[first:first + BLOCK], column[first:first + BLOCK]))

    total = [sum((dot(column, first) << KV_FRACTION) >> gap for first, gap in zip(range(0, LANES, BLOCK), gaps))
             for column in words]
    return [int(FromInt.model(np.array([t]), np.array([e]))[0]) for t, e in zip(total, exponents)]


@pytest.mark.parametrize("dsp", ["generic", "dsp48e2", "mult18x18d"])
def test_two_dot_products_reconstructed(dsp):
    dut = PeUnit(lanes=LANES, block=BLOCK, dsp=dsp)
    rows = list(cases())
    dot = dut.latency - 1 - FromInt.latency

    async def bench(context):
        for cycle in range(len(rows) + dut.latency):
            def at(age, cycle=cycle):
                return rows[min(max(cycle - age, 0), len(rows) - 1)]

            for lane in range(LANES):
                mantissas, words, *_ = at(skew(dsp, lane))
                context.set(dut.mantissa[lane], mantissas[lane])
                for column in range(2):
                    context.set(dut.word[column][lane], words[column][lane])
            for b, gap in enumerate(at(dot)[2]):
                context.set(dut.gap[b], gap)
            for column, exponent in enumerate(at(dot + 1)[3]):
                context.set(dut.exponent[column], exponent)
            if cycle >= dut.latency:
                row = rows[cycle - dut.latency]
                assert [context.get(dut.o[column]) for column in range(2)] == expected(*row), (cycle, row)
            await context.tick()

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
