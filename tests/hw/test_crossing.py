"""PortCrossing between the port engines and a memory on a clock of its own: same data, legal bursts, full rate."""

import dataclasses
import random
import re

import pytest
from amaranth.hdl import ClockDomain, ClockSignal, Module, ResetSignal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from axi_memory import DECERR, SLVERR, AxiMemory
from cocotb.clock import Clock
from cocotb.triggers import ClockCycles, RisingEdge
from skipopu.hw.blocks.axi import Axi4, connect_axi
from skipopu.hw.blocks.axi_read import AxiReader, Beat, ReadRun, Run
from skipopu.hw.blocks.axi_write import AxiWriter
from skipopu.hw.blocks.crossing import PortCrossing
from skipopu.hw.config import preset
from skipopu.sim.bench import CLOCK_NS, Stall, StreamSink, StreamSource, bench, bench_parameters, run_bench

SIZE = 1 << 15
BURST = 16
PERIODS = [4.4, 5, 13.7]  # of the memory's clock: faster, twice as fast, slower; ns
# burst and FIFOs as in the preset for the board, beats as narrow as the bench can afford
BOARD = dataclasses.replace(preset("u280"), port_bits=128, vector_lanes=4, ports=8)


class Port(wiring.Component):
    """Both port engines behind a crossing."""

    def __init__(self, *, config, memory_bits):
        self.config = config
        self.crossing = PortCrossing(core_bits=config.port_bits, memory_bits=memory_bits, memory_burst=BURST)
        super().__init__({
            "reads": In(stream.Signature(ReadRun)), "beats": Out(stream.Signature(Beat(config))),
            "writes": In(stream.Signature(Run)), "data": In(stream.Signature(config.port_bits)),
            "busy": Out(1), "error": Out(1), "memory": Out(Axi4(memory_bits)),
            "memory_clk": In(1), "memory_rst": In(1),
        })

    def elaborate(self, platform):
        m = Module()
        m.domains.memory = ClockDomain()
        m.submodules.reader = reader = AxiReader(config=self.config)
        m.submodules.writer = writer = AxiWriter(config=self.config)
        m.submodules.crossing = crossing = self.crossing
        connect_axi(m, crossing.core, reader.axi)
        connect_axi(m, crossing.core, writer.axi)
        connect_axi(m, self.memory, crossing.memory)
        for inner, outer in [(reader.runs, self.reads), (reader.beats, self.beats), (writer.runs, self.writes),
                             (writer.data, self.data)]:
            wiring.connect(m, inner, wiring.flipped(outer))
        m.d.comb += [ClockSignal("memory").eq(self.memory_clk), ResetSignal("memory").eq(self.memory_rst),
                     self.busy.eq(writer.busy), self.error.eq(writer.error)]
        return m


def beat_bytes():
    return bench_parameters()["bits"] // 8


def make_runs(seed):
    rng = random.Random(seed)
    corners = [(0, 1), (0, 16), (15, 1), (15, 2), (1, 16), (200, 70), (7, 3)]
    return corners + [(rng.randrange(500), rng.choice([1, 2, 15, 16, 17, 40])) for _ in range(8)]


def words(image, runs):
    width = beat_bytes()
    return [int.from_bytes(image[width * (a + i):width * (a + i + 1)], "little") for a, n in runs for i in range(n)]


def as_runs(runs):
    return [{"address": address, "count": count} for address, count in runs]


async def open_memory(dut, image, *, period, **options):
    """A memory behind the crossing, both domains newly reset."""
    clock = Clock(dut.memory_clk, round(1000 * period), "ps")
    clock.start()
    dut.memory_rst.value, dut.rst.value = 1, 1
    await ClockCycles(dut.clk, 8)
    await RisingEdge(dut.memory_clk)
    dut.memory_rst.value = 0
    await RisingEdge(dut.clk)
    dut.rst.value = 0
    return clock, AxiMemory(dut, "memory", image, clock=dut.memory_clk, **options)


async def read(dut, runs, *, stall=Stall.NEVER, sink_stall=Stall.NEVER, seed=0):
    layout = Beat(dataclasses.replace(preset("tiny"), port_bits=8 * beat_bytes()))
    sink = StreamSink(dut, "beats", shape=layout, stall=sink_stall, seed=seed)
    StreamSource(dut, "reads", shape=ReadRun, stall=stall, seed=seed).send(run | {"kv": 0} for run in as_runs(runs))
    got = await sink.take(sum(count for _, count in runs))
    assert await sink.rest() == []
    return got, sink.cycles


async def write(dut, runs, values, *, stall=Stall.NEVER, seed=0):
    StreamSource(dut, "writes", shape=Run, stall=stall, seed=seed).send(as_runs(runs))
    data = StreamSource(dut, "data", stall=stall, seed=seed)
    data.send(values)
    await data.sent()
    await RisingEdge(dut.clk)
    while dut.busy.value:
        await RisingEdge(dut.clk)


@bench(period=PERIODS, stall=[Stall.NEVER, Stall.HALF], seed=[1])
async def moves_the_same_data_in_legal_bursts(dut, period, stall, seed):
    image = bytearray(random.Random(seed).randbytes(SIZE))
    clock, memory = await open_memory(dut, image, period=period, stall=stall, latency=12, seed=seed)
    runs = make_runs(seed)
    got, _ = await read(dut, runs, stall=stall, sink_stall=stall, seed=seed)
    assert [beat["data"] for beat in got] == words(image, runs) and not any(beat["error"] for beat in got)
    values = words(random.Random(seed + 1).randbytes(SIZE), runs)
    await write(dut, runs, values, stall=stall, seed=seed)
    expected, position, width = bytearray(image), 0, beat_bytes()
    for address, count in runs:  # later runs write over earlier ones: the last one shows
        for i in range(count):
            expected[width * (address + i):width * (address + i + 1)] = values[position].to_bytes(width, "little")
            position += 1
    assert image == expected
    for bursts in (memory.reads, memory.writes):
        assert max(count for _, count in bursts) <= BURST
        assert sum(count for _, count in bursts) == bench_parameters()["ratio"] * sum(count for _, count in runs)
    clock.stop()


@bench()
async def reads_at_full_rate(dut):
    image = bytearray(random.Random(0).randbytes(SIZE))
    clock, _ = await open_memory(dut, image, period=CLOCK_NS / bench_parameters()["ratio"], latency=30)
    runs = [(0, 600), (700, 300)]
    got, cycles = await read(dut, runs)
    assert [beat["data"] for beat in got] == words(image, runs)
    assert cycles[-1] - cycles[0] <= 1.01 * len(got)
    clock.stop()


@bench()
async def writes_at_full_rate(dut):
    clock, memory = await open_memory(dut, bytearray(SIZE), period=CLOCK_NS / bench_parameters()["ratio"], latency=30)
    values = words(random.Random(0).randbytes(SIZE), [(0, 800)])
    StreamSource(dut, "writes", shape=Run).send(as_runs([(0, 800)]))
    source = StreamSource(dut, "data")
    source.send(values)
    await ClockCycles(dut.clk, 60)
    taken = 0
    for _ in range(400):
        await RisingEdge(dut.clk)
        taken += int(dut.data__valid.value) & int(dut.data__ready.value)
    assert taken >= 396
    await source.sent()
    while dut.busy.value:
        await RisingEdge(dut.clk)
    assert words(memory.data, [(0, 800)]) == values
    clock.stop()


@bench()
async def marks_exactly_the_beats_that_memory_refused(dut):
    width = beat_bytes()
    part = width // bench_parameters()["ratio"]
    errors = {width * 17: SLVERR, width * 19 - part: DECERR, width * 40 - part: SLVERR}
    clock, _ = await open_memory(dut, bytearray(SIZE), period=5, errors=errors)
    got, _ = await read(dut, [(10, 60)])
    assert [i for i, beat in enumerate(got) if beat["error"]] == [7, 8, 29]
    clock.stop()


@bench(beat=[0, 15, 16, 31])
async def one_refused_burst_of_memory_refuses_its_burst_of_the_core_once(dut, beat):
    part = beat_bytes() // bench_parameters()["ratio"]
    clock, _ = await open_memory(dut, bytearray(SIZE), period=5, errors={part * beat: SLVERR})
    StreamSource(dut, "writes", shape=Run).send(as_runs([(0, 48)]))
    StreamSource(dut, "data").send(range(48))
    await ClockCycles(dut.clk, 3)
    errors = 0
    while dut.busy.value:
        errors += int(dut.error.value)
        await RisingEdge(dut.clk)
    assert errors == 1
    clock.stop()


@pytest.mark.parametrize(("config", "ratio"), [(BOARD, 2), (preset("tiny"), 1), (preset("tiny"), 4)],
                         ids=lambda value: getattr(value, "name", value))
def test_port_crossing(config, ratio):
    benches = [moves_the_same_data_in_legal_bursts, marks_exactly_the_beats_that_memory_refused,
               one_refused_burst_of_memory_refuses_its_burst_of_the_core_once]
    if config is BOARD:
        benches += [reads_at_full_rate, writes_at_full_rate]
    run_bench(Port(config=config, memory_bits=config.port_bits // ratio), *benches,
              parameters={"bits": config.port_bits, "ratio": ratio})


def test_memory_is_not_wider_than_the_core():
    with pytest.raises(ValueError, match=re.escape("memory_bits must be at most core_bits (64), not 128")):
        PortCrossing(core_bits=64, memory_bits=128)
