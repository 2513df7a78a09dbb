# amaranth: UnusedElaboratable=no
"""The ULX3S's top around its core: power-on reset, button, LEDs and serial line."""

from types import SimpleNamespace

import pytest
from amaranth import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.sim import Simulator
from skipopu.bitstream import ulx3s
from skipopu.bitstream.ulx3s import BAUD, CLOCK_HZ, MEMORY_BYTES, PART, Ulx3s
from skipopu.hw.config import preset

LONGEST = 40  # clocks of the power-on reset, at most


class Core(wiring.Component):
    """Counts clocks since its reset in place of the overlay."""

    def __init__(self):
        super().__init__({"rx": In(1), "tx": Out(1), "running": Out(1), "fault": Out(1), "active": Out(1)})
        self.age = Signal(16)

    def elaborate(self, platform):
        m = Module()
        m.d.sync += self.age.eq(self.age + 1)
        return m


class Pins:
    """A platform that hands out plain signals, each once."""

    def __init__(self):
        self.signals = {}

    def request(self, name, number=0):
        assert (name, number) not in self.signals
        pin = {"clk25": "i", "button_fire": "i", "led": "o"}.get(name)
        if pin:
            found = SimpleNamespace(**{pin: Signal(name=f"{name}{number}")})
        else:
            found = SimpleNamespace(rx=SimpleNamespace(i=Signal(init=1)), tx=SimpleNamespace(o=Signal()))
        self.signals[name, number] = found
        return found


@pytest.fixture
def simulate(monkeypatch):
    core, pins = Core(), Pins()
    monkeypatch.setattr(ulx3s, "SerialOverlay", lambda **sizes: core)
    top = Ulx3s(config=preset("ulx3s")).elaborate(pins)

    def run(bench):
        simulator = Simulator(top)

        async def process(ctx):
            async def clock(count=1):
                for _ in range(count):
                    for level in (1, 0):
                        ctx.set(pins.signals["clk25", 0].i, level)
                        await ctx.delay(2e-8)

            await bench(ctx, core, pins.signals, clock)

        simulator.add_testbench(process)
        simulator.run()

    return run


def test_reset_at_power_up_and_by_the_button(simulate):
    async def bench(ctx, core, pins, clock):
        await clock(8)
        assert ctx.get(core.age) == 0  # long enough for every register to have seen it
        await clock(LONGEST)
        age = ctx.get(core.age)
        await clock(3)
        assert 0 < age and ctx.get(core.age) == age + 3
        ctx.set(pins["button_fire", 0].i, 1)
        await clock(6)
        for _ in range(2 * LONGEST):
            await clock()
            assert ctx.get(core.age) == 0
        ctx.set(pins["button_fire", 0].i, 0)
        await clock(10)
        assert ctx.get(core.age) == 0  # a button that bounces is one reset
        await clock(LONGEST)
        assert ctx.get(core.age) > 0

    simulate(bench)


def test_lights_and_line(simulate):
    async def bench(ctx, core, pins, clock):
        await clock(LONGEST)
        for running, fault, active in ((0, 0, 0), (1, 0, 0), (0, 1, 1), (0, 0, 1), (1, 1, 0)):
            for signal, value in ((core.running, running), (core.fault, fault), (core.active, active)):
                ctx.set(signal, value)
            await ctx.delay(1e-9)
            shown = [ctx.get(pins["led", index].o) for index in range(1, 8)]
            assert shown == [running, int(not running and not fault), fault, active, 0, 0, 0]
        for level in (0, 1, 0):
            ctx.set(pins["uart", 0].rx.i, level)
            ctx.set(core.tx, 1 - level)
            await ctx.delay(1e-9)
            assert (ctx.get(core.rx), ctx.get(pins["uart", 0].tx.o)) == (level, 1 - level)

    simulate(bench)


def test_sizes_fit_the_device():
    config = preset("ulx3s")
    assert CLOCK_HZ % BAUD == 0 and CLOCK_HZ >= 25_000_000
    assert config.dsp == "mult18x18d" and (PART.size, PART.multipliers) == ("85k", 156)
    assert config.ports * MEMORY_BYTES <= 208 * 2048  # block RAMs of 2 KiB
