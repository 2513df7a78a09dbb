"""The overlay as a board without a processor or external memory carries it: block RAM behind its ports, a serial link.

`serial_verilog` writes it for simulation, with the ports `clk`, `rst`, `rx`, `tx`, `running`, `fault` and `active`.
"""

from amaranth import ClockDomain, ClockSignal, DomainRenamer, Module, ResetSignal, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .blocks.block_memory import BlockMemory
from .blocks.serial_bridge import SerialBridge
from .top import Overlay
from .verilog import to_verilog

__all__ = ["SerialOverlay", "serial_verilog"]


class SerialOverlay(wiring.Component):
    """Overlay, memory and link on one clock.

    Members
    -------
    rx : In(1), tx : Out(1), the serial line
    running, fault : Out(1), as of `Overlay`
    active : Out(1), the link serves a request

    memory_bytes : behind each port; divisor : clocks per bit of the line; clock_hz : told to the host
    """

    def __init__(self, *, config, memory_bytes, divisor, clock_hz):
        self.config = config
        self._memory = BlockMemory(config=config, memory_bytes=memory_bytes)
        self._bridge = SerialBridge(config=config, memory_bytes=memory_bytes, divisor=divisor, clock_hz=clock_hz)
        super().__init__({"rx": In(1, init=1), "tx": Out(1, init=1), "running": Out(1), "fault": Out(1),
                          "active": Out(1)})

    def elaborate(self, platform):
        m = Module()
        bridge, reset = self._bridge, Signal()
        overlay, memory = Overlay(config=self.config), self._memory
        # The same clock with a reset of its own, so that the link survives what it resets.
        m.domains.overlay = ClockDomain(local=True)
        m.submodules.bridge = bridge
        rename = DomainRenamer("overlay")
        m.submodules.overlay, m.submodules.memory = rename(overlay), rename(memory)
        m.d.sync += reset.eq(bridge.overlay_reset)
        m.d.comb += [
            ClockSignal("overlay").eq(ClockSignal()), ResetSignal("overlay").eq(reset | ResetSignal()),
            bridge.rx.eq(self.rx), self.tx.eq(bridge.tx), self.active.eq(bridge.active),
            self.running.eq(overlay.running), self.fault.eq(overlay.fault),
        ]
        wiring.connect(m, bridge.axil, overlay.s_axil)
        wiring.connect(m, bridge.memory, memory.link)
        wiring.connect(m, overlay.mi_axi, memory.mi_axi)
        for port in range(self.config.ports):
            wiring.connect(m, overlay.m_axi[port], memory.m_axi[port])
        return m


class _Top(wiring.Component):
    """A board's core with clock and reset as ports."""

    def __init__(self, core):
        self.core = core
        super().__init__({"clk": In(1), "rst": In(1)})

    def elaborate(self, platform):
        m = Module()
        m.domains.sync = ClockDomain()
        m.d.comb += [ClockSignal().eq(self.clk), ResetSignal().eq(self.rst)]
        m.submodules.core = self.core
        return m


def serial_verilog(config, *, memory_bytes, divisor, clock_hz=25_000_000):
    """Verilog of `SerialOverlay`, top module `skipopu_serial`."""
    core = SerialOverlay(config=config, memory_bytes=memory_bytes, divisor=divisor, clock_hz=clock_hz)
    top = _Top(core)
    ports = {"clk": (top.clk, None), "rst": (top.rst, None)}
    ports |= {name: (getattr(core, name), None) for name in ("rx", "tx", "running", "fault", "active")}
    return to_verilog(top, name="skipopu_serial", ports=ports)
