"""The ULX3S with an LFE5U-85F: overlay, memory in block RAM and serial link on the board's 25 MHz clock.

LEDs: 0 beats with the clock, 1 the machine runs, 2 it is idle, 3 it has stopped with a fault, 4 the link serves a
request. The button FIRE1 resets everything but the memory. USB serial port US1, 1 Mbaud.
"""

from amaranth import ClockDomain, ClockSignal, Const, Module, ResetSignal, Signal
from amaranth.hdl import Elaboratable
from amaranth.lib.cdc import FFSynchronizer
from skipopu.hw.serial_top import SerialOverlay
from skipopu.sim.toolchain import ToolError

from . import ecp5

__all__ = ["BAUD", "CLOCK_HZ", "MEMORY_BYTES", "PART", "Ulx3s", "build"]

CLOCK_HZ = 25_000_000
BAUD = 1_000_000
MEMORY_BYTES = 1 << 18  #: behind the one port: 128 of the 208 block RAMs
PART = ecp5.Ecp5Part(size="85k", package="CABGA381", speed=6, multipliers=156)


class Ulx3s(Elaboratable):
    """The board's top."""

    def __init__(self, *, config, memory_bytes=MEMORY_BYTES):
        self.core = SerialOverlay(config=config, memory_bytes=memory_bytes, divisor=CLOCK_HZ // BAUD, clock_hz=CLOCK_HZ)

    def elaborate(self, platform):
        m = Module()
        m.submodules.core = core = self.core
        clock, uart, button = (platform.request(name) for name in ("clk25", "uart", "button_fire"))
        leds = [platform.request("led", index) for index in range(8)]

        # Everything starts in reset, and goes back there while the button is pressed.
        m.domains.sync = ClockDomain()
        pressed, waiting, reset = Signal(), Signal(4, init=-1), Signal(init=1)
        m.domains.start = ClockDomain(reset_less=True, local=True)
        m.submodules.button = FFSynchronizer(button.i, pressed, o_domain="start")
        with m.If(pressed):
            m.d.start += waiting.eq(-1)
        with m.Elif(waiting != 0):
            m.d.start += waiting.eq(waiting - 1)
        m.d.start += reset.eq(waiting != 0)
        m.d.comb += [ClockSignal().eq(clock.i), ClockSignal("start").eq(clock.i), ResetSignal().eq(reset)]

        beat = Signal(24)
        m.d.sync += beat.eq(beat + 1)
        lights = [beat[-1], core.running, ~core.running & ~core.fault, core.fault, core.active]
        m.d.comb += [core.rx.eq(uart.rx.i), uart.tx.o.eq(core.tx),
                     *(led.o.eq(light) for led, light in zip(leds, [*lights, *[Const(0, 1)] * 3]))]
        return m


def build(config, directory, *, seed=1, log=None):
    """Write the bitstream and its report into a folder; returns the report, see `ecp5.build`."""
    try:
        from amaranth_boards.ulx3s import ULX3S_85F_Platform
    except ImportError:
        raise ToolError("amaranth-boards not found: pip install amaranth-boards") from None
    (log or (lambda line: None))(f"elaborating configuration {config.name}")
    steps = {}
    with ecp5.timed(steps, "elaboration"):
        plan = ULX3S_85F_Platform().prepare(Ulx3s(config=config), name="top")
    about = {"board": "ulx3s-85f", "config": config.name, "config_hash": f"{config.config_hash:#010x}",
             "memory_bytes": MEMORY_BYTES, "baud": BAUD}
    return ecp5.build(plan.files["top.il"], plan.files["top.lpf"], PART, CLOCK_HZ / 1e6, directory, seed=seed, log=log,
                      steps=steps, name=f"skipopu-ulx3s-85f-{config.name}-{config.config_hash:08x}", about=about)
