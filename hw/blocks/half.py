"""FP32 to FP16 and to fixed point, and the parts of an FP16 number. Ports and enables are those of `fp`."""

import numpy as np
from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .fp import at_least, fields_model, wire

__all__ = ["HALF_LARGEST", "ToFixed", "ToHalf", "half_parts", "half_parts_model", "widen", "widen_model"]

HALF_LARGEST = 0x7BFF
"""Bits of 65504, the largest FP16 number."""


def half_parts(bits):
    """(sig, es) of a 16-bit FP16 value: combinational, signed(13) and unsigned(5); value = sig * 2^(es - 25).

    Exponent field 31 is an ordinary exponent.
    """
    # Nothing that takes logic is used twice: a simulator then evaluates it with the register that takes it, if at all.
    sign, field = bits[15], bits[10:15]
    magnitude = Cat(bits[:10], field.any())
    return (Cat(magnitude ^ sign.replicate(11), sign).as_signed() + sign, Cat(bits[10] | (field == 0), bits[11:15]))


def half_parts_model(bits):
    """``half_parts`` on arrays: FP16 bits to int64 (sig, es)."""
    bits = np.asarray(bits).astype(np.int64)
    field = (bits >> 10) & 31
    magnitude = (bits & 1023) | np.where(field > 0, 1024, 0)
    return np.where(bits >> 15, -magnitude, magnitude), np.maximum(field, 1)


def widen(bits):
    """FP32 bits of a 16-bit FP16 value, combinational. Exponent field 0 is zero, 31 an ordinary exponent."""
    return Mux(bits[10:15].any(), Cat(Const(0, 13), bits[:10], bits[10:15] + Const(112, 7), bits[15]), 0)


def widen_model(bits):
    """``widen`` on arrays."""
    bits = np.asarray(bits).astype(np.int64)
    field = (bits >> 10) & 31
    return np.where(field, bits >> 15 << 31 | field + 112 << 23 | (bits & 1023) << 13, 0).astype(np.uint32)


class ToHalf(wiring.Component):
    """FP32 to FP16, nearest even, with FP16 subnormals; the magnitude saturates at 65504 and zero keeps its sign.

    Members
    -------
    a : In(32), FP32 bits
    en : In(latency), register enables
    o : Out(16), FP16 bits
    saturated : Out(1), the rounded magnitude was above 65504; at the same time as ``o``
    """

    latency = 2

    def __init__(self):
        super().__init__({"a": In(32), "en": In(self.latency), "o": Out(16), "saturated": Out(1)})

    @staticmethod
    def model(a):
        """(FP16 bits, saturated) of FP32 bits."""
        negative, field, significand = fields_model(a)
        base = np.maximum(field, 113)  # exponent field of the smallest normal FP16 number
        down = np.minimum(13 + base - field, 40)
        kept, rest, half = significand >> down, significand & ((1 << down) - 1), 1 << (down - 1)
        kept += (rest > half) | ((rest == half) & (kept & 1 == 1))
        magnitude = ((base - 113) << 10) + kept
        saturated = magnitude > HALF_LARGEST
        bits = (negative << 15) | np.where(saturated, HALF_LARGEST, magnitude)
        return bits.astype(np.uint16), saturated

    def elaborate(self, platform):
        m = Module()

        # 1: denormalise below the smallest normal number; the last bit gathers what was lost
        field = self.a[23:31]
        extended = Cat(self.a[:23], Const(1, 1))
        places = Signal(4)
        kept = Signal(25, reset_less=True)
        base = Signal(8, reset_less=True)
        sign = Signal(reset_less=True)
        m.d.comb += places.eq(Mux(at_least(field, 113), 0, Mux(~at_least(field, 113 - 15), 15, (113 - field)[:4])))
        shifted = wire(m, Cat(Const(0, 15), extended) >> places, "shifted")
        with m.If(self.en[0]):
            m.d.sync += [
                kept.eq(Mux(field.any(), Cat(shifted[:15].any(), shifted[15:39]), 0)),
                base.eq(Mux(at_least(field, 113), field - 113, 0)),
                sign.eq(self.a[31]),
            ]

        # 2: round; the hidden bit counts the exponent up by one, so that subnormal numbers need no case
        up = kept[13] & (kept[14] | kept[:13].any())
        magnitude = wire(m, Cat(Const(0, 10), base) + kept[14:] + up, "magnitude")
        large = wire(m, at_least(magnitude, HALF_LARGEST + 1), "large")
        result, saturated = Signal(16, reset_less=True), Signal(reset_less=True)
        m.d.comb += [self.o.eq(result), self.saturated.eq(saturated)]
        with m.If(self.en[1]):
            m.d.sync += [result.eq(Cat(Mux(large, HALF_LARGEST, magnitude[:15]), sign)), saturated.eq(large)]
        return m


class ToFixed(wiring.Component):
    """min(floor(a * 2^fraction + 1/2), 2^limit) for a >= 0.

    Members
    -------
    a : In(32), FP32 bits, not negative (the sign is not looked at)
    en : In(latency), register enables
    o : Out(limit + 1), unsigned
    """

    latency = 2

    def __init__(self, fraction, limit):
        if not 24 <= limit <= 62:
            raise ValueError(f"limit must be 24..62, not {limit}")
        self._top = 127 + limit - fraction  # exponent field of 2^(limit - fraction), the clamp
        if not 1 <= self._top <= 255:
            raise ValueError(f"2^(limit - fraction) must be an FP32 number, not 2^{limit - fraction}")
        self._limit = limit
        super().__init__({"a": In(32), "en": In(self.latency), "o": Out(limit + 1)})

    @staticmethod
    def model(a, fraction, limit):
        """Fixed-point values (int64) of FP32 bits."""
        _, field, significand = fields_model(a)
        places = field - 150 + fraction
        up = significand << np.clip(places, 0, limit - 23)
        down = np.clip(-places, 0, 40)
        return np.minimum(np.where(places >= 0, up, (significand + (1 << down >> 1)) >> down), 1 << limit)

    def elaborate(self, platform):
        m = Module()

        # 1: the value with one more fraction bit, from a significand at the highest place that is not clamped
        field = self.a[23:31]
        extended = Cat(Const(0, self._limit - 23), self.a[:23], Const(1, 1))
        large = field >= self._top
        places = Signal(6)
        shifted = Signal(self._limit + 2, reset_less=True)
        m.d.comb += places.eq(Mux(field < self._top - 1 - 63, 63, (self._top - 1 - field)[:6]))
        with m.If(self.en[0]):
            m.d.sync += shifted.eq(Mux(large, 1 << (self._limit + 1), Mux(field.any(), extended >> places, 0)))

        # 2: round half up
        result = Signal(self._limit + 1, reset_less=True)
        m.d.comb += self.o.eq(result)
        with m.If(self.en[1]):
            m.d.sync += result.eq((shifted + 1)[1:])
        return m
