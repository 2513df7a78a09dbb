"""Scores of a router: the dot product of each row with FP16 weights, whose sign decides whether the row executes.

docs/numerics.md, "router scores", defines each bit. Rows may come interleaved, a few beats of each in turn. Enables are
those of `fp`.
"""

import numpy as np
from amaranth.hdl import Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..formats import SUM_BITS, SUM_FRACTION
from .fp import FpMul, delay, fields_model
from .half import ToFixed, widen, widen_model

__all__ = ["RouterScores"]

_LIMIT = 44  #: terms are clamped to 2^_LIMIT units


class RouterScores(wiring.Component):
    """Scores the rows of a chunk for one module; a row whose score is not negative executes.

    Members
    -------
    v : In(32) per lane, FP32 bits; weight : In(16) per lane, FP16 bits
    en : In(latency), register enables: bit i, a beat is ``i`` cycles after its operands
    row, first, last : In, row of the beat at the last stage, whether it is the row's first, its last one
    bias : In(signed(32)), units of 2^-24
    decided : Out(tokens), bit t: the last score of row t was not negative; ``latency`` cycles after its last beat
    """

    latency = FpMul.latency + ToFixed.latency + 2

    def __init__(self, *, config):
        self.config = config
        lanes = config.vector_lanes
        super().__init__({
            "v": In(32).array(lanes), "weight": In(16).array(lanes), "en": In(self.latency),
            "row": In(range(config.tokens)), "first": In(1), "last": In(1), "bias": In(signed(32)),
            "decided": Out(config.tokens),
        })

    @staticmethod
    def model(v, weight, bias):
        """Scores (exact Python integers) of rows of FP32 bits [rows, elements] with FP16 weights [elements]."""
        product = FpMul.model(v, widen_model(weight))
        terms = np.where(fields_model(product)[0] == 1, -1, 1) * ToFixed.model(product, SUM_FRACTION, _LIMIT)
        return [bias + sum(row) for row in terms.tolist()]

    def elaborate(self, platform):
        m = Module()
        config = self.config

        # 1..4: products, fixed point
        at_fixed, at_sum = FpMul.latency, FpMul.latency + ToFixed.latency
        terms = []
        for i in range(config.vector_lanes):
            m.submodules[f"mul{i}"] = mul = FpMul(b_bits=11)
            m.submodules[f"fixed{i}"] = fixed = ToFixed(fraction=SUM_FRACTION, limit=_LIMIT)
            m.d.comb += [
                mul.a.eq(self.v[i]), mul.b.eq(widen(self.weight[i])), mul.en.eq(self.en[:at_fixed]),
                fixed.a.eq(mul.o), fixed.en.eq(self.en[at_fixed:at_sum]),
            ]
            negative = delay(m, mul.o[31], self.en[at_fixed:at_sum], f"negative{i}")
            terms.append(Mux(negative, -fixed.o, fixed.o))

        # 5: the beat's sum
        while len(terms) > 1:
            terms = [sum(terms[i:i + 2][1:], terms[i]) for i in range(0, len(terms), 2)]
        beat = Signal(signed(_LIMIT + 2 + config.vector_lanes.bit_length()), reset_less=True)
        with m.If(self.en[at_sum]):
            m.d.sync += beat.eq(terms[0])

        # 6: the row's sum
        m.submodules.scores = scores = Memory(shape=signed(SUM_BITS), depth=config.tokens, init=[])
        old, new = scores.read_port(domain="comb"), scores.write_port()
        score = Signal(signed(SUM_BITS))
        m.d.comb += [
            old.addr.eq(self.row), new.addr.eq(self.row), new.en.eq(self.en[at_sum + 1]), new.data.eq(score),
            score.eq(Mux(self.first, self.bias, old.data) + beat),
        ]
        with m.If(self.en[at_sum + 1] & self.last):
            m.d.sync += self.decided.bit_select(self.row, 1).eq(~score[-1])
        return m
