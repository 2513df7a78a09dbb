"""The unit that the conventional FP16 dot product is compared with: two columns of aligned operands in, two FP32 out.

It is what the array does for queries with keys, without the tile registers and accumulators around it: exact dot
products of each block, the blocks brought to the largest exponent, one reconstruction.
"""

from amaranth.hdl import Module, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from skipopu.hw.blocks.dot import DOT_BITS, DotPair, dot_latency, word_bits
from skipopu.hw.blocks.fp import FromInt
from skipopu.hw.blocks.trees import tree_sum
from skipopu.hw.formats import KV_FRACTION, MANTISSA_BITS

__all__ = ["PeUnit"]


class PeUnit(wiring.Component):
    """Two dot products of ``lanes`` per cycle.

    Members
    -------
    mantissa : signed(16) per lane, of ATTENTION_BITS; word : signed(13) per column and lane; both `dot.skew` cycles
        after those of lane 0
    gap : per block, its exponent below the largest, with the dot products; exponent : of the largest, per column,
        one cycle later
    o : FP32 bits per column

    dsp : one of `config.DSPS` with packed or plain multipliers; block : lanes of one exponent
    """

    def __init__(self, *, lanes, block, dsp):
        self.lanes, self.block, self.dsp = lanes, block, dsp
        super().__init__({
            "mantissa": In(signed(max(word_bits(dsp), MANTISSA_BITS))).array(lanes),
            "word": In(signed(word_bits(dsp))).array(2, lanes),
            "gap": In(6).array(lanes // block), "exponent": In(signed(10)).array(2), "o": Out(32).array(2),
        })

    @property
    def latency(self):
        """Cycles from the operands of lane 0 to ``o``."""
        return dot_latency(self.dsp) + 1 + FromInt.latency

    def elaborate(self, platform):
        m = Module()
        blocks = self.lanes // self.block
        width = DOT_BITS + KV_FRACTION + (blocks - 1).bit_length()
        dots = []
        for b in range(blocks):
            m.submodules[f"dot{b}"] = dot = DotPair(lanes=self.block, dsp=self.dsp)
            dots.append(dot)
            if self.dsp != "dsp48e2":
                m.d.comb += dot.en.eq(1)
            for k in range(self.block):
                m.d.comb += [dot.mantissa[k].eq(self.mantissa[b * self.block + k]),
                             *(dot.word[c][k].eq(self.word[c][b * self.block + k]) for c in range(2))]
        for c in range(2):
            total = Signal(signed(width), name=f"total{c}", reset_less=True)
            m.d.sync += total.eq(tree_sum((dot.dot[c] << KV_FRACTION) >> self.gap[b] for b, dot in enumerate(dots)))
            m.submodules[f"float{c}"] = unit = FromInt(signed(width))
            m.d.comb += [unit.en.eq(~0), unit.a.eq(total), unit.n.eq(self.exponent[c]), self.o[c].eq(unit.o)]
        return m
