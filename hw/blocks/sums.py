"""Sums of numbers in fixed point.

Each number is rounded half up: floor((x + 1) / 2), for a number with one more fraction bit, is its upper bits and the
last one, which is the carry into an adder of the sum. So rounding takes no adders of its own.
"""

from amaranth.hdl import Cat, Const, Signal, signed

from .trees import tree

__all__ = ["half_sum"]


def half_sum(m, values, enables):
    """Half of each of the signed ``values``, rounded up, in a sum: (signed sum, a bit to add to it), two cycles later.

    values : as many as a power of two, at least two; enables : of the registers, of pairs and of all
    """
    def add(x, y):
        (a, up), (b, rest) = x, y
        return (Cat(Const(1, 1), a).as_signed() + Cat(up, b).as_signed())[1:].as_signed(), rest

    def register(x, enable, name):
        total = Signal(signed(len(x[0])), name=name, reset_less=True)
        rest = Signal(name=f"{name}_rest", reset_less=True)
        with m.If(enable):
            m.d.sync += [total.eq(x[0]), rest.eq(x[1])]
        return total, rest

    halves = [(value[1:].as_signed(), value[0]) for value in values]
    pairs = [register(add(*pair), enables[0], f"pair{i}") for i, pair in enumerate(zip(halves[::2], halves[1::2]))]
    return register(tree(pairs, add), enables[1], "total")
