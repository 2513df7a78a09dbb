"""StreamRegister passes every payload once, in order, without a lost cycle, and obeys the stream rules."""

import random

import pytest
from amaranth.hdl import signed, unsigned
from amaranth.lib import data
from cocotb.triggers import RisingEdge
from skipopu.hw.blocks.stream import StreamRegister
from skipopu.sim.bench import Stall, StreamSink, StreamSource, bench, bench_parameters, cycle, run_bench

RECORD = data.StructLayout({"row": 5, "values": data.ArrayLayout(signed(3), 4), "last": 1})


@bench(source_stall=Stall, sink_stall=Stall, seed=[1, 2])
async def keeps_payloads_and_order(dut, source_stall, sink_stall, seed):
    width = bench_parameters()["width"]
    corners = [0, (1 << width) - 1, 1, 1 << (width - 1), 0]
    values = corners + [random.Random(seed).getrandbits(width) for _ in range(100)]
    sink = StreamSink(dut, "o", stall=sink_stall, seed=seed)
    StreamSource(dut, "i", stall=source_stall, seed=seed).send(values)
    assert await sink.take(len(values)) == values
    assert await sink.rest() == []


@bench()
async def transfers_in_every_cycle(dut):
    sink = StreamSink(dut, "o")
    source = StreamSource(dut, "i")
    source.send(range(50))
    started = cycle()
    await sink.take(50)
    first = started + 1 + StreamRegister.latency
    assert sink.cycles == list(range(first, first + 50))


@bench()
async def holds_two_payloads_and_resumes_without_a_gap(dut):
    sink = StreamSink(dut, "o", stall=1.0)
    StreamSource(dut, "i").send(range(10))
    accepted = 0
    for _ in range(10):
        await RisingEdge(dut.clk)
        accepted += int(dut.i__valid.value) & int(dut.i__ready.value)
    assert accepted == 2
    sink.stall = Stall.NEVER
    assert await sink.take(10) == list(range(10))
    assert sink.cycles == list(range(sink.cycles[0], sink.cycles[0] + 10))


@bench()
async def ready_ignores_the_output_within_a_cycle(dut):
    """``i.ready`` is a register: it stays high for one cycle after the output has stopped."""
    sink = StreamSink(dut, "o")
    StreamSource(dut, "i").send(range(100))
    await sink.take(5)
    sink.stall = 1.0
    seen = []
    for _ in range(4):
        await RisingEdge(dut.clk)
        seen.append((int(dut.o__ready.value), int(dut.i__ready.value)))
    assert seen == [(1, 1), (0, 1), (0, 0), (0, 0)]


@bench(source_stall=Stall, sink_stall=Stall)
async def keeps_records(dut, source_stall, sink_stall):
    records = [{"row": n % 32, "values": [n % 8 - 4, -4, 3, 0], "last": n % 2} for n in range(40)]
    sink = StreamSink(dut, "o", shape=RECORD, stall=sink_stall)
    StreamSource(dut, "i", shape=RECORD, stall=source_stall).send(records)
    assert await sink.take(40) == records


@pytest.mark.parametrize("shape", [unsigned(1), unsigned(8), signed(100)], ids=str)
def test_keeps_payloads_and_order(shape):
    run_bench(StreamRegister(shape), keeps_payloads_and_order, parameters={"width": shape.width})


def test_full_throughput_and_two_places():
    run_bench(StreamRegister(8), transfers_in_every_cycle, holds_two_payloads_and_resumes_without_a_gap,
              ready_ignores_the_output_within_a_cycle)


def test_keeps_struct_payloads():
    run_bench(StreamRegister(RECORD), keeps_records)
