"""LoadUnit delivers what its numpy model says, in order and without gaps, and stops at faults."""

import dataclasses
from collections import defaultdict, deque

import cocotb
import numpy as np
import pytest
from amaranth.back import rtlil
from amaranth.hdl import Module
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In
from axi_memory import SLVERR, AxiMemory
from cocotb.triggers import ClockCycles, FallingEdge, RisingEdge
from commands import as_command, command_source
from skipopu.hw.blocks.command import Fault, PlaceAnswer, PlaceRequest
from skipopu.hw.blocks.history import History
from skipopu.hw.blocks.kvintake import KvRecord, KvShape, count_bits
from skipopu.hw.blocks.load import AbufWrite, LoadUnit
from skipopu.hw.config import PRESETS, OverlayConfig, preset
from skipopu.hw.isa import ROUTER_ROWS_AT, KvFormat
from skipopu.hw.registers import FaultCause
from skipopu.sim.bench import (
    Stall,
    StreamSink,
    StreamSource,
    Watch,
    bench,
    bench_parameters,
    cycle,
    pack,
    reset,
    run_bench,
    unpack,
)

TINY = preset("tiny")
WIDE = dataclasses.replace(  # four ABUF rows in a superbeat
    TINY, name="wide", ports=8, fifo_beats=256, outstanding=16, history_layers=16, history_tokens=128, kvbuf_heads=10)
SUPERBEATS = 16384
LAYERS = 10
PLACES = 1000


class DamagedHistory(History):
    """A history in whose masks and pointers bits flip: of row ``row``, those of ``bits``, where ``strike`` is set."""

    def __init__(self, *, config, strike):
        super().__init__(config=config)
        self.strike = strike

    def table(self, m, name, shape, depth):
        memory = super().table(m, name, shape, depth)
        read, write = memory.read_port(domain="comb"), memory.write_port()
        m.d.comb += [read.addr.eq(self.strike.row), write.addr.eq(self.strike.row), write.en.eq(self.strike[name]),
                     write.data.eq(read.data ^ self.strike.bits)]
        return memory


class DamagedLoadUnit(LoadUnit):
    def history(self):
        return DamagedHistory(config=self.config, strike=self.strike)


class Damaged(wiring.Component):
    """A load unit with such a history."""

    def __init__(self, *, config):
        self.load = DamagedLoadUnit(config=config)
        strike = data.StructLayout({f"{name}{p}": 1 for name in ("masks", "pointers") for p in range(config.ports)}
                                   | {"row": 16, "bits": 65})
        super().__init__(dict(self.load.signature.members) | {"strike": In(strike)})
        self.load.strike = self.strike
        for name in self.load.signature.members:
            setattr(self, name, getattr(self.load, name))

    def elaborate(self, platform):
        m = Module()
        m.submodules.load = self.load
        return m


class Pointers:
    """What the history must know: the place of each position in each layer, what comes next in each port, and what its
    buffer keeps: tags {position: (place, slot)}, per port the slots that were given back and how many were never used.
    """

    def __init__(self, config):
        self.config, self.following, self.of = config, [0] * config.ports, {}
        self.size = 0, 0
        self.clear()

    def clear(self):
        self.tags, self.free, self.fresh = {}, [deque() for _ in self.following], [0] * self.config.ports

    def visit(self, position, layer, final, buffer):
        """(what happens to the record that a layer reads: "hit", "fill" or None; its slot)."""
        port, place, written = position % self.config.ports, self.place(layer)(position), self.of[position]
        keep, beyond = not final and layer + 1 not in written, layer + 2 not in written
        there = buffer - self.fresh[port] + len(self.free[port])
        tag_place, slot = self.tags.get(position, (None, None))
        if tag_place == place:
            if not keep:
                self.free[port].append(self.tags.pop(position)[1])
            return "hit", slot
        if keep and (beyond or there >= buffer // 4) and (slot is not None or there):
            if slot is None and self.free[port]:
                slot = self.free[port].popleft()
            elif slot is None:
                slot = self.fresh[port]
                self.fresh[port] += 1
            self.tags[position] = place, slot
            return "fill", slot
        if slot is not None:
            self.free[port].append(self.tags.pop(position)[1])
        return None, None

    def visits(self, fields):
        """The same for all positions of a LOADKV with reuse, in order."""
        config, buffer = self.config, fields.get("buffer", 0)
        if self.size != (buffer, fields["record"]):
            self.size = buffer, fields["record"]
            self.clear()
        return [self.visit(fields["x"] + i, fields["layer"], fields.get("final", 0), buffer) if buffer else (None, None)
                for i in range(min(fields["rows"], config.tile_tokens))]

    def store(self, position, layer):
        if position == layer == 0:
            self.following = [0] * self.config.ports
            self.clear()
        port = position % self.config.ports
        before = {} if layer == 0 else self.of.get(position, {})
        self.of[position] = before | {layer: self.following[port]}
        self.following[port] += 1
        return self.following[port] - 1

    def place(self, layer):
        """The function from a position to the place of the record that ``layer`` reads."""
        def find(position):
            places = self.of[position]
            return places[max(written for written in places if written <= layer)]
        return find


class Intake:
    """Takes the records of one port, from memory and from a buffer that is filled as the entries say, each entry with
    the last of its beats.

    lengths : of the records of each tile so far; cycles : of each beat from memory; stall may be changed while running
    """

    def __init__(self, dut, p, config, lengths, *, stall, seed):
        self.dut, self.layout, self.lengths, self.stall = dut, KvRecord(config), lengths, stall
        self.cycles, self.received, self.beats = [], defaultdict(list), []
        self.buffer, self.through = [0] * config.buffer_beats, {"records": 0, "hits": 0}
        self._half = 1 << count_bits(config) - 1
        self._random = np.random.default_rng([seed, p])
        self._signal = {name: [getattr(dut, f"{name}__{p}__{part}") for part in ("valid", "ready", "payload")]
                        for name in ("records", "kv", "hits")}
        for name in self._signal if p == 1 else ():  # a watch of all ports takes most of the time
            Watch(dut, f"{name}__{p}")
        cocotb.start_soon(self._run())

    async def take(self, number, count):
        """What came for a tile, by row: (the entry, whether it is from the buffer, the beats)."""
        while len(self.received[number]) < count:
            await RisingEdge(self.dut.clk)
        return sorted(self.received.pop(number), key=lambda found: found[0]["row"])

    def _entry(self, name, other):
        """The entry offered, if its turn has come: its tile is announced, and the other source is far enough."""
        valid, _, payload = self._signal[name]
        if not valid.value:
            return None
        entry = unpack(self.layout, payload.value.to_unsigned())
        announced = range(max(len(self.lengths) - 16, 0), len(self.lengths))
        number = next((n for n in announced if n % 16 == entry["tile"]), None)
        early = entry["wait"] and (self.through[other] - entry["after"]) % (2 * self._half) >= self._half
        if number is None or early or self._random.random() < self.stall:
            return None
        return entry | {"number": number, "length": self.lengths[number]}

    async def _run(self):
        kv_valid, kv_ready, kv_payload = self._signal["kv"]
        while True:
            await FallingEdge(self.dut.clk)  # what is offered is settled
            if self.dut.rst.value:
                self.beats, self.through = [], {"records": 0, "hits": 0}
            entry = self._entry("records", "hits")
            go = entry and kv_valid.value
            if go:
                beat = kv_payload.value.to_unsigned()
                if entry["fill"]:
                    self.buffer[entry["at"] + len(self.beats)] = beat
                self.beats.append(beat)
                self.cycles.append(cycle())
            ends = go and len(self.beats) == entry["rows"] * entry["length"]
            if ends:
                self.received[entry["number"]].append((entry, False, self.beats))
                self.beats = []
            kv_ready.value, self._signal["records"][1].value = int(bool(go)), int(bool(ends))
            hit = self._entry("hits", "records")
            if hit:
                copy = self.buffer[hit["at"]:hit["at"] + hit["length"]]
                self.received[hit["number"]].append((hit, True, copy))
                self.through["hits"] += 1
            if ends and entry["counts"]:
                self.through["records"] += 1
            self._signal["hits"][1].value = int(bool(hit))


class Bench:
    """Memories on all ports, sinks on all outputs, done pulses counted."""

    def __init__(self, dut, *, latency=5, stall=0.0, sink_stall=0.0, seed=0, errors=None, base=0x10_0000):
        self.dut, self.config = dut, OverlayConfig(**bench_parameters())
        config = self.config
        width = config.port_bits // 8
        self.memory = np.random.default_rng(seed).integers(0, 256, (config.ports, SUPERBEATS, width), dtype=np.uint8)
        self.ports = []
        for p in range(config.ports):
            start = base + 4096 * p
            getattr(dut, f"base__{p}").value = start
            refused = {start + width * a: SLVERR for port, a in errors or [] if port == p}
            self.ports.append(AxiMemory(dut, f"axi__{p}", bytearray(self.memory[p].tobytes()), base=start,
                                        latency=latency, stall=stall, seed=seed, errors=refused))
        dut.limit.value = SUPERBEATS
        self.source = None
        self.pointers = Pointers(config)
        self.weights = StreamSink(dut, "weights", stall=sink_stall, seed=seed)
        self.abuf = StreamSink(dut, "abuf", shape=AbufWrite(config), stall=sink_stall, seed=seed)
        self.tiles = StreamSink(dut, "tile", shape=KvShape(config), stall=sink_stall, seed=seed)
        self.lengths = []  # of the records of each tile that was announced
        self.kv = [Intake(dut, p, config, self.lengths, stall=sink_stall, seed=seed) for p in range(config.ports)]
        cocotb.start_soon(self._watch_tiles())
        self.number, self.hits = 0, 0  # of the next tile; records from the buffer so far
        self.places = StreamSource(dut, "places", shape=PlaceRequest)

    async def _watch_tiles(self):
        while True:
            await RisingEdge(self.dut.clk)
            if self.dut.rst.value:
                self.lengths.clear()
            elif self.dut.tile__valid.value and self.dut.tile__ready.value:
                self.lengths.append(unpack(KvShape(self.config), self.dut.tile__payload.value.to_unsigned())["record"])

    def send(self, commands, **options):
        """Send (mnemonic, fields), once more or at first; stall and seed are those of the first time."""
        if self.source:
            self.source.send([as_command(name, **fields) for name, fields in commands])
        else:
            self.source = command_source(self.dut, self.config, commands, **options)

    def model(self, name, fields):
        place = self.pointers.place(fields["layer"]) if fields.get("reuse") else None
        return LoadUnit.model(self.config, self.memory, name, place, **fields)

    async def ask(self, position, layer, places=PLACES):
        """Ask for the place of a record; returns the answer, (cause, place)."""
        self.places.send([{"position": position, "layer": layer, "places": places}])
        while not (answer := unpack(PlaceAnswer, self.dut.place.value.to_unsigned()))["valid"]:
            await RisingEdge(self.dut.clk)
        await RisingEdge(self.dut.clk)
        return answer["cause"], answer["place"]

    async def store(self, written):
        """Give places to (position, layer), one after the other."""
        for position, layer in written:
            assert await self.ask(position, layer) == (FaultCause.NONE, self.pointers.store(position, layer))

    async def store_at_random(self, rng, layers, count=None):
        """The first ``count`` positions written by layer 0 and by some other layers, in the order of layers."""
        for layer in range(layers):
            await self.store([(q, layer) for q in range(count or self.config.history_tokens)
                              if layer == 0 or rng.random() < 0.2])

    async def check(self, name, fields):
        want = self.model(name, fields)
        if name == "loadw":
            assert await self.weights.take(len(want)) == [as_int(line) for line in want]
        elif name == "loada":
            got = await self.abuf.take(len(want))
            assert got == [{"addr": row, "data": as_int(line)} for row, line in want]
        else:
            await self.check_tile(fields, want)

    async def check_tile(self, fields, want):
        config, record, reuse = self.config, fields["record"], fields.get("reuse", 0)
        count = min(fields["rows"], config.tile_tokens)
        rows, rest = -(-count // config.ports), count % config.ports
        every = (1 << config.ports) - 1
        assert await self.tiles.take(1) == [{
            "heads": fields["heads"], "head_beats": fields["head_beats"], "format": fields.get("format", 0),
            "rows": rows, "record": record, "last": (1 << rest) - 1 if rest and reuse else every}]
        visits = self.pointers.visits(fields) if reuse else None
        for p, port in enumerate(want):
            lists = [(row, 1) for row in range(len(port))] if reuse else [(0, rows)]
            taken = await self.kv[p].take(self.number, len(lists))
            for (row, length), (entry, hit, got) in zip(lists, taken, strict=True):
                expected = {"tile": self.number % 16, "row": row, "rows": length, "counts": reuse}
                happens, slot = visits[row * config.ports + p] if reuse else (None, None)
                assert hit == (happens == "hit") and (hit or entry["fill"] == (happens == "fill"))
                if happens:
                    expected["at"] = slot * record
                assert entry | expected == entry
                assert got == [as_int(line) for line in port[row:row + length].reshape(-1, port.shape[2])]
        self.hits += sum(happens == "hit" for happens, _ in visits or [])
        self.number += 1
        self.dut.tile_done.value = 1
        await RisingEdge(self.dut.clk)
        self.dut.tile_done.value = 0

    async def fault(self):
        while not (fault := unpack(Fault, self.dut.fault.value.to_unsigned()))["valid"]:
            await RisingEdge(self.dut.clk)
        return {name: fault[name] for name in ("cause", "port", "pc")}

    async def nothing_more(self):
        assert [await sink.rest() for sink in (self.weights, self.abuf)] == [[], []]
        assert not any(intake.received for intake in self.kv)


def as_int(line):
    return int.from_bytes(line.tobytes(), "little")


def make_commands(config, rng, count):
    parts = config.superbeat_bytes // (4 * config.vector_lanes)
    block = config.lanes // config.beat_elements
    yield from [
        ("loadw", {"imm": 0, "count": 1}), ("loadw", {"imm": SUPERBEATS - 1, "count": 1}),
        ("loadw", {"imm": 5, "count": 0}),
        ("loada", {"imm": 0, "rows": 1, "x": 0, "count": 1, "beats": 1, "dst_stride": 0}),
        ("loada", {"imm": 9, "rows": 3, "x": config.abuf_rows - 2 * 7 - 2, "count": 2, "beats": 2, "dst_stride": 7}),
        ("loada", {"imm": 9, "rows": 0, "x": 3, "count": 2, "beats": 2, "dst_stride": 7}),
        ("loada", {"imm": 9, "rows": 2, "x": 3, "count": 3, "beats": 2 * parts, "dst_stride": 100}),
        ("loada", {"imm": 9, "rows": 2, "x": ROUTER_ROWS_AT - (1 << 16), "count": 1, "beats": parts,
                   "dst_stride": config.router_rows - parts}),
        ("loadkv", {"imm": 77, "rows": config.tile_tokens, "heads": 1, "head_beats": block, "record": 2 * block}),
        ("loadkv", {"imm": 1, "rows": 1, "heads": 1, "head_beats": block, "record": 2 * block}),
        *(("loadkv", {"imm": 7, "rows": rows, "heads": 1, "head_beats": block, "record": 2 * block + 1, "reuse": 1,
                      "layer": 3, "x": config.ports})
          for rows in (1, 2, config.ports + 1, config.tile_tokens - 1, 4095)),
        ("loadkv", {"imm": 0, "rows": config.ports + 1, "heads": config.kvbuf_heads // 2, "head_beats": 2 * block,
                    "record": 2 * config.kvbuf_heads * block}),
        *(("loadkv", {"imm": 7, "rows": config.tile_tokens, "heads": heads, "head_beats": block,
                      "format": record_format, "record": config.record_beats(heads, block, record_format)}
            | reused(config, rng))
          for record_format in (KvFormat.B12, KvFormat.B8) for heads in (1, 3, 5)),
    ]
    for _ in range(count):
        kind = rng.integers(3)
        imm, size = int(rng.integers(SUPERBEATS // 2)), int(rng.integers(1, 60))
        if kind == 0:
            yield "loadw", {"imm": imm, "count": size}
        elif kind == 1:
            beats = int(rng.integers(1, parts * size + 1))
            yield "loada", {"imm": imm, "rows": int(rng.integers(1, 4)), "x": int(rng.integers(1000)), "count": size,
                            "beats": beats, "dst_stride": int(rng.integers(1000))}
        else:
            heads, record_format = int(rng.integers(1, 3)), KvFormat(rng.integers(3))
            yield "loadkv", {"imm": imm, "heads": heads, "head_beats": block, "format": record_format,
                             "rows": int(rng.integers(1, 2 * config.tile_tokens)),
                             "record": config.record_beats(heads, block, record_format) + int(rng.integers(3))
                             } | reused(config, rng)


def reused(config, rng):
    """Fields of a LOADKV that follows the pointers, in half of all cases."""
    if rng.integers(2):
        return {}
    first = int(rng.integers(0, config.history_tokens - config.tile_tokens + 1))
    return {"reuse": 1, "x": first // config.ports * config.ports, "layer": int(rng.integers(LAYERS))}


async def count_pulses(dut, signal, counts):
    while True:
        await RisingEdge(dut.clk)
        counts += [cycle()] * int(signal.value)


def count(dut, name):
    counts = []
    cocotb.start_soon(count_pulses(dut, getattr(dut, name), counts))
    return counts


@bench(stall=Stall, seed=[1], timeout_cycles=100_000)
async def delivers_what_the_model_says(dut, stall, seed):
    b = Bench(dut, stall=stall / 2, sink_stall=stall, seed=seed)
    done, weights_read, kv_read = (count(dut, name) for name in ("done", "weights_read", "kv_read"))
    rng = np.random.default_rng(seed)
    await b.store_at_random(rng, LAYERS)
    commands = list(make_commands(b.config, rng, 16))
    b.send(commands, stall=stall, seed=seed)
    for name, fields in commands:
        await b.check(name, fields)
    await ClockCycles(dut.clk, 50)
    assert len(done) == len(commands) and not dut.busy.value
    assert (len(weights_read), len(kv_read)) == (len(b.weights.cycles), sum(len(sink.cycles) for sink in b.kv))
    await b.nothing_more()


async def stream_weights(dut, latency, sizes):
    b = Bench(dut, latency=latency)
    commands = [("loadw", {"imm": 100 * i, "count": size}) for i, size in enumerate(sizes)]
    b.send(commands)
    for name, fields in commands:
        await b.check(name, fields)
    assert b.weights.cycles == list(range(b.weights.cycles[0], b.weights.cycles[0] + sum(sizes)))


@bench(latency=[32, 45])
async def streams_a_superbeat_in_every_cycle(dut, latency):
    await stream_weights(dut, latency, [2000])


@bench(latency=[32, 100])
async def streams_short_commands_without_a_gap(dut, latency):
    await stream_weights(dut, latency, [400, 20, 64, 16, 33, 300, 30, 15, 400])


@bench()
async def reads_ahead_across_commands(dut):
    b = Bench(dut)
    b.weights.stall = 1.0
    commands = [("loadw", {"imm": 0, "count": 10}), ("loada", {"imm": 50, "rows": 2, "x": 0, "count": 3, "beats": 3,
                                                              "dst_stride": 4}), ("loadw", {"imm": 200, "count": 9})]
    b.send(commands)
    await ClockCycles(dut.clk, 100)
    assert all(sum(length for _, length in port.reads) == 25 for port in b.ports)
    b.weights.stall = Stall.NEVER
    for name, fields in commands:
        await b.check(name, fields)


@bench()
async def ports_run_ahead_of_one_another(dut):
    """A port whose records nobody takes stops no other one, until its queue is full."""
    b, rng = Bench(dut), np.random.default_rng(5)
    await b.store_at_random(rng, 3)
    commands = [tile(TINY.tile_tokens * i, 2) for i in range(2)]
    b.kv[0].stall = 1.0
    b.send(commands)
    for number in range(2):
        await b.kv[1].take(number, TINY.tile_tokens // TINY.ports)
    assert not b.kv[0].cycles


@bench()
async def is_done_in_order(dut):
    """A LOADW behind a tile that is not complete is not done before it."""
    b = Bench(dut)
    done = count(dut, "done")
    load = ("loadw", {"imm": 5, "count": 3})
    b.send([load, ("loadkv", {"imm": 0, "rows": 1, "heads": 1, "head_beats": 2, "record": 4}), load, load])
    for _ in range(3):
        await b.check(*load)
    await ClockCycles(dut.clk, 50)
    assert len(done) == 1 and dut.busy.value
    dut.tile_done.value = 1
    await RisingEdge(dut.clk)
    dut.tile_done.value = 0
    await ClockCycles(dut.clk, 10)
    assert len(done) == 4 and not dut.busy.value


@bench(port=[0, 1])
async def stops_at_a_read_error(dut, port):
    b = Bench(dut, errors=[(port, 130), (1, 130)])  # the lowest port counts
    b.send([("loadw", {"imm": imm, "count": 20}) for imm in (0, 120, 40)])
    assert await b.fault() == {"cause": FaultCause.READ_ERROR, "port": port, "pc": 101}
    await b.check("loadw", {"imm": 0, "count": 20})
    await b.check("loadw", {"imm": 120, "count": 10})
    await b.nothing_more()


@bench(port=[0, 1])
async def stops_at_a_read_error_of_a_record(dut, port):
    """The other ports may go on; of the faulty one nothing more is seen."""
    b = Bench(dut, errors=[(port, 130)])
    fields = {"rows": 4 * TINY.ports, "heads": 1, "head_beats": 2, "record": 4}
    b.send([("loadkv", {"imm": imm} | fields) for imm in (0, 120, 40)])
    assert await b.fault() == {"cause": FaultCause.READ_ERROR, "port": port, "pc": 101}
    await ClockCycles(dut.clk, 50)
    assert [len(sink.cycles) for sink in b.kv] == [26 if p == port else 48 for p in range(TINY.ports)]


@bench(command=[
    ("loadw", {"imm": SUPERBEATS - 9, "count": 10}), ("loadw", {"imm": -1, "count": 1}),
    ("loada", {"imm": SUPERBEATS - 5, "rows": 2, "x": 0, "count": 3, "beats": 1, "dst_stride": 0}),
    ("loada", {"imm": 0, "rows": 4095, "x": 0, "count": 65535, "beats": 1, "dst_stride": 0}),
    ("loadkv", {"imm": SUPERBEATS - 10, "rows": 2 * TINY.ports, "heads": 1, "head_beats": 2, "record": 8}),
])
async def refuses_addresses_beyond_the_limit(dut, command):
    b = Bench(dut)
    b.send([("loadw", {"imm": SUPERBEATS - 10, "count": 10}), command, ("loadw", {"imm": 0, "count": 1})])
    assert await b.fault() == {"cause": FaultCause.MEMORY_RANGE, "port": 0, "pc": 101}
    await b.check("loadw", {"imm": SUPERBEATS - 10, "count": 10})  # the command before is complete
    await b.nothing_more()
    assert all(address < port.base + SUPERBEATS * 8 for port in b.ports for address, _ in port.reads)


def tile(first, layer, *, imm=0, heads=1, rows=TINY.tile_tokens, **fields):
    """A LOADKV that follows the pointers."""
    return "loadkv", fields | {"imm": imm, "x": first, "rows": rows, "layer": layer, "heads": heads,
                      "head_beats": TINY.lanes // TINY.beat_elements, "reuse": 1,
                      "record": 2 * heads * TINY.lanes // TINY.beat_elements}


@bench(timeout_cycles=50_000)
async def follows_the_pointers(dut):
    """Each layer alone, the highest of several, none above the one that asks, all forgotten at layer 0."""
    b, rng = Bench(dut), np.random.default_rng(2)
    tokens, every, layers = TINY.tile_tokens, TINY.history_tokens, TINY.history_layers
    written = [(q, 0) for q in range(every)]
    written += [(q, q % layers or 1) for q in range(tokens, every)]
    written += [(q, layer) for layer in (1, 5, layers - 2, layers - 1) for q in range(2 * tokens, every, 3)]
    written += [(q, layer) for layer in (0, 3) for q in range(3 * tokens, every, 5)]
    await b.store(written)
    for first in range(0, every, tokens):
        commands = [tile(first, layer, imm=int(rng.integers(1000)))
                    for layer in [0, 1, 4, 5, 6, layers - 3, layers - 2, layers - 1]]
        b.send(commands)
        for name, fields in commands:
            await b.check(name, fields)


@bench(stall=[Stall.NEVER, Stall.HALF])
async def gives_places_while_it_looks_up(dut, stall):
    """To other positions: control orders what concerns the same ones."""
    b, rng = Bench(dut, sink_stall=stall), np.random.default_rng(3)
    half = TINY.history_tokens // 2
    await b.store_at_random(rng, 4)
    commands = [tile(TINY.tile_tokens * i, 3) for i in range(4)]
    want = [(fields, b.model(name, fields)) for name, fields in commands]
    b.send(commands)
    for _ in range(80):
        await b.store([(half + int(rng.integers(half)), int(rng.integers(1, 4)))])
        await ClockCycles(dut.clk, int(rng.integers(1, 4)))
    for fields, before in want:
        await b.check_tile(fields, before)
    late = [tile(half, 3), tile(TINY.history_tokens - TINY.tile_tokens, 3)]
    b.send(late)
    for name, fields in late:
        await b.check(name, fields)


@bench(heads=[1, 2, 5])
async def streams_records_of_many_layers_without_a_gap(dut, heads):
    config = OverlayConfig(**bench_parameters())
    b, rng = Bench(dut, latency={4: 5, 16: 32}[config.outstanding]), np.random.default_rng(4)
    await b.store_at_random(rng, 6, 6 * config.tile_tokens)
    commands = [tile(TINY.tile_tokens * i, LAYERS, imm=3 * i, heads=heads) for i in range(6)]
    b.send(commands)
    for name, fields in commands:
        await b.check(name, fields)
    # A record takes four cycles to prepare, a command eight more.
    work = 8 + 4 * config.tile_tokens // config.ports
    pace = config.tile_tokens // config.ports * commands[0][1]["record"]
    for sink in b.kv:
        gaps = sink.cycles[-1] - sink.cycles[0] + 1 - len(sink.cycles)
        assert gaps <= max(work - pace, 0) * (len(commands) - 1), f"{gaps} cycles without a beat"


@bench(buffer=[1, 3, 16, 64], stall=[Stall.NEVER, Stall.HALF], seed=[1], timeout_cycles=100_000)
async def keeps_what_later_layers_read(dut, buffer, stall, seed):
    """Several runs over the layers, as tokens are decoded: some layers skipped, more positions each time."""
    b, rng = Bench(dut, sink_stall=stall, seed=seed), np.random.default_rng(seed)
    ports, layers, first = b.config.ports, 7, 5 * b.config.ports + 1
    await b.store_at_random(rng, layers, first)
    for step in range(5):
        commands = []
        for layer in range(layers):
            if layer == 0 or rng.random() < 0.7:
                await b.store([(first + step, layer)])
            elif step:  # an attention that is skipped, which the first run does not
                continue
            tokens = first + step + 1
            commands = [tile(x, layer, rows=tokens - x, buffer=buffer, final=int(layer == layers - 1))
                        for x in range(0, tokens, b.config.tile_tokens)]
            b.send(commands, stall=stall)
            for name, fields in commands:
                await b.check(name, fields)
    assert b.hits > (0 if buffer < 3 else 5 * ports)


@bench(stall=[Stall.NEVER, Stall.MOSTLY])
async def fills_and_reads_a_slot_in_order(dut, stall):
    """The tiles of all layers at once: little else keeps the sources of a port in step."""
    b, rng = Bench(dut, sink_stall=stall), np.random.default_rng(8)
    count, layers = b.config.tile_tokens, 9
    await b.store_at_random(rng, layers, count)
    for buffer in (3, b.config.tile_tokens // b.config.ports, 2):
        for layer in range(0, layers, 2):
            await b.store([(q, layer) for q in range(1, count) if rng.random() < 0.3])
        commands = [tile(0, layer, buffer=buffer, final=int(layer == layers - 1)) for layer in range(layers)]
        b.send(commands)
        for name, fields in commands:
            await b.check(name, fields)
    assert b.hits > 30


@bench()
async def forgets_records_of_another_sequence_or_size(dut):
    b = Bench(dut)
    count = 2 * TINY.ports
    await b.store([(q, 0) for q in range(count)])
    loads = [tile(0, 3, rows=count, buffer=buffer, heads=heads)
             for buffer, heads in ((9, 1), (9, 1), (8, 1), (8, 1), (0, 1), (8, 1), (8, 2), (8, 2))]
    hits = []
    b.send(loads)
    for name, fields in loads:
        await b.check(name, fields)
        hits.append(b.hits)
    assert np.diff([0, *hits]).tolist() == [0, count, 0, count, 0, 0, 0, count]
    await b.store([(q, 0) for q in range(count)])
    b.send([tile(0, 3, rows=count, buffer=8, heads=2)])
    await b.check(*tile(0, 3, rows=count, buffer=8, heads=2))
    assert b.hits == hits[-1]


@bench(fields=[{"buffer": TINY.buffer_beats // 4 + 1}, {"buffer": 65535}, {"buffer": 22, "heads": 3}])
async def refuses_a_buffer_that_does_not_fit(dut, fields):
    b = Bench(dut)
    await b.store([(0, 0)])
    b.send([tile(0, 0, rows=1, buffer=TINY.buffer_beats // 4), tile(0, 0, rows=1, **fields)])
    await b.check(*tile(0, 0, rows=1, buffer=TINY.buffer_beats // 4))
    assert await b.fault() == {"cause": FaultCause.BUFFER_RANGE, "port": 0, "pc": 101}


@bench(first=[-TINY.ports, TINY.history_tokens - TINY.tile_tokens + TINY.ports, TINY.history_tokens, 32766])
async def refuses_positions_beyond_the_history(dut, first):
    b = Bench(dut)
    b.send([tile(first, 1)])
    assert await b.fault() == {"cause": FaultCause.BUFFER_RANGE, "port": 0, "pc": 100}
    await b.nothing_more()


@bench(port=[0, 1])
async def refuses_records_beyond_the_limit(dut, port):
    """The record of one port alone lies a beat behind the memory."""
    b = Bench(dut)
    others = [(q, 0) for q in range(TINY.tile_tokens)]
    await b.store([*others, (2 * TINY.ports + port, 1)])
    last, record = b.pointers.place(1)(2 * TINY.ports + port), tile(0, 1)[1]["record"]
    at = SUPERBEATS - (last + 1) * record
    b.send([tile(0, 1, imm=at), tile(0, 1, imm=at + 1)])
    await b.check(*tile(0, 1, imm=at))
    assert await b.fault() == {"cause": FaultCause.MEMORY_RANGE, "port": port, "pc": 101}
    await ClockCycles(dut.clk, 50)
    assert all(address + 8 * length <= port.base + SUPERBEATS * 8 for port in b.ports for address, length in port.reads)


def reads_of(b):
    return [len(port.reads) for port in b.ports]


@bench()
async def refuses_pointers_of_no_sequence(dut):
    """Before the first sequence, after a reset, and places that this sequence has not handed out."""
    b = Bench(dut)
    assert (await b.ask(1, 0))[0] == FaultCause.KV_POINTER
    await b.store([(q, layer) for layer in range(3) for q in range(TINY.tile_tokens)])
    await reset(dut)
    b.send([tile(0, 2)])
    assert (await b.fault())["cause"] == FaultCause.KV_POINTER
    await reset(dut)
    assert (await b.ask(3, 1))[0] == FaultCause.KV_POINTER
    await b.store([(0, 0), (1, 0)])  # the masks and pointers of the others are still those of the sequence before
    b.send([tile(0, 2, rows=TINY.ports + 1)])
    assert (await b.fault())["cause"] == FaultCause.KV_POINTER
    for port in b.kv:
        await port.take(0, 1)  # the row before
    await reset(dut)
    await b.store([(q, 0) for q in range(TINY.ports + 1)])
    b.number = 0
    await b.tiles.rest()  # of the tiles that failed
    b.send([tile(0, 5, rows=TINY.ports + 1)])
    await b.check(*tile(0, 5, rows=TINY.ports + 1))


@bench()
async def hands_out_places_until_a_port_is_full(dut):
    b, ports = Bench(dut), TINY.ports
    for layer in range(2):
        for position in range(3 * ports):
            assert await b.ask(position, layer, 7) == (FaultCause.NONE, position // ports + 3 * layer)
    assert await b.ask(ports + 1, 2, 7) == (FaultCause.NONE, 6)
    assert await b.ask(1, 3, 7) == (FaultCause.KV_FULL, 7)
    assert await b.ask(0, 3, 7) == (FaultCause.NONE, 6)
    assert (await b.ask(0, 4, 7))[0] == FaultCause.KV_FULL
    assert (await b.ask(TINY.history_tokens, 1))[0] == FaultCause.BUFFER_RANGE
    assert await b.ask(0, 0, 1) == (FaultCause.NONE, 0)
    assert (await b.ask(ports, 0, 1))[0] == FaultCause.KV_FULL
    assert await b.ask(0, 0, 0) == (FaultCause.KV_FULL, 0)


@bench()
async def refuses_layers_beyond_the_history(dut):
    b = Bench(dut)
    layers = b.config.history_layers
    assert await b.ask(0, 0) == (FaultCause.NONE, 0)
    assert await b.ask(0, layers - 1) == (FaultCause.NONE, 1)
    assert (await b.ask(0, layers))[0] == FaultCause.BUFFER_RANGE
    b.send([tile(0, layers, rows=1)])
    assert await b.fault() == {"cause": FaultCause.BUFFER_RANGE, "port": 0, "pc": 100}


@bench(memory=["masks", "pointers"], bit=[0, 2, 5, 16], port=[0, 1])
async def refuses_damaged_pointers(dut, memory, bit, port):
    """One bit of a mask or of a pointer flips: nothing is read from the row on in which it is needed."""
    b, row, layer = Bench(dut), 2, 3
    await b.store([(q, n) for n in (0, 3) for q in range(TINY.tile_tokens)])
    shape = Damaged(config=TINY).strike.shape()
    dut.strike.value = pack(shape, {f"{memory}{port}": 1, "bits": 1 << bit, "row":
                                    row if memory == "masks" else row * TINY.history_layers + layer})
    await RisingEdge(dut.clk)
    dut.strike.value = 0
    b.send([tile(0, 3, rows=TINY.ports * row), tile(0, 3)])
    await b.check(*tile(0, 3, rows=TINY.ports * row))
    before = [len(sink.cycles) for sink in b.kv]
    assert await b.fault() == {"cause": FaultCause.KV_POINTER, "port": port, "pc": 101}
    await ClockCycles(dut.clk, 50)
    record = tile(0, 3)[1]["record"]
    assert [len(sink.cycles) for sink in b.kv] == [count + row * record for count in before]


@bench(x=[-1, TINY.abuf_rows - 4, ROUTER_ROWS_AT - (1 << 16) + TINY.router_rows - 4])
async def refuses_rows_beyond_their_buffer(dut, x):
    b = Bench(dut)
    b.send([("loada", {"imm": 0, "rows": 2, "x": x, "count": 3, "beats": 3, "dst_stride": 3})])
    assert await b.fault() == {"cause": FaultCause.BUFFER_RANGE, "port": 0, "pc": 100}
    assert [row["addr"] for row in await b.abuf.rest()] == [(x & 0xFFFF) + i for i in range(4) if x != -1]


@bench(heads=[0, 43, 64, 65, 255], head_beats=[0, 2, 3, 255])
async def refuses_kv_tiles_that_do_not_fit(dut, heads, head_beats):
    b = Bench(dut)
    fits = heads <= TINY.kvbuf_heads and 0 < heads * head_beats <= TINY.kvbuf_heads * TINY.lanes // TINY.beat_elements
    record = 2 * heads * head_beats or 1
    fields = {"imm": 0, "rows": TINY.ports, "heads": heads, "head_beats": head_beats, "record": min(record, 65535)}
    b.send([("loadkv", fields)])
    if fits:
        await b.check("loadkv", fields)
    else:
        assert await b.fault() == {"cause": FaultCause.BUFFER_RANGE, "port": 0, "pc": 100}
        await b.nothing_more()


@bench()
async def refuses_heads_longer_than_their_record(dut):
    b = Bench(dut)
    b.send([("loadkv", {"imm": 0, "rows": 1, "heads": 2, "head_beats": 2, "record": 7})])
    assert await b.fault() == {"cause": FaultCause.BUFFER_RANGE, "port": 0, "pc": 100}


@bench(fields=[{"heads": 3, "head_beats": 2}, {"heads": 3, "head_beats": 3}, {"heads": 5, "head_beats": 2}],
       record_format=KvFormat, reuse=[0, 1])
async def narrow_records_may_be_shorter(dut, fields, record_format, reuse):
    """As long as the format needs, not a beat less."""
    b = Bench(dut)
    record = b.config.record_beats(**fields, record_format=record_format)
    fields = {"imm": 0, "rows": TINY.tile_tokens, "format": record_format, "record": record, **fields}
    b.send([("loadkv", fields), ("loadkv", fields | {"record": record - 1, "reuse": reuse})])
    await b.check("loadkv", fields)
    assert await b.fault() == {"cause": FaultCause.BUFFER_RANGE, "port": 0, "pc": 101}


@bench(record_format=[KvFormat.B12, KvFormat.B8, 3])
async def refuses_unknown_formats(dut, record_format):
    b = Bench(dut)
    known = b.config.kv_narrow and record_format != 3
    fields = {"imm": 0, "rows": 1, "heads": 1, "head_beats": 2, "record": 4, "format": record_format}
    b.send([("loadkv", fields)])
    if known:
        await b.check("loadkv", fields)
    else:
        assert await b.fault() == {"cause": FaultCause.KV_FORMAT, "port": 0, "pc": 100}
        await b.nothing_more()


@bench()
async def tells_who_waits(dut):
    b = Bench(dut, latency=60)
    starved, blocked = count(dut, "starved"), count(dut, "blocked")
    b.send([("loadw", {"imm": 0, "count": 10})])
    await b.check("loadw", {"imm": 0, "count": 10})
    assert len(starved) in range(55, 75) and not blocked
    b.weights.stall = 1.0
    b.send([("loadw", {"imm": 0, "count": 10})])
    await ClockCycles(dut.clk, 200)
    assert len(starved) < 76 and len(blocked) > 100


def test_tiny():
    run_bench(Damaged(config=TINY), delivers_what_the_model_says, streams_a_superbeat_in_every_cycle,
              reads_ahead_across_commands, ports_run_ahead_of_one_another, is_done_in_order, stops_at_a_read_error,
              stops_at_a_read_error_of_a_record, refuses_addresses_beyond_the_limit, refuses_rows_beyond_their_buffer,
              follows_the_pointers, gives_places_while_it_looks_up, streams_records_of_many_layers_without_a_gap,
              keeps_what_later_layers_read, fills_and_reads_a_slot_in_order,
              forgets_records_of_another_sequence_or_size, refuses_a_buffer_that_does_not_fit,
              refuses_positions_beyond_the_history, refuses_records_beyond_the_limit, refuses_pointers_of_no_sequence,
              hands_out_places_until_a_port_is_full, refuses_damaged_pointers,
              refuses_kv_tiles_that_do_not_fit, refuses_heads_longer_than_their_record, narrow_records_may_be_shorter,
              refuses_unknown_formats, tells_who_waits, parameters=dataclasses.asdict(TINY))


def test_wide():
    run_bench(LoadUnit(config=WIDE), delivers_what_the_model_says, streams_short_commands_without_a_gap,
              streams_records_of_many_layers_without_a_gap, refuses_layers_beyond_the_history,
              fills_and_reads_a_slot_in_order, parameters=dataclasses.asdict(WIDE))


def test_without_narrow_records():
    config = dataclasses.replace(TINY, kv_narrow=False)
    run_bench(LoadUnit(config=config), refuses_unknown_formats, parameters=dataclasses.asdict(config))


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=pytest.mark.slow) if name in ("sim", "sim16") else name for name in PRESETS])
def test_elaborates(name):
    """With few positions, since Amaranth writes every bit of a memory into its text."""
    config = preset(name)
    config = dataclasses.replace(config, history_tokens=config.tile_tokens)
    assert "module" in rtlil.convert(LoadUnit(config=config), name="top", emit_src=False)
