# amaranth: UnusedElaboratable=no
"""Instruction fetch against a read-only memory with latency, stalls and errors."""

import dataclasses
import random
from collections import deque

import cocotb
import pytest
from cocotb.triggers import ClockCycles, RisingEdge
from skipopu.hw.blocks.fetch import LINE_WORDS, Fetch, Fetched
from skipopu.hw.config import preset
from skipopu.sim.bench import Stall, bench, cycle, run_bench, unpack

CONFIG = preset("tiny")
WORD_BYTES = 32


def word_at(address, salt=0):
    """Memory contents: a different word at every word address."""
    return random.Random(f"{address // WORD_BYTES} {salt}").getrandbits(256)


class Memory:
    """AXI4 read slave: in order, ``latency`` cycles from a request to its first beat, contents of the
    time of the request."""

    def __init__(self, dut, *, latency=4, stall=Stall.NEVER, seed=0, errors=()):
        self.dut, self.latency, self.stall, self.errors = dut, latency, stall, set(errors)
        self.salt = 0
        self.requests = []
        self._random = random.Random(seed)
        self._beats = deque()
        cocotb.start_soon(self._address())
        cocotb.start_soon(self._data())

    def word_at(self, address, salt):
        return word_at(address, salt)

    async def _address(self):
        dut, offered = self.dut, None
        while True:
            dut.axi__arready.value = ready = int(self._random.random() >= self.stall)
            await RisingEdge(dut.clk)
            valid, address = int(dut.axi__arvalid.value), dut.axi__araddr.value.to_unsigned()
            assert offered is None or (valid and address == offered), "a request changed before it was taken"
            offered = address if valid and not ready else None
            if valid and ready:
                beats = dut.axi__arlen.value.to_unsigned() + 1
                assert dut.axi__arsize.value.to_unsigned() == 5 and dut.axi__arburst.value.to_unsigned() == 1
                assert address // 4096 == (address + beats * WORD_BYTES - 1) // 4096, "burst crosses 4 KiB"
                self.requests.append(address)
                at = cycle() + self.latency
                self._beats.extend((at, address + i * WORD_BYTES, self.salt, i == beats - 1) for i in range(beats))

    async def _data(self):
        dut = self.dut
        while True:
            go = self._beats and self._beats[0][0] <= cycle() and self._random.random() >= self.stall
            dut.axi__rvalid.value = int(bool(go))
            if go:
                _, address, salt, last = self._beats.popleft()
                failed = address in self.errors
                dut.axi__rdata.value = 0 if failed else self.word_at(address, salt)
                dut.axi__rresp.value, dut.axi__rlast.value = 3 if failed else 0, int(last)
            await RisingEdge(dut.clk)
            assert int(dut.axi__rready.value), "fetch asks only for what it has room for"


class Reader:
    """Control's side: takes instructions, redirects."""

    def __init__(self, dut, program, length):
        self.dut = dut
        dut.control__program.value, dut.control__length.value = program, length

    async def redirect(self, target):
        self.dut.control__instruction__ready.value = 0
        self.dut.control__enable.value = 1
        self.dut.control__redirect.value, self.dut.control__target.value = 1, target
        await RisingEdge(self.dut.clk)
        self.dut.control__redirect.value, self.dut.control__target.value = 0, 0

    async def stop(self, cycles=1):
        self.dut.control__enable.value = 0
        await ClockCycles(self.dut.clk, cycles)

    async def take(self, stall=0.0, generator=random):
        while True:
            self.dut.control__instruction__ready.value = ready = int(generator.random() >= stall)
            await RisingEdge(self.dut.clk)
            if ready and int(self.dut.control__instruction__valid.value):
                return unpack(Fetched, self.dut.control__instruction__payload.value.to_unsigned())


def expected(program, pc, length, salt=0):
    if pc >= length:
        return {"pc": pc, "outside": 1}
    return {"word": word_at(program + pc * WORD_BYTES, salt), "pc": pc, "error": 0, "outside": 0}


def check(got, want):
    for name, value in want.items():
        assert got[name] == value, f"pc {want['pc']}: {name} is {got[name]:#x}, expected {value:#x}"


@bench(program=[0, 0x1000, 0xFE0, 0x120, 0xFF_FFFF_FF20], memory_stall=[Stall.NEVER, Stall.HALF],
       reader_stall=[Stall.NEVER, Stall.HALF])
async def straight_line_code_arrives_in_order(dut, program, memory_stall, reader_stall):
    memory, generator = Memory(dut, stall=memory_stall, seed=1), random.Random(1)
    reader = Reader(dut, program, 300)
    await reader.redirect(0)
    for pc in range(300):
        check(await reader.take(reader_stall, generator), expected(program, pc, 300))
    check(await reader.take(), expected(program, 300, 300))
    first, last = program // 256, (program + 300 * WORD_BYTES - 1) // 256
    assert memory.requests == [line * 256 for line in range(first, last + 1)], "every line once, nothing beyond"


@bench(length=[1, 2, LINE_WORDS - 1, LINE_WORDS, LINE_WORDS + 1])
async def short_programs_end_at_their_length(dut, length):
    Memory(dut)
    reader = Reader(dut, 0xE0, length)
    await reader.redirect(0)
    for pc in range(length + 1):
        check(await reader.take(), expected(0xE0, pc, length))


@bench()
async def an_empty_program_is_outside(dut):
    memory = Memory(dut)
    reader = Reader(dut, 0, 0)
    await reader.redirect(0)
    check(await reader.take(), expected(0, 0, 0))
    await ClockCycles(dut.clk, 50)
    assert memory.requests == []


@bench(seed=range(6), stall=[Stall.NEVER, Stall.HALF], timeout_cycles=100_000)
async def jumps_reach_their_target(dut, seed, stall):
    """Jumps near and far, while lines are on their way and after."""
    generator = random.Random(seed)
    length, program = generator.choice([50, 500, 5000]), generator.randrange(1 << 30) * WORD_BYTES
    Memory(dut, latency=generator.choice([1, 5, 30]), stall=stall, seed=seed)
    reader = Reader(dut, program, length)
    pc = 0
    for _ in range(60):
        if generator.random() < 0.5:
            pc = generator.randrange(length)
        else:
            pc = min(length - 1, max(0, pc + generator.randint(-40, 40)))
        await reader.redirect(pc)
        for _ in range(generator.choice([0, 1, 3, 20])):
            check(await reader.take(stall, generator), expected(program, pc, length))
            if pc == length:
                break
            pc += 1


@bench()
async def a_loop_is_read_from_memory_once(dut):
    memory = Memory(dut)
    reader = Reader(dut, 0, 1000)
    for _ in range(20):
        await reader.redirect(10)
        for pc in range(10, 30):
            check(await reader.take(), expected(0, pc, 1000))
    assert len(memory.requests) == len(set(memory.requests))


@bench(wait=[0, 1, 5, 60])
async def a_new_run_sees_new_contents(dut, wait):
    """Also while lines of the old program are still on their way."""
    memory = Memory(dut, latency=20)
    reader = Reader(dut, 0, 100)
    for memory.salt in range(4):
        await reader.redirect(0)
        for pc in range(40 if memory.salt % 2 else 5):
            check(await reader.take(), expected(0, pc, 100, memory.salt))
        await reader.stop()
        await ClockCycles(dut.clk, wait + 2)


@bench()
async def errors_arrive_with_their_instruction_only(dut):
    program = 0x400
    Memory(dut, errors=[program + 40 * WORD_BYTES])
    reader = Reader(dut, program, 100)
    await reader.redirect(0)
    for pc in range(40):
        check(await reader.take(), expected(program, pc, 100))
    got = await reader.take()
    assert (got["pc"], got["error"]) == (40, 1)
    await reader.redirect(48)
    check(await reader.take(), expected(program, 48, 100))


@bench()
async def prefetch_hides_the_memory(dut):
    """32 cycles of latency: at least one instruction in two cycles, once the first has come."""
    Memory(dut, latency=32)
    reader = Reader(dut, 0, 400)
    await reader.redirect(0)
    await reader.take()
    start = cycle()
    for pc in range(1, 400):
        check(await reader.take(), expected(0, pc, 400))
    assert cycle() - start <= 2 * 399


def test_fetch():
    run_bench(Fetch(config=CONFIG), straight_line_code_arrives_in_order, short_programs_end_at_their_length,
              an_empty_program_is_outside, jumps_reach_their_target, a_loop_is_read_from_memory_once,
              a_new_run_sees_new_contents, errors_arrive_with_their_instruction_only, prefetch_hides_the_memory)


def test_smallest_cache():
    config = dataclasses.replace(CONFIG, cache_words=2 * LINE_WORDS)
    run_bench(Fetch(config=config), straight_line_code_arrives_in_order, jumps_reach_their_target)


def test_cache_without_two_lines_is_refused():
    config = dataclasses.replace(CONFIG, cache_words=LINE_WORDS)
    with pytest.raises(ValueError, match="cache_words must be at least 16, not 8"):
        Fetch(config=config)
