"""Two exact products per DSP slice: 4-bit weight codes, and 12-bit keys and values.

Weight codes
------------
One 16-bit mantissa m meets two 4-bit codes c0, c1 in one multiplication, and the slices of a cascade add:

    A + D = c0 + c1 * 2^22            26      22 21                   4 3       0
                                      [  c1     ][ sign of c0 ........ ][  c0   ]
    P = sum m * (A + D)               47                  22 21                 0
      = s0 + s1 * 2^22                [ s1 - (s0 < 0)      ][ s0 modulo 2^22    ]

s0 = sum m * c0 fits 22 bits signed while lanes * 2^18 < 2^21, so its field is s0 itself; a negative s0 borrows one from
the field above, which bit 21 gives back. No operand is excluded.

Keys and values
---------------
A 12-bit q meets two mantissas k0, k1. The products overlap; the low 8 bits of q * k1, made in fabric, leave by C:

    A + D = k0 + k1 * 2^15            26            15 14              0
    q * (A + D)                       37      [       q * k1       ]15
                                                    22 [     q * k0     ] 0
    P = q * (A + D) - low * 2^15      37      23 22                    0
      = q * k0 + h * 2^23             [ h - (q*k0 < 0) ][ q*k0 mod 2^23 ]     q * k1 = h * 2^8 + low, 0 <= low < 2^8

Exact for q = -2048..2047, k = -2047..2047: all that alignment makes (magnitude and sign, `docs/numerics.md`):
with k1 = -2048 the pre-adder could wrap. The slice subtracts (C + M) from zero, so its multiplier takes -q.
"""

from amaranth.hdl import Cat, Module, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..formats import CODE_BITS, KV_BITS, MANTISSA_BITS
from .dsp import SUBTRACT, W_C, XY_M, Z_PCIN, Z_ZERO, Dsp48e2

__all__ = ["FIELD_BITS", "CodeLanes", "CodeUnpack", "KvPair", "KvUnpack"]

FIELD_BITS = 22  #: distance of the two fields of codes
_KV_SHIFT = 15  # distance of the two mantissas: 12 + 15 bits fill the pre-adder
_KV_PRODUCT = 2 * KV_BITS - 1
_KV_LOW = _KV_PRODUCT - _KV_SHIFT


class CodeUnpack(wiring.Component):
    """The two sums in the result of a cascade (combinational).

    Members
    -------
    p : signed(48), s0 + s1 * 2^22 of sums that fit 22 bits
    dot : signed(22), s0 and s1
    """

    def __init__(self):
        super().__init__({"p": In(signed(48)), "dot": Out(signed(FIELD_BITS)).array(2)})

    def elaborate(self, platform):
        m = Module()
        low, high = self.p[:FIELD_BITS], self.p[FIELD_BITS:2 * FIELD_BITS]
        m.d.comb += [self.dot[0].eq(low), self.dot[1].eq(high + low[-1])]
        return m


class CodeLanes(wiring.Component):
    """Dot products of mantissas with the codes of two columns, one slice per lane.

    Members
    -------
    mantissa : signed(16) per lane
    code : signed(4) per lane and column
    dot : signed(22) per column, ``latency`` cycles later; new operands in every cycle

    lanes : length of the cascade; target : see `Dsp48e2`
    Raises ValueError when the sum of that many products does not fit its field.
    """

    def __init__(self, *, lanes=4, target="generic"):
        largest = 1 << MANTISSA_BITS + CODE_BITS - 2  # both operands at their minimum
        if lanes < 1 or lanes * largest >= 1 << FIELD_BITS - 1:
            raise ValueError(f"lanes must be 1..{((1 << FIELD_BITS - 1) - 1) // largest} (lanes * {largest} < "
                             f"2^{FIELD_BITS - 1}), not {lanes}")
        self.lanes = lanes
        self._slices = [Dsp48e2(opmode=XY_M | (Z_PCIN if lane else Z_ZERO), target=target) for lane in range(lanes)]
        super().__init__({
            "mantissa": In(signed(MANTISSA_BITS)).array(lanes), "code": In(signed(CODE_BITS)).array(lanes, 2),
            "dot": Out(signed(FIELD_BITS)).array(2),
        })

    @property
    def latency(self):
        """Cycles from the operands to ``dot``."""
        return self._slices[0].latency + self.lanes - 1

    def elaborate(self, platform):
        m = Module()
        m.submodules.unpack = unpack = CodeUnpack()
        for lane, dsp in enumerate(self._slices):
            m.submodules[f"dsp{lane}"] = dsp
            operands = [self.mantissa[lane], self.code[lane][0], self.code[lane][1]]
            # A lane enters the cascade one cycle after the lane before it.
            for age in range(lane):
                delayed = [Signal.like(value, name=f"operand{index}_{lane}_{age}", reset_less=True)
                           for index, value in enumerate(operands)]
                m.d.sync += [new.eq(old) for new, old in zip(delayed, operands)]
                operands = delayed
            mantissa, low, high = operands
            m.d.comb += [dsp.b.eq(mantissa), dsp.a.eq(low), dsp.d.eq(high << FIELD_BITS)]
            if lane:
                m.d.comb += dsp.pcin.eq(self._slices[lane - 1].pcout)
        m.d.comb += [unpack.p.eq(self._slices[-1].p)]
        m.d.comb += [self.dot[column].eq(unpack.dot[column]) for column in range(2)]
        return m


class KvUnpack(wiring.Component):
    """The two products in ``p`` (combinational).

    Members
    -------
    p : signed(48), q * k0 + h * 2^23; low : unsigned(8), with q * k1 = h * 2^8 + low
    product : signed(23), q * k0 and q * k1
    """

    def __init__(self):
        super().__init__({"p": In(signed(48)), "low": In(_KV_LOW), "product": Out(signed(_KV_PRODUCT)).array(2)})

    def elaborate(self, platform):
        m = Module()
        first, above = self.p[:_KV_PRODUCT], self.p[_KV_PRODUCT:_KV_PRODUCT + _KV_SHIFT]
        high = (above + first[-1])[:_KV_SHIFT]
        m.d.comb += [self.product[0].eq(first), self.product[1].eq(Cat(self.low, high))]
        return m


class KvPair(wiring.Component):
    """One operand times two mantissas in one slice.

    Members
    -------
    q : signed(12), query or probability; k : signed(12), two of -2047..2047
    product : signed(23), q * k0 and q * k1, ``latency`` cycles later; new operands in every cycle

    target : see `Dsp48e2`
    """

    def __init__(self, *, target="generic"):
        self._slice = Dsp48e2(opmode=W_C | XY_M | Z_ZERO, alumode=SUBTRACT, target=target)
        super().__init__({"q": In(signed(KV_BITS)), "k": In(signed(KV_BITS)).array(2),
                          "product": Out(signed(_KV_PRODUCT)).array(2)})

    @property
    def latency(self):
        """Cycles from the operands to ``product``."""
        return self._slice.latency

    def elaborate(self, platform):
        m = Module()
        dsp = self._slice
        m.submodules.dsp, m.submodules.unpack = dsp, KvUnpack()
        low = [Signal(_KV_LOW, name=f"low{age}", reset_less=True) for age in range(1, self.latency + 1)]
        product = self.q[:_KV_LOW] * self.k[1][:_KV_LOW]  # the low bits of a product need no more than low bits
        m.d.sync += [low[0].eq(product), *(new.eq(old) for new, old in zip(low[1:], low))]
        m.d.comb += [
            dsp.b.eq(-self.q), dsp.a.eq(self.k[0]), dsp.d.eq(self.k[1] << _KV_SHIFT),
            dsp.c.eq(low[self.latency - dsp.c_latency - 1] << _KV_SHIFT),
            m.submodules.unpack.p.eq(dsp.p), m.submodules.unpack.low.eq(low[-1]),
        ]
        m.d.comb += [self.product[column].eq(m.submodules.unpack.product[column]) for column in range(2)]
        return m
