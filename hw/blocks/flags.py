"""Many flags that are set one by one and cleared all at once."""

from amaranth.hdl import Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

__all__ = ["Flags"]

_GROUP = 32  # flags in a word of the memory


class Flags(wiring.Component):
    """Flags in a memory, of which a register knows the words that were written since the last ``clear``.

    A register for each flag would cost a decoder and a multiplexer over all of them.

    Members
    -------
    index : below ``count``; is_set : that flag, as it is before this cycle's ``clear`` and ``set`` (combinational)
    clear : all flags; set : the flag at ``index``, which outlasts a ``clear`` in the same cycle
    """

    def __init__(self, *, count):
        self.count = count
        super().__init__({"index": In(range(count)), "is_set": Out(1), "clear": In(1), "set": In(1)})

    def elaborate(self, platform):
        m = Module()
        words = -(-self.count // _GROUP)
        m.submodules.memory = memory = Memory(shape=_GROUP, depth=words, init=[])
        read, write = memory.read_port(domain="comb"), memory.write_port()
        place, word = self.index[:_GROUP.bit_length() - 1], self.index[_GROUP.bit_length() - 1:]
        written, flags, bit = Signal(words), Signal(_GROUP), Signal(_GROUP)
        m.d.comb += [
            read.addr.eq(word), flags.eq(Mux(written.bit_select(word, 1), read.data, 0)),
            bit.eq(Const(1, _GROUP) << place), self.is_set.eq(flags.bit_select(place, 1)),
            write.addr.eq(word), write.en.eq(self.set), write.data.eq(Mux(self.clear, 0, flags) | bit),
        ]
        with m.If(self.clear | self.set):
            m.d.sync += written.eq(Mux(self.clear, 0, written) | Mux(self.set, Const(1, words) << word, 0))
        return m
