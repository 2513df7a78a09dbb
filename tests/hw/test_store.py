"""StoreUnit writes exactly what its numpy model writes, is done only when memory has answered, and stops at faults."""

import dataclasses

import cocotb
import numpy as np
import pytest
from amaranth.back import rtlil
from axi_memory import DECERR, SLVERR, AxiMemory
from cocotb.triggers import ClockCycles, RisingEdge
from commands import command_source
from skipopu.hw.blocks.command import Fault, PlaceAnswer, PlaceRequest
from skipopu.hw.blocks.store import StoreUnit
from skipopu.hw.config import PRESETS, OverlayConfig, preset
from skipopu.hw.isa import KvFormat
from skipopu.hw.registers import FaultCause
from skipopu.sim.bench import (
    Stall,
    StreamSink,
    StreamSource,
    bench,
    bench_parameters,
    cycle,
    pack,
    run_bench,
    unpack,
)

TINY = preset("tiny")
# four rows of logits in a superbeat, a number of heads that is no power of two
WIDE = dataclasses.replace(TINY, name="wide", ports=8, tokens=16, kvbuf_heads=21)
SUPERBEATS = 2048


def place(position):
    """Where the history puts a record, as far as these benches go: neither in order nor all different."""
    return 29 * position % 31


class Bench:
    """Memories full of noise on all ports, KVOUT with noise, and the model's memory to compare with."""

    def __init__(self, dut, *, latency=5, stall=0.0, seed=0, errors=None, base=0x20_0000):
        self.dut, self.config = dut, OverlayConfig(**bench_parameters())
        self.rng = rng = np.random.default_rng(seed)
        config = self.config
        self.width = config.port_bits // 8
        self.expected = rng.integers(0, 256, (config.ports, SUPERBEATS, self.width), dtype=np.uint8)
        self.kvout = rng.integers(0, 256, (config.kvout_rows, self.width), dtype=np.uint8)
        self.ports = []
        for p in range(config.ports):
            start = base + 0x1_0000 * p
            getattr(dut, f"base__{p}").value = start
            refused = {start + self.width * address: code for port, address, code in errors or [] if port == p}
            self.ports.append(AxiMemory(dut, f"axi__{p}", bytearray(self.expected[p].tobytes()), base=start,
                                        latency=latency, stall=stall, seed=seed, errors=refused))
        dut.limit.value = SUPERBEATS
        self.logits = StreamSource(dut, "logits", stall=stall, seed=seed)
        self.done, self.asked, self.kv_written, self.cause = [], [], 0, FaultCause.NONE
        self.places = StreamSink(dut, "places", shape=PlaceRequest, stall=stall, seed=seed)
        for coroutine in (self._watch(), self._serve_kvout(), self._serve_places(stall)):
            cocotb.start_soon(coroutine)

    async def _serve_places(self, stall):
        while True:
            request, = await self.places.take(1)
            self.asked.append(request)
            while True:
                self.dut.place.value = pack(PlaceAnswer, {"place": int(self.rng.integers(1 << 16))})
                await RisingEdge(self.dut.clk)
                if self.rng.random() >= stall:
                    break
            answer = {"valid": 1, "place": place(request["position"]), "cause": self.cause}
            self.dut.place.value = pack(PlaceAnswer, answer)
            await RisingEdge(self.dut.clk)
            self.dut.place.value = 0

    async def _watch(self):
        while True:
            await RisingEdge(self.dut.clk)
            self.kv_written += int(self.dut.kv_written.value)
            if self.dut.done.value:
                self.done.append((cycle(), self.image()))

    async def _serve_kvout(self):
        while True:
            await RisingEdge(self.dut.clk)
            row = self.kvout[self.dut.kvout_row.value.to_unsigned()]
            self.dut.kvout_data.value = int.from_bytes(row.tobytes(), "little")

    def send(self, commands, **options):
        """Send commands and the logits of STOREL; the model follows each: (memory, positions written) after it."""
        after = []
        for name, fields in commands:
            source = self.kvout
            if name == "storel":
                beats = fields["rows"] * fields["count"] * self.config.superbeat_bytes // (4 * self.config.vector_lanes)
                source = self.rng.integers(0, 256, (beats, 4 * self.config.vector_lanes), np.uint8)
                self.logits.send(int.from_bytes(line.tobytes(), "little") for line in source)
            written = StoreUnit.model(self.config, self.expected, source, name, place, **fields)
            after.append(([port.tobytes() for port in self.expected], written))
        command_source(self.dut, self.config, commands, **options)
        return after

    def image(self):
        return [bytes(port.data) for port in self.ports]

    async def finish(self, count):
        while len(self.done) < count:
            await RisingEdge(self.dut.clk)

    async def fault(self):
        while not (fault := unpack(Fault, self.dut.fault.value.to_unsigned()))["valid"]:
            await RisingEdge(self.dut.clk)
        return {name: fault[name] for name in ("cause", "port", "pc")}


def narrow(config, heads, head_beats, record_format):
    """Fields of a STOREKV with records in a format."""
    return {"format": record_format, "heads": heads, "head_beats": head_beats,
            "record": config.record_beats(heads, head_beats, record_format)}


def make_commands(config, rng, count):
    last, tokens = SUPERBEATS * config.ports, config.tokens
    every = (1 << tokens) - 1
    yield from [
        ("storekv", {"imm": 0, "rows": 1, "x": 0, "record": 1}),
        ("storekv", {"imm": 3, "rows": 0, "x": 0, "record": 9}),
        ("storekv", {"imm": 0, "rows": config.ports + 1, "x": config.ports - 1, "record": 20}),
        ("storekv", {"imm": 1, "rows": 4, "x": 3, "record": config.kvout_rows // 4}),
        ("storekv", {"imm": SUPERBEATS - 8, "rows": 1, "x": config.ports - 1, "record": 8}),
        ("storekv", {"imm": 0, "rows": 1, "x": last - 1, "record": 1}),
        ("storekv", {"imm": 9, "rows": 4, "x": 0, "record": 3, "mask": 0b1001, "layer": 63}),
        ("storekv", {"imm": 9, "rows": 4, "x": 5, "record": 1, "mask": 0b0100, "layer": 1}),
        ("storekv", {"imm": 2, "rows": tokens, "x": config.ports - 1, "record": config.kvout_rows // tokens,
                     "mask": every ^ 1}),
        ("storekv", {"imm": 0, "rows": 4, "x": 0, "record": 9, "reuse": 1, "places": 31}),
        ("storekv", {"imm": 77, "rows": 4, "x": 2, "record": 3, "mask": 0b1010, "layer": 63, "reuse": 1,
                     "places": 65535}),
        ("storekv", {"imm": 0, "rows": tokens, "x": 1, "record": 7, "mask": 1 << tokens - 1, "layer": 40}),
        *(("storekv", {"imm": 40, "rows": 3, "x": 1, **narrow(config, *sizes, record_format)})
          for record_format in (KvFormat.B12, KvFormat.B8)
          for sizes in [(1, 1), (1, 2), (2, 1), (3, 1), (5, 3), (1, 90), (config.kvbuf_heads, 2)]),
        ("storekv", {"imm": 9, "rows": 4, "x": 0, "mask": 0b1001, "reuse": 1, "places": 31,
                     **narrow(config, 4, 2, KvFormat.B12)}),
        ("storel", {"imm": SUPERBEATS - 1, "rows": 1, "count": 1}),
        ("storel", {"imm": 5, "rows": 2, "count": 0}),
        ("storel", {"imm": 7, "rows": 3, "count": 21}),
    ]
    for _ in range(count):
        if rng.integers(2):
            yield "storel", {"imm": int(rng.integers(1500)), "rows": int(rng.integers(1, 4)),
                             "count": int(rng.integers(1, 40))}
        else:
            reuse = {"reuse": 1, "places": int(rng.integers(1 << 16))} if rng.integers(2) else {}
            sizes = [int(size) for size in rng.integers(1, 6, 2)]
            record = [{"record": int(rng.integers(1, 40))}, narrow(config, *sizes, KvFormat.B12),
                      narrow(config, *sizes, KvFormat.B8)][rng.integers(3)]
            yield "storekv", reuse | {"imm": int(rng.integers(500)), "rows": tokens, "layer": int(rng.integers(64)),
                              "mask": int(rng.integers(1, every + 1)), "x": int(rng.integers(8 * config.ports)),
                              **record}


@bench(stall=Stall, seed=[1], timeout_cycles=100_000)
async def writes_what_the_model_says(dut, stall, seed):
    """Checked at every done: all of the command is in memory, nothing else, nothing of the next command yet."""
    b = Bench(dut, stall=stall, seed=seed)
    commands = list(make_commands(b.config, b.rng, 12))
    after = b.send(commands, stall=stall, seed=seed)
    await b.finish(len(commands))
    for (name, fields), (_, got), (want, _) in zip(commands, b.done, after):
        assert got == want, f"{name} {fields}"
    await ClockCycles(dut.clk, 50)
    assert b.image() == after[-1][0] and len(b.done) == len(commands) and not dut.busy.value
    written = [(fields, written) for (name, fields), (_, written) in zip(commands, after) if name == "storekv"]
    assert b.kv_written == sum(fields["record"] * len(positions) for fields, positions in written)
    assert b.asked == [{"position": q, "layer": fields.get("layer", 0), "places": fields["places"]}
                       for fields, positions in written if fields.get("reuse") for q in positions]


@bench(command=[("storekv", {"imm": 0, "rows": 3, "x": 1, "record": 4}), ("storel", {"imm": 0, "rows": 1, "count": 4})])
async def is_done_after_the_last_response(dut, command):
    b = Bench(dut, latency=100)
    started = cycle()
    b.send([command])
    await b.finish(1)
    assert 100 < b.done[0][0] - started < 140  # the ports overlap


@bench()
async def copies_a_beat_in_every_cycle(dut):
    b = Bench(dut, latency=5)
    started = cycle()
    b.send([("storekv", {"imm": 0, "rows": 4, "x": 0, "record": 200})])
    await b.finish(1)
    assert b.done[0][0] - started < 4 * (200 + 5) + 40


@bench(record_format=[KvFormat.B12, KvFormat.B8])
async def packs_a_beat_in_every_cycle(dut, record_format):
    """Each beat of KVOUT is read for the exponents and for each plane."""
    b = Bench(dut, latency=5)
    started = cycle()
    b.send([("storekv", {"imm": 0, "rows": 4, "x": 0, **narrow(b.config, 10, 10, record_format)})])
    await b.finish(1)
    passes = 3 if record_format == KvFormat.B12 else 2
    assert 4 * 200 * passes < b.done[0][0] - started < 4 * (200 * passes + 15) + 40


@bench()
async def a_row_not_in_the_list_takes_a_cycle(dut):
    b = Bench(dut, latency=5)
    times = []
    for mask in (0b0001, 0b1000):
        started = cycle()
        b.send([("storekv", {"imm": 0, "rows": 4, "x": 0, "record": 8, "mask": mask})])
        await b.finish(len(times) + 1)
        times.append(b.done[-1][0] - started)
        await ClockCycles(dut.clk, 20)
    assert times[1] - times[0] == 3


@bench(command=["storekv", "storel"], port=[0, 1], code=[SLVERR, DECERR])
async def stops_at_a_write_error(dut, command, port, code):
    b = Bench(dut, errors=[(port, 7, code)])
    fields = {"storekv": {"imm": 0, "rows": 4, "x": 0, "record": 8}, "storel": {"imm": 0, "rows": 1, "count": 16}}
    other = {"rows": 1, "count": 1}
    b.send([("storel", {"imm": 600, **other}), (command, fields[command]), ("storel", {"imm": 900, **other})])
    assert await b.fault() == {"cause": FaultCause.WRITE_ERROR, "port": port, "pc": 101}
    await ClockCycles(dut.clk, 100)
    assert len(b.done) == 1


@bench(command=[
    ("storekv", {"imm": SUPERBEATS - 8, "rows": 2, "x": 7, "record": 5}),
    ("storekv", {"imm": 0, "rows": 1, "x": -1, "record": 5}),
    ("storekv", {"imm": -1, "rows": 1, "x": 0, "record": 1}),
    ("storekv", {"imm": -1, "rows": 4, "x": -3, "record": 255, "mask": 0b1000}),
    ("storel", {"imm": SUPERBEATS - 5, "rows": 2, "count": 3}),
    ("storel", {"imm": 0, "rows": 4095, "count": (1 << 24) - 1}),
    ("storel", {"imm": -1, "rows": 1, "count": 1}),
])
async def refuses_addresses_beyond_the_limit(dut, command):
    b = Bench(dut)
    command_source(dut, b.config, [command])
    fault = await b.fault()
    assert (fault["cause"], fault["pc"]) == (FaultCause.MEMORY_RANGE, 100)
    await ClockCycles(dut.clk, 100)
    limits = [port.base + SUPERBEATS * b.width for port in b.ports]
    assert all(address + count * b.width <= limit
               for port, limit in zip(b.ports, limits) for address, count in port.writes)
    assert not b.done


@bench(mask=[0b0001, 0b0100, 0b1000])
async def refuses_rows_beyond_kvout(dut, mask):
    b = Bench(dut)
    record = b.config.kvout_rows // mask.bit_length() + 1
    command_source(dut, b.config, [("storekv", {"imm": 0, "rows": 4, "x": 0, "record": record, "mask": mask})])
    assert await b.fault() == {"cause": FaultCause.BUFFER_RANGE, "port": 0, "pc": 100}


@bench(command=[({"format": 3}, FaultCause.KV_FORMAT), ({"record": 8}, FaultCause.BUFFER_RANGE),
                ({"record": 6}, FaultCause.BUFFER_RANGE), ({"heads": 0}, FaultCause.BUFFER_RANGE),
                ({"head_beats": 0}, FaultCause.BUFFER_RANGE), ({"format": KvFormat.B8}, FaultCause.BUFFER_RANGE),
                (narrow(TINY, TINY.kvbuf_heads + 1, 1, KvFormat.B12), FaultCause.BUFFER_RANGE),
                (narrow(TINY, 64, 5, KvFormat.B8), FaultCause.BUFFER_RANGE)], reuse=[0, 1])
async def refuses_narrow_records_that_do_not_fit(dut, command, reuse):
    b = Bench(dut)
    fields, cause = command
    fields = {"imm": 0, "rows": 2, "x": 0, "reuse": reuse, **narrow(b.config, 2, 2, KvFormat.B12), **fields}
    command_source(dut, b.config, [("storekv", fields)])
    assert await b.fault() == {"cause": cause, "port": 0, "pc": 100}
    await ClockCycles(dut.clk, 50)
    written = sum(count for port in b.ports for _, count in port.writes)
    assert written == (fields["record"] if fields["head_beats"] == 5 else 0)  # the second row is beyond KVOUT


@bench(record_format=[KvFormat.B12, KvFormat.B8, 3])
async def has_no_narrow_records(dut, record_format):
    b = Bench(dut)
    fields = {"imm": 0, "rows": 1, "x": 0, "format": record_format, "heads": 1, "head_beats": 1, "record": 2}
    command_source(dut, b.config, [("storekv", fields)])
    assert await b.fault() == {"cause": FaultCause.KV_FORMAT, "port": 0, "pc": 100}


@bench(cause=[FaultCause.KV_POINTER, FaultCause.KV_FULL, FaultCause.BUFFER_RANGE], x=[4, 5])
async def stops_when_the_history_has_no_place(dut, cause, x):
    b = Bench(dut)
    b.cause = cause
    command_source(dut, b.config, [("storekv", {"imm": 0, "rows": 2, "x": x, "record": 4, "reuse": 1})])
    port = 0 if cause == FaultCause.BUFFER_RANGE else x % b.config.ports
    assert await b.fault() == {"cause": cause, "port": port, "pc": 100}
    await ClockCycles(dut.clk, 100)
    assert not b.done and not any(port.writes for port in b.ports) and len(b.asked) == 1


@bench()
async def refuses_places_beyond_the_limit(dut):
    b = Bench(dut)
    end = SUPERBEATS - place(5) * 7
    command_source(dut, b.config, [("storekv", {"imm": imm, "rows": 1, "x": 5, "record": 7, "reuse": 1})
                                   for imm in (end - 7, end - 6)])
    assert await b.fault() == {"cause": FaultCause.MEMORY_RANGE, "port": 5 % b.config.ports, "pc": 101}
    assert [len(port.writes) > 0 for port in b.ports] == [p == 5 % b.config.ports for p in range(b.config.ports)]


BENCHES = (writes_what_the_model_says, is_done_after_the_last_response, copies_a_beat_in_every_cycle,
           packs_a_beat_in_every_cycle, a_row_not_in_the_list_takes_a_cycle,
           stops_at_a_write_error, stops_when_the_history_has_no_place, refuses_places_beyond_the_limit,
           refuses_addresses_beyond_the_limit, refuses_rows_beyond_kvout)


@pytest.mark.parametrize("config", [TINY, WIDE], ids=lambda config: config.name)
def test_store_unit(config):
    run_bench(StoreUnit(config=config), *BENCHES, parameters=dataclasses.asdict(config))


def test_narrow_records_that_do_not_fit():
    run_bench(StoreUnit(config=TINY), refuses_narrow_records_that_do_not_fit, parameters=dataclasses.asdict(TINY))


def test_without_narrow_records():
    config = dataclasses.replace(TINY, kv_narrow=False)
    run_bench(StoreUnit(config=config), has_no_narrow_records, copies_a_beat_in_every_cycle,
              parameters=dataclasses.asdict(config))


@pytest.mark.parametrize("name", PRESETS)
def test_elaborates(name):
    assert "module" in rtlil.convert(StoreUnit(config=preset(name)), name="top", emit_src=False)
