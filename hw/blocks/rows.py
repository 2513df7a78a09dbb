"""Rows of the chunk as masks, bit t for row t: how loops walk them, and the mask of a count."""

from amaranth.hdl import Cat, Const, Mux
from amaranth.utils import exact_log2

from .fp import wire

__all__ = ["lowest", "ones"]


def lowest(m, mask, name="row"):
    """(index, rest): number of the lowest set bit of ``mask``, and ``mask`` without it; 0 and 0 if no bit is set.

    A loop over rows keeps the rows that are left: the lowest is the current one, ``rest`` what is left after it, the
    current one is the last if ``rest`` is zero. name : begins the names of the signals made in ``m``
    """
    mask = wire(m, mask, f"{name}_mask")
    rest = wire(m, mask & (mask - 1)[:len(mask)], f"{name}_rest")
    alone = wire(m, mask & ~rest, f"{name}_alone")
    index = Cat(Cat(alone[i] for i in range(len(mask)) if i >> bit & 1).any()
                for bit in range(max((len(mask) - 1).bit_length(), 1)))
    return wire(m, index, f"{name}_index"), rest


def ones(rows, tokens):
    """The mask of ``tokens`` bits (a power of two) whose lowest ``rows`` are set, all of them if ``rows`` is more."""
    every, bits = Const((1 << tokens) - 1, tokens), exact_log2(tokens)
    return Mux(rows[bits:].any(), every, ~(every << rows[:bits])[:tokens])
