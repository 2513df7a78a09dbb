"""FP32 arithmetic of the vector unit: multiply, add, scale by a power of two, integer to FP32.

The format and its rounding are those of docs/numerics.md, "FP32 of the vector unit": round to nearest even, no
subnormals, infinities or NaN; too small becomes +0, too large the largest finite number.

All components share one port style: operands in, ``en`` (bit i loads the registers after stage i), ``o`` out,
``latency`` cycles after the operands. There is no back-pressure and no valid bit: the parent shifts its own valid bits
into ``en``. Models take and return arrays of FP32 bit patterns as unsigned integers.
"""

import numpy as np
from amaranth.hdl import Cat, Const, Module, Mux, Shape, Signal, Value, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..formats import ACC_BITS

__all__ = ["LARGEST", "FpAdd", "FpMul", "FromInt", "at_least", "delay", "fields_model", "normalise", "pack",
           "round_model", "scale2", "scale2_model", "wire"]

_ACCUMULATOR = signed(ACC_BITS)
_ZERO = Const(0, 1)

LARGEST = 0x7F7FFFFF
"""Bits of the largest finite FP32 number."""


def wire(m, value, name):
    """A signal that carries ``value``, for values with several uses.

    Amaranth writes an expression out again at each use, which grows exponentially in a chain. Verilator, on the other
    hand, evaluates a signal with several uses in every cycle, unless `hw.sink` moves it to the registers that take it,
    which must be of one enable: otherwise a last step with two or three uses is better left an expression.
    """
    signal = Signal(Value.cast(value).shape(), name=name)
    m.d.comb += signal.eq(value)
    return signal


def at_least(value, limit):
    """Whether an unsigned ``value`` is at least a constant: a few gates, where a comparison would be a carry chain.

    limit : at least 1
    """
    length = limit.bit_length()
    if length < len(value):
        return value[length:].any() | at_least(value[:length], limit)
    below = (~limit & ((1 << length) - 1)).bit_length()  # the run of ones at the top
    rest = limit & ((1 << below) - 1)
    return value[below:].all() & at_least(value[:below], rest) if rest else value[below:].all()


def normalise(m, value, steps, fill=_ZERO):
    """Shift ``value`` up by each of ``steps`` (each half of the one before) if so many bits at the top are zero.

    Returns (shifted value of the same width, sum of the steps taken); copies of the bit ``fill`` enter from below. A
    log shifter: few, branch-free operations in simulation, and it can be cut between any two steps. Two steps look at
    the value together, because the choice among four places is one LUT6.
    """
    width, taken = len(value), []

    def shift(value, step, empty):
        taken.append(empty)
        return wire(m, Mux(empty, Cat(fill.replicate(step), value[:width - step]), value), f"normal_{step}")

    for step, half in zip(steps[::2], [*steps[1::2], 0]):
        if not half:
            value = shift(value, step, wire(m, value[width - step:] == 0, f"empty_{step}"))
            continue
        upper, middle, lower = (value[width - (i + 1) * half:width - i * half] == 0 for i in range(3))
        upper = wire(m, upper, f"upper_{step}")
        both = wire(m, upper & middle, f"empty_{step}")
        value = shift(shift(value, step, both), half, wire(m, Mux(both, lower, upper), f"empty_{half}"))
    return value, Cat(Const(0, steps[-1].bit_length() - 1), *reversed(taken))


def pack(m, sign, exponent, value, *, step, zero, below=_ZERO):
    """Round ``value``, a significand with its leading one at the top bit, and pack it to FP32.

    exponent : exponent field of the leading one less ``step``, plus 2^(its width - 1), so that no comparison is signed
    step : as wide as ``exponent``, modulo 2^width; enters the carry chain of the rounding
    value : at least 26 bits; zero : the number is zero
    below : the bits after the last one are all equal to it, without end
    """
    width, low = len(exponent), len(value) - 24
    rest = (value[:low - 1] ^ below.replicate(low - 1)).any()
    up = Mux(below, value[low - 1] | (value[low] & ~rest), value[low - 1] & (value[low] | rest))
    exact = below & value[low - 1] & ~rest
    # One chain: a carry moves on into the exponent.
    total = Cat(Const(1, 1), value[low:-1], exponent) + Cat(up, Const(0, 23), step)
    rounded = wire(m, total[1:24 + width], "rounded")
    field = rounded[23:]
    # Flushed before rounding: what rounding lifts to the smallest exponent is zero.
    carried = (field[0] ^ exponent[0] ^ step[0]) & ~exact
    small = zero | ~field[-1] | ((field[1:-1] == 0) & (~field[0] | carried))
    large = field[8:-1].any() | field[:8].all()
    return Mux(small, 0, Cat(Mux(large, LARGEST, rounded[:31]), sign))


def shift_down(m, value, places):
    """(``value`` shifted down by ``places``, whether a one was lost)."""
    lost = []
    for index in reversed(range(len(places))):
        step = min(1 << index, len(value))
        lost.append(places[index] & value[:step].any())
        value = wire(m, Mux(places[index], Cat(value[step:], Const(0, step)), value), f"down_{step}")
    return value, Cat(*lost).any()


def below_one(taken, width):
    """1 - ``taken`` (two bits) as ``width`` bits, modulo 2^width."""
    return Cat(~taken[0], taken[1].replicate(width - 1))


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
    """a * 2^n for FP32 bits ``a`` and an ``n`` of -256..255: a combinational value of 32 bits."""
    field = (a[23:31] + n)[:10]
    small = ~a[23:31].any() | field[9] | ~field.any()
    return Mux(small, 0, Cat(Mux(field[8] | field[:8].all(), LARGEST, Cat(a[:23], field[:8])), a[31]))


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
        sign, zero = Signal(reset_less=True), Signal(reset_less=True)
        result = Signal(32, reset_less=True)
        m.d.comb += self.o.eq(result)

        # 1: multiply the significands; the exponent, plus 512, lacks one, as 128 is a bit and 127 takes an adder
        rest = 24 - self._b_bits
        a, b = Cat(self.a[:23], Const(1, 1)), Cat(self.b[rest:23], Const(1, 1))
        with m.If(self.en[0]):
            m.d.sync += [
                product.eq((a * b) << rest),
                exponent.eq(self.a[23:31] + Cat(self.b[23:30], (~self.b[30]).replicate(2), self.b[30])),
                sign.eq(self.a[31] ^ self.b[31]),
                zero.eq(~self.a[23:31].any() | ~self.b[23:31].any()),
            ]

        # 2: one place of normalisation, round
        top = product[47]
        value = Mux(top, product, Cat(Const(0, 1), product[:47]))
        with m.If(self.en[1]):
            m.d.sync += result.eq(pack(m, sign, exponent, value, step=Cat(~top, top, Const(0, 8)), zero=zero))
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
        addend = Signal(28, reset_less=True)
        exponent = Signal(8, reset_less=True)
        sign = Signal(reset_less=True)
        subtract = Signal(reset_less=True)
        m.d.comb += [
            swap.eq(b[:31] > a[:31]),
            large.eq(Mux(swap, b[:31], a[:31])),
            small.eq(Mux(swap, a[:31], b[:31])),
            distance.eq(large[23:] - small[23:]),
            shift.eq(distance[:5] | distance[5:].any().replicate(5)),
            extended.eq(Mux(small[23:].any(), Cat(Const(0, 3), small[:23], Const(1, 1)), 0)),
        ]
        different = a[31] ^ b[31]
        shifted, lost = shift_down(m, extended, shift)
        with m.If(self.en[0]):
            m.d.sync += [
                augend.eq(Mux(large[23:].any(), Cat(large[:23], Const(1, 1)), 0)),
                addend.eq(Cat(shifted[0] | lost, shifted[1:], Const(0, 1)) ^ different.replicate(28)),
                exponent.eq(large[23:]),
                sign.eq(Mux(swap, b[31], a[31])),
                subtract.eq(different),
            ]

        # 2: add or subtract, and the coarse steps of the normalisation
        total = Signal(28)
        coarse = Signal(28, reset_less=True)
        biased = Signal(10, reset_less=True)
        sign2 = Signal(reset_less=True)
        m.d.comb += total.eq((Cat(Const(1, 1), Const(0, 3), augend) + Cat(subtract, addend))[1:])
        value, zeros = normalise(m, total, [16, 8, 4])
        with m.If(self.en[1]):
            m.d.sync += [
                coarse.eq(value), biased.eq(Cat(exponent[:2], Cat(exponent[2:], Const(2, 2)) - zeros[2:])),
                sign2.eq(sign),
            ]

        # 3: the fine steps, round
        result = Signal(32, reset_less=True)
        m.d.comb += self.o.eq(result)
        value, zeros = normalise(m, coarse, [2, 1])
        with m.If(self.en[2]):
            m.d.sync += result.eq(pack(m, sign2, biased, value, step=below_one(zeros, 10), zero=~value[-1]))
        return m


class FromInt(wiring.Component):
    """a * 2^n as FP32, for an integer a.

    Members
    -------
    a : In(shape), signed or unsigned, of 17 to 64 bits
    n : In(signed(exponent_width))
    en : In(latency), register enables
    o : Out(32), FP32 bits
    """

    latency = 3

    def __init__(self, shape=_ACCUMULATOR, exponent_width=10):
        shape = Shape.cast(shape)
        if not 17 <= shape.width <= 64:
            raise ValueError(f"width must be 17..64, not {shape.width}")
        self._bias = 1 << max(10, exponent_width)
        super().__init__({"a": In(shape), "n": In(signed(exponent_width)), "en": In(self.latency), "o": Out(32)})

    @staticmethod
    def model(a, n):
        """Bits of a * 2^n; a and n int64."""
        a = np.asarray(a).astype(np.int64)
        return round_model(a < 0, np.where(a < 0, -a, a).view(np.uint64), n)

    def elaborate(self, platform):
        m = Module()

        # 1: the magnitude, less one for a negative number. Ones without end behind its last bit stand for that one and
        # enter from below; they are the leading ones where there is no other, so the steps must exceed the width.
        if Value.cast(self.a).shape().signed:
            negative, magnitude = self.a[-1], self.a[:-1] ^ self.a[-1].replicate(len(self.a) - 1)
        else:
            negative, magnitude = Const(0, 1), self.a
        places = len(magnitude)
        padding = max(26 - places, int(places & (places - 1) == 0))
        width = places + padding
        steps = [1 << k for k in reversed(range(width.bit_length()))]
        half, coarse = (Signal(width, reset_less=True, name=name) for name in ("half", "coarse"))
        exponent = [Signal(self._bias.bit_length(), reset_less=True, name=f"exponent_{i}") for i in range(2)]
        sign = [Signal(reset_less=True, name=f"sign_{i}") for i in range(2)]
        value, zeros = Cat(negative.replicate(padding), magnitude), Const(0, 1)
        if steps[:-5]:
            value, zeros = normalise(m, wire(m, value, "magnitude"), steps[:-5], negative)
        with m.If(self.en[0]):
            m.d.sync += [
                half.eq(value), sign[0].eq(negative), exponent[0].eq(self.n + (self._bias + 125 + places) - zeros),
            ]

        # 2: the coarse steps
        value, zeros = normalise(m, half, steps[-5:-2], sign[0])
        with m.If(self.en[1]):
            m.d.sync += [coarse.eq(value), sign[1].eq(sign[0]), exponent[1].eq(exponent[0] - zeros)]

        # 3: the fine steps, round
        result = Signal(32, reset_less=True)
        m.d.comb += self.o.eq(result)
        value, zeros = normalise(m, coarse, steps[-2:], sign[1])
        with m.If(self.en[2]):
            m.d.sync += result.eq(pack(m, sign[1], exponent[1], value, step=below_one(zeros, len(exponent[1])),
                                       zero=~value[-1], below=sign[1]))
        return m
