"""FP32 arithmetic of the vector unit: multiply, add, scale by a power of two, integer to FP32.

The format and its rounding are those of docs/numerics.md, "FP32 of the vector unit": round to nearest even, no
subnormals, infinities or NaN; too small becomes +0, too large the largest finite number.

All components share one port style: operands in, ``en`` (bit i loads the registers after stage i), ``o`` out,
``latency`` cycles after the operands. There is no back-pressure and no valid bit: the parent shifts its own valid bits
into ``en``. Models take and return arrays of FP32 bit patterns as unsigned integers.
"""

import numpy as np
from amaranth.hdl import Cat, Const, Module, Mux, Signal, Value, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = ["LARGEST", "FpAdd", "FpMul", "FromInt", "delay", "fields_model", "normalise", "pack", "round_model",
           "scale2", "scale2_model", "wire"]

LARGEST = 0x7F7FFFFF
"""Bits of the largest finite FP32 number."""


def wire(m, value, name):
    """A signal that carries ``value``, for values with several uses.

    Amaranth writes an expression out again at each use, which grows exponentially in a chain. Verilator, on the other
    hand, evaluates a signal with several uses in every cycle, an expression in front of a register only when it is
    enabled: a last step with two or three uses is better left an expression.
    """
    signal = Signal(Value.cast(value).shape(), name=name)
    m.d.comb += signal.eq(value)
    return signal


def normalise(m, value, steps):
    """Shift ``value`` up by each of ``steps`` (each half of the one before) if so many bits at the top are zero.

    Returns (shifted value of the same width, sum of the steps taken). A log shifter: few, branch-free operations in
    simulation, and it can be cut between any two steps.
    """
    width, taken = len(value), []
    for step in steps:
        empty = wire(m, value[width - step:] == 0, f"empty_{step}")
        value = wire(m, Mux(empty, Cat(Const(0, step), value[:width - step]), value), f"normal_{step}")
        taken.append(empty)
    return value, Cat(Const(0, steps[-1].bit_length() - 1), *reversed(taken))


def pack(sign, exponent, value):
    """Round ``value``, a significand with its leading one at the top bit, and pack it to FP32.

    exponent : exponent field of the leading one plus 2^(its width - 1), so that no comparison is signed
    value : at least 26 bits; the top bit is 0 only when the number is zero
    """
    offset = 1 << (len(exponent) - 1)
    low = len(value) - 24
    up = value[low - 1] & (value[low] | value[:low - 1].any())
    # a carry moves on into the exponent
    rounded = (Cat(value[low:-1], exponent) + up)[:23 + len(exponent)]
    small = ~value[-1] | (exponent < offset + 1)
    large = rounded[23:] >= offset + 255
    return Mux(small, 0, Cat(Mux(large, LARGEST, rounded[:31]), sign))


def delay(m, value, enables, name):
    """``value`` after one register for each bit of ``enables``."""
    for index, enable in enumerate(enables):
        register = Signal(len(value), reset_less=True, name=f"{name}_{index + 1}")
        with m.If(enable):
            m.d.sync += register.eq(value)
        value = register
    return value


def round_model(negative, magnitude, exponent):
    """FP32 bits of magnitude * 2^exponent (uint64, int64), rounded, flushed and saturated."""
    magnitude = np.asarray(magnitude, np.uint64)
    smeared = magnitude
    for step in (1, 2, 4, 8, 16, 32):
        smeared = smeared | (smeared >> np.uint64(step))
    length = np.bitwise_count(smeared).astype(np.int64)
    field = np.asarray(exponent, np.int64) + length + 126
    down = np.maximum(length - 24, 0).astype(np.uint64)
    kept = magnitude >> down
    rest, half = magnitude - (kept << down), (np.uint64(1) << down) >> np.uint64(1)
    up = (down > 0) & ((rest > half) | ((rest == half) & (kept & np.uint64(1) == 1)))
    significand = (kept << np.maximum(24 - length, 0).astype(np.uint64)).astype(np.int64)
    word = np.minimum((field << 23) + (significand - (1 << 23)) + up, LARGEST)
    word = word | (np.asarray(negative, np.int64) << 31)
    return np.where((magnitude == 0) | (field < 1), 0, word).astype(np.uint32)


def fields_model(bits):
    """(negative, exponent field, 24-bit significand) of FP32 bit patterns as int64; significand 0 for zero."""
    bits = np.asarray(bits).astype(np.int64)
    field = (bits >> 23) & 0xFF
    return bits >> 31, field, np.where(field == 0, 0, (bits & 0x7FFFFF) | 0x800000)


def scale2(a, n):
    """a * 2^n for FP32 bits ``a`` and a signed ``n``: a combinational value of 32 bits."""
    field = a[23:31] + n
    small = (a[23:31] == 0) | (field < 1)
    return Mux(small, 0, Mux(field > 254, Cat(Const(LARGEST, 31), a[31]), Cat(a[:23], field[:8], a[31])))


def scale2_model(a, n):
    """``scale2`` on arrays: FP32 bits and integers to FP32 bits."""
    negative, field, significand = fields_model(a)
    return round_model(negative, significand, field - 150 + n)


class FpMul(wiring.Component):
    """FP32 product.

    Members
    -------
    a, b : In(32), FP32 bits
    en : In(latency), register enables
    o : Out(32), FP32 bits

    b_bits : of the significand of b, the rest of which is zero
    """

    latency = 2

    def __init__(self, *, b_bits=24):
        self._b_bits = b_bits
        super().__init__({"a": In(32), "b": In(32), "en": In(self.latency), "o": Out(32)})

    @staticmethod
    def model(a, b):
        """Bits of a * b."""
        negative_a, field_a, significand_a = fields_model(a)
        negative_b, field_b, significand_b = fields_model(b)
        return round_model(negative_a ^ negative_b, significand_a * significand_b, field_a + field_b - 300)

    def elaborate(self, platform):
        m = Module()
        product = Signal(48, reset_less=True)
        exponent = Signal(10, reset_less=True)
        sign = Signal(reset_less=True)
        result = Signal(32, reset_less=True)
        m.d.comb += self.o.eq(result)

        # 1: multiply the significands; a zero operand makes the product zero through the exponent
        rest = 24 - self._b_bits
        a, b = Cat(self.a[:23], Const(1, 1)), Cat(self.b[rest:23], Const(1, 1))
        both = self.a[23:31].any() & self.b[23:31].any()
        with m.If(self.en[0]):
            m.d.sync += [
                product.eq((a * b) << rest),
                exponent.eq(Mux(both, self.a[23:31] + self.b[23:31] + (512 - 127), 0)),
                sign.eq(self.a[31] ^ self.b[31]),
            ]

        # 2: one place of normalisation, round
        value = Mux(product[47], product, Cat(Const(0, 1), product[:47]))
        with m.If(self.en[1]):
            m.d.sync += result.eq(pack(sign, (exponent + product[47])[:10], value))
        return m


class FpAdd(wiring.Component):
    """FP32 sum.

    Members
    -------
    a, b : In(32), FP32 bits
    en : In(latency), register enables
    o : Out(32), FP32 bits
    """

    latency = 3

    def __init__(self):
        super().__init__({"a": In(32), "b": In(32), "en": In(self.latency), "o": Out(32)})

    @staticmethod
    def model(a, b):
        """Bits of a + b."""
        a, b = (np.asarray(x).astype(np.int64) for x in (a, b))
        swap = (b & 0x7FFFFFFF) > (a & 0x7FFFFFFF)
        large, small = np.where(swap, b, a), np.where(swap, a, b)
        negative, field, significand = fields_model(large)
        negative_small, field_small, addend = fields_model(small)
        distance = field - field_small
        # Beyond 30 places the smaller operand is too small to change the rounded result.
        addend = np.where(distance > 30, 0, (addend << 30) >> np.minimum(distance, 30))
        total = (significand << 30) + np.where(negative == negative_small, addend, -addend)
        return round_model(negative, total, field - 180)

    def elaborate(self, platform):
        m = Module()
        a, b = self.a, self.b

        # 1: the larger magnitude first; align the smaller one to it, with guard, round and sticky bits
        swap = Signal()
        large, small = Signal(31), Signal(31)
        distance = Signal(8)
        shift = Signal(5)
        extended = Signal(27)
        augend = Signal(24, reset_less=True)
        addend = Signal(27, reset_less=True)
        exponent = Signal(8, reset_less=True)
        sign = Signal(reset_less=True)
        subtract = Signal(reset_less=True)
        m.d.comb += [
            swap.eq(b[:31] > a[:31]),
            large.eq(Mux(swap, b[:31], a[:31])),
            small.eq(Mux(swap, a[:31], b[:31])),
            distance.eq(large[23:] - small[23:]),
            shift.eq(Mux(distance > 31, 31, distance)),
            extended.eq(Mux(small[23:].any(), Cat(Const(0, 3), small[:23], Const(1, 1)), 0)),
        ]
        lost = (extended & ~(Const(-1, 27).as_unsigned() << shift)[:27]) != 0
        with m.If(self.en[0]):
            m.d.sync += [
                augend.eq(Mux(large[23:].any(), Cat(large[:23], Const(1, 1)), 0)),
                addend.eq((extended >> shift) | lost),
                exponent.eq(large[23:]),
                sign.eq(Mux(swap, b[31], a[31])),
                subtract.eq(a[31] ^ b[31]),
            ]

        # 2: add or subtract, and the coarse steps of the normalisation
        total = Signal(28)
        coarse = Signal(28, reset_less=True)
        biased = Signal(10, reset_less=True)
        sign2 = Signal(reset_less=True)
        augend_up = Cat(Const(0, 3), augend, Const(0, 1))
        m.d.comb += total.eq(augend_up + (Cat(addend, Const(0, 1)) ^ subtract.replicate(28)) + subtract)
        value, zeros = normalise(m, total, [16, 8, 4])
        with m.If(self.en[1]):
            m.d.sync += [coarse.eq(value), biased.eq(exponent + 513 - zeros), sign2.eq(sign)]

        # 3: the fine steps, round
        result = Signal(32, reset_less=True)
        m.d.comb += self.o.eq(result)
        value, zeros = normalise(m, coarse, [2, 1])
        with m.If(self.en[2]):
            m.d.sync += result.eq(pack(sign2, (biased - zeros)[:10], value))
        return m


class FromInt(wiring.Component):
    """a * 2^n as FP32, for a signed integer a.

    Members
    -------
    a : In(signed(width))
    n : In(signed(exponent_width))
    en : In(latency), register enables
    o : Out(32), FP32 bits
    """

    latency = 3

    def __init__(self, width=48, exponent_width=10):
        if not 32 <= width <= 64:
            raise ValueError(f"width must be 32..64, not {width}")
        self._bias = 1 << max(10, exponent_width)
        super().__init__({"a": In(signed(width)), "n": In(signed(exponent_width)), "en": In(self.latency),
                          "o": Out(32)})

    @staticmethod
    def model(a, n):
        """Bits of a * 2^n; a and n int64."""
        a = np.asarray(a).astype(np.int64)
        return round_model(a < 0, np.where(a < 0, -a, a).view(np.uint64), n)

    def elaborate(self, platform):
        m = Module()
        width = len(self.a)

        # 1: magnitude and the first step of the normalisation
        magnitude = Signal(width)
        half = Signal(width, reset_less=True)
        exponent = [Signal(self._bias.bit_length(), reset_less=True, name=f"exponent_{i}") for i in range(2)]
        sign = [Signal(reset_less=True, name=f"sign_{i}") for i in range(2)]
        m.d.comb += magnitude.eq(Mux(self.a[-1], -self.a, self.a))
        value, zeros = normalise(m, magnitude, [32])
        with m.If(self.en[0]):
            m.d.sync += [
                half.eq(value), sign[0].eq(self.a[-1]),
                exponent[0].eq(self.n + (self._bias + 127 + width - 1) - zeros),
            ]

        # 2: the coarse steps
        coarse = Signal(width, reset_less=True)
        value, zeros = normalise(m, half, [16, 8, 4])
        with m.If(self.en[1]):
            m.d.sync += [coarse.eq(value), sign[1].eq(sign[0]), exponent[1].eq(exponent[0] - zeros)]

        # 3: the fine steps, round
        result = Signal(32, reset_less=True)
        m.d.comb += self.o.eq(result)
        value, zeros = normalise(m, coarse, [2, 1])
        with m.If(self.en[2]):
            m.d.sync += result.eq(pack(sign[1], (exponent[1] - zeros)[:len(exponent[1])], value))
        return m
