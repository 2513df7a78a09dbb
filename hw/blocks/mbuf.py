"""MBUF: rows of block-aligned mantissas, the moving operand of the array.

A row is `lanes` 16-bit mantissas with one exponent and one sum of mantissas per block (docs/numerics.md). The largest
exponent of a vector (one or more consecutive rows) is kept at the address of its first row.
"""

from amaranth import Module, Mux, Signal, signed
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..formats import MANTISSA_BITS

__all__ = ["AlignedRow", "MantissaBuffer", "sum_shape"]


def sum_shape(config):
    """Shape of the sum of a block's mantissas."""
    return signed(MANTISSA_BITS + (config.block - 1).bit_length())


def AlignedRow(config):
    """Layout of one MBUF row: mantissas, exponents and mantissa sums."""
    return data.StructLayout({
        "mantissa": data.ArrayLayout(signed(MANTISSA_BITS), config.lanes),
        "exponent": data.ArrayLayout(signed(9), config.blocks),
        "sum": data.ArrayLayout(sum_shape(config), config.blocks),
    })


class MantissaBuffer(wiring.Component):
    """Row memory with one write and one read port, and the vectors' largest exponents.

    Members
    -------
    write_en, write_row, write_data : one row written at the clock edge
    write_vector : row address of the vector that the written row belongs to; write_first: it is the vector's first row
    read_en, read_row, read_vector : read_data, read_maximum follow one cycle later and stay until the next read
    """

    def __init__(self, *, config):
        self.config = config
        rows = range(config.mbuf_rows)
        super().__init__({
            "write_en": In(1), "write_row": In(rows), "write_vector": In(rows), "write_first": In(1),
            "write_data": In(AlignedRow(config)),
            "read_en": In(1), "read_row": In(rows), "read_vector": In(rows),
            "read_data": Out(AlignedRow(config)), "read_maximum": Out(signed(9)),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.rows = rows = Memory(shape=AlignedRow(self.config).size, depth=self.config.mbuf_rows, init=[])
        m.submodules.maxima = maxima = Memory(shape=signed(9), depth=self.config.mbuf_rows, init=[])
        write, read = rows.write_port(), rows.read_port()
        m.d.comb += [
            write.en.eq(self.write_en), write.addr.eq(self.write_row), write.data.eq(self.write_data.as_value()),
            read.en.eq(self.read_en), read.addr.eq(self.read_row), self.read_data.as_value().eq(read.data),
        ]
        largest = self.write_data.exponent[0]
        for exponent in list(self.write_data.exponent)[1:]:
            largest = Mux(exponent > largest, exponent, largest)
        old, update = maxima.read_port(domain="comb"), maxima.write_port()
        row_largest = Signal(signed(9))
        m.d.comb += [
            row_largest.eq(largest),
            old.addr.eq(self.write_vector), update.addr.eq(self.write_vector),
            update.en.eq(self.write_en & (self.write_first | (row_largest > old.data))),
            update.data.eq(row_largest),
        ]
        lookup = maxima.read_port()
        m.d.comb += [lookup.en.eq(self.read_en), lookup.addr.eq(self.read_vector), self.read_maximum.eq(lookup.data)]
        return m
