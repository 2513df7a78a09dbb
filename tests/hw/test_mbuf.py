"""MantissaBuffer returns what was written, keeps each vector's largest exponent, and holds a read."""

import dataclasses
import random

import pytest
from cocotb.triggers import RisingEdge
from skipopu.hw.blocks.mbuf import AlignedRow, MantissaBuffer
from skipopu.hw.config import OverlayConfig, preset
from skipopu.sim.bench import bench, bench_parameters, pack, run_bench, unpack

TINY = preset("tiny")
BLOCKS = dataclasses.replace(TINY, name="blocks", lanes=64, columns=128, mbuf_rows=64)  # two blocks in a row


def make_row(config, generator, exponents=(-127, 127)):
    """The bits of a random row, and its largest exponent."""
    layout = AlignedRow(config)
    row = unpack(layout, generator.getrandbits(layout.size))
    row["exponent"] = [generator.randint(*exponents) for _ in row["exponent"]]
    return pack(layout, row), max(row["exponent"])


class Port:
    """Drives both ports and holds the model: rows, maxima, and what the last read has to show."""

    def __init__(self, dut):
        self.dut, self.rows, self.maxima, self.shown = dut, {}, {}, None

    async def step(self, write=None, read=None):
        """One cycle. write : (row, vector, first, data, largest); read : (row, vector)"""
        dut = self.dut
        dut.write_en.value, dut.read_en.value = int(write is not None), int(read is not None)
        if write:
            row, vector, first, data, _ = write
            dut.write_row.value, dut.write_vector.value = row, vector
            dut.write_first.value, dut.write_data.value = first, data
        if read:
            dut.read_row.value, dut.read_vector.value = read
        await RisingEdge(dut.clk)
        if self.shown:
            got = dut.read_data.value.to_unsigned(), dut.read_maximum.value.to_signed()
            assert got == self.shown, f"got {got[0]:#x}, {got[1]}, expected {self.shown[0]:#x}, {self.shown[1]}"
        if read:
            self.shown = self.rows[read[0]], self.maxima[read[1]]
        if write:
            self.rows[row] = data
            self.maxima[vector] = write[4] if first else max(self.maxima[vector], write[4])


def config_of_bench():
    return OverlayConfig(**bench_parameters())


@bench()
async def largest_exponent_of_a_vector(dut):
    """Corners: equal, rising, falling and negative exponents, the largest in each block, a vector written again."""
    config, port = config_of_bench(), Port(dut)
    generator = random.Random(1)
    layout = AlignedRow(config)
    for exponents in ([5], [-127], [127], [-127, -126], [-126, -127], [3, 3], [-1, 0, 1], [1, 0, -1], [0, 127, -127]):
        for block in range(config.blocks):
            base = generator.randrange(config.mbuf_rows - 4)
            for i, exponent in enumerate(exponents):
                row = unpack(layout, generator.getrandbits(layout.size))
                row["exponent"] = [exponent if b == block else exponent - 1 for b in range(config.blocks)]
                await port.step(write=(base + i, base, int(i == 0), pack(layout, row), exponent))
            for i in range(len(exponents)):
                await port.step(read=(base + i, base))
            await port.step()


@bench(seed=[1, 2])
async def reads_what_was_written_and_holds_it(dut, seed):
    """Vectors of 1 to 4 rows at random places, written at the same time as others are read, with pauses."""
    config, port = config_of_bench(), Port(dut)
    generator = random.Random(seed)
    pending, written = [], {}  # rows to write; row -> vector of the whole ones
    for _ in range(600):
        if not pending:
            base, count = generator.randrange(config.mbuf_rows - 4), generator.randint(1, 4)
            written = {row: vector for row, vector in written.items()
                       if not base <= row < base + count and not base <= vector < base + count}
            limits = generator.choice([(-127, 127), (-2, 2)])
            for row in range(base, base + count):
                data, largest = make_row(config, generator, limits)
                pending.append((row, base, int(row == base), data, largest))
        write = pending.pop(0) if generator.random() < 0.7 else None
        read = generator.choice(list(written.items())) if written and generator.random() < 0.6 else None
        await port.step(write, read)
        if write and not pending:
            written |= {row: write[1] for row in range(write[1], write[0] + 1)}


@bench()
async def every_row_is_its_own(dut):
    config, port = config_of_bench(), Port(dut)
    generator = random.Random(5)
    places = {*range(min(64, config.mbuf_rows)), config.mbuf_rows - 1, *(1 << i for i in range(6)),
              *(config.mbuf_rows >> i for i in range(1, 6))}
    for row in places:
        data, largest = make_row(config, generator)
        await port.step(write=(row, row, 1, data, largest))
    for row in places:
        await port.step(read=(row, row))
    await port.step()


@pytest.mark.parametrize("config", [TINY, BLOCKS], ids=lambda config: config.name)
def test_rows_and_maxima(config):
    run_bench(MantissaBuffer(config=config), largest_exponent_of_a_vector, reads_what_was_written_and_holds_it,
              every_row_is_its_own, parameters=dataclasses.asdict(config))
