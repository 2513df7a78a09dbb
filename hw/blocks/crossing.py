"""One AXI4 port from the core's clock to the memory's: narrower beats, shorter bursts.

High-bandwidth memory takes beats of 256 bits at twice the core's clock in bursts of 16 at most (AXI3). A burst of the
core becomes several of memory, from its start on; their answers become one again. The channels cross in asynchronous
FIFOs and are joined nowhere but in the memory's domain, so that each direction runs at full rate.
"""

from amaranth.hdl import Cat, DomainRenamer, Module, Mux, Signal
from amaranth.lib import fifo, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from .axi import Axi4, AxiRead, drive_address

__all__ = ["PortCrossing"]

_ADDRESSES = 8  # requests in a crossing FIFO: a burst outlasts the synchronisers many times
_PAGE_BITS = 12  # no burst crosses 4 KiB


class PortCrossing(wiring.Component):
    """An AXI4 slave in domain "sync" that is a master in domain "memory", in order.

    Members
    -------
    core : In(AXI4 without IDs), INCR bursts of whole beats within 4 KiB; data after or with their address. Every byte
        is written: ``wstrb`` is ignored
    memory : Out(the same, ``memory_bits`` wide); bursts of at most ``memory_burst`` beats; requests and written data
        come from registers, and data never overtake their address

    Parameters
    ----------
    core_bits, memory_bits : data widths, powers of two, the memory's not above the core's
    memory_burst : beats of the longest burst of memory, a power of two
    outstanding : bursts of memory in flight, per direction
    depth : beats in a crossing FIFO, core's width; 16 cover the synchronisers at a clock ratio of two
    write : False for a port that only reads
    """

    def __init__(self, *, core_bits, memory_bits, memory_burst=16, outstanding=64, depth=16, write=True):
        if memory_bits > core_bits:
            raise ValueError(f"memory_bits must be at most core_bits ({core_bits}), not {memory_bits}")
        self.ratio = core_bits // memory_bits
        self.core_bits, self.memory_bits, self.memory_burst = core_bits, memory_bits, memory_burst
        self.outstanding, self.depth, self.write = outstanding, depth, write
        kind = Axi4 if write else AxiRead
        super().__init__({"core": In(kind(core_bits)), "memory": Out(kind(memory_bits))})

    def elaborate(self, platform):
        m = Module()
        self._read(m)
        if self.write:
            self._write(m)
        return m

    def _queue(self, m, name, width, depth, *, to_memory):
        source, target = ("sync", "memory") if to_memory else ("memory", "sync")
        queue = fifo.AsyncFIFO(width=width, depth=depth, exact_depth=True, w_domain=source, r_domain=target)
        m.submodules[name] = queue
        return queue

    def _requests(self, m, channel):
        """Split the requests of ``channel`` ("ar" or "aw").

        Returns a FIFO of one bit per burst of memory, whether it is the last of its burst of the core, and the pulse
        that has put a bit into it.
        """
        core, memory = self.core, self.memory
        core_valid, core_ready, address, length = (getattr(core, channel + name)
                                                   for name in ("valid", "ready", "addr", "len"))
        valid, ready, out_address, out_length = (getattr(memory, channel + name)
                                                 for name in ("valid", "ready", "addr", "len"))
        queue = self._queue(m, f"{channel}_queue", len(address) + len(length), _ADDRESSES, to_memory=True)
        order = DomainRenamer("memory")(fifo.SyncFIFOBuffered(width=1, depth=self.outstanding))
        m.submodules[f"{channel}_order"] = order
        drive_address(m, memory, channel, self.memory_bits)

        left = Signal(range(256 * self.ratio + 1), name=f"{channel}_left")  # beats of memory
        position = Signal.like(address, name=f"{channel}_position", reset_less=True)
        final, issue = Signal(name=f"{channel}_final"), Signal(name=f"{channel}_issue")
        m.d.comb += [
            queue.w_data.eq(Cat(length, address)), queue.w_en.eq(core_valid), core_ready.eq(queue.w_rdy),
            queue.r_en.eq(left == 0),
            final.eq(left <= self.memory_burst),
            issue.eq((left != 0) & order.w_rdy & (~valid | ready)),
            order.w_en.eq(issue), order.w_data.eq(final),
        ]
        with m.If(queue.r_rdy & queue.r_en):
            m.d.memory += [left.eq((queue.r_data[:len(length)] + 1) << exact_log2(self.ratio)),
                           position.eq(queue.r_data[len(length):])]
        with m.If(issue):
            m.d.memory += [
                out_address.eq(position), out_length.eq(Mux(final, left, self.memory_burst) - 1),
                left.eq(Mux(final, 0, left - self.memory_burst)),
                position[:_PAGE_BITS].eq(position[:_PAGE_BITS] + self.memory_burst * self.memory_bits // 8),
            ]
        with m.If(issue | ready):
            m.d.memory += valid.eq(issue)
        return order, issue

    def _read(self, m):
        core, memory, ratio = self.core, self.memory, self.ratio
        order, _ = self._requests(m, "ar")
        queue = self._queue(m, "r_queue", self.core_bits + 3, self.depth, to_memory=False)
        taken, whole = Signal(), Signal()
        index = Signal(range(ratio))
        earlier = Signal((ratio - 1) * self.memory_bits, reset_less=True)  # beats before the last of a core's beat
        response = Signal(2)
        m.d.comb += [
            memory.rready.eq(queue.w_rdy & order.r_rdy), taken.eq(memory.rvalid & memory.rready),
            whole.eq(taken & (index == ratio - 1)),
            queue.w_en.eq(whole),
            queue.w_data.eq(Cat(earlier, memory.rdata, response | memory.rresp, memory.rlast & order.r_data)),
            order.r_en.eq(taken & memory.rlast),
            Cat(core.rdata, core.rresp, core.rlast).eq(queue.r_data),
            core.rvalid.eq(queue.r_rdy), queue.r_en.eq(core.rready),
        ]
        with m.If(taken):
            m.d.memory += [index.eq(Mux(whole, 0, index + 1)), response.eq(Mux(whole, 0, response | memory.rresp)),
                           earlier.eq(Cat(earlier, memory.rdata)[self.memory_bits:])]

    def _write(self, m):
        core, memory, ratio = self.core, self.memory, self.ratio
        order, requested = self._requests(m, "aw")
        data = self._queue(m, "w_queue", self.core_bits + 1, self.depth, to_memory=True)
        index, beat = Signal(range(ratio)), Signal(range(self.memory_burst))
        granted = Signal(range(self.outstanding + 2))  # bursts requested whose data are not all sent
        send, whole, ends = Signal(), Signal(), Signal()
        m.d.comb += [
            data.w_data.eq(Cat(core.wdata, core.wlast)), data.w_en.eq(core.wvalid), core.wready.eq(data.w_rdy),
            send.eq(data.r_rdy & (granted != 0) & (~memory.wvalid | memory.wready)),
            whole.eq(index == ratio - 1),
            ends.eq((beat == self.memory_burst - 1) | (whole & data.r_data[-1])),
            data.r_en.eq(send & whole),
            memory.wstrb.eq(~0),
        ]
        with m.If(send):
            m.d.memory += [memory.wdata.eq(data.r_data.word_select(index, self.memory_bits)), memory.wlast.eq(ends),
                           index.eq(Mux(whole, 0, index + 1)), beat.eq(Mux(ends, 0, beat + 1))]
        with m.If(send | memory.wready):
            m.d.memory += memory.wvalid.eq(send)
        m.d.memory += granted.eq(granted + requested - (send & ends))

        answers = self._queue(m, "b_queue", 2, _ADDRESSES, to_memory=False)
        answered, response = Signal(), Signal(2)
        m.d.comb += [
            memory.bready.eq(answers.w_rdy & order.r_rdy), answered.eq(memory.bvalid & memory.bready),
            order.r_en.eq(answered),
            answers.w_data.eq(response | memory.bresp), answers.w_en.eq(answered & order.r_data),
            core.bresp.eq(answers.r_data), core.bvalid.eq(answers.r_rdy), answers.r_en.eq(core.bready),
        ]
        with m.If(answered):
            m.d.memory += response.eq(Mux(order.r_data, 0, response | memory.bresp))
