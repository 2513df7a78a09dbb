"""One AXI4 port as a reader: long runs of beats, requested as far ahead as the FIFO has room for.

A command is cut into bursts that end at multiples of ``burst_beats`` beats, so none crosses 4 KiB. A burst is requested
only when the FIFO has room for all of it, counting what is on its way; ``rready`` is therefore always high, and a
stalled consumer never holds beats in the interconnect. Commands are taken while the beats of earlier ones are still
on their way.
"""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from .axi import AxiRead, drive_address

__all__ = ["ADDRESS_BITS", "AxiReader", "Beat", "COUNT_BITS", "ReadRun", "Run"]

ADDRESS_BITS = 32  #: superbeat index
COUNT_BITS = 32  #: superbeats of one command

#: ``count`` beats from beat ``address`` after the base.
Run = data.StructLayout({"address": ADDRESS_BITS, "count": COUNT_BITS})

#: A run for reading; ``kv``: what its beats are marked with.
ReadRun = data.StructLayout({"address": ADDRESS_BITS, "count": COUNT_BITS, "kv": 1})


def Beat(config):
    """One beat of a port; ``error`` if memory answered it with an error (the data are then meaningless), ``kv`` as in
    its run."""
    return data.StructLayout({"data": config.port_bits, "error": 1, "kv": 1})


class AxiReader(wiring.Component):
    """Reads runs of beats from one memory port, in order.

    Members
    -------
    runs : In(stream of ReadRun), count of at least 1
    base : In(64), byte address of beat 0, a multiple of the beat; stable while a run is active
    axi : Out(AxiRead); every output is a register
    beats : Out(stream of Beat)
    beat : Out(1), pulse: a beat has arrived
    """

    def __init__(self, *, config):
        self.config = config
        super().__init__({
            "runs": In(stream.Signature(ReadRun)), "base": In(64), "axi": Out(AxiRead(config.port_bits)),
            "beats": Out(stream.Signature(Beat(config))), "beat": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, axi = self.config, self.axi
        beat_shift = (config.port_bits // 8).bit_length() - 1
        burst_shift = config.burst_beats.bit_length() - 1

        m.submodules.fifo = queue = fifo.SyncFIFOBuffered(width=Beat(config).size, depth=config.fifo_beats)
        drive_address(m, axi, "ar", config.port_bits)
        # The marks of the bursts on their way, each at its number.
        marks, asked, answered = Signal(config.outstanding), *(Signal(range(config.outstanding)) for _ in range(2))
        mark = Signal()
        arrived = axi.rvalid & axi.rready
        taken = self.beats.valid & self.beats.ready
        m.d.comb += [
            axi.rready.eq(1),
            queue.w_en.eq(arrived), queue.w_data.eq(Cat(axi.rdata, axi.rresp[1], marks.bit_select(answered, 1))),
            self.beats.payload.eq(queue.r_data), self.beats.valid.eq(queue.r_rdy), queue.r_en.eq(self.beats.ready),
        ]
        m.d.sync += self.beat.eq(arrived)

        # The rest of the running command: `within` and `block` are the beat address, cut at the longest burst.
        active = Signal()
        within, block = (Signal(bits, name=name, reset_less=True) for name, bits in (
            ("within", burst_shift), ("block", 64 - beat_shift - burst_shift)))
        left = Signal(COUNT_BITS, reset_less=True)
        address, beats = Signal.like(axi.araddr, reset_less=True), Signal.like(axi.arlen, reset_less=True)
        room = Signal(burst_shift + 1)  # beats up to the next burst boundary
        length = Signal(burst_shift + 1)
        last = Signal()
        free = Signal(range(config.fifo_beats + 1), init=config.fifo_beats)
        in_flight = Signal(range(config.outstanding + 1))
        issue = Signal()
        m.d.comb += [
            room.eq(config.burst_beats - within),
            last.eq(left <= room),
            length.eq(Mux(last, left, room)),
            issue.eq(active & (free >= length) & (in_flight != config.outstanding) & (~axi.arvalid | axi.arready)),
            self.runs.ready.eq(~active), axi.araddr.eq(address), axi.arlen.eq(beats),
        ]
        with m.If(self.runs.valid & self.runs.ready):
            m.d.sync += [Cat(within, block).eq(self.base[beat_shift:] + self.runs.payload.address),
                         left.eq(self.runs.payload.count), mark.eq(self.runs.payload.kv), active.eq(1)]
        with m.If(issue):
            m.d.sync += [
                address.eq(Cat(Const(0, beat_shift), within, block)), beats.eq(length - 1),
                within.eq(0), block.eq(block + 1), left.eq(left - length), active.eq(~last),
                marks.bit_select(asked, 1).eq(mark), asked.eq(asked + 1),
            ]
        with m.If(arrived & axi.rlast):
            m.d.sync += answered.eq(answered + 1)
        with m.If(issue | axi.arready):
            m.d.sync += axi.arvalid.eq(issue)
        m.d.sync += [
            free.eq(free - Mux(issue, length, 0) + taken),
            in_flight.eq(in_flight + issue - (arrived & axi.rlast)),
        ]
        return m
