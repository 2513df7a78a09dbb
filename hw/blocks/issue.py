"""Issue queue: holds the commands of one unit until the commands of other units that they need are done."""

from amaranth.hdl import Array, Cat, Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..config import OverlayConfig
from .command import Command

__all__ = ["IssueQueue"]


class IssueQueue(wiring.Component):
    """A FIFO of ``depth`` commands, by default ``config.queue_depth``, whose head leaves when its needs are met.

    A need is compared when the command enters, and from then on watched for in the count of each cycle: the numbers
    may wrap while the command waits. This holds as long as fewer than 128 commands of a unit are outstanding.

    Members
    -------
    i : In(stream of Command)
    o : Out(stream of Command), in order, from registers; two cycles or more after ``i``
    done_counts : per unit, commands done since reset, modulo 256; rises by at most one in a cycle
    enable : while low nothing more leaves the queue
    waiting : the head is there and waits for another unit
    """

    def __init__(self, *, config: OverlayConfig, depth: int | None = None):
        self.config, self.depth = config, depth or config.queue_depth
        command = stream.Signature(Command(config))
        super().__init__({
            "i": In(command), "o": Out(command), "done_counts": In(8).array(4), "enable": In(1), "waiting": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        depth = self.depth
        shape = Command(self.config)
        m.submodules.storage = storage = Memory(shape=data.ArrayLayout(1, shape.size), depth=depth, init=[])
        write, read = storage.write_port(), storage.read_port(domain="comb")
        head, tail, level = Signal(range(depth)), Signal(range(depth)), Signal(range(depth + 1))
        needs = [[Signal(8, name=f"need_{slot}_{unit}", reset_less=True) for unit in range(4)] for slot in range(depth)]
        pending = Array(Signal(4, name=f"pending_{slot}") for slot in range(depth))
        push, pop, blocked = Signal(), Signal(), Signal()
        payload = Signal.like(self.o.payload, reset_less=True)

        m.d.comb += [
            self.o.payload.eq(payload),
            self.i.ready.eq(level != depth),
            push.eq(self.i.valid & self.i.ready),
            blocked.eq(pending[head].any()),
            self.waiting.eq((level != 0) & blocked),
            pop.eq((level != 0) & ~blocked & self.enable & (~self.o.valid | self.o.ready)),
            write.addr.eq(tail), write.data.eq(self.i.payload.as_value()), write.en.eq(push),
            read.addr.eq(head),
        ]
        with m.If(push ^ pop):
            m.d.sync += level.eq(level + push - pop)
        with m.If(push):
            m.d.sync += tail.eq((tail + 1) % depth)
        with m.If(pop):
            m.d.sync += [head.eq((head + 1) % depth), payload.eq(read.data.as_value())]
        with m.If(pop | self.o.ready):
            m.d.sync += self.o.valid.eq(pop)

        ahead = Cat((self.done_counts[unit] - self.i.payload.needs[unit])[7] for unit in range(4))
        for slot in range(depth):
            with m.If(push & (tail == slot)):
                m.d.sync += pending[slot].eq(ahead)
                m.d.sync += [need.eq(self.i.payload.needs[unit]) for unit, need in enumerate(needs[slot])]
            with m.Elif(pending[slot].any()):
                met = Cat(self.done_counts[unit] == need for unit, need in enumerate(needs[slot]))
                m.d.sync += pending[slot].eq(pending[slot] & ~met)
        return m
