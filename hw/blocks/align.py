"""Block alignment: FP32 elements to integer mantissas with one shared exponent, as docs/numerics.md defines."""

import operator

import numpy as np
from amaranth.hdl import Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..formats import ATTENTION_BITS, MANTISSA_BITS
from .fp import delay, fields_model, wire
from .trees import tree

__all__ = ["BlockAlign"]

_FIRST_GROUP = 8  # elements whose largest exponent, and whose sum, is formed in one stage


class BlockAlign(wiring.Component):
    """Mantissas, shared exponent and sum of mantissas of one block, a block each cycle.

    Members
    -------
    a : In(32) array of ``block``, FP32 bits
    short : In(1), with ``a``: mantissas of ATTENTION_BITS, for queries and probabilities
    en : In(latency), register enables
    m : Out(signed(16)) array of ``block``
    e : Out(signed(9)), -127 for a block of zeros
    s : Out(signed), sum of ``m``
    """

    latency = 6

    def __init__(self, block=32):
        if block < 1 or block & (block - 1):
            raise ValueError(f"block must be a power of two, not {block}")
        self._block = block
        super().__init__({
            "a": In(32).array(block), "short": In(1), "en": In(self.latency),
            "m": Out(signed(MANTISSA_BITS)).array(block), "e": Out(signed(9)),
            "s": Out(signed(MANTISSA_BITS + block.bit_length() - 1)),
        })

    @staticmethod
    def model(a, short=False):
        """(m, e, s) as int64 of FP32 bits [..., block], with m [..., block]; short : bool, or one per block [...]."""
        bits = np.where(short, ATTENTION_BITS, MANTISSA_BITS)[..., None]
        negative, field, significand = fields_model(a)
        top = field.max(axis=-1, keepdims=True)
        down = np.minimum(25 - bits + top - field, 40)
        magnitude = np.minimum((significand + (1 << (down - 1))) >> down, (1 << (bits - 1)) - 1)
        mantissa = np.where(negative, -magnitude, magnitude)
        return mantissa, top[..., 0] - 127, mantissa.sum(axis=-1)

    def elaborate(self, platform):
        m = Module()
        block, en = self._block, self.en

        def register(stage, value, name):
            return delay(m, value, [en[stage]], name)

        def groups(values, stage, combine, name):
            return [register(stage, tree(values[i:i + _FIRST_GROUP], combine), f"{name}_{i}")
                    for i in range(0, block, _FIRST_GROUP)]

        # 1, 2: the largest exponent. Sign and the upper 16 bits of the significand are all that later stages need.
        def larger(x, y):
            return wire(m, Mux(x > y, x, y), "larger")

        top = register(1, tree(groups([a[23:31] for a in self.a], 0, larger, "largest"), larger), "top")
        held = [delay(m, Cat(a[8:23], a[23:32]), en[:2], f"held_{k}") for k, a in enumerate(self.a)]

        # 3: shift to the block's exponent, with one bit below the mantissa
        short = delay(m, self.short, en[:2], "short")
        reach = wire(m, top + short * (MANTISSA_BITS - ATTENTION_BITS), "reach")
        shifted, signs = [], []
        for k, element in enumerate(held):
            field, distance = element[15:23], Signal(9, name=f"distance_{k}")
            m.d.comb += distance.eq(reach - field)
            value = Cat(element[:15], Const(1, 1)) >> distance[:4]
            shifted.append(register(2, Mux(distance[4:].any() | ~field.any(), 0, value), f"shifted_{k}"))
            signs.append(register(2, element[23], f"sign_{k}"))

        # 4: round half up, but not to the next power of two, which exceeds the limit; floor((x + 1) / 2) negates too if
        # x is the one's complement
        mantissas, short = [], register(2, short, "short_4")
        for k, (value, sign) in enumerate(zip(shifted, signs)):
            limit = value[:ATTENTION_BITS].all() & (value[ATTENTION_BITS] | short)
            upper, up = Cat(value[1:] ^ sign.replicate(MANTISSA_BITS - 1), sign), (value[0] & ~limit) ^ sign
            mantissas.append(register(3, (upper + up)[:MANTISSA_BITS], f"mantissa_{k}").as_signed())

        # 5, 6: the sum
        total = tree([x.as_signed() for x in groups(mantissas, 4, operator.add, "sum")], operator.add)
        m.d.comb += [
            self.s.eq(register(5, total, "total").as_signed()),
            self.e.eq(delay(m, (top - 127)[:9], en[2:], "exponent").as_signed()),
            *(out.eq(delay(m, x, en[4:], f"out_{k}")) for k, (out, x) in enumerate(zip(self.m, mantissas))),
        ]
        return m
