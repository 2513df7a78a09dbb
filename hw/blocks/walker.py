"""The loop nest of vector instructions, as counters that step once per beat.

Several walkers run the same nest at different pipeline depths, instead of addresses travelling with the data.
"""

from amaranth import Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from .fp import wire
from .rows import lowest

__all__ = ["LoopWalker", "Nest"]


def Nest(config):
    """Loop bounds and strides of one vector instruction (fields of `hw.isa`), in beats of V elements.

    mask : the rows of loop t, at least one
    """
    return data.StructLayout({
        "heads": 8, "groups": 8, "mask": config.tokens, "beats": 16, "row_stride": 14, "group_stride": 14,
        "head_stride": 16, "wrap": 12, "vector": 16, "table_stride": 10,
        "per_tile": range(config.columns // config.vector_lanes + 1),  # beats of one row in one column tile
    })


class LoopWalker(wiring.Component):
    """Walks h, n, g, t, c. Outputs describe the beat that comes next; `step` moves on, `start` begins anew.

    Loop t takes the rows of ``nest.mask``, lowest first; the mask and the strides of t count from `start` on, the rest
    of the nest only from the cycle after it.

    offset : t*row_stride + g*group_stride + h*head_stride + beat
    beat : n*per_tile + c; row : t; state : (h*groups + g)*tokens + t
    table : t*table_stride + beat mod wrap; turn : beat div wrap; place : beat mod vector
    row_begins, row_last : first, last beat of row t; final_row : t is the highest row of the mask; last : last beat of
        all
    """

    def __init__(self, *, config):
        self.config = config
        super().__init__({
            "nest": In(Nest(config)), "start": In(1), "step": In(1),
            "offset": Out(16), "beat": Out(16), "row": Out(range(config.tokens)), "head": Out(8), "column": Out(range(
                config.columns // config.vector_lanes)),
            "state": Out(range(config.state_rows)), "table": Out(16), "turn": Out(10), "place": Out(16),
            "row_begins": Out(1), "row_last": Out(1), "final_row": Out(1), "last": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, nest = self.config, self.nest
        c, base = Signal(range(config.columns // config.vector_lanes)), Signal(16)
        # Counted from 1, so that the last of a loop is found without a subtraction: beats of the row and of what lies
        # before its column tile, g, h.
        beats, tile_beats, groups, heads = Signal(16), Signal(16), Signal(8), Signal(8)
        offset_t, offset_g, offset_h = Signal(16), Signal(16), Signal(16)
        state_g = Signal(range(config.state_rows + config.tokens))
        table_t = Signal(16)
        # Positions in the wrapping counters: now, and where this column tile began.
        inside, inside_tile, turn_tile, place_tile = Signal(12), Signal(12), Signal(10), Signal(16)
        m.d.comb += [
            self.beat.eq(base + c), self.column.eq(c), self.offset.eq(offset_t + base + c),
            self.table.eq(table_t + inside), self.state.eq(state_g + self.row),
            self.row_last.eq(beats == nest.beats), self.row_begins.eq(self.beat == 0),
        ]
        rest = Signal(config.tokens)  # rows after this one
        tile_last, last_t, last_g, last_h = Signal(), self.final_row, Signal(), Signal()
        m.d.comb += [
            tile_last.eq(self.row_last | (c == nest.per_tile - 1)), last_t.eq(rest == 0),
            last_g.eq(groups == nest.groups), last_h.eq(heads == nest.heads),
            self.last.eq(self.row_last & last_t & last_g & last_h),
        ]
        next_row, next_rest = lowest(m, Mux(self.start | last_t, nest.mask, rest))
        row_offset = wire(m, (next_row * nest.row_stride)[:16], "row_offset")
        row_table = (next_row * nest.table_stride)[:16]
        inside_next, turn_next, place_next = Signal(12), Signal(10), Signal(16)
        wraps = inside + 1 == nest.wrap
        m.d.comb += [
            inside_next.eq(Mux(wraps, 0, inside + 1)), turn_next.eq(self.turn + wraps),
            place_next.eq(Mux(self.place + 1 == nest.vector, 0, self.place + 1)),
        ]
        with m.If(self.start):
            for signal in (c, base, offset_g, offset_h, state_g, inside, inside_tile, turn_tile, place_tile,
                           self.head, self.turn, self.place):
                m.d.sync += signal.eq(0)
            m.d.sync += [signal.eq(1) for signal in (beats, tile_beats, groups, heads)]
            m.d.sync += [self.row.eq(next_row), rest.eq(next_rest), offset_t.eq(row_offset), table_t.eq(row_table)]
        with m.Elif(self.step):
            m.d.sync += [c.eq(c + 1), beats.eq(beats + 1), inside.eq(inside_next), self.turn.eq(turn_next),
                         self.place.eq(place_next)]
            with m.If(tile_last):
                # Next row of the same column tile: back to where the tile began.
                m.d.sync += [
                    c.eq(0), beats.eq(tile_beats), inside.eq(inside_tile), self.turn.eq(turn_tile),
                    self.place.eq(place_tile), self.row.eq(next_row), rest.eq(next_rest),
                    offset_t.eq(offset_g + row_offset), table_t.eq(row_table),
                ]
                with m.If(last_t):
                    m.d.sync += [
                        groups.eq(groups + 1), offset_t.eq(offset_g + nest.group_stride + row_offset),
                        offset_g.eq(offset_g + nest.group_stride), state_g.eq(state_g + config.tokens),
                    ]
                    with m.If(last_g):
                        # Next column tile of this head, or the next head.
                        m.d.sync += [
                            groups.eq(1), offset_t.eq(offset_h + row_offset), offset_g.eq(offset_h),
                            base.eq(base + nest.per_tile), beats.eq(beats + 1), tile_beats.eq(beats + 1),
                            inside.eq(inside_next), inside_tile.eq(inside_next), self.turn.eq(turn_next),
                            turn_tile.eq(turn_next), self.place.eq(place_next), place_tile.eq(place_next),
                        ]
                        with m.If(self.row_last):
                            m.d.sync += [
                                base.eq(0), beats.eq(1), tile_beats.eq(1), heads.eq(heads + 1),
                                self.head.eq(self.head + 1),
                                offset_t.eq(offset_h + nest.head_stride + row_offset),
                                offset_g.eq(offset_h + nest.head_stride), offset_h.eq(offset_h + nest.head_stride),
                                inside.eq(0), inside_tile.eq(0), self.turn.eq(0), turn_tile.eq(0), self.place.eq(0),
                                place_tile.eq(0),
                            ]
                        with m.Else():
                            m.d.sync += state_g.eq(state_g - self._group_states(m, nest))
        return m

    def _group_states(self, m, nest):
        """States covered by the g loop beyond its first round (returns to g = 0 within the same head)."""
        covered = Signal(range(self.config.state_rows + self.config.tokens))
        m.d.comb += covered.eq((nest.groups - 1) * self.config.tokens)
        return covered
