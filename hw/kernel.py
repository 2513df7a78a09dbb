"""The overlay as an RTL kernel of AMD's XRT: its port names, its two clocks, and a reset that the host can ask for.

The core runs on `ap_clk`, the memory ports on `ap_clk_2`, each behind a `PortCrossing`. The register RESET is decoded
outside of what it resets.
"""

from amaranth import Cat, ClockDomain, ClockSignal, DomainRenamer, Module, ResetSignal, Signal
from amaranth.lib import wiring
from amaranth.lib.cdc import FFSynchronizer
from amaranth.lib.wiring import In, Out

from .blocks.axi import Axi4, AxiLite, AxiRead, axi_ports, connect_axi
from .blocks.crossing import PortCrossing
from .blocks.reset import ResetOnRequest
from .registers import ADDRESS_BITS
from .top import Overlay
from .verilog import to_verilog

__all__ = ["FETCH_BITS", "FETCH_PORT", "KERNEL", "Kernel", "kernel_verilog", "port_name"]

KERNEL = "skipopu"  #: of the module
FETCH_PORT = "mi_axi"
FETCH_BITS = 256


def port_name(port):
    """Prefix of a memory port's signals."""
    return f"m{port:02}_axi"


class Kernel(wiring.Component):
    """The overlay between XRT's register bus and the pseudo-channels of its memory.

    Members
    -------
    ap_clk, ap_rst_n : core and registers; ap_clk_2, ap_rst_n_2 : memory; resets are active low, each of its clock
    s_axi_control : registers (`hw.registers`); interrupt : level
    m_axi : a master per pseudo-channel; mi_axi : instructions, from the memory of port 0

    memory_bits : data bits of a memory port; narrower ports of the configuration keep their width
    memory_burst : beats of its longest burst
    """

    def __init__(self, *, config, memory_bits=256, memory_burst=16):
        self.config, self.memory_burst = config, memory_burst
        self.memory_bits, self.fetch_bits = min(memory_bits, config.port_bits), min(memory_bits, FETCH_BITS)
        super().__init__({
            "ap_clk": In(1), "ap_rst_n": In(1), "ap_clk_2": In(1), "ap_rst_n_2": In(1), "interrupt": Out(1),
            "s_axi_control": In(AxiLite(ADDRESS_BITS)),
            "m_axi": Out(Axi4(self.memory_bits)).array(config.ports), "mi_axi": Out(AxiRead(self.fetch_bits)),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        m.submodules.overlay = overlay = Overlay(config=config)
        m.d.comb += self.interrupt.eq(overlay.irq)

        # Domain "host" is the core's clock with the reset from outside only.
        m.domains += [ClockDomain("sync"), ClockDomain("host"), ClockDomain("memory")]
        resetting, memory_resetting = Signal(), Signal()
        m.submodules.memory_reset = FFSynchronizer(resetting, memory_resetting, o_domain="memory", reset_less=True)
        resets = {"sync": (self.ap_clk, ~self.ap_rst_n | resetting), "host": (self.ap_clk, ~self.ap_rst_n),
                  "memory": (self.ap_clk_2, ~self.ap_rst_n_2 | memory_resetting)}
        for domain, (clock, reset) in resets.items():
            held = Signal(2, init=3, reset_less=True, name=f"{domain}_held")  # cuts the path of a wide reset
            local = ClockDomain(f"{domain}_clock", reset_less=True)
            m.domains += local
            m.d.comb += [ClockSignal(local.name).eq(clock), ClockSignal(domain).eq(clock),
                         ResetSignal(domain).eq(held[-1])]
            m.d[local.name] += held.eq(Cat(reset, held))

        m.submodules.reset = reset = DomainRenamer("host")(ResetOnRequest())
        wiring.connect(m, wiring.flipped(self.s_axi_control), reset.host)
        wiring.connect(m, reset.registers, overlay.s_axil)
        m.d.comb += [resetting.eq(reset.active), reset.hold.eq(ResetSignal("sync"))]

        for p in range(config.ports):
            m.submodules[f"crossing{p}"] = crossing = PortCrossing(
                core_bits=config.port_bits, memory_bits=self.memory_bits, memory_burst=self.memory_burst)
            wiring.connect(m, overlay.m_axi[p], crossing.core)
            connect_axi(m, self.m_axi[p], crossing.memory)
        m.submodules.crossing_fetch = crossing = PortCrossing(
            core_bits=FETCH_BITS, memory_bits=self.fetch_bits, memory_burst=self.memory_burst, outstanding=8,
            write=False)
        wiring.connect(m, overlay.mi_axi, crossing.core)
        connect_axi(m, self.mi_axi, crossing.memory)
        return m


def kernel_verilog(kernel):
    """Verilog of a Kernel, top module `KERNEL`, one module per block."""
    names = ("ap_clk", "ap_rst_n", "ap_clk_2", "ap_rst_n_2", "interrupt")
    ports = {name: (getattr(kernel, name), None) for name in names}
    ports |= axi_ports("s_axi_control", kernel.s_axi_control) | axi_ports(FETCH_PORT, kernel.mi_axi)
    for p in range(kernel.config.ports):
        ports |= axi_ports(port_name(p), kernel.m_axi[p])
    return to_verilog(kernel, name=KERNEL, ports=ports, flatten=False, primitives=True)
