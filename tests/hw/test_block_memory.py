# amaranth: UnusedElaboratable=no
"""Block memory at its AXI ports: what is written is read, by data port, fetch and link alike, stalled or not."""

import random

import cocotb
from cocotb.triggers import RisingEdge
from skipopu.hw.blocks.block_memory import BlockMemory
from skipopu.hw.config import preset
from skipopu.sim.bench import Stall, bench, cycle, run_bench

CONFIG = preset("tiny")
MEMORY = 4096 - 256  # no power of two
BEAT, LINE = CONFIG.port_bits // 8, 32
OKAY, DECERR = 0, 3


class Port:
    """A master that is slow as ``stall`` says."""

    def __init__(self, dut, name, width=BEAT, stall=0.0, seed=0):
        self.clock, self.width, self.stall = RisingEdge(dut.clk), width, stall
        self.signal = lambda member: getattr(dut, f"{name}__{member}")
        self.random = random.Random(f"{name} {seed}")

    async def _transfer(self, channel, *, ours, **payload):
        """One transfer of a channel; ``ours``: this side sends."""
        mine, other = ("valid", "ready") if ours else ("ready", "valid")
        while self.random.random() < self.stall:
            await self.clock
        for member, value in payload.items():
            self.signal(member).value = value
        self.signal(channel + mine).value = 1
        while True:
            await self.clock
            if self.signal(channel + other).value:
                break
        self.signal(channel + mine).value = 0

    async def _address(self, channel, address, beats):
        fields = {"addr": address, "len": beats - 1, "size": self.width.bit_length() - 1, "burst": 1}
        await self._transfer(channel, ours=True, **{channel + name: value for name, value in fields.items()})

    async def read(self, address, beats):
        """(bytes, response of each beat)."""
        await self._address("ar", address, beats)
        found, codes = b"", []
        for index in range(beats):
            await self._transfer("r", ours=False)
            found += self.signal("rdata").value.to_unsigned().to_bytes(self.width, "little")
            codes.append(self.signal("rresp").value.to_unsigned())
            assert bool(self.signal("rlast").value) == (index == beats - 1)
        return found, codes

    async def write(self, address, data, strobes=None):
        """Response; ``strobes``: one number per beat."""
        beats = len(data) // self.width
        await self._address("aw", address, beats)
        for index in range(beats):
            part = data[index * self.width:(index + 1) * self.width]
            await self._transfer("w", ours=True, wdata=int.from_bytes(part, "little"), wlast=index == beats - 1,
                                 wstrb=(1 << self.width) - 1 if strobes is None else strobes[index])
        await self._transfer("b", ours=False)
        return self.signal("bresp").value.to_unsigned()


async def link(dut, port, address, data=None):
    """A word through the link; what was read."""
    dut.link__port.value, dut.link__address.value = port, address
    dut.link__write.value, dut.link__data.value, dut.link__valid.value = data is not None, data or 0, 1
    while True:
        await RisingEdge(dut.clk)
        if dut.link__done.value:
            break
    answer = dut.link__answer.value.to_unsigned()
    dut.link__valid.value = 0
    await RisingEdge(dut.clk)
    return answer


def ports_of(dut, stall, seed):
    return [Port(dut, f"m_axi__{index}", stall=stall, seed=seed) for index in range(CONFIG.ports)]


@bench(stall=[Stall.NEVER, Stall.HALF], seed=[1, 2], timeout_cycles=60_000)
async def all_ways_see_one_memory(dut, stall, seed):
    ports, fetch = ports_of(dut, stall, seed), Port(dut, "mi_axi", LINE, stall, seed)
    expected = [bytearray(MEMORY) for _ in ports]
    for port, contents in zip(ports, expected):
        for at in range(0, MEMORY, 256):
            assert await port.write(at, bytes(256)) == OKAY
        assert len(contents) == MEMORY

    async def traffic(index):
        """Bursts on one port, in the part of the memory that the link leaves alone."""
        port, generator = ports[index], random.Random(f"{seed} {index}")
        for _ in range(25):
            beats = generator.randint(1, 16)
            at = BEAT * generator.randrange(2048 // BEAT - beats)
            if generator.random() < 0.5:
                data, strobes = generator.randbytes(beats * BEAT), [generator.getrandbits(BEAT) for _ in range(beats)]
                assert await port.write(at, data, strobes) == OKAY
                for i, byte in enumerate(data):
                    if strobes[i // BEAT] >> i % BEAT & 1:
                        expected[index][at + i] = byte
            else:
                assert await port.read(at, beats) == (bytes(expected[index][at:at + beats * BEAT]), [OKAY] * beats)

    async def words():
        generator = random.Random(seed)
        for _ in range(60):
            index, at = generator.randrange(CONFIG.ports), 4 * generator.randrange(512, MEMORY // 4)
            if generator.random() < 0.5:
                value = generator.getrandbits(32)
                await link(dut, index, at, value)
                expected[index][at:at + 4] = value.to_bytes(4, "little")
            else:
                assert await link(dut, index, at) == int.from_bytes(expected[index][at:at + 4], "little")

    async def instructions():  # reads a part that nobody writes
        for _ in range(10):
            assert await fetch.read(MEMORY - 256, 8) == (bytes(expected[0][MEMORY - 256:]), [OKAY] * 8)

    tasks = [cocotb.start_soon(traffic(index)) for index in range(CONFIG.ports)] + [cocotb.start_soon(words())]
    for task in tasks:
        await task
    tasks = [cocotb.start_soon(traffic(0)), cocotb.start_soon(instructions())]
    for task in tasks:
        await task
    for port, contents in zip(ports, expected):
        for at in range(0, MEMORY, 128):
            assert (await port.read(at, 16))[0] == contents[at:at + 128]


@bench()
async def bursts_that_leave_the_memory_fail_whole(dut):
    ports, fetch = ports_of(dut, 0.0, 0), Port(dut, "mi_axi", LINE)
    kept = bytes(range(256))
    assert await ports[0].write(MEMORY - 256, kept[:128]) == OKAY
    assert await ports[0].write(MEMORY - 128, kept[128:]) == OKAY
    for at in (MEMORY - 8, MEMORY, 1 << 40, (1 << 63) + 64):
        assert await ports[0].write(at, b"\xff" * 16) == DECERR
        assert await ports[0].read(at, 2) == (bytes(16), [DECERR] * 2)
    assert await fetch.read(MEMORY, 8) == (bytes(256), [DECERR] * 8)
    assert await ports[0].read(MEMORY - 256, 32) == (kept, [OKAY] * 32)
    assert await fetch.read(MEMORY - 256, 8) == (kept, [OKAY] * 8)


@bench()
async def reads_and_writes_move_a_beat_in_every_cycle(dut):
    port = Port(dut, "m_axi__0")
    dut.m_axi__0__araddr.value, dut.m_axi__0__arlen.value = 0, 15
    dut.m_axi__0__arvalid.value = dut.m_axi__0__rready.value = 1
    arrived = []
    while len(arrived) < 64:
        await RisingEdge(dut.clk)
        if dut.m_axi__0__rvalid.value:
            arrived.append(cycle())
    assert arrived[-1] - arrived[0] == 63, "bursts follow each other without a pause"
    dut.m_axi__0__arvalid.value = dut.m_axi__0__rready.value = 0
    await port._address("aw", 0, 16)
    begin = cycle()
    for index in range(16):
        await port._transfer("w", ours=True, wdata=index, wlast=index == 15, wstrb=255)
    assert cycle() - begin == 16


def test_block_memory():
    run_bench(BlockMemory(config=CONFIG, memory_bytes=MEMORY), all_ways_see_one_memory,
              bursts_that_leave_the_memory_fail_whole, reads_and_writes_move_a_beat_in_every_cycle)
