"""From Amaranth to text: what is left out, and that nothing else is."""

import pytest
from amaranth import Module, Signal
from amaranth.back import rtlil
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from skipopu.hw.verilog import to_rtlil, to_verilog


class Reader(wiring.Component):
    """Reads one memory, so that nothing of it is trimmed."""

    def __init__(self, contents):
        self.contents = contents
        super().__init__({"address": In(3), "value": Out(8)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.memory = memory = Memory(shape=8, depth=8, init=self.contents)
        read, write = memory.read_port(domain="comb"), memory.write_port()
        m.d.comb += [read.addr.eq(self.address), self.value.eq(read.data), write.addr.eq(self.address),
                     write.data.eq(Signal(8, init=1)), write.en.eq(self.address == 7)]
        return m


@pytest.mark.parametrize(("contents", "initialised"), [([], 0), ([0, 0, 0], 0), ([0, 5], 1), ([0] * 7 + [128], 1)])
def test_only_memories_of_zeros_have_no_initial_contents(contents, initialised):
    before = rtlil.ModuleEmitter
    assert to_rtlil(Reader(contents), name="reader").count("cell $meminit_v2 ") == initialised
    assert rtlil.ModuleEmitter is before
    text = to_verilog(Reader(contents), name="reader")
    for place, value in enumerate(contents):
        assert (f"[{place}] = 8'h{value:02x};" in text) == bool(initialised), (place, value)


def test_the_emitter_is_put_back_after_a_mistake():
    before = rtlil.ModuleEmitter
    with pytest.raises(TypeError):
        to_rtlil(object(), name="nothing", ports={})
    assert rtlil.ModuleEmitter is before
