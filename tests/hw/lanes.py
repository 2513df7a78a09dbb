"""Benches of pipelined blocks without back-pressure: many copies side by side, driven from numpy arrays."""

import random

import numpy as np
from amaranth.hdl import Cat, Module, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from cocotb.triggers import RisingEdge

__all__ = ["Lanes", "check_lanes", "spread_floats"]


class Lanes(wiring.Component):
    """``count`` copies of a block: each port as wide as all copies together, ``en`` shifted along from ``valid_i``."""

    def __init__(self, make, count=4):
        self.copies = [make() for _ in range(count)]
        first = self.copies[0]
        self.latency = first.latency
        ports = {"valid_i": In(1), "valid_o": Out(1)}
        for path, member, value in first.signature.flatten(first):
            if path != ("en",):
                ports["_".join(map(str, path))] = member.flow(len(Value.cast(value)) * count)
        super().__init__(ports)

    def elaborate(self, platform):
        m = Module()
        valid = Signal(self.latency)
        enable = Cat(self.valid_i, valid[:-1])
        m.d.sync += valid.eq(enable)
        m.d.comb += self.valid_o.eq(valid[-1])
        for lane, copy in enumerate(self.copies):
            m.submodules[f"lane_{lane}"] = copy
            for path, member, value in copy.signature.flatten(copy):
                if path == ("en",):
                    m.d.comb += value.eq(enable)
                    continue
                value = Value.cast(value)
                wide = getattr(self, "_".join(map(str, path)))
                part = wide[lane * len(value):][:len(value)]
                m.d.comb += value.eq(part) if member.flow == In else part.eq(value)
        return m


def _join(values, width):
    """The bits of an array of integers, one value after the other."""
    mask, bits = (1 << width) - 1, 0
    for value in reversed(values.tolist()):
        bits = bits << width | value & mask
    return bits


async def check_lanes(dut, *, inputs, outputs, count=4, seed=0):
    """Drive equally long integer arrays into ``Lanes`` with random pauses and compare every result.

    inputs, outputs : port name to array; the arrays are padded to whole rows of ``count`` lanes
    """
    length = len(next(iter(inputs.values())))
    rows = -(-length // count)
    pick = np.arange(rows * count) % length

    def table(ports):
        return {name: np.asarray(values)[pick].reshape(rows, count) for name, values in ports.items()}

    sent, expected = table(inputs), table(outputs)
    width = {name: len(getattr(dut, name)) // count for name in [*inputs, *outputs]}
    joined, wanted = ([{name: _join(values[row], width[name]) for name, values in tables.items()}
                       for row in range(rows)] for tables in (sent, expected))
    generator = random.Random(seed)
    edge = RisingEdge(dut.clk)
    offered = taken = 0
    while taken < rows:
        valid = offered < rows and generator.random() < 0.8
        dut.valid_i.value = int(valid)
        for name in inputs:
            getattr(dut, name).value = joined[offered][name] if valid else generator.getrandbits(width[name] * count)
        await edge
        if dut.valid_o.value:
            for name in outputs:
                got = int(getattr(dut, name).value)
                if got != (want := wanted[taken][name]):
                    lane = (((got ^ want) & -(got ^ want)).bit_length() - 1) // width[name]
                    case = {key: hex(int(sent[key][taken][lane])) for key in inputs}
                    got, want = (bits >> (width[name] * lane) & ((1 << width[name]) - 1) for bits in (got, want))
                    raise AssertionError(f"seed {seed}, {name}: got {got:#x}, expected {want:#x} for {case}")
            taken += 1
        offered += valid


def spread_floats(generator, count, low=0, high=256):
    """FP32 bit patterns with random signs and fractions and exponent fields low..high-1."""
    fraction = generator.integers(0, 1 << 23, count)
    # Runs of ones and zeros at the low end make ties and carries frequent.
    fraction = np.where(generator.random(count) < 0.3, fraction & (-1 << generator.integers(0, 24, count)), fraction)
    fraction = np.where(generator.random(count) < 0.1, 0x7FFFFF - fraction, fraction) & 0x7FFFFF
    sign, field = generator.integers(0, 2, count), generator.integers(low, high, count)
    return ((sign << 31) | (field << 23) | fraction).astype(np.uint32)
