"""One AXI4 port as a writer: runs of beats, each burst requested only when all its data have arrived.

Bursts end at multiples of ``burst_beats`` beats, so none crosses 4 KiB. Since a burst never waits for data, a slow
producer cannot block the interconnect, over which the same producer may be waiting for reads.
"""

from amaranth.hdl import Cat, Const, Module, Signal
from amaranth.lib import fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from .axi import AxiWrite, drive_address
from .axi_read import COUNT_BITS, Run

__all__ = ["AxiWriter"]


class AxiWriter(wiring.Component):
    """Writes runs of beats to one memory port, in order.

    Members
    -------
    runs : In(stream of Run), count of at least 1
    data : In(stream of beats), taken only while a run is active
    base : In(64), byte address of beat 0, a multiple of the beat; stable while busy
    axi : Out(AxiWrite); every output is a register
    busy : Out(1), low when every run has been answered by memory
    beat : Out(1), pulse: a beat has been taken by memory
    error : Out(1), pulse: memory answered a burst with an error
    """

    def __init__(self, *, config):
        self.config = config
        super().__init__({
            "runs": In(stream.Signature(Run)), "data": In(stream.Signature(config.port_bits)), "base": In(64),
            "axi": Out(AxiWrite(config.port_bits)), "busy": Out(1), "beat": Out(1), "error": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config, axi = self.config, self.axi
        beat_shift = (config.port_bits // 8).bit_length() - 1
        burst_shift = config.burst_beats.bit_length() - 1
        block_bits = 64 - beat_shift - burst_shift
        drive_address(m, axi, "aw", config.port_bits)
        m.d.comb += axi.wstrb.eq(~0)

        # Two bursts of data: one is sent while the next arrives.
        m.submodules.queue = queue = fifo.SyncFIFOBuffered(width=config.port_bits + 1, depth=2 * config.burst_beats)
        # Bursts whose data are all in the queue: where they start and how long they are.
        m.submodules.bursts = bursts = fifo.SyncFIFOBuffered(
            width=block_bits + 2 * burst_shift, depth=4)

        active = Signal()
        within, block = (Signal(bits, name=name, reset_less=True) for name, bits in (
            ("within", burst_shift), ("block", block_bits)))
        position = Cat(within, block)  # of the next beat to arrive, cut at the longest burst
        start = Signal(burst_shift, reset_less=True)  # of the burst that arrives, within its block
        left = Signal(COUNT_BITS, reset_less=True)
        ends = Signal()
        accept = Signal()
        m.d.comb += [
            self.runs.ready.eq(~active),
            self.data.ready.eq(active & queue.w_rdy & bursts.w_rdy),
            accept.eq(self.data.valid & self.data.ready),
            ends.eq((left == 1) | (within == config.burst_beats - 1)),
            queue.w_en.eq(accept), queue.w_data.eq(Cat(self.data.payload, ends)),
            bursts.w_en.eq(accept & ends), bursts.w_data.eq(Cat((within - start)[:burst_shift], start, block)),
        ]
        with m.If(self.runs.valid & self.runs.ready):
            first = self.base[beat_shift:] + self.runs.payload.address
            m.d.sync += [position.eq(first), start.eq(first), left.eq(self.runs.payload.count), active.eq(1)]
        with m.If(accept):
            m.d.sync += [position.eq(position + 1), left.eq(left - 1), active.eq(left != 1)]
            with m.If(ends):
                m.d.sync += start.eq(0)

        # Requests, then the data of requested bursts only: data never overtake their address.
        in_flight = Signal(range(config.outstanding + 1))
        granted = Signal(range(config.outstanding + 2))  # bursts requested whose data are not all sent
        issue, send = Signal(), Signal()
        finished = Signal()
        last = queue.r_data[-1]
        address, beats, word, ending = (Signal.like(member, name=name, reset_less=True) for name, member in (
            ("address", axi.awaddr), ("beats", axi.awlen), ("word", axi.wdata), ("ending", axi.wlast)))
        m.d.comb += [
            axi.awaddr.eq(address), axi.awlen.eq(beats), axi.wdata.eq(word), axi.wlast.eq(ending),
            issue.eq(bursts.r_rdy & (in_flight != config.outstanding) & (~axi.awvalid | axi.awready)),
            bursts.r_en.eq(issue),
            send.eq(queue.r_rdy & (granted != 0) & (~axi.wvalid | axi.wready)),
            queue.r_en.eq(send),
            axi.bready.eq(1),
            finished.eq(axi.bvalid & axi.bready),
        ]
        with m.If(issue):
            m.d.sync += [beats.eq(bursts.r_data[:burst_shift]),
                         address.eq(Cat(Const(0, beat_shift), bursts.r_data[burst_shift:]))]
        with m.If(issue | axi.awready):
            m.d.sync += axi.awvalid.eq(issue)
        with m.If(send):
            m.d.sync += [word.eq(queue.r_data[:-1]), ending.eq(last)]
        with m.If(send | axi.wready):
            m.d.sync += axi.wvalid.eq(send)
        m.d.sync += [
            granted.eq(granted + issue - (send & last)),
            in_flight.eq(in_flight + issue - finished),
            self.beat.eq(axi.wvalid & axi.wready), self.error.eq(finished & axi.bresp[1]),
            # A register, so that it falls only after `error` has been seen.
            self.busy.eq(active | (self.runs.valid & self.runs.ready) | (bursts.level != 0) | (in_flight != 0)),
        ]
        return m
