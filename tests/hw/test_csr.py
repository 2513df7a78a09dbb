# amaranth: UnusedElaboratable=no
"""Registers over AXI4-Lite, driven by an independent bus model."""

import dataclasses
import random

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge
from cocotbext.axi import AxiLiteBus, AxiLiteMaster
from skipopu.hw import registers
from skipopu.hw.blocks.command import Fault
from skipopu.hw.blocks.csr import Csr, Events
from skipopu.hw.config import preset
from skipopu.hw.isa import MAX_LAYERS
from skipopu.hw.registers import COUNTERS, MAP, Access, Control, FaultCause, Interrupt, Status, address
from skipopu.sim.bench import Stall, bench, pack, reset, run_bench

CONFIG = preset("tiny")
START, DONE, IDLE, READY = Control.START, Control.DONE, Control.IDLE, Control.READY


class Host:
    """The bus master, and the side of control that the registers see."""

    def __init__(self, dut, stall=Stall.NEVER, seed=0):
        self.dut = dut
        self.bus = AxiLiteMaster(AxiLiteBus.from_prefix(dut, "axil_"), dut.clk)
        channels = [self.bus.write_if.aw_channel, self.bus.write_if.w_channel, self.bus.write_if.b_channel,
                    self.bus.read_if.ar_channel, self.bus.read_if.r_channel]
        for index, channel in enumerate(channels if stall else []):
            generator = random.Random(seed * 10 + index)
            channel.set_pause_generator(iter(lambda g=generator: g.random() < stall, None))

    async def write(self, name, value, index=0, word=0):
        await self.bus.write_dword(address(name, index) + 4 * word, value)

    async def read(self, name, index=0, word=0):
        return await self.bus.read_dword(address(name, index) + 4 * word)

    async def read64(self, name, index=0):
        return await self.read(name, index) | await self.read(name, index, 1) << 32

    async def pulse(self, signal, value=1):
        signal.value = value
        await RisingEdge(self.dut.clk)
        signal.value = 0

    async def finish(self):
        await self.pulse(self.dut.control__finished)
        await ClockCycles(self.dut.clk, 2)


def writable(name):
    special = {"CTRL", "GIE", "IER", "ISR"}
    item = registers.registers()[name]
    return item.access == Access.READ_WRITE and name not in special


def existing(item):
    """Entries of a register that this configuration has."""
    limits = {"PORT_BASE": CONFIG.ports, "TOKEN_TABLE": CONFIG.tokens, "BEATS_READ": CONFIG.ports,
              "BEATS_WRITTEN": CONFIG.ports}
    return limits.get(item.name, item.count)


@bench(stall=[Stall.NEVER, Stall.HALF], seed=[1, 2], timeout_cycles=100_000)
async def every_register_keeps_what_is_written(dut, stall, seed):
    host, generator = Host(dut, stall, seed), random.Random(seed)
    values = {}
    for item in MAP:
        for where in range(item.address, item.address + 4 * item.words * existing(item), 4):
            if writable(item.name):
                values[where] = generator.getrandbits({"PROGRAM_LENGTH": 24, "ROUTE_FORCE": 1}.get(item.name, 32))
    for where, value in generator.sample(list(values.items()), len(values)):
        await host.bus.write_dword(where, value)
    for where, value in generator.sample(list(values.items()), len(values)):
        assert await host.bus.read_dword(where) == value, f"address {where:#x}"
    assert dut.control__program.value.to_unsigned() == \
        values[address("PROGRAM")] | values[address("PROGRAM") + 4] << 32
    for index in range(7):
        port = getattr(dut, f"control__arguments__{index}")
        assert port.value.to_unsigned() == values[address(f"ARG{index}")]
    for index in range(CONFIG.ports):
        port = getattr(dut, f"port_base__{index}")
        base = address("PORT_BASE", index)
        assert port.value.to_unsigned() == values[base] | values[base + 4] << 32
    assert int(dut.control__route_force.value) == values[address("ROUTE_FORCE")]
    assert dut.memory_limit.value.to_unsigned() == values[address("MEMORY_LIMIT")]


@bench()
async def strobes_select_bytes(dut):
    host = Host(dut)
    for name, index in (("WATCHDOG", 0), ("TOKEN_TABLE", 0), ("ROUTES_FORCED", 6), ("ROUTES_FORCED", 7)):
        await host.write(name, 0x11223344, index)
        await host.bus.write(address(name, index) + 1, b"\xaa\xbb")
        assert await host.read(name, index) == 0x11BBAA44
    assert await host.read("ROUTES_FORCED", 6) == 0x11BBAA44


@bench()
async def read_only_and_unused_addresses_ignore_writes(dut):
    host = Host(dut)
    dut.argmax_index.value, dut.argmax_value.value, dut.debug_data.value = 5, 0x3F800000, 0xDEADBEEF
    expected = {**registers.capabilities(CONFIG), "ARGMAX_INDEX": 5, "ARGMAX_VALUE": 0x3F800000,
                "DEBUG_DATA": 0xDEADBEEF, "FAULT": 0, "STATUS": Status.IDLE, "ROUTES": 0}
    for name, value in expected.items():
        await host.write(name, ~value & 0xFFFFFFFF)
        assert await host.read(name) == value, name
    unused = [0x0FC, address("PORT_BASE", CONFIG.ports), address("TOKEN_TABLE", CONFIG.tokens), 0xFFC]
    for where in unused:
        await host.bus.write_dword(where, 0x12345678)
        assert await host.bus.read_dword(where) == 0, f"address {where:#x}"


@bench()
async def start_runs_until_finished(dut):
    host = Host(dut)
    starts = []

    async def watch():
        while True:
            await RisingEdge(dut.clk)
            starts.append(int(dut.control__start.value))
    cocotb.start_soon(watch())
    assert await host.read("CTRL") == IDLE
    await host.write("CTRL", START | Control.AUTO_RESTART)
    assert sum(starts) == 1
    assert await host.read("CTRL") == START
    await host.write("CTRL", START)  # while running: nothing
    assert await host.read("STATUS") == Status.RUNNING
    dut.events.value = pack(Events, {name: 0 for name, _ in Events} | {"busy": 0b0101})
    assert await host.read("STATUS") == Status.RUNNING | Status.BUSY_LOAD | Status.BUSY_VECTOR
    dut.events.value = 0
    await host.finish()
    assert sum(starts) == 1
    assert await host.read("STATUS") == Status.DONE | Status.IDLE
    assert await host.read("CTRL") == DONE | IDLE | READY
    assert await host.read("CTRL") == IDLE, "done and ready are cleared by reading"
    assert await host.read("STATUS") == Status.DONE | Status.IDLE, "reading STATUS or CTRL does not clear it"
    await host.write("CTRL", START)
    assert await host.read("STATUS") == Status.RUNNING
    await host.finish()
    assert sum(starts) == 2


@bench(gie=[0, 1], ier=[0, 1, 2, 3])
async def interrupt_follows_its_enables(dut, gie, ier):
    host = Host(dut)
    await host.write("GIE", gie)
    await host.write("IER", ier)
    await host.write("CTRL", START)
    await ClockCycles(dut.clk, 5)
    assert int(dut.irq.value) == 0
    await host.finish()
    await ClockCycles(dut.clk, 2)
    assert int(dut.irq.value) == int(gie and ier != 0)
    assert await host.read("ISR") == ier
    await host.write("ISR", Interrupt.DONE)
    assert await host.read("ISR") == ier & ~Interrupt.DONE
    assert int(dut.irq.value) == int(bool(gie and ier & Interrupt.READY))
    await host.write("ISR", Interrupt.DONE | Interrupt.READY)
    assert await host.read("ISR") == 0
    assert int(dut.irq.value) == 0


@bench()
async def a_fault_refuses_the_next_start(dut):
    host = Host(dut)
    await host.write("CTRL", START)
    dut.control__fault.value = pack(Fault, {"valid": 1, "cause": FaultCause.READ_ERROR, "port": 1, "pc": 77})
    dut.control__fault_seen.value = 1 << FaultCause.READ_ERROR | 1 << FaultCause.WATCHDOG
    await host.finish()
    assert await host.read("STATUS") == Status.DONE | Status.IDLE | Status.FAULT
    assert [await host.read(name) for name in ("FAULT", "FAULT_PORT", "FAULT_PC")] == [FaultCause.READ_ERROR, 1, 77]
    assert await host.read("FAULT_STICKY") == 1 << FaultCause.READ_ERROR | 1 << FaultCause.WATCHDOG
    await host.read("CTRL")
    await host.write("CTRL", START)
    assert await host.read("CTRL") == DONE | IDLE | READY, "the start is over at once"
    dut.control__fault.value = 0
    await reset(dut)
    assert await host.read("STATUS") == Status.IDLE


@bench(seed=[1, 2])
async def counters_count_their_events(dut, seed):
    host, generator = Host(dut), random.Random(seed)
    await host.write("CTRL", START)
    totals = dict.fromkeys([name for name, _ in COUNTERS], 0)
    read, written = [0] * CONFIG.ports, [0] * CONFIG.ports
    for _ in range(300):
        event = {name: generator.getrandbits(shape) for name, shape in Events.members.items()}
        dut.events.value = pack(Events, event)
        dut.control__running.value = running = generator.getrandbits(1)
        dut.control__dispatched.value = dispatched = generator.getrandbits(1)
        dut.beats_read.value = beats_read = generator.getrandbits(CONFIG.ports)
        dut.beats_written.value = beats_written = generator.getrandbits(CONFIG.ports)
        await RisingEdge(dut.clk)
        totals["CYCLES"] += running
        totals["INSTRUCTIONS"] += dispatched
        for index, unit in enumerate(("LOAD", "COMPUTE", "VECTOR", "STORE")):
            totals[f"BUSY_{unit}"] += event["busy"] >> index & 1
            totals[f"HAZARD_WAIT_{unit}"] += event["hazard_wait"] >> index & 1
        for name in list(event)[2:]:
            totals[name.upper()] += event[name]
        for port in range(CONFIG.ports):
            read[port] += beats_read >> port & 1
            written[port] += beats_written >> port & 1
    for signal in (dut.events, dut.control__running, dut.control__dispatched, dut.beats_read, dut.beats_written):
        signal.value = 0
    for name, total in totals.items():
        assert await host.read64(name) == total, name
    for port in range(CONFIG.ports):
        assert await host.read64("BEATS_READ", port) == read[port]
        assert await host.read64("BEATS_WRITTEN", port) == written[port]
    await host.finish()
    assert await host.read64("SATURATIONS") == totals["SATURATIONS"], "counters survive the end of a run"
    await host.write("CTRL", START)
    assert [await host.read64(name) for name in totals] == [0] * len(totals)


@bench()
async def control_reads_the_token_table(dut):
    host = Host(dut)
    for index in range(CONFIG.tokens):
        await host.write("TOKEN_TABLE", 0x1000 + index, index)
    for index in reversed(range(CONFIG.tokens)):
        dut.control__token_index.value = index
        await ClockCycles(dut.clk, 2)
        assert dut.control__token_value.value.to_unsigned() == 0x1000 + index


@bench()
async def control_reads_and_notes_routes(dut):
    host, generator = Host(dut), random.Random(1)
    forced, taken = ([generator.getrandbits(32) for _ in range(2 * MAX_LAYERS)] for _ in range(2))
    for index in (0, 1, 14, 15, 2 * MAX_LAYERS - 2, 2 * MAX_LAYERS - 1):
        await host.write("ROUTES_FORCED", forced[index], index)
    for layer in (MAX_LAYERS - 1, 7, 0):
        dut.control__route_layer.value = layer
        for module in range(2):
            getattr(dut, f"control__routes__{module}").value = taken[2 * layer + module]
        await host.pulse(dut.control__route_write)
        await RisingEdge(dut.clk)
        for module in range(2):
            got = getattr(dut, f"control__routes_forced__{module}").value.to_unsigned()
            assert got == forced[2 * layer + module], f"layer {layer}"
            getattr(dut, f"control__routes__{module}").value = 0
    for layer in (0, 7, MAX_LAYERS - 1):
        for index in (2 * layer, 2 * layer + 1):
            assert await host.read("ROUTES", index) == taken[index]
            assert await host.read("ROUTES_FORCED", index) == forced[index]
    assert await host.read("ROUTES", 2) == 0


def test_registers():
    run_bench(Csr(config=CONFIG), every_register_keeps_what_is_written, strobes_select_bytes,
              read_only_and_unused_addresses_ignore_writes, start_runs_until_finished, interrupt_follows_its_enables,
              a_fault_refuses_the_next_start, counters_count_their_events, control_reads_the_token_table,
              control_reads_and_notes_routes)


@bench(seed=[1])
async def without_counters_their_registers_read_zero(dut, seed):
    host = Host(dut)
    await host.write("CTRL", START)
    dut.events.value = (1 << len(dut.events)) - 1
    for signal in (dut.control__running, dut.control__dispatched):
        signal.value = 1
    dut.beats_read.value = dut.beats_written.value = (1 << CONFIG.ports) - 1
    await ClockCycles(dut.clk, 20)
    counted = {name: await host.read64(name) for name, _ in COUNTERS}
    assert counted.pop("CYCLES") > 20 and counted.pop("INSTRUCTIONS") > 0 and not any(counted.values())
    for port in range(CONFIG.ports):
        assert (await host.read64("BEATS_READ", port), await host.read64("BEATS_WRITTEN", port)) == (0, 0)
    assert await host.read("LANES") == CONFIG.lanes and await host.read("STATUS") & Status.RUNNING


def test_counters_can_be_left_out():
    config = dataclasses.replace(CONFIG, counters=False)
    assert config.config_hash == CONFIG.config_hash  # programs and results are the same
    run_bench(Csr(config=config), without_counters_their_registers_read_zero)


def test_too_many_ports_for_the_map_are_refused():
    config = dataclasses.replace(preset("u280"), ports=64)
    with pytest.raises(ValueError, match="the register map holds 32 ports and 128 tokens, not 64 and 32"):
        Csr(config=config)
