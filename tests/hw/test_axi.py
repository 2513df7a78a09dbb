"""AxiReader and AxiWriter against two memories: cocotbext-axi's AxiRam and one with many bursts in flight."""

import dataclasses
import itertools
import random

import pytest
from amaranth.back import verilog
from amaranth.hdl import Module
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from axi_memory import DECERR, SLVERR, AxiMemory
from cocotb.triggers import ClockCycles, RisingEdge
from cocotbext.axi import AxiBus, AxiRam
from skipopu.hw.blocks.axi import Axi4, AxiLite, axi_ports, connect_axi
from skipopu.hw.blocks.axi_read import AxiReader, Beat, ReadRun, Run
from skipopu.hw.blocks.axi_write import AxiWriter
from skipopu.hw.config import preset
from skipopu.sim.bench import Stall, StreamSink, StreamSource, bench, bench_parameters, run_bench

TINY = preset("tiny")
WIDTH = TINY.port_bits // 8
SIZE = 1 << 15


class Master(wiring.Component):
    """Both engines on one AXI4 port, with the IDs that AxiRam insists on."""

    def __init__(self, *, config):
        self.config = config
        ids = {name: Out(1) for name in ("axi__awid", "axi__arid")} | {name: In(1) for name in ("axi__bid", "axi__rid")}
        super().__init__({
            "reads": In(stream.Signature(ReadRun)), "beats": Out(stream.Signature(Beat(config))), "base": In(64),
            "writes": In(stream.Signature(Run)), "data": In(stream.Signature(config.port_bits)),
            "busy": Out(1), "error": Out(1), "beat_read": Out(1), "beat_written": Out(1),
            "axi": Out(Axi4(config.port_bits)), **ids,
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.reader = reader = AxiReader(config=self.config)
        m.submodules.writer = writer = AxiWriter(config=self.config)
        for inner, outer in [(reader.runs, self.reads), (reader.beats, self.beats), (writer.runs, self.writes),
                             (writer.data, self.data)]:
            wiring.connect(m, inner, wiring.flipped(outer))
        connect_axi(m, self.axi, reader.axi)
        connect_axi(m, self.axi, writer.axi)
        m.d.comb += [reader.base.eq(self.base), writer.base.eq(self.base), self.busy.eq(writer.busy),
                     self.error.eq(writer.error), self.beat_read.eq(reader.beat), self.beat_written.eq(writer.beat)]
        return m


CORNERS = [(0, 1), (0, 16), (15, 1), (15, 2), (1, 16), (511, 2), (500, 40), (512, 64), (7, 3)]


def make_runs(seed, count=12):
    rng = random.Random(seed)
    return CORNERS + [(rng.randrange(1500), rng.choice([1, 2, 15, 16, 17, 40])) for _ in range(count)]


def make_image(seed):
    return bytearray(random.Random(seed).randbytes(SIZE))


def words(image, runs):
    return [int.from_bytes(image[WIDTH * (a + i):WIDTH * (a + i + 1)], "little") for a, n in runs for i in range(n)]


def as_runs(runs):
    return [{"address": address, "count": count} for address, count in runs]


def as_read_runs(runs):
    """Marked in a pattern that neither a burst nor a run repeats."""
    return [run | {"kv": i % 3 % 2} for i, run in enumerate(as_runs(runs))]


async def read(dut, runs, *, stall=Stall.NEVER, sink_stall=Stall.NEVER, seed=0):
    sink = StreamSink(dut, "beats", shape=Beat(TINY), stall=sink_stall, seed=seed)
    StreamSource(dut, "reads", shape=ReadRun, stall=stall, seed=seed).send(as_read_runs(runs))
    got = await sink.take(sum(count for _, count in runs))
    assert [beat["kv"] for beat in got] == [run["kv"] for run in as_read_runs(runs) for _ in range(run["count"])]
    assert await sink.rest() == []
    return got, sink.cycles


async def write(dut, runs, values, *, stall=Stall.NEVER, seed=0):
    StreamSource(dut, "writes", shape=Run, stall=stall, seed=seed).send(as_runs(runs))
    data = StreamSource(dut, "data", stall=stall, seed=seed)
    data.send(values)
    await data.sent()
    while dut.busy.value:
        await RisingEdge(dut.clk)


def pauses(stall, seed):
    rng = random.Random(seed)
    return (rng.random() < stall for _ in itertools.count())


@bench(stall=[Stall.NEVER, Stall.HALF], seed=[1, 2])
async def agrees_with_axi_ram(dut, stall, seed):
    ram = AxiRam(AxiBus.from_prefix(dut, "axi_"), dut.clk, dut.rst, size=SIZE)
    for i, channel in enumerate([ram.write_if.aw_channel, ram.write_if.w_channel, ram.write_if.b_channel,
                                 ram.read_if.ar_channel, ram.read_if.r_channel]):
        channel.set_pause_generator(pauses(stall, 10 * seed + i))
    runs, image = make_runs(seed), make_image(seed)
    ram.write(0, bytes(image))
    got, _ = await read(dut, runs, stall=stall, sink_stall=stall, seed=seed)
    assert [beat["data"] for beat in got] == words(image, runs) and not any(beat["error"] for beat in got)
    values = words(make_image(seed + 100), runs)
    await write(dut, runs, values, stall=stall, seed=seed)
    position = 0
    for address, count in runs:
        for i in range(count):
            image[WIDTH * (address + i):WIDTH * (address + i + 1)] = values[position].to_bytes(WIDTH, "little")
            position += 1
    assert ram.read(0, SIZE) == bytes(image)


@bench(stall=Stall, latency=[1, 40], seed=[1])
async def reads_with_many_bursts_in_flight(dut, stall, latency, seed):
    base = 0x123_4567_0038  # not on a burst boundary
    dut.base.value = base
    runs, image = make_runs(seed), make_image(seed)
    memory = AxiMemory(dut, "axi", image, base=base, latency=latency, stall=stall, seed=seed)
    got, _ = await read(dut, runs, stall=stall, sink_stall=stall, seed=seed)
    assert [beat["data"] for beat in got] == words(image, runs)
    assert max(count for _, count in memory.reads) <= TINY.burst_beats


@bench(stall=Stall, latency=[1, 40], seed=[1])
async def writes_whole_bursts_only(dut, stall, latency, seed):
    base = 0x123_4567_0038
    dut.base.value = base
    image = bytearray(SIZE)
    memory = AxiMemory(dut, "axi", image, base=base, latency=latency, stall=stall, seed=seed)
    runs = [(3, 1), (4, 70), (100, 16), (200, 17), (511, 3)]
    values = words(make_image(seed), runs)
    await write(dut, runs, values, stall=stall, seed=seed)
    assert words(image, runs) == values
    assert bytes(image[WIDTH * 514:]) == bytes(SIZE - WIDTH * 514) and bytes(image[:3 * WIDTH]) == bytes(3 * WIDTH)
    assert sum(count for _, count in memory.writes) == sum(count for _, count in runs)


@bench(latency=[32, 100])
async def reads_a_beat_in_every_cycle(dut, latency):
    image = make_image(0)
    AxiMemory(dut, "axi", image, latency=latency)
    runs = [(0, 1000), (1000, 5), (2000, 300), (3000, 16), (64, 500)]
    got, cycles = await read(dut, runs)
    assert [beat["data"] for beat in got] == words(image, runs)
    assert cycles == list(range(cycles[0], cycles[0] + len(got)))


@bench(first=[0, 8])
async def requests_only_what_the_fifo_can_take(dut, first):
    memory = AxiMemory(dut, "axi", make_image(0), latency=1)
    sink = StreamSink(dut, "beats", stall=1.0)
    StreamSource(dut, "reads", shape=ReadRun).send(as_read_runs([(first, 1000)]))
    await ClockCycles(dut.clk, 200)
    assert sum(count for _, count in memory.reads) == bench_parameters()["fifo_beats"] - first  # whole bursts only
    sink.stall = Stall.NEVER
    await sink.take(1000)


@bench()
async def marks_the_beats_that_memory_refused(dut):
    image = make_image(0)
    AxiMemory(dut, "axi", image, errors={WIDTH * 17: SLVERR, WIDTH * 18: DECERR})
    got, _ = await read(dut, [(10, 20)])
    assert [i for i, beat in enumerate(got) if beat["error"]] == [7, 8]


@bench(code=[SLVERR, DECERR])
async def reports_write_errors_before_it_is_idle(dut, code):
    AxiMemory(dut, "axi", bytearray(SIZE), errors={WIDTH * 20: code})
    StreamSource(dut, "writes", shape=Run).send(as_runs([(10, 40)]))
    StreamSource(dut, "data").send(range(40))
    await ClockCycles(dut.clk, 3)
    errors = 0
    while dut.busy.value:
        errors += int(dut.error.value)
        await RisingEdge(dut.clk)
    assert errors == 1


@bench()
async def counts_beats(dut):
    AxiMemory(dut, "axi", bytearray(SIZE), stall=Stall.HALF)
    counts = [0, 0]
    StreamSink(dut, "beats")
    StreamSource(dut, "reads", shape=ReadRun).send(as_read_runs([(0, 33), (100, 7)]))
    StreamSource(dut, "writes", shape=Run).send(as_runs([(0, 21)]))
    StreamSource(dut, "data").send(range(30))
    for _ in range(400):
        await RisingEdge(dut.clk)
        counts[0] += int(dut.beat_read.value)
        counts[1] += int(dut.beat_written.value)
    assert counts == [40, 21]


@bench()
async def asks_for_nothing_before_the_data_are_there(dut):
    memory = AxiMemory(dut, "axi", bytearray(SIZE), latency=1)
    source = StreamSource(dut, "data")
    StreamSource(dut, "writes", shape=Run).send(as_runs([(0, 20)]))
    source.send(range(15))
    await ClockCycles(dut.clk, 60)
    assert memory.writes == []
    source.send(range(5))
    await ClockCycles(dut.clk, 60)
    assert memory.writes == [(0, 16), (16 * WIDTH, 4)]


def test_axi_engines():
    run_bench(Master(config=TINY), agrees_with_axi_ram, reads_with_many_bursts_in_flight, writes_whole_bursts_only,
              requests_only_what_the_fifo_can_take, marks_the_beats_that_memory_refused,
              reports_write_errors_before_it_is_idle, counts_beats, asks_for_nothing_before_the_data_are_there,
              parameters={"fifo_beats": TINY.fifo_beats})


def test_reader_is_as_fast_as_memory_when_the_fifo_covers_the_latency():
    config = dataclasses.replace(TINY, fifo_beats=256, outstanding=16)
    run_bench(Master(config=config), reads_a_beat_in_every_cycle)


@pytest.mark.parametrize("name", ["sim", "u280"])
def test_ports_have_the_names_of_axi(name):
    master = Master(config=preset(name))
    text = verilog.convert(master, name="top", ports={**axi_ports("m0_axi", master.axi), "base": (master.base, None)})
    header = text[text.index("module top("):].partition(";")[0]
    for member in Axi4(64).members:
        assert f"m0_axi_{member}" in header


def test_axi_lite_has_no_bursts():
    assert set(Axi4(32).members) - set(AxiLite(12).members) == {
        "awlen", "awsize", "awburst", "wlast", "arlen", "arsize", "arburst", "rlast"}
