"""Exponents of the keys, or of the values, in the records of every second row of a port (`kvbuf`)."""

from amaranth.hdl import Array, Cat, Module, Signal
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from .kvintake import EXPONENT_BITS

__all__ = ["KvExponents"]

_WORDS = 64  #: of a piece: a LUT. One memory of more words would take nearly twice as many.


class KvExponents(wiring.Component):
    """Two slots of heads; an exponent in each row. One write, two reads a cycle.

    Members
    -------
    en : In(rows), which rows get ``exponent``, In(5), in ``slot``, In(1), for ``head``, In(8)
    now_slot, now_head : In, of the head whose exponents are ``now``, Out(5 per row)
    ahead_en, ahead_slot, ahead_head : In, of the head whose exponents are ``ahead``, Out(5 per row), one cycle later

    heads : capacity of a slot; what is beyond is undefined. rows : of records
    """

    def __init__(self, *, heads, rows):
        self._heads, self._rows = heads, rows
        line = Out(data.ArrayLayout(EXPONENT_BITS, rows))
        super().__init__({
            "en": In(rows), "slot": In(1), "head": In(8), "exponent": In(EXPONENT_BITS),
            "now_slot": In(1), "now_head": In(8), "now": line,
            "ahead_en": In(1), "ahead_slot": In(1), "ahead_head": In(8), "ahead": line})

    def elaborate(self, platform):
        m = Module()
        depth = 2 * self._heads
        bits, within = (depth - 1).bit_length(), _WORDS.bit_length() - 1

        def address(slot, head):
            """(word of a piece, piece)"""
            whole = Cat(slot, head)[:bits]
            return whole[:within], whole[within:]

        word, piece = address(self.slot, self.head)
        now_word, now_piece = address(self.now_slot, self.now_head)
        ahead_word, ahead_piece = address(self.ahead_slot, self.ahead_head)
        from_piece = Signal.like(ahead_piece)
        with m.If(self.ahead_en):
            m.d.sync += from_piece.eq(ahead_piece)
        now, ahead = [], []
        for index, first in enumerate(range(0, depth, _WORDS)):
            memory = Memory(shape=self.now.shape(), depth=min(_WORDS, depth - first), init=[])
            m.submodules[f"piece{index}"] = memory
            write, comb, sync = memory.write_port(granularity=1), memory.read_port(domain="comb"), memory.read_port()
            m.d.comb += [
                write.addr.eq(word), write.en.eq(self.en & (piece == index).replicate(self._rows)),
                *(part.eq(self.exponent) for part in write.data),
                comb.addr.eq(now_word), sync.addr.eq(ahead_word), sync.en.eq(self.ahead_en),
            ]
            now.append(comb.data.as_value())
            ahead.append(sync.data.as_value())
        m.d.comb += [self.now.eq(Array(now)[now_piece]), self.ahead.eq(Array(ahead)[from_piece])]
        return m
