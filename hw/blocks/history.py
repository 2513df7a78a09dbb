"""Where the KV records lie that layers share: places handed out, and for each position a pointer of every layer.

A position belongs to the port that holds its records; row r of a bank stands for position r*P + port. The record that
a layer reads is that of the last layer which wrote the position: a mask says which layers did. Masks and pointers carry
a parity bit, so that a damaged one is reported instead of followed. One thing happens at a time; a request comes first.
"""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from ..isa import MAX_LAYERS
from ..registers import FaultCause
from .command import PLACE_BITS, PlaceAnswer, PlaceRequest
from .fp import normalise

__all__ = ["History"]

_LAYER_BITS = exact_log2(MAX_LAYERS)


class History(wiring.Component):
    """Gives records their places, and looks up those of KV tiles, a row of all ports at a time.

    Members
    -------
    request : In(stream of PlaceRequest), the next one only after the answer; answer : Out(PlaceAnswer), cycles later
    begin : In(1), look up ``rows`` rows from ``first`` on, and forget the lookup before
    layer : In, the highest layer that counts, below history_layers; stable while rows are looked up
    found : Out(1), ``place`` and ``bad`` are those of the next row, until ``take``
    place : Out for each port; bad : Out(P), the port has no sound pointer to a record of the running sequence
    """

    def __init__(self, *, config):
        self.config = config
        rows = config.history_tokens // config.ports
        super().__init__({
            "request": In(stream.Signature(PlaceRequest)), "answer": Out(PlaceAnswer),
            "begin": In(1), "first": In(range(rows)), "rows": In(range(config.tile_tokens // config.ports + 1)),
            "layer": In(_LAYER_BITS), "found": Out(1), "take": In(1),
            "place": Out(PLACE_BITS).array(config.ports), "bad": Out(config.ports),
        })

    def table(self, m, name, shape, depth):
        """A memory of this name; a bench that damages one adds its ports here."""
        m.submodules[name] = memory = Memory(shape=shape, depth=depth, init=[])
        return memory

    def elaborate(self, platform):
        m = Module()
        config, request = self.config, self.request.payload
        bank_bits, layers = exact_log2(config.ports), config.history_layers
        layer_bits = exact_log2(layers)
        begun = Signal()  # a sequence runs
        following = [Signal(PLACE_BITS, name=f"following{p}") for p in range(config.ports)]

        # A new record: which row and port, whether a sequence begins, what there is to complain about.
        noted, free, cause = Signal(PlaceRequest), Signal(PLACE_BITS), Signal(FaultCause)
        anew, note, noted_row = Signal(), Signal(), Signal(range(config.history_tokens // config.ports))
        m.d.comb += [anew.eq((noted.position == 0) & (noted.layer == 0)), noted_row.eq(noted.position >> bank_bits)]
        with m.Switch(noted.position[:bank_bits]):
            for p in range(config.ports):
                with m.Case(p):
                    m.d.comb += free.eq(Mux(anew, 0, following[p]))
        with m.If(~begun & ~anew):
            m.d.comb += cause.eq(FaultCause.KV_POINTER)
        with m.Elif((noted.position >= config.history_tokens) | (noted.layer >= layers)):
            m.d.comb += cause.eq(FaultCause.BUFFER_RANGE)
        with m.Elif(free >= noted.places):
            m.d.comb += cause.eq(FaultCause.KV_FULL)
        m.d.sync += self.answer.valid.eq(0)

        row, left = Signal.like(self.first), Signal.like(self.rows)
        read_mask, read_pointer, masked, pointed = Signal(), Signal(), Signal(), Signal()
        with m.If(self.take):
            m.d.sync += self.found.eq(0)
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += self.request.ready.eq(1)
                with m.If(self.request.valid):
                    m.d.comb += read_mask.eq(1)
                    m.d.sync += noted.eq(request)
                    m.next = "NOTE"
                with m.Elif((left != 0) & (~self.found | self.take)):
                    m.d.comb += read_mask.eq(1)
                    m.next = "LAST"
            with m.State("NOTE"):
                m.d.comb += note.eq(cause == FaultCause.NONE)
                m.d.sync += [self.answer.valid.eq(1), self.answer.cause.eq(cause), self.answer.place.eq(free)]
                m.next = "IDLE"
            with m.State("LAST"):
                m.d.comb += masked.eq(1)
                m.next = "POINTER"
            with m.State("POINTER"):
                m.d.comb += read_pointer.eq(1)
                m.next = "CHECK"
            with m.State("CHECK"):
                m.d.comb += pointed.eq(1)
                m.d.sync += [self.found.eq(1), row.eq(row + 1), left.eq(left - 1)]
                m.next = "IDLE"
        with m.If(self.begin):
            m.d.sync += [row.eq(self.first), left.eq(self.rows)]
        with m.If(note & anew):
            m.d.sync += [begun.eq(1), *(place.eq(0) for place in following)]

        seen = ((Const(2, layers + 1) << self.layer[:layer_bits]) - 1)[:layers]
        rows = config.history_tokens // config.ports
        for p in range(config.ports):
            masks = self.table(m, f"masks{p}", layers + 1, rows)
            pointers = self.table(m, f"pointers{p}", PLACE_BITS + 1, rows * layers)
            mask, mask_write, pointer, pointer_write = (
                masks.read_port(), masks.write_port(), pointers.read_port(), pointers.write_port())
            mine, mask_sound, bit = Signal(), Signal(), (Const(1, layers) << noted.layer[:layer_bits])[:layers]
            old, parity, last = mask.data[:layers], mask.data[layers], Signal(layer_bits, name=f"last{p}")
            m.d.comb += [
                mine.eq(note & (noted.position[:bank_bits] == p)),
                mask.en.eq(read_mask), mask.addr.eq(Mux(self.request.valid, request.position >> bank_bits, row)),
                mask_write.en.eq(mine), mask_write.addr.eq(noted_row),
                # A damaged mask stays one.
                mask_write.data.eq(Mux(noted.layer == 0, 1, Cat(old | bit, parity ^ ~(old & bit).any()))),
                pointer.en.eq(read_pointer), pointer.addr.eq(Cat(last, row)),
                pointer_write.en.eq(mine), pointer_write.addr.eq(Cat(noted.layer[:layer_bits], noted_row)),
                pointer_write.data.eq(Cat(free, ~free.xor())),
            ]
            with m.If(mine):
                m.d.sync += following[p].eq(free + 1)
            width = 1 << layer_bits
            _, zeros = normalise(m, (old & seen)[:layers], [width >> step for step in range(1, layer_bits + 1)])
            with m.If(masked):
                m.d.sync += [last.eq(~zeros), mask_sound.eq(mask.data.xor() & (old & seen).any())]
            with m.If(pointed):
                m.d.sync += [
                    self.place[p].eq(pointer.data[:PLACE_BITS]),
                    self.bad[p].eq(~(begun & mask_sound & pointer.data.xor()
                                     & (pointer.data[:PLACE_BITS] < following[p]))),
                ]
        return m
