"""AXI4 and AXI4-Lite as Amaranth interfaces, under the names that tools expect (``m0_axi_araddr``).

AXI4 without IDs: INCR bursts of whole beats, answered in order. Members are named as in the AMBA AXI specification
(IHI 0022), in lower case, seen from the master.
"""

from amaranth.hdl import Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

__all__ = ["Axi4", "AxiLite", "AxiRead", "AxiWrite", "axi_ports", "connect_axi", "drive_address"]

_INCR = 1


def _address(channel, bits):
    return {f"{channel}addr": Out(bits), f"{channel}len": Out(8), f"{channel}size": Out(3), f"{channel}burst": Out(2),
            f"{channel}valid": Out(1), f"{channel}ready": In(1)}


def _read(data_bits):
    return {"rdata": In(data_bits), "rresp": In(2), "rlast": In(1), "rvalid": In(1), "rready": Out(1)}


def _write(data_bits):
    return {"wdata": Out(data_bits), "wstrb": Out(data_bits // 8), "wlast": Out(1), "wvalid": Out(1), "wready": In(1),
            "bresp": In(2), "bvalid": In(1), "bready": Out(1)}


class AxiRead(wiring.Signature):
    """The read channels (AR, R) of an AXI4 master."""

    def __init__(self, data_bits, address_bits=64):
        super().__init__({**_address("ar", address_bits), **_read(data_bits)})


class AxiWrite(wiring.Signature):
    """The write channels (AW, W, B) of an AXI4 master."""

    def __init__(self, data_bits, address_bits=64):
        super().__init__({**_address("aw", address_bits), **_write(data_bits)})


class Axi4(wiring.Signature):
    """All five channels of an AXI4 master."""

    def __init__(self, data_bits, address_bits=64):
        super().__init__({**_address("aw", address_bits), **_write(data_bits),
                          **_address("ar", address_bits), **_read(data_bits)})


class AxiLite(wiring.Signature):
    """All channels of an AXI4-Lite master; a slave has it as ``In(AxiLite(12))``."""

    def __init__(self, address_bits, data_bits=32):
        bursts = {"awlen", "awsize", "awburst", "wlast", "arlen", "arsize", "arburst", "rlast"}
        members = Axi4(data_bits, address_bits).members
        super().__init__({name: member for name, member in members.items() if name not in bursts})


def axi_ports(prefix, interface):
    """The signals of ``interface`` under the names ``<prefix>_<member>``, for ``ports=`` of Amaranth's ``convert``.

    Amaranth itself would join the names with two underscores, which AXI tools do not recognise. Halves merge:
    ``{**axi_ports("m0_axi", reader.axi), **axi_ports("m0_axi", writer.axi)}``.
    """
    return {"_".join([prefix, *map(str, path)]): (Value.cast(value), None)
            for path, _, value in interface.signature.flatten(interface)}


def connect_axi(m, outer, inner):
    """Drive the channels of ``outer`` (a member of the component that ``m`` elaborates) that ``inner`` (of a submodule)
    has: an AxiRead and an AxiWrite together make one Axi4."""
    for name, member in inner.signature.members.items():
        inside, outside = getattr(inner, name), getattr(outer, name)
        m.d.comb += outside.eq(inside) if member.flow == Out else inside.eq(outside)


def drive_address(m, axi, channel, data_bits):
    """Set what never changes in the address channel ``channel`` ("ar" or "aw"): INCR bursts of whole beats."""
    m.d.comb += [getattr(axi, f"{channel}size").eq((data_bits // 8).bit_length() - 1),
                 getattr(axi, f"{channel}burst").eq(_INCR)]
