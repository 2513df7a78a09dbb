"""KvBuffer delivers the tiles that its numpy model describes, whatever stalls, and its exponents are exact."""

import dataclasses
from typing import NamedTuple

import cocotb
import numpy as np
import pytest
from cocotb.triggers import ClockCycles, RisingEdge
from skipopu.hw.blocks.kvbuf import KvBuffer, KvRequest, KvTile
from skipopu.hw.blocks.kvintake import PENDING, KvRecord, KvShape, count_bits
from skipopu.hw.blocks.kvpack import KvPacker
from skipopu.hw.config import PRESETS, OverlayConfig, preset
from skipopu.hw.isa import KvFormat
from skipopu.hw.verilog import to_rtlil
from skipopu.sim.bench import Stall, StreamSink, StreamSource, bench, bench_parameters, cycle, run_bench

TINY = preset("tiny")
WIDE = dataclasses.replace(TINY, name="wide", ports=4, columns=32)  # a superbeat spans more tokens than dimensions
# a tree of two stages; slices of a device; capacities that are no powers of two, and reached
FLAT = dataclasses.replace(
    TINY, name="flat", ports=4, lanes=16, columns=32, port_bits=128, kvbuf_heads=21, dsp="dsp48e2")
SINGLE = dataclasses.replace(TINY, name="single", ports=8)  # one row of records a step
# a head is one port beat, and exponents of many heads fill several
BEAT = dataclasses.replace(TINY, name="beat", lanes=4, ports=4, kvbuf_heads=85)
CONFIGS = {config.name: config for config in (TINY, WIDE, FLAT, SINGLE, BEAT)}
FORMATS = list(KvFormat)

CORNERS = [0, 0x8000, 0x0001, 0x8001, 0x03FF, 0x0400, 0x0401, 0x1400, 0x3C00, 0x7BFF, 0xFBFF, 0x7C00, 0x7FFF, 0xFFFF]


def config_of_bench():
    return OverlayConfig(**bench_parameters())


def make_records(config, rng, heads, head_dim):
    """uint16 [tokens, 2, heads, head_dim]: corner values, heads of zeros or subnormals only, and all exponents."""
    shape = (config.tile_tokens, 2, heads, head_dim)
    records = rng.integers(0, 1 << 16, shape, dtype=np.uint16)
    kind = rng.integers(0, 6, shape[:3])
    records[kind == 0] &= 0x8000
    records[kind == 1] &= 0x83FF
    records[kind == 2] = rng.choice(np.array(CORNERS, np.uint16), records[kind == 2].shape)
    near = kind == 3  # exponents close to each other, as in real heads
    records[near] = (records[near] & 0x8FFF) | 0x3000
    return records


class Tile(NamedTuple):
    """Records as they lie in memory, beats uint8 [tokens, port beats, port bytes], and what comes of them: exponents
    int [tokens, 2, heads], mantissas int [tokens, 2, heads, head_dim]."""

    record_format: KvFormat
    beats: np.ndarray
    exponents: np.ndarray
    mantissas: np.ndarray

    def shape(self, config, record):
        """The fields of KvShape that are its own."""
        heads, head_dim = self.mantissas.shape[2:]
        return {"heads": heads, "head_beats": head_dim // config.beat_elements, "record": record,
                "format": self.record_format}

    def lines(self, token, record, rng):
        """Port beats of a record, padded to ``record`` with noise."""
        noise = rng.integers(0, 256, (record - self.beats.shape[1], self.beats.shape[2]), dtype=np.uint8)
        return [int.from_bytes(line.tobytes(), "little") for line in (*self.beats[token], *noise)]


def make_tile(config, rng, heads, head_dim, record_format=KvFormat.FP16):
    """Records of make_records. Of narrow ones every second is noise, with exponents and signed zeros that come of no
    FP16."""
    records, head_beats = make_records(config, rng, heads, head_dim), head_dim // config.beat_elements
    if record_format == KvFormat.FP16:
        beats = records.view(np.uint8).reshape(len(records), -1, config.port_bits // 8)
        return Tile(record_format, beats, *KvBuffer.model(records))
    beats = KvPacker.model(config, records, record_format)
    assert beats.shape[1] == config.record_beats(heads, head_beats, record_format)
    beats[1::2] = rng.integers(0, 256, beats[1::2].shape)
    return Tile(record_format, beats, *KvBuffer.narrow_model(config, beats, record_format, heads, head_beats))


class Writer:
    """Sends tiles, as the load unit does, each port at its own pace."""

    def __init__(self, dut, config, *, stall=Stall.NEVER, seed=0):
        self.config, self.number, self.rng = config, 0, np.random.default_rng(seed)
        self.shape = StreamSource(dut, "shape", shape=KvShape(config), stall=stall, seed=seed)
        self.records = [StreamSource(dut, f"records__{p}", shape=KvRecord(config), stall=stall * (p % 2), seed=seed)
                        for p in range(config.ports)]
        self.beats = [StreamSource(dut, f"beats__{p}", stall=stall, seed=seed) for p in range(config.ports)]
        self.hits = [StreamSource(dut, f"hits__{p}", shape=KvRecord(config), stall=stall, seed=seed)
                     for p in range(config.ports)]
        # Per port, in the order of sending: (record, number of the read) in each slot; records of each kind.
        self.slots, self.reads, self.hit = [{} for _ in self.beats], [0] * config.ports, [0] * config.ports

    def send(self, tile, record, *, one_by_one=False, tokens=None):
        """The first ``tokens`` of a tile (all of it if None), ``record`` beats each. one_by_one : each record for
        itself, and none that is beyond tokens"""
        config = self.config
        tokens = len(tile.beats) if tokens is None else tokens
        rows, rest = -(-tokens // config.ports), tokens % config.ports if one_by_one else 0
        every = (1 << config.ports) - 1
        self.shape.send([tile.shape(config, record) | {"rows": rows, "last": (1 << rest) - 1 if rest else every}])
        for p in range(config.ports):
            count = rows - (rest != 0 and p >= rest)
            runs = [(row, 1) for row in range(count)] if one_by_one else [(0, count)]
            self.records[p].send({"tile": self.number % 16, "row": row, "rows": length} for row, length in runs)
            self.beats[p].send(line for row in range(count)
                               for line in tile.lines(row * config.ports + p, record, self.rng))
        self.number += 1

    def send_mixed(self, tile, record, choose):
        """A whole tile, some of whose records come from the history buffer: ``choose(row, port)`` is None, or "hit"
        or "fill" with a slot. Its exponents and mantissas become those of the records that it is then made of."""
        config, count = self.config, len(tile.beats)
        self.shape.send([tile.shape(config, record) | {"rows": count // config.ports,
                                                       "last": (1 << config.ports) - 1}])
        modulus = 1 << count_bits(config)
        for token in range(count):
            row, p = divmod(token, config.ports)
            kind, slot = choose(row, p) or (None, 0)
            entry = {"tile": self.number % 16, "row": row, "rows": 1, "counts": 1, "at": slot * record}
            if kind == "hit":
                tile.exponents[token], tile.mantissas[token], number = self.slots[p][slot]
                self.hits[p].send([entry | {"wait": int(self.reads[p] - number < PENDING), "after": number % modulus}])
                self.hit[p] += 1
                continue
            self.reads[p] += 1
            fill = int(kind == "fill")
            if fill:
                self.slots[p][slot] = tile.exponents[token].copy(), tile.mantissas[token].copy(), self.reads[p]
            self.records[p].send([entry | {"fill": fill, "wait": fill, "after": self.hit[p] % modulus}])
            self.beats[p].send(tile.lines(token, record, self.rng))
        self.number += 1

    async def sent(self):
        for source in self.beats:
            await source.sent()


def expected_tile(config, mantissas, value, head, n, k):
    """KvTile dicts of one request."""
    lanes, columns, tokens = config.lanes, config.columns, mantissas.shape[0]
    padded = np.zeros((tokens, columns * (n + 1) + mantissas.shape[3]), int)
    padded[:, :mantissas.shape[3]] = mantissas[:, value, head]
    if value:
        block = padded[k * lanes:(k + 1) * lanes, n * columns:(n + 1) * columns]
    else:
        block = padded[n * columns:(n + 1) * columns, k * lanes:(k + 1) * lanes]
    rows, width = block.shape
    block = block.reshape(rows // config.kv_step, config.kv_step, width // config.beat_elements, config.beat_elements)
    block = block.transpose(0, 2, 1, 3).reshape(-1, config.kv_step * config.beat_elements)
    return [{"data": line.tolist(), "last": int(i == len(block) - 1)} for i, line in enumerate(block)]


def all_requests(config, slot, heads, head_dim):
    keys = [(n, k) for n in range(config.tile_tokens // config.columns) for k in range(head_dim // config.lanes)]
    values = [(n, k) for n in range(-(-head_dim // config.columns)) for k in range(config.tile_tokens // config.lanes)]
    return [{"slot": slot, "value": value, "head": head, "n": n, "k": k}
            for head in range(heads) for value, places in ((0, keys), (1, values)) for n, k in places]


def as_exponents(bits, tokens):
    return [bits >> 5 * t & 31 for t in range(tokens)]


async def pulse(dut, signal):
    signal.value = 1
    await RisingEdge(dut.clk)
    signal.value = 0


def shapes(config, rng):
    """(heads, head_dim, format, record): corners of the capacity first."""
    def least(heads, blocks, record_format):
        return config.record_beats(heads, blocks * config.lanes // config.beat_elements, record_format)

    for number, record_format in enumerate(FORMATS):
        yield 1, config.lanes, record_format, least(1, 1, record_format)
        yield 1, config.lanes, record_format, 5 * least(1, 1, record_format)  # four fifths padding
        yield 3, config.lanes, record_format, least(3, 1, record_format) + 3
        yield 3, 2 * config.lanes, FORMATS[number - 1], least(3, 2, FORMATS[number - 1])
        if config.kvbuf_heads % 2:
            for heads in (config.kvbuf_heads, 7):
                blocks = config.kvbuf_heads // heads
                yield heads, blocks * config.lanes, record_format, least(heads, blocks, record_format)
    for record_format in FORMATS:
        heads, blocks = int(rng.integers(1, 8)), int(rng.integers(1, 4))
        yield heads, blocks * config.lanes, record_format, least(heads, blocks, record_format) + int(rng.integers(2))


async def exponents_of(dut, config, slot, part, head):
    side = "kv"[part]
    getattr(dut, f"{side}_slot").value, getattr(dut, f"{side}_head").value = slot, head
    await ClockCycles(dut.clk, 2)
    return as_exponents(getattr(dut, f"{side}_exponents").value.to_unsigned(), config.tile_tokens)


@bench(stall=Stall, seed=[1], timeout_cycles=100_000)
async def tiles_match_the_model(dut, stall, seed):
    config = config_of_bench()
    rng = np.random.default_rng(seed)
    sink = StreamSink(dut, "tile", shape=KvTile(config), stall=stall, seed=seed)
    requests = StreamSource(dut, "request", shape=KvRequest(config), stall=stall, seed=seed)
    writer = Writer(dut, config, stall=stall, seed=seed)
    for index, (heads, head_dim, record_format, record) in enumerate(shapes(config, rng)):
        slot = index % 2
        tile = make_tile(config, rng, heads, head_dim, record_format)
        asked = all_requests(config, slot, heads, head_dim)
        requests.send(asked)  # before the tile is there
        writer.send(tile, record, one_by_one=index % 3 == 1)
        for request in asked:
            want = expected_tile(config, tile.mantissas, *(request[name] for name in ("value", "head", "n", "k")))
            got = await sink.take(len(want))
            assert got == want, f"{(heads, head_dim, record_format, record)} {request}"
        assert int(dut.full.value) == 1 << slot
        for head in range(heads):
            for part in range(2):
                assert await exponents_of(dut, config, slot, part, head) == tile.exponents[:, part, head].tolist()
        await pulse(dut, dut.release)
    assert await sink.rest() == []
    assert int(dut.full.value) == 0


@bench(stall=[Stall.NEVER, Stall.HALF], record_format=[KvFormat.FP16, KvFormat.B8])
async def a_short_tile_is_full_with_its_last_record(dut, stall, record_format):
    """Every number of tokens; a port without a record in the last row is not waited for."""
    config = config_of_bench()
    rng = np.random.default_rng(6)
    tile = make_tile(config, rng, 1, config.lanes, record_format)
    record = tile.beats.shape[1]
    writer = Writer(dut, config, stall=stall)
    sink = StreamSink(dut, "tile", shape=KvTile(config))
    requests = StreamSource(dut, "request", shape=KvRequest(config))
    done = []
    cocotb.start_soon(count_pulses(dut, dut.done, done))
    for index, tokens in enumerate(range(1, config.tile_tokens + 1)):
        slot = index % 2
        writer.send(tile, record, one_by_one=True, tokens=tokens)
        while len(done) <= index:
            await RisingEdge(dut.clk)
        await RisingEdge(dut.clk)
        assert dut.full.value.to_unsigned() == 1 << slot
        for part in range(2):
            got = await exponents_of(dut, config, slot, part, 0)
            assert got[:tokens] == tile.exponents[:tokens, part, 0].tolist()
        asked = all_requests(config, slot, 1, config.lanes)[:config.tile_tokens // config.columns]  # all keys
        requests.send(asked)
        for request in asked:
            want = expected_tile(config, tile.mantissas, 0, 0, request["n"], 0)
            got = await sink.take(len(want))
            for beat, (line, expected) in enumerate(zip(got, want)):
                row = request["n"] * config.columns + beat // (config.lanes // config.beat_elements) * config.kv_step
                there = max(min(tokens - row, config.kv_step), 0) * config.beat_elements
                assert line["data"][:there] == expected["data"][:there]
        await pulse(dut, dut.release)


async def count_pulses(dut, signal, counts):
    while True:
        await RisingEdge(dut.clk)
        if signal.value:
            counts += [cycle()] * int(signal.value)


@bench(stall=Stall, seeds=[(1, KvFormat.FP16), (2, KvFormat.FP16), (1, KvFormat.B8), (2, KvFormat.B12)],
       timeout_cycles=100_000)
async def records_come_from_memory_and_from_the_history_buffer(dut, stall, seeds):
    """Slots are filled and read in random order, also a slot that was just read, and one that was just filled."""
    config, (seed, record_format) = config_of_bench(), seeds
    rng = np.random.default_rng(seed)
    sink = StreamSink(dut, "tile", shape=KvTile(config), stall=stall / 2, seed=seed)
    requests = StreamSource(dut, "request", shape=KvRequest(config))
    writer = Writer(dut, config, stall=stall, seed=seed)
    record = config.record_beats(2, config.lanes // config.beat_elements, record_format) + 1
    buffered = []
    cocotb.start_soon(count_pulses(dut, dut.buffered, buffered))

    def choose(row, p):
        slot = int(rng.integers(4 if seed == 1 else min(config.buffer_beats // record, 24)))
        kind = rng.choice(["hit", "fill", ""], p=[0.5, 0.3, 0.2])
        return (kind, slot) if kind == "fill" or (kind and slot in writer.slots[p]) else None

    tiles = []
    for _ in range(7):
        tiles.append(make_tile(config, rng, 2, config.lanes, record_format))
        writer.send_mixed(tiles[-1], record, choose)
    for index, tile in enumerate(tiles):
        slot = index % 2
        asked = all_requests(config, slot, 2, config.lanes)
        requests.send(asked)
        for request in asked:
            want = expected_tile(config, tile.mantissas, *(request[name] for name in ("value", "head", "n", "k")))
            assert await sink.take(len(want)) == want, f"tile {index} {request}"
        for head in range(2):
            for part in range(2):
                assert await exponents_of(dut, config, slot, part, head) == tile.exponents[:, part, head].tolist()
        await pulse(dut, dut.release)
    assert len(buffered) == sum(writer.hit) * record and sum(writer.hit) > (10 if seed == 1 else 0)
    assert await sink.rest() == [] and int(dut.full.value) == 0


@bench(record_format=KvFormat)
async def takes_two_beats_a_cycle(dut, record_format):
    """Even rows from memory, odd ones from the history buffer."""
    config = config_of_bench()
    rng = np.random.default_rng(9)
    writer, record, rows = Writer(dut, config), 16, config.tile_tokens // config.ports
    done = []
    cocotb.start_soon(count_pulses(dut, dut.done, done))
    first, second = (make_tile(config, rng, 1, config.lanes, record_format) for _ in range(2))
    writer.send_mixed(first, record, lambda row, p: ("fill", row))
    while not done:
        await RisingEdge(dut.clk)
    await ClockCycles(dut.clk, 5)
    started = cycle()
    writer.send_mixed(second, record, lambda row, p: ("hit", row) if row % 2 else None)
    while len(done) < 2:
        await RisingEdge(dut.clk)
    assert done[1] - started <= rows // 2 * record + 10
    assert await exponents_of(dut, config, 1, 1, 0) == second.exponents[:, 1, 0].tolist()


@bench()
async def ports_write_at_their_own_pace(dut):
    """One may be a tile ahead of another; the tiles are full in their order."""
    config = config_of_bench()
    rng = np.random.default_rng(7)
    tiles = [make_tile(config, rng, 1, config.lanes) for _ in range(4)]
    record = 2 * config.lanes // config.beat_elements
    writer = Writer(dut, config)
    done = []
    cocotb.start_soon(count_pulses(dut, dut.done, done))
    writer.beats[-1].stall = 1.0
    for tile in tiles:
        writer.send(tile, record, one_by_one=True)
    for source in writer.beats[:-1]:
        while len(source._queue) > 2 * config.tile_tokens // config.ports * record:
            await RisingEdge(dut.clk)
    await ClockCycles(dut.clk, 50)
    assert not done and dut.full.value.to_unsigned() == 0
    writer.beats[-1].stall = Stall.NEVER
    while len(done) < 2:
        await RisingEdge(dut.clk)
    assert done[1] - done[0] >= config.tile_tokens // config.ports * record  # the slow port alone made them wait
    for slot in (0, 1):
        assert await exponents_of(dut, config, slot, 0, 0) == tiles[slot].exponents[:, 0, 0].tolist()


@bench()
async def holds_two_tiles_and_fills_one_while_the_other_is_read(dut):
    config = config_of_bench()
    rng = np.random.default_rng(3)
    tiles = [make_tile(config, rng, 2, config.lanes, record_format) for record_format in FORMATS]
    records = [tile.beats.shape[1] for tile in tiles]
    writer = Writer(dut, config)
    for tile, record in zip(tiles, records):
        writer.send(tile, record)
    await ClockCycles(dut.clk, config.tile_tokens // config.ports * sum(records) + 20)
    assert int(dut.full.value) == 3
    assert not any(int(getattr(dut, f"beats__{p}__ready").value) for p in range(config.ports))
    sink = StreamSink(dut, "tile", shape=KvTile(config))
    requests = StreamSource(dut, "request", shape=KvRequest(config))
    for index, tile in enumerate(tiles):
        slot = index % 2
        asked = all_requests(config, slot, 2, config.lanes)
        requests.send(asked)
        want = [line for r in asked
                for line in expected_tile(config, tile.mantissas, r["value"], r["head"], r["n"], r["k"])]
        assert await sink.take(len(want)) == want
        await pulse(dut, dut.release)  # the third tile moves in
    await writer.sent()


@bench(record_format=KvFormat)
async def delivers_a_step_in_every_cycle(dut, record_format):
    config = config_of_bench()
    rng = np.random.default_rng(4)
    tile = make_tile(config, rng, 2, 2 * config.lanes, record_format)
    record = tile.beats.shape[1]
    writer = Writer(dut, config)
    started = cycle()
    writer.send(tile, record)
    await writer.sent()
    written = cycle() - started
    assert written <= config.tile_tokens // config.ports * record + 2
    await ClockCycles(dut.clk, 10)
    sink = StreamSink(dut, "tile", shape=KvTile(config))
    asked = all_requests(config, 0, 2, 2 * config.lanes)
    started = cycle()
    StreamSource(dut, "request", shape=KvRequest(config)).send(asked)
    total = len(asked) * config.lanes * config.columns // (config.kv_step * config.beat_elements)
    await sink.take(total)
    first = started + 1 + KvBuffer.latency
    assert sink.cycles == list(range(first, first + total))


def test_model_rounds_halves_away_from_zero():
    """Aligned by hand: 1.0 next to 2^12 is half a unit, next to 2^13 less; subnormals count from exponent 1."""
    head = np.array([[[[0x6C00, 0x3C00, 0xBC00, 0x3BFF]]]], np.uint16)
    assert KvBuffer.model(head)[1].tolist() == [[[[2048, 1, -1, 0]]]]
    head = np.array([[[[0x7000, 0x3C00, 0xBC00, 0x8000]]]], np.uint16)
    assert KvBuffer.model(head)[1].tolist() == [[[[2048, 0, 0, 0]]]]
    head = np.array([[[[0x0001, 0x83FF, 0x0000, 0x0400]]]], np.uint16)
    assert KvBuffer.model(head)[0].tolist() == [[[1]]]
    assert KvBuffer.model(head)[1].tolist() == [[[[2, -2046, 0, 2048]]]]
    head = np.array([[[[0x7FFF, 0xFFFF, 0x7BFF, 0x7800]]]], np.uint16)
    assert KvBuffer.model(head)[0].tolist() == [[[31]]]
    assert KvBuffer.model(head)[1].tolist() == [[[[4094, -4094, 2047, 1024]]]]


@pytest.mark.parametrize("name", [name if name in ("tiny", "flat") else pytest.param(
    name, marks=pytest.mark.slow) for name in CONFIGS])
def test_tiles(name):
    config = CONFIGS[name]
    run_bench(KvBuffer(config=config), tiles_match_the_model, a_short_tile_is_full_with_its_last_record,
              records_come_from_memory_and_from_the_history_buffer, takes_two_beats_a_cycle,
              ports_write_at_their_own_pace, holds_two_tiles_and_fills_one_while_the_other_is_read,
              delivers_a_step_in_every_cycle, parameters=dataclasses.asdict(config))


@pytest.mark.parametrize("name", PRESETS)
def test_elaborates(name):
    """In full width; one head, since Amaranth writes every bit of a memory into its text."""
    config = preset(name)
    config = dataclasses.replace(config, kvbuf_heads=1, buffer_beats=min(config.buffer_beats, 1))
    assert "module" in to_rtlil(KvBuffer(config=config), name="top")
