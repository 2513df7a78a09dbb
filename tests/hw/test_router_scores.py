"""RouterScores equals its model, and the model exact arithmetic: rows interleaved, terms of every size, ties."""

import random
from collections import deque
from fractions import Fraction
from math import floor

import numpy as np
from cocotb.triggers import RisingEdge
from lanes import spread_floats
from skipopu.hw.blocks.fp import FpMul
from skipopu.hw.blocks.half import widen_model
from skipopu.hw.blocks.scores import RouterScores
from skipopu.hw.config import preset
from skipopu.sim.bench import Stall, bench, run_bench
from test_fp import CORNERS, to_float64

TINY = preset("tiny")
V = TINY.vector_lanes
WEIGHTS = np.array([0, 1, 0x3FF, 0x400, 0x3C00, 0xBC00, 0x7BFF, 0xFBFF, 0x7C00, 0x7FFF, 0xFFFF, 0x8000, 0x8001])
BIASES = [0, 1, -1, (1 << 31) - 1, -(1 << 31)]


def operands(rng, *shape):
    """FP32 bits and FP16 bits: ordinary values, a part of them of any size, corners."""
    v = np.where(rng.random(shape) < 0.8, spread_floats(rng, np.prod(shape), 110, 132).reshape(shape),
                 rng.choice(np.concatenate([CORNERS, spread_floats(rng, 100)]), shape))
    weight = np.where(rng.random(shape) < 0.8, rng.normal(0, 0.1, shape).astype(np.float16).view(np.uint16),
                      rng.choice(np.concatenate([WEIGHTS, rng.integers(0, 1 << 16, 100)]), shape))
    return v.astype(np.uint32), weight


async def drive(dut, beats, bias, *, stall=0.0):
    """Beats (row, first, last, v, weight), one a cycle; what is said of the row comes at the last stage."""
    generator, waiting = random.Random(f"{stall} {bias}"), deque(beats)
    stages = deque([None] * RouterScores.latency, RouterScores.latency)
    dut.bias.value = bias
    while True:
        stages.appendleft(waiting.popleft() if waiting and generator.random() >= stall else None)
        dut.en.value = sum(1 << i for i, beat in enumerate(stages) if beat)
        for i in range(V):
            v, weight = (int(stages[0][at][i]) if stages[0] else generator.getrandbits(16) for at in (3, 4))
            getattr(dut, f"v__{i}").value, getattr(dut, f"weight__{i}").value = v, weight
        row, first, last = stages[-1][:3] if stages[-1] else (generator.randrange(TINY.tokens), 1, 1)
        dut.row.value, dut.first.value, dut.last.value = row, int(first), int(last)
        await RisingEdge(dut.clk)
        if not waiting and not any(stages):
            return


def interleaved(rng, rows, v, weight):
    """Beats of v [rows, beats, V], some of each row in turn."""
    beats = v.shape[1]
    step = int(rng.integers(1, beats + 1))
    for start in range(0, beats, step):
        for i, row in enumerate(rows):
            for beat in range(start, min(start + step, beats)):
                yield row, beat == 0, beat == beats - 1, v[i, beat], weight[beat]


async def check(dut, rng, rows, v, weight, bias, decided, stall=0.0):
    """Run rows and compare all decisions with ``decided``, the ones before, in place."""
    await drive(dut, interleaved(rng, rows, v, weight), bias, stall=stall)
    scores = RouterScores.model(v.reshape(len(rows), -1), weight.ravel(), bias)
    for row, score in zip(rows, scores):
        decided[row] = int(score >= 0)
    got = [dut.decided.value.to_unsigned() >> t & 1 for t in range(TINY.tokens)]
    assert got == decided, f"rows {rows}: decided {got}, expected {decided} by {scores}"


@bench(stall=[Stall.NEVER, Stall.HALF], seed=[1, 2])
async def decides_as_the_model(dut, stall, seed):
    rng, decided = np.random.default_rng(seed), [0] * TINY.tokens
    for number in range(60):
        rows = np.sort(rng.permutation(TINY.tokens)[:rng.integers(1, TINY.tokens + 1)]).tolist()
        v, weight = operands(rng, len(rows), int(rng.integers(1, 9)), V)
        bias = int(rng.choice(BIASES)) if number % 2 else int(rng.integers(-1 << 25, 1 << 25))
        await check(dut, rng, rows, v, weight[0], bias, decided, stall)


@bench()
async def a_tie_executes(dut):
    """The bias takes the score of one row to -1, 0 and 1; terms on either side of one half unit."""
    rng, decided = np.random.default_rng(3), [0] * TINY.tokens
    half = int(np.float32(2.0**-25).view(np.uint32))
    one = np.full((1, 3, V), 0x3C00)
    for bits in (half, half - 1, half | 1 << 31, 0, 0x80000000, 0x3F800000, 0xBF800000):
        v = np.full((1, 3, V), bits, np.uint32)
        score, = RouterScores.model(v.reshape(1, -1), one.ravel(), 0)
        for above in (-1, 0, 1, -1):
            await check(dut, rng, [2], v, one[0], above - score, decided)
            assert decided[2] == (above >= 0)


@bench(sign=[0, 1])
async def sums_do_not_overflow(dut, sign):
    """Terms of 2^44 units in more beats than a router has rows."""
    decided = [0] * TINY.tokens
    v = np.full((1, 2 * TINY.router_rows, V), 0x7F7FFFFF | sign << 31, np.uint32)
    weight = np.full(v.shape[1:], 0x7BFF)
    await check(dut, np.random.default_rng(4), [1], v, weight, BIASES[-1 - sign], decided)
    assert decided[1] == 1 - sign


def test_decisions_equal_the_model():
    run_bench(RouterScores(config=TINY), decides_as_the_model, a_tie_executes, sums_do_not_overflow)


def test_model_is_exact_arithmetic():
    v, weight = operands(np.random.default_rng(5), 300, 4)
    for bias, row, d in zip(BIASES * 60, v, weight):
        product = to_float64(FpMul.model(row, widen_model(d))).tolist()
        terms = [min(floor(abs(Fraction(p)) * 2**24 + Fraction(1, 2)), 2**44) for p in product]
        want = bias + sum(-term if p < 0 else term for term, p in zip(terms, product))
        assert RouterScores.model(row[None], d, bias) == [want]
