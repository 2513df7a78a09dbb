"""Scores of a router: the dot product of each row with FP16 weights, whose sign decides whether the row executes.

docs/numerics.md, "router scores", defines each bit. Rows may come interleaved, a few beats of each in turn. Enables are
those of `fp`.
"""

import numpy as np
from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..formats import SUM_BITS, SUM_FRACTION
from .fp import FpMul, delay, fields_model, wire
from .half import ToFixed, widen, widen_model
from .sums import half_sum

__all__ = ["RouterScores", "SharedScores"]

_LIMIT = 44  #: terms are clamped to 2^_LIMIT units
_LOWEST = 98  # sum of the exponent fields of factors whose significands, 2^23 and 2^10, are shifted by 63 places


class _Term(wiring.Component):
    """A product of FP32 and FP16, rounded to FP32, in fixed point with SUM_FRACTION + 1 bits, clamped to 2 * 2^_LIMIT.

    Members
    -------
    v : In(32), FP32 bits; weight : In(16), FP16 bits
    en : In(latency), register enables
    o : Out(signed), the one's complement of a negative term: half of it, rounded up, is then the term rounded as the
        magnitude rounds half up
    """

    latency = 3

    def __init__(self):
        super().__init__({"v": In(32), "weight": In(16), "en": In(self.latency), "o": Out(signed(_LIMIT + 3))})

    def elaborate(self, platform):
        m = Module()

        # 1: the product of 11 and 24 bits; 512 and more: a position in fixed point, counted from the lowest, which is
        # 98 as a sum of exponent fields; 63 is the highest for a significand without carry.
        fields = self.v[23:31], self.weight[10:15]
        product = Signal(35, reset_less=True)
        position = Signal(10, reset_less=True)
        negative = [Signal(name=f"negative{i}", reset_less=True) for i in range(2)]
        with m.If(self.en[0]):
            m.d.sync += [
                product.eq(Cat(self.v[:23], Const(1, 1)) * Cat(self.weight[:10], Const(1, 1))),
                position.eq(Mux(fields[0].any() & fields[1].any(), sum(fields) + (512 - _LOWEST), 0)),
                negative[0].eq(self.v[31] ^ self.weight[15]),
            ]

        # 2: rounded to 24 bits where they are, with one of the two upper bits set
        top = product[-1]
        up = [product[low - 1] & (product[low] | product[:low - 1].any()) for low in (10, 11)]
        rounded = Signal(26, reset_less=True)
        places, large = Signal(6, reset_less=True), Signal(reset_less=True)
        with m.If(self.en[1]):
            m.d.sync += [
                rounded.eq(Cat(product[10] & ~top, product[11:]) + Cat(up[0] & ~top, up[1] & top)),
                places.eq(~(position[:6] & position[9].replicate(6))), large.eq(position[9] & position[6:9].any()),
                negative[1].eq(negative[0]),
            ]

        # 3: fixed point
        clamped = wire(m, large | ((places == 0) & rounded[24:].any()) | ((places == 1) & rounded[25]), "clamped")
        shifted = (Cat(Const(0, _LIMIT - 23), rounded) >> (places | clamped.replicate(6)))[:_LIMIT + 1]
        o = Signal.like(self.o, reset_less=True)
        m.d.comb += self.o.eq(o)
        with m.If(self.en[2]):
            m.d.sync += o.eq(Cat(shifted, clamped, Const(0, 1)) ^ negative[1].replicate(_LIMIT + 3))
        return m


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

    latency = 6

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

        # 1..3: products in fixed point; 4, 5: the beat's sum
        terms = []
        for i, (v, weight) in enumerate(zip(self.v, self.weight)):
            m.submodules[f"term{i}"] = term = _Term()
            m.d.comb += [term.v.eq(v), term.weight.eq(weight), term.en.eq(self.en[:_Term.latency])]
            terms.append(term.o)
        beat, up = half_sum(m, terms, self.en[_Term.latency:-1])

        # 6: the row's sum
        m.submodules.scores = scores = Memory(shape=signed(SUM_BITS), depth=config.tokens, init=[])
        old, new = scores.read_port(domain="comb"), scores.write_port()
        score = Signal(signed(SUM_BITS))
        m.d.comb += [
            old.addr.eq(self.row), new.addr.eq(self.row), new.en.eq(self.en[-1]), new.data.eq(score),
            score.eq((Cat(Const(1, 1), Mux(self.first, self.bias, old.data)) + Cat(up, beat).as_signed())[1:]),
        ]
        with m.If(self.en[-1] & self.last):
            m.d.sync += self.decided.bit_select(self.row, 1).eq(~score[-1])
        return m


class SharedScores(wiring.Component):
    """Both modules' scores by one multiplier, which takes a product a cycle: both of a lane, the last lane's first.

    Members
    -------
    en : a beat is there, at a distance of 2 * lanes cycles or more from the one before; a lane stays until it is taken
    v : In(32) per lane, FP32 bits; weight : In(16) per module and lane, FP16 bits
    row, first, last : In, row of the beat, whether it is the row's first, its last one
    bias : In(signed(32)) per module, units of 2^-24
    decided : Out(tokens) per module, bit t: the last score of row t was not negative; when no longer busy
    busy : something is under way after the cycle of ``en``
    """

    def __init__(self, *, config):
        self.config = config
        lanes = config.vector_lanes
        super().__init__({
            "v": In(32).array(lanes), "weight": In(16).array(2, lanes), "en": In(1), "row": In(range(config.tokens)),
            "first": In(1), "last": In(1), "bias": In(signed(32)).array(2), "decided": Out(config.tokens).array(2),
            "busy": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        lanes, tokens = self.config.vector_lanes, self.config.tokens
        term = data.StructLayout({
            "valid": 1, "lane": range(lanes), "module": range(2), "row": range(tokens), "begins": 1, "ends": 1})
        ages = FpMul.latency + ToFixed.latency
        here, *later = stages = [Signal(term, name=f"term{i}") for i in range(ages + 1)]
        turn = Signal(range(2 * lanes))  # 0 but in further turns of a beat
        running, row, first, last = Signal(), Signal.like(self.row), Signal(), Signal()
        with m.If(self.en | running):
            m.d.sync += [turn.eq(turn + 1), running.eq(~turn.all())]
        with m.If(self.en):
            m.d.sync += [row.eq(self.row), first.eq(self.first), last.eq(self.last)]
        m.d.comb += [
            here.valid.eq(self.en | running), here.module.eq(turn[0]), here.lane.eq(lanes - 1 - turn[1:]),
            here.row.eq(Mux(self.en, self.row, row)),
            here.begins.eq(Mux(self.en, self.first, first) & (here.lane == lanes - 1)),
            here.ends.eq(Mux(self.en, self.last, last) & (here.lane == 0)),
            self.busy.eq(running | Cat(stage.valid for stage in later).any()),
        ]
        for before, after in zip(stages, later):
            m.d.sync += after.eq(before)
        enables = Cat(stage.valid for stage in stages)

        m.submodules.mul = mul = FpMul(b_bits=11)
        m.submodules.fixed = fixed = ToFixed(fraction=SUM_FRACTION, limit=_LIMIT)
        m.d.comb += [
            mul.a.eq(Array(self.v)[here.lane]),
            mul.b.eq(widen(Array(Array(weights) for weights in self.weight)[here.module][here.lane])),
            mul.en.eq(enables[:FpMul.latency]), fixed.a.eq(mul.o), fixed.en.eq(enables[FpMul.latency:ages]),
        ]
        negative = delay(m, mul.o[31], enables[FpMul.latency:ages], "negative")

        m.submodules.scores = scores = Memory(shape=signed(SUM_BITS), depth=2 * tokens, init=[])
        old, new, done = scores.read_port(domain="comb"), scores.write_port(), stages[-1]
        score = Signal(signed(SUM_BITS))
        m.d.comb += [
            old.addr.eq(Cat(done.module, done.row)), new.addr.eq(old.addr), new.en.eq(done.valid), new.data.eq(score),
            score.eq(Mux(done.begins, Array(self.bias)[done.module], old.data) + Mux(negative, -fixed.o, fixed.o)),
        ]
        for module, decided in enumerate(self.decided):
            with m.If(done.valid & done.ends & (done.module == module)):
                m.d.sync += decided.bit_select(done.row, 1).eq(~score[-1])
        return m
