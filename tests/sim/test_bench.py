"""run_bench reports what goes wrong in the simulator, the stream ends catch broken blocks, packing is exact."""

import pytest
from amaranth.hdl import Module, Signal, signed, unsigned
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import ClockCycles, Timer
from skipopu.hw.blocks.stream import StreamRegister
from skipopu.sim import bench as bench_module
from skipopu.sim.bench import (
    BenchFailure,
    Stall,
    StreamSink,
    StreamSource,
    Watch,
    bench,
    bench_parameters,
    pack,
    reset,
    run_bench,
    unpack,
)


class Impatient(wiring.Component):
    """Broken on purpose: ``o`` withdraws its offer (``fault="valid"``) or replaces it when ``o.ready`` is late."""

    def __init__(self, fault):
        self._fault = fault
        super().__init__({"i": In(stream.Signature(8)), "o": Out(stream.Signature(8))})

    def elaborate(self, platform):
        m = Module()
        counter = Signal(8)
        m.d.sync += counter.eq(counter + 1)
        m.d.comb += [self.i.ready.eq(1), self.o.payload.eq(1 if self._fault == "valid" else counter),
                     self.o.valid.eq(counter[0] if self._fault == "valid" else 1)]
        return m


class Inverter(wiring.Component):
    """A block without a clock."""

    a: In(4)
    y: Out(4)

    def elaborate(self, platform):
        m = Module()
        m.d.comb += self.y.eq(~self.a)
        return m


@bench(stall=Stall)
async def passes_ten(dut, stall):
    sink = StreamSink(dut, "o", stall=stall)
    StreamSource(dut, "i").send(range(10))
    await sink.take(10)


@bench()
async def expects_a_wrong_payload(dut):
    sink = StreamSink(dut, "o")
    StreamSource(dut, "i").send([3])
    got, = await sink.take(1)
    assert got == 4, "three is not four"


@bench(timeout_cycles=100)
async def waits_for_ever(dut):
    await StreamSink(dut, "o").take(1)


@bench()
async def never_yields(dut):
    while True:
        pass


@bench()
async def only_watches(dut):
    Watch(dut, "o")
    await ClockCycles(dut.clk, 20)


@bench()
async def survives_a_reset(dut):
    Watch(dut, "o")
    sink = StreamSink(dut, "o", stall=1.0)
    source = StreamSource(dut, "i")
    source.send(range(10))
    await ClockCycles(dut.clk, 10)  # the block holds 0 and 1, and 2 is on offer
    await reset(dut, cycles=1)
    sink.stall = Stall.NEVER
    assert await sink.take(8) == list(range(2, 10))
    await source.sent()


@bench()
async def inverts(dut):
    for value in range(16):
        dut.a.value = value
        await Timer(1, "ns")
        assert dut.y.value.to_unsigned() == value ^ 15


@bench()
async def gets_its_parameters(dut):
    assert bench_parameters() == {"rows": [1, 2], "name": "tiny"}


@bench()
async def finds_inputs_reset(dut):
    assert not dut.i__valid.value
    assert not dut.o__ready.value
    dut.i__valid.value = 1  # left behind for the bench after
    await ClockCycles(dut.clk, 2)


def test_failing_assertion_is_reported_with_its_bench_and_text():
    with pytest.raises(BenchFailure, match=r"(?s)1 of 4 benches.*expects_a_wrong_payload.*three is not four"):
        run_bench(StreamRegister(8), passes_ten, expects_a_wrong_payload)


def test_timeout_is_reported():
    with pytest.raises(BenchFailure, match="waits_for_ever: SimTimeoutError"):
        run_bench(StreamRegister(8), waits_for_ever)


def test_endless_loop_is_stopped_and_located():
    with pytest.raises(BenchFailure, match="(?s)did not run: never_yields.*Timeout.*in never_yields"):
        run_bench(StreamRegister(8), never_yields, wall_seconds=1)


@pytest.mark.parametrize("fault, text", [("valid", "valid fell before the transfer"),
                                         ("payload", "stream o, cycle .*: payload changed from 0x.* to 0x")])
def test_stream_violation_is_caught(fault, text):
    with pytest.raises(BenchFailure, match=text) as caught:
        run_bench(Impatient(fault), passes_ten, only_watches)
    assert "only_watches" in str(caught.value)
    assert "stall=NEVER" not in str(caught.value)  # never stalled, the fault does not show


def test_benches_that_do_not_run_are_an_error(monkeypatch):
    monkeypatch.setattr(expects_a_wrong_payload, "name", "gone")
    with pytest.raises(BenchFailure, match="did not run: gone"):
        run_bench(StreamRegister(8), passes_ten, expects_a_wrong_payload)


def test_undecorated_bench_is_refused():
    with pytest.raises(TypeError, match="decorated with @bench"):
        run_bench(None)
    with pytest.raises(TypeError, match="decorated with @bench"):
        run_bench(None, print)


def test_block_without_clock_and_parameters():
    run_bench(Inverter(), inverts, gets_its_parameters, parameters={"rows": [1, 2], "name": "tiny"})


def test_each_bench_starts_with_inputs_at_zero():
    run_bench(StreamRegister(8), finds_inputs_reset, passes_ten, finds_inputs_reset)


def test_stream_ends_survive_a_reset():
    run_bench(StreamRegister(8), survives_a_reset)


def test_second_run_takes_the_program_from_the_cache(monkeypatch):
    run_bench(StreamRegister(8), passes_ten)
    monkeypatch.setattr(bench_module.verilog, "convert", None)  # a build would need it
    run_bench(StreamRegister(8), passes_ten)


def test_trace_is_written(tmp_path):
    trace = tmp_path / "trace.vcd"
    run_bench(StreamRegister(8), passes_ten, trace=trace)
    assert "o__valid" in trace.read_text()


class Kind(enum.Enum, shape=2):
    ROW = 1
    END = 3


class Beat(data.Struct):
    kind: Kind
    value: signed(5)


@pytest.mark.parametrize("shape, value, bits", [
    (unsigned(3), 5, 5),
    (signed(4), -1, 15),
    (signed(1), -1, 1),
    (data.ArrayLayout(signed(4), 3), [-8, 7, 0], 0x078),
    (data.StructLayout({"a": 8, "b": signed(2)}), {"a": 200, "b": -2}, 0x2C8),
    (data.StructLayout({"a": 1, "b": data.ArrayLayout(2, 2)}), {"a": 1, "b": [3, 0]}, 0b00111),
    (Kind, Kind.END, 3),
    (Beat, {"kind": Kind.ROW, "value": -3}, 0b1110101),
], ids=str)
def test_pack_and_unpack(shape, value, bits):
    assert pack(shape, value) == bits
    assert unpack(shape, bits) == value
