"""Masks of rows: every mask of a few bits, random ones of 32."""

import random

import pytest
from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import Timer
from skipopu.hw.blocks.rows import lowest, ones
from skipopu.sim.bench import bench, bench_parameters, run_bench


class Rows(wiring.Component):
    """Both functions between ports."""

    def __init__(self, *, tokens):
        super().__init__({"mask": In(tokens), "index": Out(range(max(tokens, 2))), "rest": Out(tokens),
                          "count": In(12), "ones": Out(tokens)})

    def elaborate(self, platform):
        m = Module()
        index, rest = lowest(m, self.mask)
        m.d.comb += [self.index.eq(index), self.rest.eq(rest), self.ones.eq(ones(self.count, len(self.mask)))]
        return m


@bench()
async def walks_set_bits_in_ascending_order(dut):
    tokens = bench_parameters()["tokens"]
    generator = random.Random(1)
    masks = range(1 << tokens) if tokens < 8 else [
        0, 1, 1 << tokens - 1, (1 << tokens) - 1, *(generator.getrandbits(tokens) for _ in range(100))]
    for mask in masks:
        for t in [t for t in range(tokens) if mask >> t & 1]:
            dut.mask.value = mask
            await Timer(1, "ns")
            mask &= ~(1 << t)
            got = int(dut.index.value), int(dut.rest.value)
            assert got == (t, mask), f"got {got}, expected {(t, mask)}"
        dut.mask.value = 0
        await Timer(1, "ns")
        assert int(dut.index.value) == int(dut.rest.value) == 0, "no bit set"


@bench()
async def counts_become_masks(dut):
    tokens = bench_parameters()["tokens"]
    for count in [*range(2 * tokens + 2), 1 << 11, (1 << 12) - 1]:
        dut.count.value = count
        await Timer(1, "ns")
        assert int(dut.ones.value) == (1 << min(count, tokens)) - 1, f"{count} rows"


@pytest.mark.parametrize("tokens", [1, 4, 32])
def test_rows(tokens):
    run_bench(Rows(tokens=tokens), walks_set_bits_in_ascending_order, counts_become_masks,
              parameters={"tokens": tokens})
