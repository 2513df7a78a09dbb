"""DotPair of every target gives what integers give, a new row in every cycle."""

import random

import pytest
from amaranth.sim import Simulator
from skipopu.hw.blocks.dot import DotPair, dot_latency, skew
from skipopu.hw.config import DSPS, ConfigError

MANTISSAS, NUMBERS = (-16383, -1, 0, 1, 16383), (-4094, -1, 0, 1, 4094)  # of queries with keys
LONG, CODES = (-32767, -1, 0, 1, 32767), (0, 1, 15)  # of activations with weights


def check(dsp, rows):
    """Compare the dot products of rows (mantissas, words of both columns, bias); all lanes differ in time by `skew`."""
    lanes = len(rows[0][0])
    dut, latency = DotPair(lanes=lanes, dsp=dsp), dot_latency(dsp)

    async def bench(context):
        if dsp != "dsp48e2":
            context.set(dut.en, 1)
        for cycle in range(len(rows) + latency):
            for lane in range(lanes):
                row = cycle - skew(dsp, lane)
                if 0 <= row < len(rows):
                    mantissas, words, _ = rows[row]
                    context.set(dut.mantissa[lane], mantissas[lane])
                    for column in range(2):
                        context.set(dut.word[column][lane], words[column][lane])
            context.set(dut.bias, rows[min(cycle, len(rows) - 1)][2])
            if cycle >= latency:
                mantissas, words, bias = rows[cycle - latency]
                expected = [sum(m * k for m, k in zip(mantissas, words[column])) + bias for column in range(2)]
                assert [context.get(dut.dot[column]) for column in range(2)] == expected, (cycle, rows[cycle - latency])
            await context.tick()

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()


@pytest.mark.parametrize("dsp", DSPS)
@pytest.mark.parametrize("lanes", [8, 32])
def test_corners_then_random_rows(dsp, lanes, seed=1):
    """Codes with a bias and numbers without follow each other in no order."""
    generator = random.Random(seed)
    rows = [([m] * lanes, [[a] * lanes, [b] * lanes], 0) for m in MANTISSAS for a in NUMBERS for b in NUMBERS]
    rows += [([m] * lanes, [[a] * lanes, [b] * lanes], -8 * m * lanes)
             for m in LONG for a in CODES for b in CODES]
    for _ in range(150):
        is_code = generator.random() < 0.5
        low, high, limit = (0, 15, 32767) if is_code else (-4094, 4094, 16383)
        mantissas = [generator.randint(-limit, limit) for _ in range(lanes)]
        words = [[generator.randint(low, high) for _ in range(lanes)] for _ in range(2)]
        rows.append((mantissas, words, -8 * sum(mantissas) if is_code and generator.random() < 0.7 else 0))
    generator.shuffle(rows)
    check(dsp, rows if lanes == 8 else rows[:60])


@pytest.mark.parametrize("dsp", DSPS[1:])
def test_every_bit_has_its_place(dsp):
    """One bit of one mantissa times one bit of one word, all pairs; the other column's words are -1."""
    lanes, rows = 8, []
    for lane in range(lanes):
        for column in range(2):
            for i in range(16):
                for j in range(13 if i < 15 else 4):  # longer mantissas meet codes only
                    mantissas, words = [0] * lanes, [[-1] * lanes, [-1] * lanes]
                    mantissas[lane] = -(1 << i) if i in (14, 15) else 1 << i
                    words[column][lane] = 2 - 4096 if j == 12 else 1 << j  # -4096 is no word
                    rows.append((mantissas, words, 0))
    check(dsp, rows)


@pytest.mark.parametrize(("lanes", "dsp", "message"), [
    (6, "dsp48e2", "lanes of a block must be a multiple of 4, not 6"), (0, "generic", "multiple of 4, not 0"),
    (64, "dsp48e2", r"lanes \* 16383 \* 4094 must be below 2\^31, which 64 lanes exceed"),
    (8, "dsp58", "dsp must be one of generic, dsp48e2, mult18x18d, not 'dsp58'"),
])
def test_refuses_what_cannot_be_packed(lanes, dsp, message):
    with pytest.raises(ConfigError, match=message):
        DotPair(lanes=lanes, dsp=dsp)
