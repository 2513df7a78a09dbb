"""The conventional dot product, for comparison only: FP16 multipliers with one DSP each, and a tree of FP16 adders.

Every product and every sum is rounded to FP16, nearest even. As usual for such cores there are no subnormals: they are
zero as operands and as results (decided after rounding); zero is +0. Overflow gives the largest finite number; there is
no infinity and no NaN. All of this makes it smaller, so the comparison is in its favour, and so does the tree: cascaded
adders would delay the operands of every lane, and their rounding errors add up along the chain.
"""

import numpy as np
from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from skipopu.hw.blocks.dsp import Dsp48e2
from skipopu.hw.blocks.fp import normalise

__all__ = ["HalfAdd", "HalfDot", "HalfMul"]

_LARGEST = 0x7BFF  # bits of 65504


def _round_model(exact):
    """FP16 bits (uint16) of exact float64 values."""
    fraction, exponent = np.frexp(exact)
    rounded = np.ldexp(np.rint(np.ldexp(fraction, 11)), exponent - 11)
    rounded = np.where(np.abs(rounded) < 2.0**-14, 0.0, np.clip(rounded, -65504.0, 65504.0))
    return rounded.astype(np.float16).view(np.uint16)


def _operand_model(bits):
    """Values (float64) of FP16 bits, subnormals as zero."""
    value = np.asarray(bits, np.uint16).view(np.float16).astype(np.float64)
    return np.where(np.abs(value) < 2.0**-14, 0.0, value)


def _pack(sign, exponent, value, offset):
    """FP16 of a significand whose leading one is its top bit (0: zero), rounded; exponent: field + offset."""
    low = len(value) - 11
    up = value[low - 1] & (value[low] | value[:low - 1].any())
    rounded = (Cat(value[low:-1], exponent) + up)[:10 + len(exponent)]  # a carry moves on into the exponent
    field = rounded[10:]
    return Mux(~value[-1] | (field < offset + 1), 0,
               Cat(Mux(field >= offset + 31, _LARGEST, rounded[:15]), sign))


class HalfMul(wiring.Component):
    """FP16 product; one DSP.

    Members
    -------
    a, b : In(16), FP16 bits, finite
    o : Out(16), FP16 bits, ``latency`` cycles later
    """

    latency = 3

    def __init__(self, *, target="generic"):
        self._dsp = Dsp48e2(registers={"a": 0, "b": 0, "c": 0, "d": 0, "ad": 0}, target=target)
        super().__init__({"a": In(16), "b": In(16), "o": Out(16)})

    @staticmethod
    def model(a, b):
        """Bits of a * b."""
        return _round_model(_operand_model(a) * _operand_model(b))

    def elaborate(self, platform):
        m = Module()

        # 1, 2: the product of the significands, in the DSP's own registers
        m.submodules.dsp = dsp = self._dsp
        beside = Cat(self.a[10:15].any() & self.b[10:15].any(), self.a[15] ^ self.b[15], self.a[10:15] + self.b[10:15])
        for stage in range(dsp.latency):
            register = Signal(len(beside), name=f"beside{stage}", reset_less=True)
            m.d.sync += register.eq(beside)
            beside = register
        m.d.comb += [dsp.a.eq(Cat(self.a[:10], Const(1, 1))), dsp.b.eq(Cat(self.b[:10], Const(1, 1)))]

        # 3: one place of normalisation, round; the exponent field is the sum of both - 15, kept 32 higher
        product, nonzero, sign, exponent = dsp.p[:22], beside[0], beside[1], beside[2:]
        value = Signal(22)
        field = Signal(7)
        result = Signal(16, reset_less=True)
        m.d.comb += [value.eq(Mux(product[21], product, product << 1)), field.eq(exponent + product[21] + (32 - 15)),
                     self.o.eq(result)]
        m.d.sync += result.eq(Mux(nonzero, _pack(sign, field, value, 32), 0))
        return m


class HalfAdd(wiring.Component):
    """FP16 sum.

    Members
    -------
    a, b : In(16), FP16 bits, finite
    o : Out(16), FP16 bits, ``latency`` cycles later
    """

    latency = 3

    def __init__(self):
        super().__init__({"a": In(16), "b": In(16), "o": Out(16)})

    @staticmethod
    def model(a, b):
        """Bits of a + b."""
        return _round_model(_operand_model(a) + _operand_model(b))

    def elaborate(self, platform):
        m = Module()

        # 1: the larger magnitude first; align the smaller one to it, with guard, round and sticky bits
        swap, large, small = Signal(), Signal(15), Signal(15)
        distance, shift, extended = Signal(5), Signal(4), Signal(14)
        augend, addend = Signal(11, reset_less=True), Signal(14, reset_less=True)
        field, sign, subtract = Signal(5, reset_less=True), Signal(reset_less=True), Signal(reset_less=True)
        m.d.comb += [
            swap.eq(self.b[:15] > self.a[:15]),
            large.eq(Mux(swap, self.b[:15], self.a[:15])), small.eq(Mux(swap, self.a[:15], self.b[:15])),
            distance.eq(large[10:] - small[10:]), shift.eq(Mux(distance > 15, 15, distance)),
            extended.eq(Mux(small[10:].any(), Cat(Const(0, 3), small[:10], Const(1, 1)), 0)),
        ]
        lost = (extended & ~(Const(-1, 14).as_unsigned() << shift)[:14]).any()
        m.d.sync += [
            augend.eq(Mux(large[10:].any(), Cat(large[:10], Const(1, 1)), 0)), addend.eq((extended >> shift) | lost),
            field.eq(large[10:]), sign.eq(Mux(swap, self.b[15], self.a[15])), subtract.eq(self.a[15] ^ self.b[15]),
        ]

        # 2: add or subtract, and the coarse steps of the normalisation
        total = Signal(15)
        m.d.comb += total.eq(Cat(Const(0, 3), augend, Const(0, 1)) + (Cat(addend, Const(0, 1)) ^ subtract.replicate(15))
                             + subtract)
        value, zeros = normalise(m, total, [8, 4])
        coarse, exponent, sign2 = Signal(15, reset_less=True), Signal(7, reset_less=True), Signal(reset_less=True)
        m.d.sync += [coarse.eq(value), exponent.eq(field + (32 + 1) - zeros), sign2.eq(sign)]

        # 3: the fine steps, round
        value, zeros = normalise(m, coarse, [2, 1])
        result = Signal(16, reset_less=True)
        m.d.comb += self.o.eq(result)
        m.d.sync += result.eq(_pack(sign2, (exponent - zeros)[:7], value, 32))
        return m


class HalfDot(wiring.Component):
    """Dot product of two vectors of FP16, a new one in every cycle.

    Members
    -------
    a, b : In(16) array of ``lanes``, FP16 bits, finite
    o : Out(16), FP16 bits, ``latency`` cycles later

    lanes : a power of two; target : see `Dsp48e2`
    """

    def __init__(self, *, lanes=64, target="generic"):
        if lanes < 1 or lanes & (lanes - 1):
            raise ValueError(f"lanes must be a power of two, not {lanes}")
        self.lanes, self._target = lanes, target
        super().__init__({"a": In(16).array(lanes), "b": In(16).array(lanes), "o": Out(16)})

    @property
    def latency(self):
        """Cycles from the operands to ``o``."""
        return HalfMul.latency + HalfAdd.latency * (self.lanes.bit_length() - 1)

    @staticmethod
    def model(a, b):
        """Bits of the dot product of FP16 bits [..., lanes]."""
        terms = HalfMul.model(a, b)
        while terms.shape[-1] > 1:
            terms = HalfAdd.model(terms[..., ::2], terms[..., 1::2])
        return terms[..., 0]

    def elaborate(self, platform):
        m = Module()
        terms = []
        for lane in range(self.lanes):
            m.submodules[f"mul{lane}"] = unit = HalfMul(target=self._target)
            m.d.comb += [unit.a.eq(self.a[lane]), unit.b.eq(self.b[lane])]
            terms.append(unit.o)
        while len(terms) > 1:
            sums = []
            for index in range(0, len(terms), 2):
                m.submodules[f"add{len(terms)}_{index // 2}"] = unit = HalfAdd()
                m.d.comb += [unit.a.eq(terms[index]), unit.b.eq(terms[index + 1])]
                sums.append(unit.o)
            terms = sums
        m.d.comb += self.o.eq(terms[0])
        return m
