"""LoadUnit delivers what its numpy model says, in order and without gaps, and stops at faults."""

import dataclasses

import cocotb
import numpy as np
import pytest
from amaranth.back import rtlil
from axi_memory import SLVERR, AxiMemory
from cocotb.triggers import ClockCycles, RisingEdge
from commands import as_command, command_source
from skipopu.hw.blocks.command import Fault, Written
from skipopu.hw.blocks.kvbuf import KvWrite
from skipopu.hw.blocks.load import AbufWrite, LoadUnit
from skipopu.hw.config import PRESETS, OverlayConfig, preset
from skipopu.hw.isa import MAX_LAYERS, ROUTER_ROWS_AT
from skipopu.hw.registers import FaultCause
from skipopu.sim.bench import Stall, StreamSink, bench, bench_parameters, cycle, pack, run_bench, unpack

TINY = preset("tiny")
WIDE = dataclasses.replace(TINY, name="wide", ports=8, fifo_beats=256, outstanding=16)  # four ABUF rows in a superbeat
SUPERBEATS = 4096
LAYERS = 10


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
        self.history = [0] * config.history_tokens  # layers that wrote each position, as bits
        self.weights = StreamSink(dut, "weights", stall=sink_stall, seed=seed)
        self.abuf = StreamSink(dut, "abuf", shape=AbufWrite(config), stall=sink_stall, seed=seed)
        self.kv = StreamSink(dut, "kv", shape=KvWrite(config), stall=sink_stall, seed=seed)

    def send(self, commands, **options):
        """Send (mnemonic, fields), once more or at first; stall and seed are those of the first time."""
        if self.source:
            self.source.send([as_command(name, **fields) for name, fields in commands])
        else:
            self.source = command_source(self.dut, self.config, commands, **options)

    def model(self, name, fields):
        return LoadUnit.model(self.config, self.memory, name, self.history, **fields)

    async def note(self, written):
        """Records were written: (position, layer), one a cycle."""
        for position, layer in written:
            self.dut.history.value = pack(Written, {"valid": 1, "position": position, "layer": layer})
            if position < len(self.history):
                self.history[position] = (self.history[position] if layer else 0) | 1 << layer
            await RisingEdge(self.dut.clk)
        self.dut.history.value = 0

    async def random_history(self, rng, layers):
        """Every position written by layer 0 and by some other layers, in the order of layers."""
        positions = range(len(self.history))
        for layer in range(layers):
            await self.note([(q, layer) for q in positions if layer == 0 or rng.random() < 0.2])

    async def check(self, name, fields):
        want = self.model(name, fields)
        if name == "loadw":
            assert await self.weights.take(len(want)) == [as_int(line) for line in want]
        elif name == "loada":
            got = await self.abuf.take(len(want))
            assert got == [{"addr": row, "data": as_int(line)} for row, line in want]
        else:
            got = await self.kv.take(len(want))
            assert got == [{"data": as_int(line), "last": int(i == len(want) - 1)} for i, line in enumerate(want)]

    async def fault(self):
        while not (fault := unpack(Fault, self.dut.fault.value.to_unsigned()))["valid"]:
            await RisingEdge(self.dut.clk)
        return {name: fault[name] for name in ("cause", "port", "pc")}

    async def nothing_more(self):
        assert [await sink.rest() for sink in (self.weights, self.abuf, self.kv)] == [[], [], []]


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
        ("loadkv", {"imm": 77, "heads": 1, "head_beats": block, "record": 2 * block}),
        ("loadkv", {"imm": 0, "heads": config.kvbuf_heads // 2, "head_beats": 2 * block,
                    "record": 2 * config.kvbuf_heads * block}),
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
            heads = int(rng.integers(1, 3))
            yield "loadkv", {"imm": imm, "heads": heads, "head_beats": block,
                             "record": 2 * heads * block + int(rng.integers(3))} | reused(config, rng)


def reused(config, rng):
    """Fields of a LOADKV that follows the history, in half of all cases."""
    if rng.integers(2):
        return {}
    stride = int(rng.integers(1, SUPERBEATS // 3 // LAYERS))
    first = int(rng.integers(0, config.history_tokens - config.tile_tokens + 1))
    return {"reuse": 1, "x": first // config.ports * config.ports, "layer": int(rng.integers(LAYERS)),
            "layer_stride": stride}


async def count_pulses(dut, signal, counts):
    while True:
        await RisingEdge(dut.clk)
        if signal.value:
            counts.append(cycle())


def count(dut, name):
    counts = []
    cocotb.start_soon(count_pulses(dut, getattr(dut, name), counts))
    return counts


@bench(stall=Stall, seed=[1], timeout_cycles=100_000)
async def delivers_what_the_model_says(dut, stall, seed):
    b = Bench(dut, stall=stall / 2, sink_stall=stall, seed=seed)
    done, weights_read, kv_read = (count(dut, name) for name in ("done", "weights_read", "kv_read"))
    rng = np.random.default_rng(seed)
    await b.random_history(rng, LAYERS)
    commands = list(make_commands(b.config, rng, 16))
    b.send(commands, stall=stall, seed=seed)
    for name, fields in commands:
        await b.check(name, fields)
    await ClockCycles(dut.clk, 50)
    assert len(done) == len(commands) and not dut.busy.value
    assert (len(weights_read), len(kv_read)) == (len(b.weights.cycles), len(b.kv.cycles))
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
async def announces_the_shape_of_a_kv_tile(dut):
    b = Bench(dut, sink_stall=Stall.HALF)
    block = b.config.lanes // b.config.beat_elements
    b.send([("loadkv", {"imm": 64 * i, "heads": i, "head_beats": block * i, "record": 2 * block * i * i + 1})
            for i in (1, 2, 1)])
    tiles = []
    while len(tiles) < 3:
        await RisingEdge(dut.clk)
        if dut.kv__valid.value and dut.kv__ready.value:
            shape = tuple(getattr(dut, f"kv_{name}").value.to_unsigned() for name in ("heads", "head_beats", "record"))
            assert shape in [(i, block * i, 2 * block * i * i + 1) for i in (1, 2)]
            if unpack(KvWrite(b.config), dut.kv__payload.value.to_unsigned())["last"]:
                tiles.append(shape[0])
    assert tiles == [1, 2, 1]


@bench(port=[0, 1])
async def stops_at_a_read_error(dut, port):
    b = Bench(dut, errors=[(port, 130), (1, 130)])  # the lowest port counts
    b.send([("loadw", {"imm": imm, "count": 20}) for imm in (0, 120, 40)])
    assert await b.fault() == {"cause": FaultCause.READ_ERROR, "port": port, "pc": 101}
    await b.check("loadw", {"imm": 0, "count": 20})
    await b.check("loadw", {"imm": 120, "count": 10})
    await b.nothing_more()


@bench(command=[
    ("loadw", {"imm": SUPERBEATS - 9, "count": 10}), ("loadw", {"imm": -1, "count": 1}),
    ("loada", {"imm": SUPERBEATS - 5, "rows": 2, "x": 0, "count": 3, "beats": 1, "dst_stride": 0}),
    ("loada", {"imm": 0, "rows": 4095, "x": 0, "count": 65535, "beats": 1, "dst_stride": 0}),
    ("loadkv", {"imm": SUPERBEATS - 10, "heads": 1, "head_beats": 2, "record": 8}),
])
async def refuses_addresses_beyond_the_limit(dut, command):
    b = Bench(dut)
    b.send([("loadw", {"imm": SUPERBEATS - 10, "count": 10}), command, ("loadw", {"imm": 0, "count": 1})])
    assert await b.fault() == {"cause": FaultCause.MEMORY_RANGE, "port": 0, "pc": 101}
    await b.check("loadw", {"imm": SUPERBEATS - 10, "count": 10})  # the command before is complete
    await b.nothing_more()
    assert all(address < port.base + SUPERBEATS * 8 for port in b.ports for address, _ in port.reads)


def tile(first, layer, *, imm=0, layer_stride=0, heads=1):
    """A LOADKV that follows the history."""
    return "loadkv", {"imm": imm, "x": first, "layer": layer, "layer_stride": layer_stride, "heads": heads,
                      "head_beats": TINY.lanes // TINY.beat_elements, "reuse": 1,
                      "record": 2 * heads * TINY.lanes // TINY.beat_elements}


@bench()
async def follows_the_history(dut):
    """Each layer alone, the highest of several, none above the one that asks, all forgotten at layer 0."""
    b, rng = Bench(dut), np.random.default_rng(2)
    tokens, every = TINY.tile_tokens, TINY.history_tokens
    notes = [(q, 0) for q in range(every)]  # what earlier benches wrote is gone
    notes += [(q, q % MAX_LAYERS) for q in range(tokens, every)]
    notes += [(q, layer) for layer in (1, 5, 62, 63) for q in range(2 * tokens, every, 3)]
    notes += [(q, layer) for layer in (0, 3) for q in range(3 * tokens, every, 5)]
    # Beyond the history; the last of them has the low bits of a position inside.
    notes += [(q, 7) for q in (every, every + 1, (1 << 16) - 1, 4 * every + 3)]
    await b.note(notes)
    for first in range(0, every, tokens):
        layers = [0, 1, 4, 5, 6, 61, 62, MAX_LAYERS - 1]
        commands = [tile(first, layer, imm=int(rng.integers(1000)), layer_stride=48) for layer in layers]
        b.send(commands)
        for name, fields in commands:
            await b.check(name, fields)


@bench(stall=[Stall.NEVER, Stall.HALF])
async def notes_while_it_looks_up(dut, stall):
    """Of other positions: control orders what concerns the same ones."""
    b, rng = Bench(dut, sink_stall=stall), np.random.default_rng(3)
    half = TINY.history_tokens // 2
    await b.random_history(rng, 4)
    commands = [tile(TINY.tile_tokens * i, 3, layer_stride=int(rng.integers(900))) for i in range(4)]
    want = [(name, fields, b.model(name, fields)) for name, fields in commands]
    b.send(commands)
    for _ in range(300):
        await b.note([(half + int(rng.integers(half)), int(rng.integers(1, 4)))])
        await ClockCycles(dut.clk, int(rng.integers(1, 4)))
    for name, fields, before in want:
        assert (b.model(name, fields) == before).all()
        await b.check(name, fields)
    late = [tile(half, 3, layer_stride=500), tile(TINY.history_tokens - TINY.tile_tokens, 3, layer_stride=77)]
    b.send(late)
    for name, fields in late:
        await b.check(name, fields)


@bench(heads=[1, 2, 5])
async def streams_records_of_many_layers_without_a_gap(dut, heads):
    config = OverlayConfig(**bench_parameters())
    b, rng = Bench(dut, latency={4: 5, 16: 32}[config.outstanding]), np.random.default_rng(4)
    await b.random_history(rng, LAYERS)
    commands = [tile(TINY.tile_tokens * i, LAYERS, imm=3 * i, layer_stride=200, heads=heads) for i in range(6)]
    b.send(commands)
    for name, fields in commands:
        await b.check(name, fields)
    gaps = b.kv.cycles[-1] - b.kv.cycles[0] + 1 - len(b.kv.cycles)
    # A record takes four cycles to prepare, a command seven.
    work = 7 + 4 * config.tile_tokens // config.ports
    pace = config.tile_tokens // config.ports * commands[0][1]["record"]
    assert gaps <= max(work - pace, 0) * (len(commands) - 1), f"{gaps} cycles without a superbeat"


@bench(first=[-TINY.ports, TINY.history_tokens - TINY.tile_tokens + TINY.ports, TINY.history_tokens, 32766])
async def refuses_positions_beyond_the_history(dut, first):
    b = Bench(dut)
    b.send([tile(first, 1)])
    assert await b.fault() == {"cause": FaultCause.BUFFER_RANGE, "port": 0, "pc": 100}
    await b.nothing_more()


@bench(port=[0, 1], imm=[-4, 0])
async def refuses_records_beyond_the_limit(dut, port, imm):
    """One record of the tile in layer 1, whose region ends a beat behind the memory."""
    b = Bench(dut)
    count, ports = TINY.tile_tokens // TINY.ports, TINY.ports
    await b.note([(q, 0) for q in range(TINY.tile_tokens)])
    await b.note([((count - 1) * ports + port, 1)])
    at = SUPERBEATS - 4 * count  # the last place for a tile
    b.send([tile(0, 1, imm=9, layer_stride=at - 9), tile(0, 1, imm=imm, layer_stride=at - imm + 1)])
    await b.check(*tile(0, 1, imm=9, layer_stride=at - 9))
    port = port if imm == 0 else 0
    assert await b.fault() == {"cause": FaultCause.MEMORY_RANGE, "port": port, "pc": 101}
    assert all(address + 8 * length <= port.base + SUPERBEATS * 8 for port in b.ports for address, length in port.reads)


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
    b.send([("loadkv", {"imm": 0, "heads": heads, "head_beats": head_beats, "record": min(record, 65535)})])
    if fits:
        await b.check("loadkv", {"imm": 0, "record": record})
    else:
        assert await b.fault() == {"cause": FaultCause.BUFFER_RANGE, "port": 0, "pc": 100}
        await b.nothing_more()


@bench()
async def refuses_heads_longer_than_their_record(dut):
    b = Bench(dut)
    b.send([("loadkv", {"imm": 0, "heads": 2, "head_beats": 2, "record": 7})])
    assert await b.fault() == {"cause": FaultCause.BUFFER_RANGE, "port": 0, "pc": 100}


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
    run_bench(LoadUnit(config=TINY), delivers_what_the_model_says, streams_a_superbeat_in_every_cycle,
              reads_ahead_across_commands, announces_the_shape_of_a_kv_tile, stops_at_a_read_error,
              refuses_addresses_beyond_the_limit, refuses_rows_beyond_their_buffer, follows_the_history,
              notes_while_it_looks_up, streams_records_of_many_layers_without_a_gap,
              refuses_positions_beyond_the_history, refuses_records_beyond_the_limit,
              refuses_kv_tiles_that_do_not_fit, refuses_heads_longer_than_their_record, tells_who_waits,
              parameters=dataclasses.asdict(TINY))


def test_wide():
    run_bench(LoadUnit(config=WIDE), delivers_what_the_model_says, streams_short_commands_without_a_gap,
              streams_records_of_many_layers_without_a_gap, parameters=dataclasses.asdict(WIDE))


@pytest.mark.parametrize("name", PRESETS)
def test_elaborates(name):
    assert "module" in rtlil.convert(LoadUnit(config=preset(name)), name="top", emit_src=False)
