"""Two 4-bit codes per DSP slice and nothing else: what three per slice is measured against.

One 16-bit mantissa m meets two 4-bit codes c0, c1 in one multiplication, and the slices of a cascade add:

    A + D = c0 + c1 * 2^22            26      22 21                   4 3       0
                                      [  c1     ][ sign of c0 ........ ][  c0   ]
    P = sum m * (A + D)               47                  22 21                 0
      = s0 + s1 * 2^22                [ s1 - (s0 < 0)      ][ s0 modulo 2^22    ]

s0 = sum m * c0 fits 22 bits signed while lanes * 2^18 < 2^21, so its field is s0 itself; a negative s0 borrows one from
the field above, which bit 21 gives back. No operand is excluded.
"""

from amaranth.hdl import Module, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from skipopu.hw.blocks.dsp import XY_M, Z_PCIN, Z_ZERO, Dsp48e2
from skipopu.hw.formats import CODE_BITS, MANTISSA_BITS

__all__ = ["FIELD_BITS", "CodeLanes", "CodeUnpack"]

FIELD_BITS = 22  #: distance of the two fields of codes


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
