"""ResetOnRequest lets accesses pass, and resets for the key in RESET only, after its answer."""

import cocotb
from amaranth.hdl import Cat, Module, ResetInserter, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import ClockCycles, RisingEdge
from cocotbext.axi import AxiLiteBus, AxiLiteMaster
from skipopu.hw.blocks.axi import AxiLite
from skipopu.hw.blocks.csr import Csr
from skipopu.hw.blocks.reset import ResetOnRequest
from skipopu.hw.config import preset
from skipopu.hw.registers import ADDRESS_BITS, RESET_KEY, address
from skipopu.sim.bench import bench, run_bench


class Registers(wiring.Component):
    """The register file behind the reset, with only its bus outside."""

    def __init__(self):
        super().__init__({"host": In(AxiLite(ADDRESS_BITS)), "active": Out(1), "hold": In(1)})

    def elaborate(self, platform):
        m = Module()
        m.submodules.reset = reset = ResetOnRequest()
        csr = Csr(config=preset("tiny"))
        late = Signal(3)  # as behind the registers of a wide reset
        m.d.sync += late.eq(Cat(reset.active, late))
        m.submodules.csr = ResetInserter(late[-1] | self.hold)(csr)
        m.d.comb += reset.hold.eq(late.any() | self.hold)
        wiring.connect(m, wiring.flipped(self.host), reset.host)
        wiring.connect(m, reset.registers, csr.axil)
        m.d.comb += self.active.eq(reset.active)
        return m


def open_bus(dut):
    return AxiLiteMaster(AxiLiteBus.from_prefix(dut, "host_"), dut.clk, dut.rst)


@bench()
async def the_key_resets_the_registers(dut):
    bus = open_bus(dut)
    await bus.write_dword(address("WATCHDOG"), 77)
    assert await bus.read_dword(address("WATCHDOG")) == 77
    await bus.write_dword(address("RESET"), RESET_KEY)
    assert await bus.read_dword(address("WATCHDOG")) == 0, "the read waits for the end of the reset"
    await bus.write_dword(address("WATCHDOG"), 78)
    assert await bus.read_dword(address("WATCHDOG")) == 78


@bench()
async def a_reset_lasts_long_enough_for_slower_clocks(dut):
    await open_bus(dut).write_dword(address("RESET"), RESET_KEY)
    cycles = 0
    for _ in range(200):
        await RisingEdge(dut.clk)
        cycles += int(dut.active.value)
    assert cycles == ResetOnRequest.cycles


@bench()
async def accesses_wait_while_the_registers_are_held(dut):
    bus = open_bus(dut)
    dut.hold.value = 1
    write = cocotb.start_soon(bus.write_dword(address("WATCHDOG"), 79))
    await ClockCycles(dut.clk, 20)
    assert not write.done()
    dut.hold.value = 0
    await write
    assert await bus.read_dword(address("WATCHDOG")) == 79


@bench(write=[("RESET", 0), ("RESET", RESET_KEY ^ 1), ("WATCHDOG", RESET_KEY)])
async def nothing_else_resets(dut, write):
    register, value = write
    bus = open_bus(dut)
    await bus.write_dword(address("MEMORY_LIMIT"), 55)
    await bus.write_dword(address(register), value)
    await ClockCycles(dut.clk, 5)
    assert not dut.active.value and await bus.read_dword(address("MEMORY_LIMIT")) == 55


@bench(part=[(0, RESET_KEY & 0xFFFF), (2, RESET_KEY >> 16)])
async def half_a_key_does_not_reset(dut, part):
    offset, value = part
    bus = open_bus(dut)
    await bus.write_word(address("RESET") + offset, value)
    await ClockCycles(dut.clk, 5)
    assert not dut.active.value


def test_reset_on_request():
    run_bench(Registers(), the_key_resets_the_registers, a_reset_lasts_long_enough_for_slower_clocks,
              accesses_wait_while_the_registers_are_held, nothing_else_resets, half_a_key_does_not_reset)
