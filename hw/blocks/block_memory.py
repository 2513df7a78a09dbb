"""Device memory in block RAM: one bank behind each memory port, and a second way in for the board's serial link.

A bank has one read and one write port. Reads serve the overlay's data port, on bank 0 also its instruction fetch, and
the link, a burst of one at a time; a new burst follows the one before without a pause. The contents survive a reset.
"""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, enum, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In
from amaranth.utils import exact_log2

from ..isa import WORD_BITS
from .axi import Axi4, AxiRead, connect_axi
from .serial_bridge import WordAccess

__all__ = ["BlockMemory"]

_DECERR = 3


class _Source(enum.Enum, shape=2):
    """Who asked for a beat."""

    DATA = 0
    FETCH = 1
    LINK = 2


class _Bank(wiring.Component):
    """The memory of one port.

    Members
    -------
    axi : In(AXI4); fetch : In(AXI4 read channels), ``WORD_BITS`` wide
    link : In(WordAccess), its ``port`` not looked at and its address in range

    A burst that leaves the memory is answered DECERR as a whole: reads give zeros, writes change nothing.
    """

    def __init__(self, *, port_bits, memory_bytes):
        self.port_bits, self.depth = port_bits, memory_bytes // (port_bits // 8)
        super().__init__({"axi": In(Axi4(port_bits)), "fetch": In(AxiRead(WORD_BITS)), "link": In(WordAccess())})

    def elaborate(self, platform):
        m = Module()
        bits, axi, fetch, link = self.port_bits, self.axi, self.fetch, self.link
        shift = exact_log2(bits // 8)
        pieces = WORD_BITS // bits  # beats of a fetched word
        link_words = bits // 32
        m.submodules.storage = storage = Memory(shape=bits, depth=self.depth, init=[])
        write, read = storage.write_port(granularity=8), storage.read_port()
        index_bits = len(read.addr)
        count_bits = 9 + exact_log2(pieces)
        link_word = link.address[2:shift]

        def outside(address, beats):
            return (address[shift + index_bits:] != 0) | (address[shift:shift + index_bits] + beats > self.depth)

        # Reads: `active` walks through a burst; a beat that was read waits in the memory's output register.
        beat = data.StructLayout({"source": _Source, "last": 1, "error": 1})
        active, at, left = Signal(), Signal(index_bits), Signal(count_bits)
        source, error = Signal(_Source), Signal()
        valid, out = Signal(), Signal(beat)
        move, taken, ends, accept, link_busy = Signal(), Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            move.eq(~valid | taken), ends.eq(left == 1), accept.eq(~active | (move & ends)),
            read.addr.eq(at), read.en.eq(move),
        ]
        with m.If(move):
            m.d.sync += [valid.eq(active), out.source.eq(source), out.last.eq(ends), out.error.eq(error)]
            with m.If(active):
                m.d.sync += [at.eq(at + 1), left.eq(left - 1), active.eq(~ends)]
        wants_link = link.valid & ~link.write & ~link_busy
        with m.If(accept):
            with m.If(wants_link):
                m.d.sync += [active.eq(1), at.eq(link.address[shift:]), left.eq(1), source.eq(_Source.LINK),
                             error.eq(0), link_busy.eq(1)]
            with m.Elif(fetch.arvalid):
                beats = (fetch.arlen + 1) << exact_log2(pieces)
                m.d.comb += fetch.arready.eq(1)
                m.d.sync += [active.eq(1), at.eq(fetch.araddr[shift:]), left.eq(beats), source.eq(_Source.FETCH),
                             error.eq(outside(fetch.araddr, beats))]
            with m.Elif(axi.arvalid):
                m.d.comb += axi.arready.eq(1)
                m.d.sync += [active.eq(1), at.eq(axi.araddr[shift:]), left.eq(axi.arlen + 1), source.eq(_Source.DATA),
                             error.eq(outside(axi.araddr, axi.arlen + 1))]

        found = Mux(out.error, 0, read.data)
        m.d.comb += [axi.rdata.eq(found), axi.rlast.eq(out.last), axi.rresp.eq(Mux(out.error, _DECERR, 0))]
        piece = Signal(range(pieces)) if pieces > 1 else Const(0, 1)
        full = piece == pieces - 1
        with m.Switch(out.source):
            with m.Case(_Source.DATA):
                m.d.comb += [axi.rvalid.eq(valid), taken.eq(axi.rready)]
            with m.Case(_Source.FETCH):
                m.d.comb += taken.eq(~fetch.rvalid | fetch.rready)
            with m.Default():
                m.d.comb += taken.eq(1)
        word = Signal(WORD_BITS, reset_less=True)
        m.d.comb += fetch.rdata.eq(word)
        with m.If(fetch.rready):
            m.d.sync += fetch.rvalid.eq(0)
        with m.If(valid & taken & (out.source == _Source.FETCH)):
            m.d.sync += [word.eq(Cat(word, found)[-WORD_BITS:]), fetch.rlast.eq(out.last),
                         fetch.rresp.eq(Mux(out.error, _DECERR, 0)), fetch.rvalid.eq(full)]
            if pieces > 1:
                m.d.sync += piece.eq(piece + 1)

        # Writes: the overlay's bursts, and a word of the link in a cycle without a beat.
        w_active, w_at, w_error = Signal(), Signal(index_bits), Signal()
        storing, link_write = Signal(), Signal()
        m.d.comb += [
            axi.awready.eq(~w_active & ~axi.bvalid), axi.wready.eq(w_active),
            storing.eq(axi.wvalid & axi.wready), link_write.eq(link.valid & link.write & ~link_busy & ~storing),
            write.addr.eq(w_at), write.data.eq(axi.wdata),
            write.en.eq(Mux(storing & ~w_error, axi.wstrb, 0)),
        ]
        with m.If(link_write):
            m.d.comb += [write.addr.eq(link.address[shift:]), write.data.eq(link.data.replicate(link_words)),
                         write.en.eq(Const(0b1111, bits // 8) << (link_word << 2))]
            m.d.sync += link_busy.eq(1)
        with m.If(axi.awvalid & axi.awready):
            m.d.sync += [w_active.eq(1), w_at.eq(axi.awaddr[shift:]), w_error.eq(outside(axi.awaddr, axi.awlen + 1))]
        with m.If(storing):
            m.d.sync += w_at.eq(w_at + 1)
            with m.If(axi.wlast):
                m.d.sync += [w_active.eq(0), axi.bvalid.eq(1), axi.bresp.eq(Mux(w_error, _DECERR, 0))]
        with m.If(axi.bvalid & axi.bready):
            m.d.sync += axi.bvalid.eq(0)

        m.d.sync += link.done.eq(link_write | (valid & (out.source == _Source.LINK)))
        m.d.sync += link.answer.eq(read.data.word_select(link_word, 32))
        with m.If(link.done):
            m.d.sync += link_busy.eq(0)
        return m


class BlockMemory(wiring.Component):
    """All ports' memory.

    Members
    -------
    m_axi : In(AXI4) per port; mi_axi : In(AXI4 read channels), instruction fetch from bank 0
    link : In(WordAccess), port and address in range

    memory_bytes : behind each port, a multiple of a fetched line of 256 bytes
    """

    def __init__(self, *, config, memory_bytes):
        if memory_bytes < 256 or memory_bytes % 256:
            raise ValueError(f"memory_bytes must be a positive multiple of 256, not {memory_bytes}")
        if config.port_bits > WORD_BITS:
            raise ValueError(f"port_bits must be at most {WORD_BITS}, not {config.port_bits}")
        self.config, self.memory_bytes = config, memory_bytes
        super().__init__({"m_axi": In(Axi4(config.port_bits)).array(config.ports), "mi_axi": In(AxiRead(WORD_BITS)),
                          "link": In(WordAccess())})

    def elaborate(self, platform):
        m = Module()
        link = self.link
        for port in range(self.config.ports):
            bank = _Bank(port_bits=self.config.port_bits, memory_bytes=self.memory_bytes)
            m.submodules[f"bank{port}"] = bank
            connect_axi(m, self.m_axi[port], bank.axi)
            if port == 0:
                connect_axi(m, self.mi_axi, bank.fetch)
            chosen = link.port == port
            m.d.comb += [bank.link.valid.eq(link.valid & chosen), bank.link.write.eq(link.write),
                         bank.link.address.eq(link.address), bank.link.data.eq(link.data)]
            with m.If(chosen):
                m.d.comb += [link.done.eq(bank.link.done), link.answer.eq(bank.link.answer)]
        return m
