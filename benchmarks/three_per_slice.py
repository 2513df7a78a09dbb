"""Three INT4 products per DSP slice: what it costs against the two of the array, which add up in the cascade.

One mantissa m meets three 4-bit codes whose fields are 11 bits apart. The products, 20 bits each, overlap by 9 bits:
the low 9 bits of the second and third, made in fabric, leave by C. What remains abuts without a bit to spare:

    A + D = c0 + c1 * 2^11 + c2 * 2^22          m * c1 = h1 * 2^9 + t1,  m * c2 = h2 * 2^9 + t2
    P = m * (A + D) - t1 * 2^11 - t2 * 2^22     41       31 30       20 19            0
      = m * c0 + h1 * 2^20 + h2 * 2^31          [   h2     ][   h1     ][   m * c0    ]   less the borrows from below

Exact for every mantissa and code (`tests/benchmarks/test_three_per_slice.py`). No slice can add another's products: the
fields have no room for a carry. So all products are added in fabric, where two per slice leave a quarter of them.
"""

import argparse
import sys
from fractions import Fraction

from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from common import Row, machine, show
from common.code_lanes import CodeLanes
from skipopu.bitstream.synth import TARGETS, SynthesisError, resources, synthesise, target
from skipopu.hw.blocks.dsp import SUBTRACT, W_C, XY_M, Z_ZERO, Dsp48e2
from skipopu.hw.formats import CODE_BITS, MANTISSA_BITS
from skipopu.hw.verilog import YosysError

__all__ = ["CodeDot", "CodeTriple", "TripleUnpack"]

COUNT = 3
SHIFT = 11
PRODUCT = MANTISSA_BITS + CODE_BITS
LOW = PRODUCT - SHIFT
LANES = 64


class TripleUnpack(wiring.Component):
    """The three products in ``p`` (combinational).

    Members
    -------
    p : signed(48), m * c0 + h1 * 2^20 + h2 * 2^31; low : unsigned(9), t1 and t2
    product : signed(20), m * c0, h1 * 2^9 + t1 and h2 * 2^9 + t2
    """

    def __init__(self):
        super().__init__({"p": In(signed(48)), "low": In(LOW).array(2), "product": Out(signed(PRODUCT)).array(COUNT)})

    def elaborate(self, platform):
        m = Module()
        m.d.comb += self.product[0].eq(self.p[:PRODUCT])
        for index, low in enumerate(self.low):
            at = PRODUCT + index * SHIFT
            high = (self.p[at:at + SHIFT] + self.p[at - 1])[:SHIFT]  # what lies below is negative: it borrowed one
            m.d.comb += self.product[1 + index].eq(Cat(low, high))
        return m


class CodeTriple(wiring.Component):
    """One mantissa times three codes in one slice.

    Members
    -------
    mantissa : signed(16); negated : signed(17), the same times -1 (formed once for all columns); code : signed(4)
    product : signed(20) per code, ``latency`` cycles later; new operands in every cycle

    target : see `Dsp48e2`
    """

    def __init__(self, *, target="generic"):
        self._slice = Dsp48e2(opmode=W_C | XY_M | Z_ZERO, alumode=SUBTRACT, target=target)
        super().__init__({
            "mantissa": In(signed(MANTISSA_BITS)), "negated": In(signed(MANTISSA_BITS + 1)),
            "code": In(signed(CODE_BITS)).array(COUNT), "product": Out(signed(PRODUCT)).array(COUNT),
        })

    @property
    def latency(self):
        """Cycles from the operands to ``product``."""
        return self._slice.latency

    def elaborate(self, platform):
        m = Module()
        dsp = self._slice
        m.submodules.dsp, m.submodules.unpack = dsp, TripleUnpack()
        low = [Signal(2 * LOW, name=f"low{age}", reset_less=True) for age in range(1, self.latency + 1)]

        def low_product(code):
            """The low bits of mantissa * code in rows: Yosys would take a DSP for a product."""
            rows = [Mux(code[bit], self.mantissa[:LOW] << bit, 0) for bit in range(CODE_BITS)]
            return (rows[0] + rows[1] + rows[2] - rows[3])[:LOW]

        products = [low_product(code) for code in list(self.code)[1:]]
        m.d.sync += [low[0].eq(Cat(*products)), *(new.eq(old) for new, old in zip(low[1:], low))]
        first, second = low[self.latency - dsp.c_latency - 1].word_select(0, LOW), \
            low[self.latency - dsp.c_latency - 1].word_select(1, LOW)
        m.d.comb += [
            dsp.b.eq(self.negated), dsp.a.eq(self.code[0] + (self.code[1] << SHIFT)),
            dsp.d.eq(self.code[2] << 2 * SHIFT), dsp.c.eq((first << SHIFT) + (second << 2 * SHIFT)),
            m.submodules.unpack.p.eq(dsp.p), Cat(*m.submodules.unpack.low).eq(low[-1]),
        ]
        m.d.comb += [out.eq(product) for out, product in zip(self.product, m.submodules.unpack.product)]
        return m


class CodeDot(wiring.Component):
    """Dot product of ``lanes`` mantissas with the codes of some columns: units and a registered adder tree.

    packed : 3 columns with `CodeTriple`, or 2 with `CodeLanes` of ``depth`` lanes
    """

    def __init__(self, *, packed, lanes=LANES, depth=4, target="generic"):
        self.packed, self.lanes, self.depth = packed, lanes, depth if packed == 2 else 1
        self._units = [CodeLanes(lanes=depth, target=target) if packed == 2 else CodeTriple(target=target)
                       for _ in range(lanes // self.depth)]
        super().__init__({
            "mantissa": In(signed(MANTISSA_BITS)).array(lanes), "negated": In(signed(MANTISSA_BITS + 1)).array(lanes),
            "code": In(signed(CODE_BITS)).array(lanes, packed),
            "dot": Out(signed(PRODUCT + lanes.bit_length() - 1)).array(packed),
        })

    @property
    def latency(self):
        """Cycles from the operands to ``dot``."""
        return self._units[0].latency + (self.lanes // self.depth).bit_length() - 1

    def elaborate(self, platform):
        m = Module()
        sums = [[] for _ in range(self.packed)]
        for index, unit in zip(range(0, self.lanes, self.depth), self._units):
            if self.packed == 2:
                for lane in range(self.depth):
                    m.d.comb += unit.mantissa[lane].eq(self.mantissa[index + lane])
                    m.d.comb += [unit.code[lane][c].eq(self.code[index + lane][c]) for c in range(2)]
                results = unit.dot
            else:
                m.d.comb += [unit.mantissa.eq(self.mantissa[index]), unit.negated.eq(self.negated[index])]
                m.d.comb += [unit.code[c].eq(self.code[index][c]) for c in range(COUNT)]
                results = unit.product
            m.submodules[f"unit{index}"] = unit
            for column, result in zip(sums, results):
                column.append(result)
        for column, values in enumerate(sums):
            while len(values) > 1:
                pairs = [values[i] + values[i + 1] for i in range(0, len(values), 2)]
                values = [Signal(pair.shape(), name=f"sum{column}_{len(pairs)}_{i}", reset_less=True)
                          for i, pair in enumerate(pairs)]
                m.d.sync += [value.eq(pair) for value, pair in zip(values, pairs)]
            m.d.comb += self.dot[column].eq(values[0])
        return m


def main():
    """Synthesise both and print them side by side."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--lanes", type=int, default=LANES, help="of the dot product (default: %(default)s)")
    parser.add_argument("--target", default="xcup", help=f"{', '.join(TARGETS)} (default: %(default)s)")
    options = parser.parse_args()
    on = target(options.target)
    slices = "dsp48e2" if on.name == "xcup" else "generic"
    print(f"dot products of {options.lanes} mantissas with 4-bit codes, {on.device}; {machine()}")
    rows = []
    for packed, name in ((2, "two per slice"), (COUNT, "three per slice")):
        dot = CodeDot(packed=packed, lanes=options.lanes, target=slices)
        cost, products = resources(synthesise(dot, on, name=name), on), packed * options.lanes
        rows += [Row(f"{name}: products per DSP", float(Fraction(products, cost.dsps)), "counted", "{:g}"),
                 Row(f"{name}: LUTs per product", cost.luts / products, "estimated", "{:.1f}"),
                 Row(f"{name}: FFs per product", cost.ffs / products, "estimated", "{:.1f}")]
    show("4-bit codes, adder trees included", rows)


if __name__ == "__main__":
    try:
        main()
    except (SynthesisError, YosysError) as error:
        sys.exit(f"error: {error}")
