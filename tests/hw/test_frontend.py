"""Registers, fetch and control together: a program in memory, started and observed over the register bus alone."""

from amaranth.hdl import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import ClockCycles
from skipopu.hw.blocks.axi import AxiLite, AxiRead
from skipopu.hw.blocks.command import Command
from skipopu.hw.blocks.control import Control
from skipopu.hw.blocks.csr import Csr
from skipopu.hw.blocks.fetch import Fetch
from skipopu.hw.config import preset
from skipopu.hw.isa import WORD_BITS, Condition, encode
from skipopu.hw.registers import ADDRESS_BITS, FaultCause, Interrupt, Status
from skipopu.hw.registers import Control as Ctrl
from skipopu.sim.bench import StreamSink, bench, run_bench
from test_csr import Host
from test_fetch import Memory

CONFIG = preset("tiny")


class Frontend(wiring.Component):
    """The three blocks; the load unit's commands come out and are done at once."""

    axil: In(AxiLite(ADDRESS_BITS))
    axi: Out(AxiRead(WORD_BITS))
    irq: Out(1)
    loads: Out(stream.Signature(Command(CONFIG)))

    def elaborate(self, platform):
        m = Module()
        m.submodules.csr, m.submodules.fetch, m.submodules.control = csr, fetch, control = (
            Csr(config=CONFIG), Fetch(config=CONFIG), Control(config=CONFIG))
        wiring.connect(m, csr.control, control.csr)
        wiring.connect(m, control.fetch, fetch.control)
        wiring.connect(m, fetch.axi, wiring.flipped(self.axi))
        wiring.connect(m, csr.axil, wiring.flipped(self.axil))
        wiring.connect(m, control.commands[0], wiring.flipped(self.loads))
        m.d.comb += [self.irq.eq(csr.irq), csr.events.hazard_wait.eq(control.waiting)]
        m.d.comb += control.done[0].eq(self.loads.valid & self.loads.ready)
        return m


class Program(Memory):
    """The memory of the fetch bench with a program in it."""

    def __init__(self, dut, words, base):
        super().__init__(dut, latency=8)
        self.words = {base + 32 * index: word for index, word in enumerate(words)}

    def word_at(self, address, salt):
        return self.words.get(address, 0)


@bench()
async def a_program_runs_from_the_registers(dut):
    base = 0x1FE0
    program = [
        encode("token", rd=8, imm_reg=1),
        encode("loadw", imm_reg=8, rows_reg=2, count=77),
        encode("addi", rd=2, imm_reg=2, imm=-1),
        encode("branch", condition=Condition.NE, rows_reg=2, imm=1),
        encode("halt"),
    ]
    memory = Program(dut, program, base)
    sink = StreamSink(dut, "loads", shape=Command(CONFIG))
    host = Host(dut)
    await host.write("PROGRAM", base)
    await host.write("PROGRAM_LENGTH", len(program))
    await host.write("TOKEN_TABLE", 1000, 3)
    await host.write("ARG0", 3)
    await host.write("ARG1", 5)
    await host.write("GIE", 1)
    await host.write("IER", Interrupt.DONE)
    for _ in range(2):
        await host.write("CTRL", Ctrl.START)
        while not int(dut.irq.value):
            await ClockCycles(dut.clk, 1)
        assert await host.read("STATUS") == Status.DONE | Status.IDLE
        assert await host.read64("INSTRUCTIONS") == 1 + 3 * 5 + 1
        assert 30 < await host.read64("CYCLES") < 200
        assert await host.read("PC") == 4
        got = await sink.rest()
        assert [(c["imm"], c["rows"], c["pc"]) for c in got] == [(1000, rows, 1) for rows in (5, 4, 3, 2, 1)]
        await host.write("ISR", Interrupt.DONE)
    memory.words.clear()  # the next run must not find the old program in the cache
    await host.write("CTRL", Ctrl.START)
    while not int(dut.irq.value):
        await ClockCycles(dut.clk, 1)
    assert await host.read("STATUS") == Status.DONE | Status.IDLE | Status.FAULT
    assert (await host.read("FAULT"), await host.read("FAULT_PC")) == (FaultCause.ILLEGAL_OPCODE, 0)


def test_frontend():
    run_bench(Frontend(), a_program_runs_from_the_registers)
