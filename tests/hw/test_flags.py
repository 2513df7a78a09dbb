"""Flags: each one alone, all cleared at once, set and cleared in the same cycle, random against a set of numbers."""

import random

import pytest
from cocotb.triggers import RisingEdge
from skipopu.hw.blocks.flags import Flags
from skipopu.sim.bench import bench, bench_parameters, run_bench


async def step(dut, flags, index, *, set_=0, clear=0):
    """One cycle, in which the flag must read as in the model ``flags``."""
    dut.index.value, dut.set.value, dut.clear.value = index, set_, clear
    await RisingEdge(dut.clk)
    got, expected = int(dut.is_set.value), int(index in flags)
    assert got == expected, f"flag {index} is {got}, expected {expected}"
    if clear:
        flags.clear()
    if set_:
        flags.add(index)


@bench()
async def each_is_set_alone(dut):
    count, flags = bench_parameters()["count"], set()
    for index in range(count):
        await step(dut, flags, index, set_=1)
        await step(dut, flags, index)
        await step(dut, flags, (index + 1) % count)
    for index in range(count):
        await step(dut, flags, index, clear=index == count // 2)
    for index in range(count):
        await step(dut, flags, index)


@bench()
async def set_outlasts_clear(dut):
    """Neighbours in the same word of the memory do not come back."""
    count, flags = bench_parameters()["count"], set()
    for index in range(count):
        await step(dut, flags, index, set_=1)
    await step(dut, flags, 0, set_=1, clear=1)
    for index in range(count):
        await step(dut, flags, index)


@bench(seeds=range(3))
async def random_flags(dut, seeds):
    generator, count, flags = random.Random(seeds), bench_parameters()["count"], set()
    for _ in range(3000):
        await step(dut, flags, generator.randrange(count), set_=generator.random() < 0.4,
                   clear=generator.random() < 0.02)


@pytest.mark.parametrize("count", [2, 16, 33, 128])
def test_flags(count):
    run_bench(Flags(count=count), each_is_set_alone, set_outlasts_clear, random_flags, parameters={"count": count})
