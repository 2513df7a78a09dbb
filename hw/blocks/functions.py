"""Functions of the vector unit: 2^x, 1/x, 1/sqrt(x) and 1/(1 + 2^x) by tables and quadratic interpolation.

docs/numerics.md, "Functions", defines each bit. The tables are made with 50-digit decimal arithmetic, so that every
machine makes the same ones. Ports and enables are those of `skipopu.hw.blocks.fp`.
"""

import decimal
import functools
from decimal import Decimal

import numpy as np
from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from .fp import LARGEST, FpMul, at_least, delay, fields_model, round_model, wire

__all__ = ["CURVES", "Exp2", "QuadTable", "Recip", "Rsqrt", "Sigmoid", "coefficients", "quad_model"]

_SEGMENTS = 128


def _exp2(x):
    y, log2 = Decimal(2) ** x, Decimal(2).ln()
    return y, y * log2, y * log2 * log2 / 2


def _recip(x):
    y = 1 / (1 + x)
    return y, -y * y, y * y * y


def _rsqrt(x):
    y = 1 / (1 + x).sqrt()
    return y, -y / (1 + x) / 2, y / (1 + x) / (1 + x) * 3 / 8


def _rsqrt_half(x):
    root = Decimal(2).sqrt()
    return tuple(term / root for term in _rsqrt(x))


CURVES = {"exp2": _exp2, "recip": _recip, "rsqrt": _rsqrt, "rsqrt_half": _rsqrt_half}
"""Name to a function of x (Decimal, 0..1) that returns f(x), f'(x) and f''(x) / 2."""


@functools.cache
def coefficients(curve):
    """The table of ``curve``: int64 [segments, 3], c0 with 30, c1 with 22 and c2 with 14 fraction bits."""
    with decimal.localcontext(prec=50):
        middles = [(Decimal(i) + Decimal("0.5")) / _SEGMENTS for i in range(_SEGMENTS)]
        rows = [[int((term * 2**bits).to_integral_value(decimal.ROUND_HALF_UP))
                 for term, bits in zip(CURVES[curve](x), (30, 22, 14))] for x in middles]
    return np.array(rows, np.int64)


def quad_model(curve, fraction):
    """QUAD of docs/numerics.md for 23-bit fractions: int64 with 30 fraction bits."""
    fraction = np.asarray(fraction, np.int64)
    c0, c1, c2 = coefficients(curve)[fraction >> 16].T
    d = (fraction & 0xFFFF) - 32768
    return c0 + ((c1 * d) >> 15) + ((c2 * ((d * d) >> 14)) >> 16)


class QuadTable(wiring.Component):
    """QUAD of docs/numerics.md for one or two curves, plus a rounding constant.

    Members
    -------
    select : In(1), which of two curves (absent when there is one)
    fraction : In(23)
    en : In(latency), register enables
    y : Out(32), 30 fraction bits, ``bias`` included
    """

    latency = 4

    def __init__(self, *curves, bias):
        if len(curves) not in (1, 2):
            raise ValueError(f"a table holds one or two curves, not {len(curves)}")
        self._curves, self._bias = curves, bias
        ports = {"fraction": In(23), "en": In(self.latency), "y": Out(32)}
        super().__init__(ports | ({"select": In(1)} if len(curves) == 2 else {}))

    def elaborate(self, platform):
        m = Module()
        rows = (np.concatenate([coefficients(curve) for curve in self._curves]) + [self._bias, 0, 0]).tolist()
        address = Cat(self.fraction[16:], self.select) if len(self._curves) == 2 else self.fraction[16:]

        # 1: read the table, two memories of 36 bits at most, as wide as a block RAM: values, and slopes (of one sign,
        # which is not stored) with bends.
        values, slopes, bends = zip(*rows)
        falls = max(slopes) < 0
        slope_bits, bend_bits = (max(abs(x) for x in column).bit_length() for column in (slopes, bends))
        words = [slope % (1 << slope_bits) | bend << slope_bits for slope, bend in zip(slopes, bends)]
        reads = {}
        for name, column in ("values", values), ("words", words):
            m.submodules[name] = memory = Memory(shape=max(column).bit_length(), depth=len(rows), init=column)
            read = memory.read_port()
            m.d.comb += [read.addr.eq(address), read.en.eq(self.en[0])]
            reads[name] = read.data
        c0, word = reads.values()
        c1, c2 = Cat(word[:slope_bits], Const(falls, 1)).as_signed(), word[slope_bits:]
        d = Signal(signed(16), reset_less=True)
        with m.If(self.en[0]):
            m.d.sync += d.eq(Cat(self.fraction[:15], ~self.fraction[15]))

        # 2: the two products of d
        sum0 = Signal(32, reset_less=True)
        linear = Signal(signed(slope_bits + 2), reset_less=True)
        square = Signal(17, reset_less=True)
        curvature = Signal(bend_bits, reset_less=True)
        with m.If(self.en[1]):
            m.d.sync += [sum0.eq(c0), linear.eq((c1 * d) >> 15), square.eq((d * d) >> 14),
                         curvature.eq(c2)]

        # 3: the quadratic term
        sum1 = Signal(32, reset_less=True)
        quadratic = Signal(bend_bits + 1, reset_less=True)
        with m.If(self.en[2]):
            m.d.sync += [sum1.eq(sum0 + linear), quadratic.eq((curvature * square) >> 16)]

        # 4: the sum
        y = Signal(32, reset_less=True)
        m.d.comb += self.y.eq(y)
        with m.If(self.en[3]):
            m.d.sync += y.eq(sum1 + quadratic)
        return m


_BIAS = 512  # added to exponent fields, so that out-of-range ones need no sign
_OVERFLOW = _BIAS + 256
_ONE = 0x3F800000


def _assemble(sign, exponent, fraction):
    """FP32 bits of a rounded result; ``exponent`` is the field plus ``_BIAS``."""
    small = ~exponent[9] | ~exponent[:9].any()
    large = exponent[8] | exponent[:8].all()
    return Mux(small, 0, Cat(Mux(large, LARGEST, Cat(fraction, exponent[:8])), sign))


class Exp2(wiring.Component):
    """2^a.

    Largest relative error over all FP16 inputs with a result in range: 9.76e-8 (1.64 units of 2^-24).

    Members
    -------
    a : In(32), FP32 bits
    en : In(latency), register enables
    o : Out(32), FP32 bits
    fixed : Out(31), floor(o * 2^30), at the same time as ``o``; only for a <= 0
    """

    latency = QuadTable.latency + 2

    def __init__(self):
        super().__init__({"a": In(32), "en": In(self.latency), "o": Out(32), "fixed": Out(31)})

    @staticmethod
    def model(a):
        """Bits of 2^a."""
        negative, field, significand = fields_model(a)
        value = np.where(negative, -significand, significand)
        argument = np.where(field < 127, value >> np.clip(127 - field, 0, 63), value << np.clip(field - 127, 0, 8))
        s = (quad_model("exp2", argument & 0x7FFFFF) + 64) >> 7
        inside = round_model(0, s, (argument >> 23) - 23)
        return np.where(field < 135, inside, np.where(negative, 0, LARGEST)).astype(np.uint32)

    def elaborate(self, platform):
        m = Module()

        # 1: floor(a * 2^23). For negative a, floor(-x) = ~(x - 1 unit), taken before places are lost. From |a| = 128
        # on the result is out of range whatever the fraction.
        present, negative = Signal(), Signal()
        magnitude = Signal(30)
        places = Signal(5)
        shifted = Signal(30)
        integer, fraction = Signal(signed(8)), Signal(23, reset_less=True)
        exponent = Signal(10, reset_less=True)
        m.d.comb += [
            present.eq(self.a[23:31].any()),
            negative.eq(self.a[31] & present),
            magnitude.eq(Cat(Const(0, 6), self.a[:23], Const(1, 1)) - negative),
            places.eq((133 % 32 - self.a[23:28])[:5] | (~at_least(self.a[23:31], 133 - 31)).replicate(5)),
            shifted.eq(Mux(present, magnitude >> places, 0)),
            integer.eq(Cat(shifted[23:], Const(0, 1)) ^ negative.replicate(8)),
        ]
        with m.If(self.en[0]):
            m.d.sync += [
                fraction.eq(shifted[:23] ^ negative.replicate(23)),
                exponent.eq(Mux(at_least(self.a[23:31], 134), Mux(negative, 1, _OVERFLOW),
                                Cat(integer[:7], ~integer[7], Const(2, 2)))),
            ]

        # 2..5: the table
        m.submodules.table = table = QuadTable("exp2", bias=64)
        m.d.comb += [table.fraction.eq(fraction), table.en.eq(self.en[1:5])]
        exponent = delay(m, exponent, self.en[1:5], "exponent")  # of one above the result

        # 6: floating and fixed point
        result = Signal(32, reset_less=True)
        fixed = Signal(31, reset_less=True)
        down = Mux(at_least(exponent, _BIAS + 128 - 31), (-exponent[:5])[:5], 32)
        final = wire(m, (exponent + (~table.y[31]).replicate(10))[:10], "final")
        m.d.comb += [self.o.eq(result), self.fixed.eq(fixed)]
        with m.If(self.en[5]):
            m.d.sync += [
                result.eq(_assemble(Const(0, 1), final, table.y[7:30])),
                fixed.eq(Cat(Const(0, 7), table.y[7:]) >> down),
            ]
        return m


class Recip(wiring.Component):
    """1 / a; the largest finite number for zero.

    Largest relative error over all nonzero FP16 inputs: 8.06e-8 (1.36 units of 2^-24).

    Members
    -------
    a : In(32), FP32 bits
    en : In(latency), register enables
    o : Out(32), FP32 bits
    """

    latency = QuadTable.latency + 1

    def __init__(self):
        super().__init__({"a": In(32), "en": In(self.latency), "o": Out(32)})

    @staticmethod
    def model(a):
        """Bits of 1 / a."""
        negative, field, significand = fields_model(a)
        s = (quad_model("recip", significand & 0x7FFFFF) + 32) >> 6
        return np.where(field == 0, LARGEST, round_model(negative, s, 127 - field - 24)).astype(np.uint32)

    def elaborate(self, platform):
        m = Module()
        field = self.a[23:31]
        m.submodules.table = table = QuadTable("recip", bias=32)
        m.d.comb += [table.fraction.eq(self.a[:23]), table.en.eq(self.en[:4])]
        exponent = delay(m, Mux(field == 0, _OVERFLOW, _BIAS + 253 - field)[:10], self.en[:4], "exponent")
        sign = delay(m, self.a[31] & field.any(), self.en[:4], "sign")
        result = Signal(32, reset_less=True)
        m.d.comb += self.o.eq(result)
        with m.If(self.en[4]):
            m.d.sync += result.eq(_assemble(sign, wire(m, (exponent + table.y[30])[:10], "final"), table.y[6:29]))
        return m


class Rsqrt(wiring.Component):
    """1 / sqrt(a); the largest finite number for a <= 0.

    Largest relative error over all positive FP16 inputs: 5.97e-8 (1.01 units of 2^-24).

    Members
    -------
    a : In(32), FP32 bits
    en : In(latency), register enables
    o : Out(32), FP32 bits
    """

    latency = QuadTable.latency + 1

    def __init__(self):
        super().__init__({"a": In(32), "en": In(self.latency), "o": Out(32)})

    @staticmethod
    def model(a):
        """Bits of 1 / sqrt(a)."""
        negative, field, significand = fields_model(a)
        exponent, fraction = field - 127, significand & 0x7FFFFF
        y = np.where(exponent & 1, quad_model("rsqrt_half", fraction), quad_model("rsqrt", fraction))
        inside = round_model(0, (y + 32) >> 6, -(exponent >> 1) - 24)
        return np.where((negative == 1) | (field == 0), LARGEST, inside).astype(np.uint32)

    def elaborate(self, platform):
        m = Module()
        field = self.a[23:31]
        m.submodules.table = table = QuadTable("rsqrt", "rsqrt_half", bias=32)
        m.d.comb += [table.fraction.eq(self.a[:23]), table.select.eq(~field[0]), table.en.eq(self.en[:4])]
        usable = field.any() & ~self.a[31]
        exponent = Mux(usable, _BIAS + 190 - ((field + 1) >> 1), _OVERFLOW)[:10]
        exponent = delay(m, exponent, self.en[:4], "exponent")
        result = Signal(32, reset_less=True)
        m.d.comb += self.o.eq(result)
        with m.If(self.en[4]):
            final = wire(m, (exponent + table.y[30])[:10], "final")
            m.d.sync += result.eq(_assemble(Const(0, 1), final, table.y[6:29]))
        return m


class Sigmoid(wiring.Component):
    """1 / (1 + 2^a), the sigmoid of -a * ln 2.

    Largest error over all FP16 inputs: 1.88e-7 absolute; 2.21e-7 relative (3.70 units of 2^-24) where the result is at
    least 2^-125.

    Members
    -------
    a : In(32), FP32 bits
    en : In(latency), register enables
    o : Out(32), FP32 bits

    exp2 : an `Exp2` of the parent's instead of an own one; the parent gives it `argument` of ``a`` and its enables
    """

    latency = Exp2.latency + QuadTable.latency + FpMul.latency

    def __init__(self, exp2=None):
        self._exp2 = exp2
        super().__init__({"a": In(32), "en": In(self.latency), "o": Out(32)})

    @staticmethod
    def argument(a):
        """-|a|, what the 2^x of a sigmoid of ``a`` is taken of."""
        return Cat(a[:31], Const(1, 1))

    @staticmethod
    def model(a):
        """Bits of 1 / (1 + 2^a)."""
        negative, field, _ = fields_model(a)
        u = Exp2.model(np.asarray(a).astype(np.int64) | 1 << 31)
        _, field_u, significand_u = fields_model(u)
        fixed = (significand_u << 7) >> np.clip(127 - field_u, 0, 63)
        y = quad_model("recip", np.minimum(fixed >> 7, 0x7FFFFF))
        r = round_model(0, (y + 32) >> 6, -24)
        return np.where((negative == 0) & (field > 0), FpMul.model(u, r), r).astype(np.uint32)

    def elaborate(self, platform):
        m = Module()
        m.submodules.table = table = QuadTable("recip", bias=32)
        m.submodules.mul = mul = FpMul()
        start, end = Exp2.latency, Exp2.latency + QuadTable.latency
        exp2 = self._exp2
        if exp2 is None:
            m.submodules.exp2 = exp2 = Exp2()
            m.d.comb += [exp2.a.eq(self.argument(self.a)), exp2.en.eq(self.en[:start])]

        # u = 2^-|a|, then r = 1 / (1 + u); the result is u * r, or 1 * r when a <= 0
        positive = delay(m, self.a[23:31].any() & ~self.a[31], self.en[:start], "positive")
        factor = delay(m, Mux(positive, exp2.o, _ONE), self.en[start:end], "factor")
        m.d.comb += [
            table.fraction.eq(exp2.fixed[7:30] | exp2.fixed[30].replicate(23)), table.en.eq(self.en[start:end]),
            mul.a.eq(factor), mul.b.eq(Cat(table.y[6:29], 126 + table.y[30], Const(0, 1))[:32]),
            mul.en.eq(self.en[end:]), self.o.eq(mul.o),
        ]
        return m
