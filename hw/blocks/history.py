"""The history of KV records: for each position the layers that wrote its record since layer 0, in a bank for each port.

A position belongs to the port that holds its records, so the records of a tile are looked up a row of all banks at a
time. One read port a bank serves both looking up and noting; noting goes first.
"""

from amaranth.hdl import Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from ..isa import MAX_LAYERS
from .command import Written
from .fp import normalise

__all__ = ["History"]

_LAYER_BITS = exact_log2(MAX_LAYERS)


class History(wiring.Component):
    """Notes written records, and looks up the records of KV tiles, one of each port at a time.

    Members
    -------
    note : In(Written); two cycles apart or more for one position; beyond history_tokens without effect
    begin : In(1), look up a tile from ``position`` on (a multiple of ports), and forget the one before
    layer : In, the highest layer that counts; stable while a tile is looked up
    found : Out(1), ``last`` is that of the next record, until ``take``
    last : Out for each port, the highest layer up to ``layer`` that wrote the record, 0 if none did
    """

    def __init__(self, *, config):
        self.config = config
        super().__init__({
            "note": In(Written), "begin": In(1), "position": In(range(config.history_tokens)), "layer": In(_LAYER_BITS),
            "found": Out(1), "take": In(1), "last": Out(_LAYER_BITS).array(config.ports),
        })

    def elaborate(self, platform):
        m = Module()
        config, note = self.config, self.note
        bank_bits = exact_log2(config.ports)
        row = Signal(range(config.history_tokens // config.ports))
        left = Signal(range(config.tile_tokens // config.ports + 1))
        look, looked = Signal(), Signal()
        m.d.comb += look.eq((left != 0) & ~looked & (~self.found | self.take) & ~note.valid)
        m.d.sync += [looked.eq(look), self.found.eq(looked | (self.found & ~self.take))]
        with m.If(look):
            m.d.sync += [row.eq(row + 1), left.eq(left - 1)]
        with m.If(self.begin):
            m.d.sync += [row.eq(self.position >> bank_bits), left.eq(config.tile_tokens // config.ports),
                         looked.eq(0), self.found.eq(0)]

        noted_row, noted_layer = Signal.like(row), Signal.like(note.layer)
        with m.If(note.valid):
            m.d.sync += [noted_row.eq(note.position >> bank_bits), noted_layer.eq(note.layer)]
        seen = ((Const(2, MAX_LAYERS + 1) << self.layer) - 1)[:MAX_LAYERS]
        for p in range(config.ports):
            m.submodules[f"bank{p}"] = bank = Memory(shape=MAX_LAYERS, depth=config.history_tokens // config.ports,
                                                     init=[])
            read, write = bank.read_port(), bank.write_port()
            mine = note.valid & (note.position[:bank_bits] == p) & (note.position < config.history_tokens)
            m.d.sync += write.en.eq(mine)
            m.d.comb += [
                read.en.eq(look | mine), read.addr.eq(Mux(note.valid, note.position >> bank_bits, row)),
                write.addr.eq(noted_row),
                write.data.eq(Mux(noted_layer == 0, 0, read.data) | (Const(1, MAX_LAYERS) << noted_layer)),
            ]
            _, zeros = normalise(m, read.data & seen, [32, 16, 8, 4, 2, 1])
            with m.If(looked):
                m.d.sync += self.last[p].eq(~zeros)
        return m
