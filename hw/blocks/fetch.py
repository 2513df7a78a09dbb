"""Instruction fetch: an AXI4 read master, a direct-mapped cache and prefetch along the program.

A line is one burst of `LINE_WORDS` instructions at an aligned address, so no burst crosses 4 KiB; the first and the
last line of a program may hold words that are not part of it, which are fetched and never delivered. Lines are
requested up to `prefetch` ahead of the program counter: layers are unrolled into straight-line code.
"""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from ..config import OverlayConfig
from ..isa import WORD_BITS
from .axi import AxiRead, drive_address
from .command import PC_BITS

__all__ = ["Fetch", "FetchSignature", "Fetched", "LINE_WORDS"]

LINE_WORDS = 8

#: An instruction and its index; ``error``: memory answered with an error, ``outside``: the index is not in the program.
Fetched = data.StructLayout({"word": WORD_BITS, "pc": PC_BITS, "error": 1, "outside": 1})


class FetchSignature(wiring.Signature):
    """Between control (Out) and fetch (In).

    enable : high while a program runs; low forgets all lines
    redirect, target : continue at this instruction; what is on offer in this cycle is withdrawn
    program, length : byte address (a multiple of 32) and instructions of the program; stable while enabled
    instruction : the instructions from ``target`` on, in order
    """

    def __init__(self):
        super().__init__({
            "enable": Out(1), "redirect": Out(1), "target": Out(PC_BITS), "program": Out(64), "length": Out(PC_BITS),
            "instruction": In(stream.Signature(Fetched)),
        })


class Fetch(wiring.Component):
    """Deliver instructions, one a cycle while they hit.

    Members
    -------
    axi : Out(AXI4 read channels, 64-bit addresses, 256-bit data); outputs come from registers
    control : In(FetchSignature)
    """

    def __init__(self, *, config: OverlayConfig, prefetch: int = 4):
        if config.cache_words < 2 * LINE_WORDS:
            raise ValueError(f"cache_words must be at least {2 * LINE_WORDS}, not {config.cache_words}")
        self.config = config
        self.lines = config.cache_words // LINE_WORDS
        self.prefetch = min(prefetch, self.lines - 1)
        super().__init__({
            "axi": Out(AxiRead(WORD_BITS)), "control": In(FetchSignature()),
        })

    def elaborate(self, platform):
        m = Module()
        axi, control, out = self.axi, self.control, self.control.instruction
        word_bits, slot_bits = exact_log2(LINE_WORDS), exact_log2(self.lines)
        line_bytes_log2 = exact_log2(LINE_WORDS * WORD_BITS // 8)
        outstanding_max = 4

        m.submodules.words = words = Memory(shape=WORD_BITS, depth=self.config.cache_words, init=[])
        fill_port, read_port = words.write_port(), words.read_port()
        tag_bits = PC_BITS + 1 - word_bits - slot_bits
        m.submodules.tags = tags = Memory(shape=tag_bits, depth=self.lines, init=[])
        tag_write, tag_here, tag_fill = tags.write_port(), tags.read_port(domain="comb"), tags.read_port(domain="comb")
        valid, pending, bad = (Signal(self.lines, name=name) for name in ("valid", "pending", "bad"))

        # Positions count words from the aligned address at or below the program, so that lines are aligned.
        offset = control.program[line_bytes_log2 - word_bits:line_bytes_log2]
        pc, position = Signal(PC_BITS), Signal(PC_BITS + 1)
        line, slot = position[word_bits:], position[word_bits:word_bits + slot_bits]

        # Delivery.
        hit, outside, move = Signal(), Signal(), Signal()
        m.d.comb += [
            tag_here.addr.eq(slot),
            hit.eq(valid.bit_select(slot, 1) & (tag_here.data == line[slot_bits:])),
            outside.eq(pc >= control.length),
            move.eq(~out.valid | out.ready),
            read_port.addr.eq(position), read_port.en.eq(move),
            out.payload.word.eq(read_port.data),
        ]
        with m.If(move):
            m.d.sync += [
                out.valid.eq(hit | outside), out.payload.pc.eq(pc), out.payload.outside.eq(outside),
                out.payload.error.eq(bad.bit_select(slot, 1)),
            ]
            with m.If(hit & ~outside):
                m.d.sync += [pc.eq(pc + 1), position.eq(position + 1)]
        with m.If(control.redirect):
            m.d.sync += [pc.eq(control.target), position.eq(control.target + offset)]
        with m.If(control.redirect | ~control.enable):
            m.d.sync += out.valid.eq(0)

        # Requests: `fill` walks from the current line to the last line of the program, at most `prefetch` ahead.
        # `draining` keeps the lines of a stopped program from counting as lines of the next one.
        fill, address = Signal(PC_BITS + 1 - word_bits), Signal.like(axi.araddr, reset_less=True)
        fill_slot, fill_tag = fill[:slot_bits], fill[slot_bits:]
        fill_end = Signal(PC_BITS + 1)
        outstanding, draining = Signal(range(outstanding_max + 1)), Signal()
        present, request, finish = Signal(), Signal(), Signal()
        busy = pending.bit_select(fill_slot, 1)
        m.d.sync += fill_end.eq(control.length + offset)
        m.d.comb += [
            tag_fill.addr.eq(fill_slot),
            present.eq((valid.bit_select(fill_slot, 1) | busy) & (tag_fill.data == fill_tag)),
            tag_write.addr.eq(fill_slot), tag_write.data.eq(fill_tag), tag_write.en.eq(request),
        ]
        with m.If(control.redirect):
            m.d.sync += fill.eq((control.target + offset) >> word_bits)
        with m.Elif(control.enable & ~draining & (Cat(Const(0, word_bits), fill) < fill_end)
                    & (fill - line <= self.prefetch)):
            with m.If(present):
                m.d.sync += fill.eq(fill + 1)
            with m.Elif(~busy & (outstanding != outstanding_max) & (~axi.arvalid | axi.arready)):
                m.d.comb += request.eq(1)
                m.d.sync += fill.eq(fill + 1)
        with m.If(request):
            m.d.sync += [
                axi.arvalid.eq(1),
                address.eq(Cat(Const(0, line_bytes_log2), control.program[line_bytes_log2:] + fill)),
            ]
        with m.Elif(axi.arready):
            m.d.sync += axi.arvalid.eq(0)
        with m.If(request ^ finish):
            m.d.sync += outstanding.eq(outstanding + request - finish)
        with m.If(outstanding == 0):
            m.d.sync += draining.eq(0)
        with m.Elif(~control.enable):
            m.d.sync += draining.eq(1)

        # Answers come in the order of the requests; there is room for all of them.
        m.submodules.order = order = Memory(shape=slot_bits, depth=outstanding_max, init=[])
        order_write, order_read = order.write_port(), order.read_port(domain="comb")
        first, last, beat, failed = Signal(2), Signal(2), Signal(word_bits), Signal()
        filled = order_read.data
        m.d.comb += [
            order_write.addr.eq(last), order_write.data.eq(fill_slot), order_write.en.eq(request),
            order_read.addr.eq(first),
            fill_port.addr.eq(Cat(beat, filled)), fill_port.data.eq(axi.rdata), fill_port.en.eq(axi.rvalid),
            axi.araddr.eq(address), axi.arlen.eq(LINE_WORDS - 1), axi.rready.eq(1),
            finish.eq(axi.rvalid & (beat == LINE_WORDS - 1)),
        ]
        drive_address(m, axi, "ar", WORD_BITS)
        with m.If(request):
            m.d.sync += last.eq(last + 1)
        with m.If(axi.rvalid):
            m.d.sync += [beat.eq(beat + 1), failed.eq(~finish & (failed | axi.rresp[1]))]
        with m.If(finish):
            m.d.sync += first.eq(first + 1)
        # The bits of a line that is requested or filled; both may happen at once, with different lines.
        asked, came = Signal(self.lines), Signal(self.lines)
        with m.If(request):
            m.d.comb += asked.eq(Const(1, self.lines) << fill_slot)
        with m.If(finish):
            m.d.comb += came.eq(Const(1, self.lines) << filled)
        with m.If(request | finish):
            m.d.sync += [
                pending.eq((pending | asked) & ~came), valid.eq((valid & ~asked & ~came) | Mux(draining, 0, came)),
                bad.eq(Mux(failed | axi.rresp[1], bad | came, bad & ~came)),
            ]
        with m.If(~control.enable):
            m.d.sync += valid.eq(0)
        return m
