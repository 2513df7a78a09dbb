"""ComputeUnit delivers every accumulator that a model in integers gives, whatever its streams and its output do."""

import dataclasses
from collections import Counter, deque

import cocotb
import numpy as np
import pytest
from cocotb.triggers import ClockCycles, First, RisingEdge, ValueChange
from commands import as_command
from compute_model import Matmul, aligned_row
from skipopu.hw.blocks.command import Command
from skipopu.hw.blocks.compute import AccBeat, ComputeUnit, KvRequest
from skipopu.hw.blocks.dot import word_bits
from skipopu.hw.config import OverlayConfig, preset
from skipopu.hw.isa import MatmulMode
from skipopu.sim.bench import Stall, StreamSink, StreamSource, bench, bench_parameters, cycle, run_bench
from vector_model import geometry

TINY = preset("tiny")
WIDE = dataclasses.replace(TINY, name="wide", ports=4, port_bits=128)  # a tile a superbeat, two scale sets a chunk


class ComputeBench:
    """The unit with its weight stream, a KV buffer that answers requests, and a sink for the accumulators."""

    def __init__(self, dut, *, stall=0.0, sink_stall=0.0, seed=0):
        self.dut, self.edge = dut, RisingEdge(dut.clk)
        self.config = OverlayConfig(**bench_parameters())
        self.commands = StreamSource(dut, "cmd", shape=Command(self.config), seed=seed)
        self.weights = StreamSource(dut, "weights", stall=stall, seed=seed)
        self.requests = StreamSink(dut, "kv_request", shape=KvRequest(self.config), stall=stall, seed=seed)
        self.tiles = StreamSource(dut, "kv_tile", stall=stall, seed=seed)
        self.sink = StreamSink(dut, "out", shape=AccBeat(self.config), stall=sink_stall, seed=seed)
        self.rng = np.random.default_rng(seed)
        self.count, self.slots = Counter(), Counter()
        self.transfers = []  # cycles in which a superbeat of weights or of a KV tile was taken
        self.active = []  # cycles in which a row was in use
        self.writes, self.spoiled = deque(), deque()  # of MBUF: (row, vector, first, bits)
        self.answers, self.exponents = deque(), []
        self.next_row = 0
        for part in (self._monitor(), self._serve_exponents(), self._serve_tiles()):
            cocotb.start_soon(part)

    async def _monitor(self):
        dut = self.dut
        while True:
            await self.edge
            for name in ("done", "starved", "drain_blocked", "kv_release", "busy"):
                self.count[name] += int(getattr(dut, name).value)
            if dut.active.value:
                self.active.append(cycle())
            if (dut.weights__valid.value and dut.weights__ready.value) or (
                    dut.kv_tile__valid.value and dut.kv_tile__ready.value):
                self.transfers.append(cycle())
            if dut.done.value and (spoiled := self.spoiled.popleft()):
                # Done means that the rows are free: spoil what was read last at once.
                self.writes.appendleft(spoiled)
            dut.write_en.value = int(bool(self.writes))
            if self.writes:
                dut.write_row.value, dut.write_vector.value, dut.write_first.value, dut.write_data.value = (
                    self.writes.popleft())

    async def _serve_exponents(self):
        """K exponents of the QK whose results leave, one after the other."""
        dut, slot, tile = self.dut, 0, 0
        while True:
            if int(dut.exponent_slot.value) != slot:
                slot, tile = 1 - slot, tile + 1
            head = dut.exponent_head.value.to_unsigned()
            if tile < len(self.exponents) and head < len(self.exponents[tile]):
                dut.exponents.value = sum(int(e) << 5 * i for i, e in enumerate(self.exponents[tile][head]))
            await First(*(ValueChange(signal) for signal in (dut.exponent_slot, dut.exponent_head, dut.cmd__valid)))

    async def _serve_tiles(self):
        while True:
            request, = await self.requests.take(1)
            want, beats = self.answers.popleft()
            got = tuple(request[name] for name in ("slot", "value", "head", "n", "k"))
            assert got == want, f"the KV buffer is asked for {got}, expected {want}"
            bits = word_bits(self.config.dsp)
            for i, beat in enumerate(beats):
                data = sum((value & (1 << bits) - 1) << bits * j for j, value in enumerate(beat))
                self.tiles.send([data | int(i == len(beats) - 1) << bits * len(beat)])

    def make(self, rng, mode, **fixed):
        """A Matmul with random geometry and operands, its rows in a part of MBUF of its own."""
        config = self.config
        mode, vectors = MatmulMode(mode), config.columns // config.vector_lanes
        heads, groups, rows, n_tiles, k_tiles = (int(rng.integers(1, top + 1)) for top in (2, 4, 4, 3, 4))
        if mode == MatmulMode.QK:
            n_tiles = config.tile_tokens // config.columns
        if mode == MatmulMode.PV:
            k_tiles = config.tile_tokens // config.lanes
        sizes = {"heads": heads, "groups": groups, "rows": rows, "n_tiles": n_tiles, "k_tiles": k_tiles} | fixed
        fields = sizes | geometry(rng, *(sizes[name] for name in ("heads", "groups", "rows", "k_tiles")))
        last = int(rng.integers(1, vectors + 1))
        fields["beats"] = fixed.get("beats", (sizes["n_tiles"] - 1) * vectors + last)
        fields["group"] = int(fixed.get("group", rng.integers(0, 5)))
        fields["x"] = self.next_row
        matmul = Matmul(config, mode, fields, rng)
        self.next_row = max(matmul.rows) + 1
        return matmul

    async def write(self, rows):
        """Write rows of MBUF and wait until they are there."""
        for row, (mantissas, exponents, vector, first) in sorted(rows.items()):
            self.writes.append((row, vector, first, aligned_row(self.config, mantissas, exponents)))
        await ClockCycles(self.dut.clk, len(rows) + 2)

    async def send(self, *commands):
        """Write the rows of MATMULs, then send all commands and operands; returns the beats to expect, by MATMUL.

        A command is a Matmul, or a number of superbeats to drop.
        """
        expected, matmuls = [], [command for command in commands if isinstance(command, Matmul)]
        for matmul in matmuls:
            await self.write(matmul.rows)
        for matmul in commands:
            if matmul not in matmuls:
                self.weights.send(int.from_bytes(self.rng.bytes(self.config.superbeat_bytes)) for _ in range(matmul))
                self.spoiled.append(None)
                continue
            self.weights.send(matmul.weight_stream())
            slot = self.slots[matmul.mode] % 2
            for request in matmul.requests(slot):
                self.answers.append((request, matmul.kv_tile(*request[2:])))
            self.slots[matmul.mode] += 1
            if matmul.mode == MatmulMode.QK:
                self.exponents.append(matmul.key_exponents)
            fields = matmul.fields
            vector = fields["x"] + matmul.t[-1] * fields["row_stride"] + sum((fields[count] - 1) * fields[stride]
                for count, stride in (("heads", "head_stride"), ("groups", "group_stride")))
            self.spoiled.append((vector + fields["k_tiles"] - 1, vector, 1, 0))
            expected.append(matmul.expected())
        self.commands.send([as_command("matmul", mode=int(item.mode), **item.fields) if item in matmuls else
                            as_command("dropw", count=item) for item in commands])
        return expected

    async def run(self, *commands):
        """Send, compare all results, and wait until the unit is idle."""
        done, release = self.count["done"], self.count["kv_release"]
        matmuls = [command for command in commands if isinstance(command, Matmul)]
        for matmul, expected in zip(matmuls, await self.send(*commands)):
            for number, want in enumerate(expected):
                beat, = await self.sink.take(1)
                got = beat["acc"], beat["exponent"]
                assert got == want, f"beat {number} of {matmul.mode.name} {matmul.fields}: got {got}, expected {want}"
        while self.count["done"] - done < len(commands):
            await self.edge
        assert await self.sink.rest(12) == []
        assert not self.dut.busy.value
        assert self.count["done"] - done == len(commands)
        assert self.count["kv_release"] - release == sum(matmul.mode == MatmulMode.PV for matmul in matmuls)
        assert not self.answers, "the KV buffer was not asked for every tile"


@bench(stall=Stall, sink_stall=Stall, timeout_cycles=60_000)
async def every_mode_matches(dut, stall, sink_stall):
    """Commands back to back, in all modes."""
    rng = np.random.default_rng(1)
    machine = ComputeBench(dut, stall=stall, sink_stall=sink_stall, seed=1)
    modes = [*MatmulMode, *rng.permutation(list(MatmulMode))]
    await machine.run(*(machine.make(rng, mode) for mode in modes))


@bench(seed=[2, 3], timeout_cycles=60_000)
async def single_commands_match(dut, seed):
    """Each mode alone, small geometries first, then random ones."""
    rng = np.random.default_rng(seed)
    machine = ComputeBench(dut, seed=seed)
    kv = {MatmulMode.PV: {"k_tiles": machine.config.tile_tokens // machine.config.lanes}}
    for mode in MatmulMode:
        single = {"heads": 1, "groups": 1, "rows": 1, "n_tiles": 1, "k_tiles": 1} | kv.get(mode, {})
        await machine.run(machine.make(rng, mode, **single, beats=1))
        await machine.run(machine.make(rng, mode))


@bench(stall=[Stall.NEVER, Stall.HALF], timeout_cycles=60_000)
async def blocks_share_scales(dut, stall):
    """Every group with each kind of weights; the last tiles of a column tile may have a set of scales to themselves."""
    rng = np.random.default_rng(11)
    machine = ComputeBench(dut, stall=stall, seed=11)
    for mode in (MatmulMode.W4, MatmulMode.W4M, MatmulMode.W8):
        for group in range(8):
            sizes = {"groups": 1, "rows": 2, "k_tiles": int(rng.choice([1, 4, 5, 9])), "group": group}
            await machine.run(*(machine.make(rng, mode, heads=1 + i, n_tiles=2, **sizes) for i in range(2)))
            machine.next_row = 0


@bench(timeout_cycles=60_000)
async def every_limit_of_beats(dut):
    """The last column tile may deliver any part of itself; accumulator rows may all be used."""
    rng = np.random.default_rng(4)
    machine = ComputeBench(dut)
    config = machine.config
    vectors = config.columns // config.vector_lanes
    for n_tiles in (1, 2):
        sizes = {"heads": 2, "groups": 1, "rows": 3, "n_tiles": n_tiles, "k_tiles": 2}
        await machine.run(*(machine.make(rng, MatmulMode.W4, **sizes, beats=(n_tiles - 1) * vectors + last)
                            for last in range(1, vectors + 1)))
    sizes = {"heads": 1, "groups": config.acc_rows // config.tokens, "rows": config.tokens, "n_tiles": 3, "k_tiles": 1}
    await machine.run(machine.make(rng, MatmulMode.W8, **sizes))


@bench(stall=[Stall.NEVER, Stall.HALF], timeout_cycles=60_000)
async def a_mask_chooses_the_rows(dut, stall):
    """Every mask of a chunk, then random ones in all modes: rows that run keep their places in MBUF."""
    rng = np.random.default_rng(9)
    machine = ComputeBench(dut, stall=stall, sink_stall=stall, seed=9)
    tokens = machine.config.tokens
    every = range(1, 1 << tokens)
    sizes = {"heads": 2, "groups": 2, "rows": tokens, "n_tiles": 2, "k_tiles": 2}
    await machine.run(*(machine.make(rng, MatmulMode.W4, **sizes, mask=mask) for mask in every))
    machine.next_row = 0
    for mode in [*MatmulMode] * 3:
        await machine.run(machine.make(rng, mode, rows=tokens, mask=int(rng.choice(every))))


@bench(stall=[Stall.NEVER, Stall.HALF], timeout_cycles=60_000)
async def drops_weights_between_products(dut, stall):
    rng = np.random.default_rng(10)
    machine = ComputeBench(dut, stall=stall, seed=10)
    small = {"heads": 1, "groups": 1, "rows": 2, "n_tiles": 1, "k_tiles": 2}
    for counts in [(0,), (1,), (5, 0, 1), (40,)]:
        await machine.run(*counts)
        products = [machine.make(rng, mode, **small) for mode in (MatmulMode.W4M, MatmulMode.W4)]
        await machine.run(*counts, products[0], *counts, products[1], *counts)
    product = machine.make(rng, MatmulMode.QK)
    await machine.run(3, product, 3)


@bench(count=[0, 1, 30])
async def drops_a_superbeat_in_every_cycle(dut, count):
    machine = ComputeBench(dut)
    machine.weights.send([1] * (count + 2))
    await ClockCycles(dut.clk, 5)
    assert not machine.transfers and not dut.busy.value
    machine.commands.send([as_command("dropw", count=count)])
    machine.spoiled.append(None)
    while not machine.count["done"]:
        await machine.edge
    await ClockCycles(dut.clk, 5)
    assert len(machine.transfers) == count and not _gaps(machine.transfers)
    assert machine.count["busy"] == count + 1 and not machine.active and not machine.count["starved"]


@bench(groups=[2, 3])
async def waits_while_all_banks_are_full(dut, groups):
    """With a blocked output four column tiles are computed, or two of more rows than fill half a bank, then the array
    stops until the output moves."""
    rng = np.random.default_rng(5)
    machine = ComputeBench(dut, sink_stall=1.0)
    config = machine.config
    assert config.acc_rows == 4 * config.tokens
    matmul = machine.make(rng, MatmulMode.W4, heads=1, groups=groups, rows=config.tokens, n_tiles=6, k_tiles=2)
    expected, = await machine.send(matmul)
    await ClockCycles(dut.clk, 400)
    assert len(machine.active) == (4 if groups == 2 else 2) * 2 * groups * config.tokens
    assert machine.count["drain_blocked"] > 100 and machine.count["done"] == 0
    machine.sink.stall = Stall.NEVER
    got = [(beat["acc"], beat["exponent"]) for beat in await machine.sink.take(len(expected))]
    assert got == expected
    assert machine.count["done"] == 1


@bench(stall=[Stall.NEVER, Stall.HALF], sink_stall=[Stall.NEVER, Stall.HALF], timeout_cycles=60_000)
async def few_and_many_rows_share_the_banks(dut, stall, sink_stall):
    """Commands whose rows fill half a bank at most, and others: short ones, so that several are on their way."""
    rng = np.random.default_rng(12)
    machine = ComputeBench(dut, stall=stall, sink_stall=sink_stall, seed=12)
    for _ in range(4):
        machine.next_row = 0
        await machine.run(*(machine.make(rng, mode, heads=int(rng.integers(1, 4)), groups=groups,
                                         rows=int(rng.integers(1, 5)), n_tiles=int(rng.integers(1, 4)), k_tiles=1)
                            for groups in (1, 4, 1, 1, 3, 2) for mode in [rng.choice([MatmulMode.W4, MatmulMode.W4M])]))


def _gaps(cycles):
    return set(np.diff(cycles).tolist()) - {1}


@bench(mode=list(MatmulMode))
async def one_row_runs_at_the_speed_of_the_stream(dut, mode):
    """One row per tile: a superbeat is taken in every cycle, from the first to the last of the command."""
    rng = np.random.default_rng(6)
    machine = ComputeBench(dut)
    sizes = {"heads": 1, "groups": 1, "rows": 1}
    if mode not in (MatmulMode.QK, MatmulMode.PV):
        sizes |= {"n_tiles": 3, "k_tiles": 24}  # a column tile lasts longer than the way of another one to the output
    matmul = machine.make(rng, mode, **sizes)
    await machine.run(matmul)
    assert len(machine.active) == np.prod(matmul.shape)
    assert not _gaps(machine.transfers), f"cycles of transfers: {machine.transfers}"
    assert machine.transfers[-1] == machine.active[-1] - 2, "the last row is issued right after the last superbeat"


@bench(mode=list(MatmulMode))
async def tiles_follow_each_other_without_a_gap(dut, mode):
    """More rows than superbeats to a tile: the next tile is there when the last row of one is used."""
    machine = ComputeBench(dut)
    config = machine.config
    rows = {"groups": config.acc_rows // config.tokens, "rows": config.tokens}
    if mode not in (MatmulMode.QK, MatmulMode.PV):
        rows["k_tiles"] = 6
    matmul = machine.make(np.random.default_rng(7), mode, heads=1, n_tiles=1, **rows)  # more wait for the output
    await machine.run(matmul)
    assert len(machine.active) == np.prod(matmul.shape) * config.acc_rows and not _gaps(machine.active)


@bench()
async def debug_shows_rows_of_mbuf(dut):
    rng = np.random.default_rng(8)
    machine = ComputeBench(dut)
    rows = machine.make(rng, MatmulMode.W4).rows
    await machine.write(rows)
    await machine.edge
    dut.debug.value = 1
    for row, (mantissas, exponents, *_) in rows.items():
        dut.debug_row.value = row
        await ClockCycles(dut.clk, 2)
        assert dut.debug_data.value.to_unsigned() == aligned_row(machine.config, mantissas, exponents)
    dut.debug.value = 0
    await machine.run(machine.make(rng, MatmulMode.W4M))  # still works


@pytest.mark.parametrize("config", [TINY, WIDE], ids=lambda config: config.name)
def test_matmul(config):
    run_bench(ComputeUnit(config=config), every_mode_matches, single_commands_match, every_limit_of_beats,
              blocks_share_scales, a_mask_chooses_the_rows, drops_weights_between_products,
              drops_a_superbeat_in_every_cycle, waits_while_all_banks_are_full, few_and_many_rows_share_the_banks,
              one_row_runs_at_the_speed_of_the_stream, tiles_follow_each_other_without_a_gap, debug_shows_rows_of_mbuf,
              parameters=dataclasses.asdict(config))


@bench(mode=list(MatmulMode))
async def rows_follow_at_the_distance_of_passes(dut, mode):
    """More passes than superbeats to a tile: the next tile is there when the last pass of one is over."""
    machine = ComputeBench(dut)
    sizes = {"n_tiles": 1, "k_tiles": 6} if mode not in (MatmulMode.QK, MatmulMode.PV) else {}
    matmul = machine.make(np.random.default_rng(7), mode, heads=1, groups=1, rows=1, **sizes)
    await machine.run(matmul)
    assert len(machine.active) == np.prod(matmul.shape)
    assert set(np.diff(machine.active).tolist()) == {machine.config.passes}


@pytest.mark.parametrize("passes", [2, 4])
@pytest.mark.parametrize("dsp", ["generic", "mult18x18d"])
def test_matmul_in_passes(passes, dsp):
    config = dataclasses.replace(WIDE, name=f"passes{passes}", dsp=dsp, passes=passes)
    benches = [every_mode_matches, single_commands_match, every_limit_of_beats, blocks_share_scales,
               a_mask_chooses_the_rows, few_and_many_rows_share_the_banks, debug_shows_rows_of_mbuf]
    run_bench(ComputeUnit(config=config), *benches, *[rows_follow_at_the_distance_of_passes] * (passes == 4),
              parameters=dataclasses.asdict(config))
