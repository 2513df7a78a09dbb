"""The PE array: exact integer dot products of one MBUF row with every column of a tile, scaled and accumulated.

Stages (`docs/numerics.md`, Weights):
1. dot: D[column, block] = sum of mantissa * code, exact.
2. scale: (D or D + 8S) * sig, shift amount = (emax - e) + (scale_exponent - es).
3. shift right (floor), add the minimum term and the blocks.
4. accumulate: add to the accumulator row, write it back.

The accumulators have two banks: the next column tile accumulates in one while the other drains.
"""

from amaranth import Module, Mux, Signal, signed, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..formats import ACC_BITS, CODE_BITS, KV_BITS, MANTISSA_BITS
from .mbuf import AlignedRow, sum_shape

__all__ = ["Column", "PeArray", "RowControl", "Scale", "tile_beats"]



def Scale():
    """A column's scale of one block as it enters the array: signed significand, scale_exponent - es (0..63)."""
    return data.StructLayout({"significand": signed(12), "shift": unsigned(6)})


def RowControl(config):
    """What travels with a row through the stages."""
    return data.StructLayout({
        "acc": range(2 * config.acc_rows),  # accumulator row, bank in the top bit
        "first": 1,  # first k: the old accumulator is not added
        "offset": 1,  # codes are stored minus 8
        "minimum": 1,  # add minimum * S
        "last": 1,  # last row of a column tile: it may drain
    })


_WORD = 32


def _word_sum(values):
    while len(values) > 1:
        values = [(values[i] + values[i + 1])[:_WORD] for i in range(0, len(values), 2)]
    return values[0]


def tile_beats(config):
    """Superbeats that fill a tile: (of codes, of keys, of values)."""
    tokens_per_beat, elements = config.ports, config.beat_elements
    return (config.tile_beats,
            (config.columns // tokens_per_beat) * (config.lanes // elements),
            (config.lanes // tokens_per_beat) * (config.columns // elements))


def _tree(values):
    while len(values) > 1:
        values = [values[i] + values[i + 1] if i + 1 < len(values) else values[i] for i in range(0, len(values), 2)]
    return values[0]


class Column(wiring.Component):
    """One column: dot products, scaling and accumulators."""

    def __init__(self, *, config):
        self.config = config
        super().__init__({
            "weight": In(_WORD).array(config.lanes), "mantissa": In(_WORD).array(config.lanes), "dot_en": In(1),
            "scale": In(Scale()).array(config.blocks), "minimum": In(Scale()).array(config.blocks),
            "sum": In(sum_shape(config)).array(config.blocks),
            "exponent_gap": In(6).array(config.blocks), "scale_en": In(1),
            "offset": In(1), "use_minimum": In(1),
            "shift_en": In(1), "acc_en": In(1), "acc_row": In(range(2 * config.acc_rows)), "acc_first": In(1),
            "drain_row": In(range(2 * config.acc_rows)), "drain": Out(signed(ACC_BITS)),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        dot_bits = MANTISSA_BITS + KV_BITS - 1 + (config.block - 1).bit_length()  # no operand is its type's minimum
        terms = []
        for b in range(config.blocks):
            lanes = range(b * config.block, (b + 1) * config.block)
            assert dot_bits <= _WORD
            dot = Signal(signed(_WORD), name=f"dot{b}", reset_less=True)
            with m.If(self.dot_en):
                m.d.sync += dot.eq(_word_sum([(self.mantissa[k] * self.weight[k])[:_WORD] for k in lanes]))

            scaled = Signal(signed(40), name=f"scaled{b}", reset_less=True)
            scaled_minimum = Signal(signed(33), name=f"scaled_minimum{b}", reset_less=True)
            shift = Signal(6, name=f"shift{b}", reset_less=True)
            shift_minimum = Signal(6, name=f"shift_minimum{b}", reset_less=True)
            corrected = Signal(signed(dot_bits), name=f"corrected{b}")
            m.d.comb += corrected.eq(dot + Mux(self.offset, self.sum[b] << 3, 0))
            with m.If(self.scale_en):
                gap = self.exponent_gap[b]
                for amount, scale in ((shift, self.scale[b]), (shift_minimum, self.minimum[b])):
                    total = Signal(7)
                    m.d.comb += total.eq(gap + scale.shift)
                    m.d.sync += amount.eq(Mux(total[6], 63, total))
                m.d.sync += [
                    scaled.eq(corrected * self.scale[b].significand),
                    scaled_minimum.eq(Mux(self.use_minimum, self.sum[b] * self.minimum[b].significand, 0)),
                ]
            terms += [scaled >> shift, scaled_minimum >> shift_minimum]

        contribution = Signal(signed(ACC_BITS), reset_less=True)
        with m.If(self.shift_en):
            m.d.sync += contribution.eq(_tree(terms))
        m.submodules.acc = acc = Memory(shape=signed(ACC_BITS), depth=2 * config.acc_rows, init=[])
        old, new, drain = acc.read_port(domain="comb"), acc.write_port(), acc.read_port(domain="comb")
        m.d.comb += [
            old.addr.eq(self.acc_row), new.addr.eq(self.acc_row), new.en.eq(self.acc_en),
            new.data.eq(contribution + Mux(self.acc_first, 0, old.data)),
            drain.addr.eq(self.drain_row), self.drain.eq(drain.data),
        ]
        return m


class PeArray(wiring.Component):
    """All columns, fed row by row.

    Members
    -------
    codes, load_codes : superbeat of 4-bit codes; bit j of load_codes: it is the j-th of its tile
    mantissas, load_keys, load_values : superbeat of the KV buffer, and which one of a K or V tile it is
    row_en, row, maximum, control : an MBUF row enters (stage 1), with its vector's largest exponent
    scale, minimum : scales of the tile in use, valid one cycle after row_en of its rows
    tile_done : every row of a column tile is in the accumulators (`latency` cycles after its last row)
    drain_row, drain : accumulators of one row (combinational)
    """

    latency = 4

    def __init__(self, *, config):
        self.config = config
        codes, keys, values = tile_beats(config)
        super().__init__({
            "codes": In(8 * config.superbeat_bytes), "mantissas": In(KV_BITS * config.ports * config.beat_elements),
            "load_codes": In(codes), "load_keys": In(keys), "load_values": In(values),
            "row_en": In(1), "row": In(AlignedRow(config)), "maximum": In(signed(9)), "control": In(RowControl(config)),
            "scale": In(Scale()).array(config.columns, config.blocks),
            "minimum": In(Scale()).array(config.columns, config.blocks),
            "tile_done": Out(1),
            "drain_row": In(range(2 * config.acc_rows)), "drain": Out(signed(ACC_BITS)).array(config.columns),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        scale_en, shift_en, acc_en = Signal(), Signal(), Signal()
        control_scale, control_shift, control_acc = (
            Signal(RowControl(config), name=f"control_{stage}") for stage in ("scale", "shift", "acc"))
        sums = [Signal.like(s, name=f"sum{b}", reset_less=True) for b, s in enumerate(self.row.sum)]
        gaps = [Signal(6, name=f"gap{b}", reset_less=True) for b in range(config.blocks)]
        m.d.sync += [scale_en.eq(self.row_en), shift_en.eq(scale_en), acc_en.eq(shift_en),
                     self.tile_done.eq(acc_en & control_acc.last)]
        with m.If(self.row_en):
            m.d.sync += control_scale.eq(self.control)
            for b in range(config.blocks):
                gap = Signal(signed(10), name=f"gap_wide{b}")
                m.d.comb += gap.eq(self.maximum - self.row.exponent[b])
                m.d.sync += [sums[b].eq(self.row.sum[b]), gaps[b].eq(Mux(gap[6:].any(), 63, gap[:6]))]
        with m.If(scale_en):
            m.d.sync += control_shift.eq(control_scale)
        with m.If(shift_en):
            m.d.sync += control_acc.eq(control_shift)

        mantissas = []
        for k in range(config.lanes):
            mantissa = Signal(_WORD, name=f"mantissa{k:02}")
            wide = self.row.mantissa[k]
            m.d.comb += mantissa.eq(wide)
            mantissas.append(mantissa)

        weights = self._tile(m)
        for n in range(config.columns):
            m.submodules[f"column{n}"] = column = Column(config=config)
            m.d.comb += [
                column.dot_en.eq(self.row_en), column.scale_en.eq(scale_en),
                column.shift_en.eq(shift_en),
                column.offset.eq(control_scale.offset), column.use_minimum.eq(control_scale.minimum),
                column.acc_en.eq(acc_en), column.acc_row.eq(control_acc.acc), column.acc_first.eq(control_acc.first),
                column.drain_row.eq(self.drain_row), self.drain[n].eq(column.drain),
            ]
            for k in range(config.lanes):
                m.d.comb += [column.weight[k].eq(weights[n][k]), column.mantissa[k].eq(mantissas[k])]
            for b in range(config.blocks):
                m.d.comb += [
                    column.scale[b].eq(self.scale[n][b]), column.minimum[b].eq(self.minimum[n][b]),
                    column.sum[b].eq(sums[b]), column.exponent_gap[b].eq(gaps[b]),
                ]
        return m

    def _tile(self, m):
        """The tile registers [n][k], and the three ways to fill them.

        Words of 32 bits: exact modulo 2^32 (see ``dot_bits``), and the machine word of a simulator. Every source goes
        straight into the register, so that a simulator evaluates it only when it is loaded.
        """
        config = self.config
        lanes, columns, ports, elements = config.lanes, config.columns, config.ports, config.beat_elements
        weights = [[Signal(_WORD, name=f"weight{n}_{k:02}", reset_less=True) for k in range(lanes)]
                   for n in range(columns)]

        def fill(load, place):
            """place(n, k) -> (superbeat, source)"""
            parts = {}
            for n in range(columns):
                for k in range(lanes):
                    beat, source = place(n, k)
                    parts.setdefault(beat, []).append(weights[n][k].eq(source))
            for beat, statements in parts.items():
                with m.If(load[beat]):
                    m.d.sync += statements

        per_beat = columns // config.tile_beats

        def code(n, k):
            return n // per_beat, self.codes.word_select((n % per_beat) * lanes + k, CODE_BITS).as_signed()

        def key(n, k):
            beat = (n // ports) * (lanes // elements) + k // elements
            return beat, self.mantissas.word_select((n % ports) * elements + k % elements, KV_BITS).as_signed()

        def value(n, k):
            beat = (k // ports) * (columns // elements) + n // elements
            return beat, self.mantissas.word_select((k % ports) * elements + n % elements, KV_BITS).as_signed()

        fill(self.load_codes, code)
        fill(self.load_keys, key)
        fill(self.load_values, value)
        return weights
