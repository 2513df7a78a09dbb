"""A design cut in two halves: joined again they are the same design, and what cannot be cut is refused."""

import re

import pytest
from amaranth import Cat, ClockDomain, ClockSignal, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from skipopu.hw.halves import EXCHANGED, HalvesError
from skipopu.hw.verilog import to_verilog

SECOND = ("right.",)


class Block(wiring.Component):
    """A counter that begins at 5, stopped by ``hold``, and a memory that is read at ``address``."""

    def __init__(self, domain):
        self.domain = domain
        super().__init__({"hold": In(1), "address": In(3), "count": Out(4), "word": Out(8), "entry": Out(8)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.memory = memory = Memory(shape=8, depth=8, init=range(7, 15))
        read, at, write = (memory.read_port(domain=self.domain), memory.read_port(domain="comb"),
                           memory.write_port(domain=self.domain))
        m.d.comb += [read.addr.eq(self.count[:3]), self.word.eq(read.data), read.en.eq(1), write.en.eq(~self.hold),
                     write.addr.eq(self.count[1:]), write.data.eq(self.count), at.addr.eq(self.address),
                     self.entry.eq(at.data)]
        counter = Signal(4, init=5)
        m.d.comb += self.count.eq(counter)
        with m.If(~self.hold):
            m.d[self.domain] += counter.eq(counter + 1)
        return m


class Pair(wiring.Component):
    """Two blocks, either holds the other at times; ``kind`` adds what cannot be cut."""

    def __init__(self, kind="good"):
        self.kind = kind
        super().__init__({"clk": In(1), "rst": In(1), "slow_clock": In(1), "seen": Out(24), "both": Out(2),
                          "mixed": Out(1)})

    def elaborate(self, platform):
        m = Module()
        for name in ("sync", "slow"):
            m.domains += ClockDomain(name, reset_less=name == "slow")
        m.d.comb += [ClockSignal().eq(self.clk), ClockSignal("slow").eq(self.slow_clock)]
        m.submodules.left, m.submodules.right = left, right = Block("sync"), Block("slow")
        m.d.comb += [
            left.hold.eq(right.count[2]), right.hold.eq(left.count[3]),
            self.seen.eq(Cat(left.count, left.word, right.count, right.word)),
            self.both.eq(left.count[0]), self.both[1].eq(right.count[0]),
        ]
        if self.kind == "mixed":
            m.d.comb += self.mixed.eq(left.count[0] ^ right.count[1])
        if self.kind == "lookup":
            m.d.comb += left.address.eq(right.count)
            kept = Signal(8, name="kept")
            m.submodules.right_too = too = Keeper()
            m.d.comb += [too.value.eq(left.entry), kept.eq(too.kept), self.both[1].eq(right.count[0] ^ kept[0])]
        return m


class Keeper(wiring.Component):
    value: In(8)
    kept: Out(8)

    def elaborate(self, platform):
        m = Module()
        m.d.sync += self.kept.eq(self.value)
        return m


def verilog(kind, second):
    top = Pair(kind)
    ports = {name: (getattr(top, name), None) for name in ("clk", "rst", "slow_clock", "seen", "both", "mixed")}
    return to_verilog(top, name="pair", ports=ports, second=second)


def module(text, name):
    begin = text.index(f"module {name}(")
    return text[begin:text.index("endmodule", begin)]


def ports(text, kind):
    return set(re.findall(rf"\n  {kind} (?:\[\d+:0\] )?(\w+);", text))


def test_each_half_has_its_registers_and_what_it_reads_of_the_others():
    text = verilog("good", SECOND)
    first, second = module(text, "pair"), module(text, "pair_second")
    read_by_first, read_by_second = ({port for port in ports(half, "input") if EXCHANGED.fullmatch(port)}
                                     for half in (first, second))
    assert read_by_first == {port for port in ports(second, "output") if EXCHANGED.fullmatch(port)} != set()
    assert read_by_second == {port for port in ports(first, "output") if EXCHANGED.fullmatch(port)} != set()
    assert {EXCHANGED.fullmatch(port)[1] for port in read_by_first} == {"1"}
    assert {EXCHANGED.fullmatch(port)[2] for port in read_by_first} == {"slow_clock"}
    assert {EXCHANGED.fullmatch(port)[2] for port in read_by_second} == {"clk"}
    assert "posedge slow_clock" in second and "posedge slow_clock" not in first
    assert "posedge clk" in first and "posedge clk" not in second
    # Initial values, of registers and of memories.
    assert "4'h5" in first and "4'h5" in second and first.count("8'h0e") == second.count("8'h0e") == 1


def test_an_outputs_bit_is_in_the_half_that_knows_it():
    text = verilog("good", SECOND)
    first, second = module(text, "pair"), module(text, "pair_second")
    assert re.search(r"assign both = \{ 1'h0, .*\};", first) and re.search(r"assign both = \{ .*, 1'h0 \};", second)


@pytest.mark.parametrize("kind, message", [
    ("mixed", r"^expected output mixed\[0\] to depend on one half's registers, not on both: move one of them, or "),
    ("lookup", r"^expected an address from its own half's registers for what is read without a clock of memory "
               r"left\.memory\S*: move it to the other half$"),
])
def test_what_cannot_be_cut(kind, message):
    with pytest.raises(HalvesError, match=message):
        verilog(kind, (*SECOND, "right_too."))


def test_the_same_text_on_every_run():
    assert verilog("good", SECOND) == verilog("good", SECOND)
