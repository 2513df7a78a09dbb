"""PeArray accumulates exactly what numpy's integers give, for every mode, shift and accumulator row."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
from cocotb.triggers import ClockCycles, RisingEdge, Timer
from skipopu.hw.blocks.array import ColumnPair, PeArray, RowControl, Scale, tile_beats
from skipopu.hw.blocks.dot import CASCADE, word_bits
from skipopu.hw.blocks.mbuf import AlignedRow, sum_shape
from skipopu.hw.config import DSPS, OverlayConfig, preset
from skipopu.sim.bench import bench, bench_parameters, cycle, pack, run_bench

TINY = preset("tiny")
BLOCKS = dataclasses.replace(TINY, name="blocks", lanes=64, columns=128, ports=8)  # two blocks in a row
SHIFT_LIMIT = 63


def make_tile(rng, config, kind):
    """A tile with its scales. kind : "codes", "keys" or "values", which is also the way it is loaded"""
    shape, blocks = (config.columns, config.lanes), (config.columns, config.blocks)
    low, high = (-8, 7) if kind == "codes" else (-4094, 4094)
    codes = rng.integers(low, high + 1, shape)
    codes = np.where(rng.random((config.columns, 1)) < 0.2, rng.choice([low, high, -1, 0], (config.columns, 1)), codes)

    def scale():
        significand = np.where(rng.random(blocks) < 0.2, rng.choice([-2047, 2047, 0, 1, -1], blocks),
                               rng.integers(-2047, 2048, blocks))
        shift = np.where(rng.random(blocks) < 0.3, rng.choice([0, 62, 63], blocks), rng.integers(0, 64, blocks))
        return significand, shift

    if kind == "codes":
        offset, use_minimum = (int(bit) for bit in rng.integers(0, 2, 2))
        return SimpleNamespace(kind=kind, codes=codes, scale=scale(), minimum=scale(), offset=offset,
                               use_minimum=use_minimum)
    unit = np.full(blocks, 64), np.zeros(blocks, int)
    return SimpleNamespace(kind=kind, codes=codes, scale=unit, minimum=scale(), offset=0, use_minimum=0)


def make_row(rng, config, tile):
    """Mantissas [lanes], sums, exponents [blocks] and the vector's largest exponent: a row that meets the tile."""
    limit = 32767 if tile.kind == "codes" else 16383
    mantissas = rng.integers(-limit, limit + 1, config.lanes)
    if rng.random() < 0.2:
        mantissas[:] = rng.choice([-limit, limit, -2047, 2047, 0, -1])
    sums = mantissas.reshape(config.blocks, -1).sum(-1)
    maximum = int(rng.integers(-127, 128))
    gaps = rng.choice([0, 1, 2, 5, 20, 61, 62, 63, 64, 65, 254], config.blocks)
    return SimpleNamespace(mantissas=mantissas, sums=sums, exponents=np.maximum(maximum - gaps, -127), maximum=maximum)


def contribution(config, tile, row):
    """What one row adds to each column, int64 [columns]."""
    dots = (tile.codes * row.mantissas).reshape(config.columns, config.blocks, -1).sum(-1)
    gap = row.maximum - row.exponents
    significand, shift = tile.scale
    total = ((dots + 8 * tile.offset * row.sums) * significand) >> np.minimum(gap + shift, SHIFT_LIMIT)
    if tile.use_minimum:
        significand, shift = tile.minimum
        total = total + ((row.sums * significand) >> np.minimum(gap + shift, SHIFT_LIMIT))
    return total.sum(-1)


def superbeats(config, tile):
    """The words that fill the tile registers, in order."""
    if tile.kind == "codes":
        nibbles = (tile.codes & 15).reshape(config.tile_beats, -1)
        return [sum(int(code) << 4 * i for i, code in enumerate(line)) for line in nibbles]
    tokens = tile.codes if tile.kind == "keys" else tile.codes.T
    step, elements = config.kv_step, config.beat_elements
    lines = tokens.reshape(len(tokens) // step, step, -1, elements).transpose(0, 2, 1, 3)
    bits = word_bits(config.dsp)
    return [sum((int(value) & (1 << bits) - 1) << bits * i for i, value in enumerate(line))
            for line in lines.reshape(-1, step * elements)]


def loads(config, tile):
    """The superbeats of a tile as `ArrayBench.step` takes them."""
    return [(tile.kind, index, word) for index, word in enumerate(superbeats(config, tile))]


def scale_bits(tile, name, column, block):
    """The bits of a Scale."""
    significand, shift = getattr(tile, name)
    less = 64 if name == "scale" else 0
    return int(significand[column, block] - less) & 0x1FFF | int(shift[column, block]) << 13


class ArrayBench:
    """Drives one cycle at a time; scales follow their row by one cycle, noise stands on everything that is not used."""

    def __init__(self, dut, rng):
        self.dut, self.rng, self.edge = dut, rng, RisingEdge(dut.clk)
        self.config = OverlayConfig(**bench_parameters())
        self.acc = {}  # accumulator row -> int64 [columns]
        self.used = None  # tile of the row in the cycle before
        self.last_rows, self.done = [], []  # cycles

    async def step(self, *, load=None, swap=0, row=None, tile=None, acc=0, first=0, last=0):
        """One cycle. load : (kind, index, word) of a superbeat; row, tile : a row to accumulate with a tile"""
        dut, config, rng = self.dut, self.config, self.rng
        for name, port in (("codes", dut.load_codes), ("keys", dut.load_keys), ("values", dut.load_values)):
            port.value = 1 << load[1] if load and load[0] == name else 0
        for port, mine in ((dut.codes, load and load[0] == "codes"), (dut.mantissas, load and load[0] != "codes")):
            port.value = load[2] if mine else int.from_bytes(rng.bytes(len(port) // 8), "little")
        dut.swap.value = swap
        self._drive_scales()
        dut.row_en.value = int(row is not None)
        row_bits = int.from_bytes(rng.bytes(len(dut.row) // 8), "little")
        if row is not None:
            row_bits = pack(AlignedRow(config), {"mantissa": row.mantissas.tolist(), "exponent": row.exponents.tolist(),
                                                 "sum": row.sums.tolist()})
            dut.maximum.value = row.maximum
            dut.control.value = pack(RowControl(config), {
                "acc": acc, "first": first, "signed_codes": int(tile.kind == "codes" and not tile.offset),
                "minimum": tile.use_minimum, "last": last})
            value = contribution(config, tile, row)
            self.acc[acc] = value if first else self.acc[acc] + value
        else:
            dut.control.value = int(rng.integers(0, 1 << len(dut.control)))
        dut.row.value = row_bits
        self.used = tile
        await self.edge
        if row is not None and last:
            self.last_rows.append(cycle())
        if dut.tile_done.value:
            self.done.append(cycle())

    async def use(self, tile):
        """Load a tile and take it for use."""
        for beat in loads(self.config, tile):
            await self.step(load=beat)
        await self.step(swap=1)

    def _drive_scales(self):
        dut, config, tile = self.dut, self.config, self.used
        for n in range(config.columns):
            for b in range(config.blocks):
                for name in ("scale", "minimum"):
                    if tile is None:
                        bits = int(self.rng.integers(0, 1 << Scale().size))
                    else:
                        bits = scale_bits(tile, name, n, b)
                    getattr(dut, f"{name}__{n}__{b}").value = bits

    async def check(self):
        """Let the stages run empty, then compare every accumulator row that was written."""
        for _ in range(PeArray.latency + 1):
            await self.step()
        for address, want in self.acc.items():
            self.dut.drain_row.value = address
            await Timer(1, "ns")
            got = [getattr(self.dut, f"drain__{n}").value.to_signed() for n in range(self.config.columns)]
            assert got == want.tolist(), f"accumulator row {address}: got {got}, expected {want.tolist()}"
        assert self.done == [at + PeArray.latency for at in self.last_rows]
        await self.edge


@bench(seed=[1, 2])
async def accumulates_exactly(dut, seed):
    """Tiles of all kinds, each loaded while rows of the one before follow each other or pause, and taken for use with
    the last of them or later; the first superbeat of the next one may come in the same cycle."""
    rng = np.random.default_rng(seed)
    machine = ArrayBench(dut, rng)
    config, kinds = machine.config, ["codes", "keys", "values"]
    assert [len(superbeats(config, make_tile(rng, config, kind))) for kind in kinds] == list(tile_beats(config))
    tile, upcoming = None, make_tile(rng, config, "codes")
    beats = loads(config, upcoming)
    for _ in range(60):
        eager = rng.choice([0, 0.5, 1])

        async def step(eager=eager, beats=beats, **row):
            await machine.step(load=beats.pop(0) if beats and rng.random() < eager else None, **row)

        rows = []
        if tile:
            places = rng.integers(0, 2 * config.acc_rows, int(rng.integers(1, 12)))
            if rng.random() < 0.3:
                places[:] = places[0]  # the same row again and again
            for place in places.tolist():
                first = int(place not in machine.acc and place not in {row["acc"] for row in rows}
                            or rng.random() < 0.2)
                rows.append({"row": make_row(rng, config, tile), "tile": tile, "acc": place, "first": first})
            rows[-1]["last"] = int(rng.random() < 0.5)
        with_last = rows and rng.random() < 0.7
        for row in rows[:-1] if with_last else rows:
            while rng.random() < 0.2:
                await step()
            await step(**row)
        while beats:
            await step(1)
        tile, upcoming = upcoming, make_tile(rng, config, str(rng.choice(kinds)))
        beats = loads(config, upcoming)
        await step(beats=beats, swap=1, **(rows[-1] if with_last else {}))
    await machine.check()


@bench()
async def every_shift_floors(dut):
    """All 64 shifts of both terms, from the scale and from the exponent gap, for negative and positive dots."""
    rng = np.random.default_rng(3)
    machine = ArrayBench(dut, rng)
    config = machine.config
    tile = make_tile(rng, config, "codes")
    tile.offset, tile.use_minimum = 1, 1
    await machine.use(tile)
    for shift in range(0, 64, config.columns):
        columns = shift + np.arange(config.columns).reshape(-1, 1)
        for number, gap in enumerate((0, 1, 40, 63, 64, 200)):
            # The tile registers stay; only the scales differ.
            scale = tile.scale[0], columns
            scaled = SimpleNamespace(**vars(tile) | {"scale": scale, "minimum": scale})
            row = make_row(rng, config, tile)
            row.maximum, row.exponents = 100, np.full(config.blocks, 100 - gap)
            await machine.step(row=row, tile=scaled, acc=number, first=1)
        await machine.check()


@bench()
async def banks_are_apart(dut):
    """Every accumulator row of both banks keeps its own value."""
    rng = np.random.default_rng(4)
    machine = ArrayBench(dut, rng)
    config = machine.config
    tile = make_tile(rng, config, "keys")
    await machine.use(tile)
    for first in (1, 0, 0):
        for acc in rng.permutation(2 * config.acc_rows).tolist():
            await machine.step(row=make_row(rng, config, tile), tile=tile, acc=acc, first=first, last=1)
        await machine.check()


@bench(seed=[5])
async def columns_sum_their_blocks(dut, seed):
    """Two columns of two blocks: each block has its own dot product, bias, scale, minimum, sum and exponent."""
    config, rng = OverlayConfig(**bench_parameters()), np.random.default_rng(seed)
    acc = 0
    for name in ("dot_en", "scale_en", "shift_en"):
        if hasattr(dut, name):
            getattr(dut, name).value = 1
    for number in range(60):
        tile = make_tile(rng, config, ("codes", "keys")[number % 2])
        row = make_row(rng, config, tile)
        want = contribution(config, tile, row)[:2]
        acc = acc + want if number % 3 else want
        is_code = tile.kind == "codes"
        for k in range(config.lanes):
            getattr(dut, f"mantissa__{k}").value = int(row.mantissas[k])
            for c in range(2):
                word = int(tile.codes[c, k])
                getattr(dut, f"code__{c}__{k}").value = word & 15 if is_code else int(rng.integers(16))
                getattr(dut, f"key__{c}__{k}").value = int(rng.integers(-4094, 4095)) if is_code else word
                getattr(dut, f"load__{c}__{k}").value = 1
                getattr(dut, f"load_code__{c}__{k}").value = int(is_code)
        for b in range(config.blocks):
            getattr(dut, f"bias__{b}").value = int(-8 * row.sums[b] * (is_code and not tile.offset))
            getattr(dut, f"sum__{b}").value = int(row.sums[b] * tile.use_minimum)
            getattr(dut, f"exponent_gap__{b}").value = min(int(row.maximum - row.exponents[b]), SHIFT_LIMIT)
            for c in range(2):
                for name in ("scale", "minimum"):
                    getattr(dut, f"{name}__{c}__{b}").value = scale_bits(tile, name, c, b)
        dut.acc_row.value, dut.drain_row.value, dut.acc_first.value = 5, 5, int(number % 3 == 0)
        # Everything stands still until it has come through all stages.
        await ClockCycles(dut.clk, PeArray.latency + CASCADE)
        dut.acc_en.value = 1
        await RisingEdge(dut.clk)
        dut.acc_en.value = 0
        await ClockCycles(dut.clk, 1)
        got = [getattr(dut, f"drain__{c}").value.to_signed() for c in range(2)]
        assert got == acc.tolist(), f"row {number}: {tile.kind}, offset {tile.offset}"


@pytest.mark.parametrize("dsp", DSPS)
def test_array(dsp):
    config = dataclasses.replace(TINY, dsp=dsp)
    run_bench(PeArray(config=config), accumulates_exactly, every_shift_floors, banks_are_apart,
              parameters=dataclasses.asdict(config))


@pytest.mark.parametrize("dsp", DSPS)
def test_columns_of_two_blocks(dsp):
    config = dataclasses.replace(BLOCKS, dsp=dsp)
    assert config.blocks == 2 and sum_shape(config).width == 21
    run_bench(ColumnPair(config=config), columns_sum_their_blocks, parameters=dataclasses.asdict(config))


@pytest.mark.parametrize(("blocks", "sizes"), [
    (2, {"ports": 4}),
    pytest.param(4, {"ports": 4, "port_bits": 32, "vector_lanes": 2}, marks=pytest.mark.slow)])
def test_places_of_values(blocks, sizes):
    """Keys and values go to the same places if a step is one (`test_array`) or two blocks of tokens and elements."""
    config = dataclasses.replace(TINY, name="blocks", dsp="dsp48e2", **sizes)
    assert config.kv_step == blocks * config.beat_elements
    run_bench(PeArray(config=config), accumulates_exactly, parameters=dataclasses.asdict(config))
