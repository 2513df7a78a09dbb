"""A reset that the host asks for by a register, decoded in front of the registers that it resets."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..registers import ADDRESS_BITS, RESET_KEY, address
from .axi import AxiLite

__all__ = ["ResetOnRequest"]


class ResetOnRequest(wiring.Component):
    """Stands in the way of the register bus and watches for the key in RESET.

    Members
    -------
    host : In(AXI4-Lite), registers : Out(the same); every access passes, also the one that asks
    active : Out(1), high for `cycles` once that write has been answered
    hold : In(1), the registers are in reset, whose ready signals mean nothing: with either, no access begins

    Members pass combinationally. The slave takes one write at a time.
    """

    cycles = 64  #: of its clock: many of any other clock of the design

    def __init__(self):
        super().__init__({"host": In(AxiLite(ADDRESS_BITS)), "registers": Out(AxiLite(ADDRESS_BITS)),
                          "active": Out(1), "hold": In(1)})

    def elaborate(self, platform):
        m = Module()
        host, registers = self.host, self.registers
        wiring.connect(m, wiring.flipped(host), wiring.flipped(registers))
        with m.If(self.active | self.hold):
            m.d.comb += [getattr(side, f"{channel}{name}").eq(0) for channel in ("aw", "w", "ar")
                         for side, name in ((registers, "valid"), (host, "ready"))]

        address_hit, key_hit, left = Signal(), Signal(), Signal(range(self.cycles + 1))
        m.d.comb += self.active.eq(left != 0)
        with m.If(host.awvalid & host.awready):
            m.d.sync += address_hit.eq(host.awaddr[2:] == address("RESET") >> 2)
        with m.If(host.wvalid & host.wready):
            m.d.sync += key_hit.eq((host.wdata == RESET_KEY) & host.wstrb.all())
        with m.If(host.bvalid & host.bready):
            m.d.sync += left.eq(Mux(address_hit & key_hit, self.cycles, 0))
        with m.Elif(self.active):
            m.d.sync += left.eq(left - 1)
        return m
