"""What the commands of one unit that are not done yet read and write."""

from amaranth.hdl import Cat, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..isa import COMMON
from .command import PC_BITS

__all__ = ["HazardWindow"]


class HazardWindow(wiring.Component):
    """The outstanding commands of one unit, newest first, up to ``size`` (a power of two, at most 64).

    A unit completes its commands in order, so a later command that conflicts with some of them needs the newest of
    those to be done. A conflict: one writes what the other reads or writes.

    Members
    -------
    reads, writes, pc : of the command that control looks at
    push : append that command; not while ``full``
    done : the oldest command is complete
    need : how many commands of this unit must be done (modulo 256, since reset) before that command may start;
        a number already reached if there is no conflict
    done_count : commands done since reset, modulo 256; one cycle after ``done``
    full, empty : of the window
    oldest_pc : instruction index of the oldest command, if not ``empty``
    """

    def __init__(self, *, size: int = 16):
        if size not in (2, 4, 8, 16, 32, 64):
            raise ValueError(f"size must be a power of two from 2 to 64, not {size}")
        self.size = size
        resources = COMMON["reads"].bits
        super().__init__({
            "reads": In(resources), "writes": In(resources), "pc": In(PC_BITS), "push": In(1), "done": In(1),
            "need": Out(8), "done_count": Out(8), "full": Out(1), "empty": Out(1), "oldest_pc": Out(PC_BITS),
        })

    def elaborate(self, platform):
        m = Module()
        count, done_count = Signal(8), self.done_count
        live = Signal(self.size)  # as many ones, from bit 0, as commands are outstanding
        reads = [Signal.like(self.reads, name=f"reads_{i}", reset_less=True) for i in range(self.size)]
        writes = [Signal.like(self.writes, name=f"writes_{i}", reset_less=True) for i in range(self.size)]

        with m.If(self.push):
            m.d.sync += count.eq(count + 1)
            m.d.sync += [new.eq(old) for new, old in zip(reads, [self.reads, *reads])]
            m.d.sync += [new.eq(old) for new, old in zip(writes, [self.writes, *writes])]
        with m.If(self.done):
            m.d.sync += done_count.eq(done_count + 1)
        with m.If(self.push & ~self.done):
            m.d.sync += live.eq(Cat(1, live))
        with m.If(self.done & ~self.push):
            m.d.sync += live.eq(live >> 1)

        m.d.comb += [self.full.eq(live[-1]), self.empty.eq(~live[0]), self.need.eq(done_count)]
        for i in reversed(range(self.size)):
            conflict = (writes[i] & (self.reads | self.writes)) | (reads[i] & self.writes)
            with m.If(live[i] & conflict.any()):
                m.d.comb += self.need.eq(count - i)

        m.submodules.pcs = pcs = Memory(shape=PC_BITS, depth=self.size, init=[])
        write, read = pcs.write_port(), pcs.read_port(domain="comb")
        m.d.comb += [
            write.addr.eq(count), write.data.eq(self.pc), write.en.eq(self.push),
            read.addr.eq(done_count), self.oldest_pc.eq(read.data),
        ]
        return m
