"""Exact dot products of aligned mantissas with the words of two columns, in the multipliers of each device.

A word is a weight code 0..15, for mantissas of 16 bits, or a mantissa of a key or value, -4094..4094, for those of 15
bits: one arithmetic for both, so that a row may change its kind from cycle to cycle.

DSP48E2: two products per slice, four slices per cascade
--------------------------------------------------------
    A + D = k0 + k1 * 2^14                  26          14 13              0
                                            [     k1      ][ sign of k0 ...]  + k0
    sum over a cascade of m * (A + D)       42          29 28              0
      = S0 + S1 * 2^14                      [ S1, 29 bits from bit 14 on    ]
                                                          [ S0, 29 bits     ]

The sums overlap in 15 bits. Fabric forms low = -S1 modulo 2^15, one Booth digit of k1 per carry chain; the last slice
adds it through its C port, another one adds 2^28, so that the lower field is never negative and nothing borrows:

    P = S0 + 2^28 + H * 2^29                42          29 28              0
    with S1 = H * 2^15 - low                [  H, 14 bits ][ S0 + 2^28     ]

Exact for all that alignment makes (`docs/numerics.md`): |m| <= 16383 with |k| <= 4094, |m| <= 32767 with codes. The
lanes of a cascade enter one cycle after each other (`skew`); then the sums of the cascades are added.

MULT18X18D, generic: all in one expression. Boards with the first are slow enough for it; a simulator likes it.
"""

from amaranth.hdl import C, Cat, Module, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..config import DSPS, ConfigError
from ..formats import ATTENTION_BITS, KV_BITS, KV_LARGEST, MANTISSA_BITS
from .dsp import W_C, W_ZERO, XY_M, Z_PCIN, Z_ZERO, Dsp48e2
from .trees import tree, tree_sum

__all__ = [
    "BIAS_BITS", "CASCADE", "DOT_BITS", "BoothRow", "DotPair", "Fields", "LowLane", "dot_latency", "skew", "word_bits",
]

DOT_BITS = 32
BIAS_BITS = 25
CASCADE = 4  #: slices whose results add up within the DSP column
_SHIFT = 27 - KV_BITS  # distance of the two words: they fill the pre-adder
_FIELD = ATTENTION_BITS + KV_BITS - 1 + (CASCADE - 1).bit_length()  # of the lower sum
_LOW = _FIELD - _SHIFT
_SPLIT = 6  # places of the Booth digits that one sum takes; another one takes the rest
_PIPELINED = 8


def skew(dsp, lane):
    """Cycles by which the operands of a lane follow those of lane 0."""
    return lane % CASCADE if dsp == "dsp48e2" else 0


def word_bits(dsp):
    """Width of operands: what they need, or the machine word of a simulator."""
    return DOT_BITS if dsp == "generic" else KV_BITS


def dot_latency(dsp):
    """Cycles from the operands of lane 0 to the dot products."""
    return _PIPELINED if dsp == "dsp48e2" else 1


class DotPair(wiring.Component):
    """Dot products of one block of mantissas with the words of two columns; new operands in every cycle.

    Members
    -------
    en : not with "dsp48e2": mantissas are valid
    mantissa, word : per lane, and per column and lane, `skew` cycles after those of lane 0; mantissas are of
        ATTENTION_BITS unless all words are 0..15
    bias : added to both; not 0 only while all words are 0..15
    dot : signed(32) per column, `dot_latency` cycles later

    lanes : of the block; dsp : one of DSPS
    Raises ConfigError when lanes do not fill cascades or their sums do not fit.
    """

    def __init__(self, *, lanes, dsp="generic"):
        mantissa = (1 << ATTENTION_BITS - 1) - 1
        relations = [
            (dsp in DSPS, f"dsp must be one of {', '.join(DSPS)}, not {dsp!r}"),
            (lanes >= 1 and lanes % CASCADE == 0, f"lanes of a block must be a multiple of {CASCADE}, not {lanes}"),
            (lanes * mantissa * KV_LARGEST < 1 << DOT_BITS - 1,
             f"lanes * {mantissa} * {KV_LARGEST} must be below 2^{DOT_BITS - 1}, which {lanes} lanes exceed"),
        ]
        for holds, message in relations:
            if not holds:
                raise ConfigError(message)
        self.lanes, self.dsp = lanes, dsp
        bits = word_bits(dsp)
        members = {"mantissa": In(signed(max(bits, MANTISSA_BITS))).array(lanes),
                   "word": In(signed(bits)).array(2, lanes), "bias": In(signed(BIAS_BITS)),
                   "dot": Out(signed(DOT_BITS)).array(2)}
        super().__init__(({} if dsp == "dsp48e2" else {"en": In(1)}) | members)

    def elaborate(self, platform):
        m = Module()
        {"generic": self._words, "dsp48e2": self._cascades, "mult18x18d": self._products}[self.dsp](m)
        return m

    def _words(self, m):
        """Modulo 2^32 throughout: exact, and no wider than a simulator's registers."""
        def add(a, b):
            return (a + b)[:DOT_BITS]

        for column in range(2):
            dot = Signal(signed(DOT_BITS), name=f"total{column}", reset_less=True)
            products = [(a * b)[:DOT_BITS] for a, b in zip(self.mantissa, self.word[column])]
            with m.If(self.en):
                m.d.sync += dot.eq(tree(products, add) + self.bias)
            m.d.comb += self.dot[column].eq(dot)

    def _products(self, m):
        for column in range(2):
            dot = Signal(signed(DOT_BITS), name=f"total{column}", reset_less=True)
            with m.If(self.en):
                m.d.sync += dot.eq(tree_sum(a * b for a, b in zip(self.mantissa, self.word[column])) + self.bias)
            m.d.comb += self.dot[column].eq(dot)

    def _cascades(self, m):
        results = [self._cascade(m, first) for first in range(0, self.lanes, CASCADE)]
        lows = [_register(m, low, f"low{i}") for i, (low, _) in enumerate(results)]
        fields = [[], []]
        for i, (_, p) in enumerate(results):
            m.submodules[f"fields{i}"] = split = Fields()
            m.d.comb += split.p.eq(p)
            fields[0].append(split.lower)
            fields[1].append(split.upper)

        def add_fours(values, name):
            return [_register(m, tree_sum(values[i:i + 4]), f"{name}_{i}") for i in range(0, len(values), 4)]

        low = _register(m, tree_sum(add_fours(lows, "low_sum")), "low_total")
        first, second = (tree_sum(add_fours(values, f"sum{column}")) for column, values in enumerate(fields))
        m.d.comb += [
            self.dot[0].eq(_register(m, first, "dot0")),
            self.dot[1].eq(_register(m, ((second << _LOW) - low)[:DOT_BITS].as_signed(), "dot1")),
        ]

    def _cascade(self, m, first):
        """(low, P): valid `CASCADE` cycles after the operands of the first lane, and two cycles later."""
        upper, lower = C(0, _LOW) if first else (-self.bias)[:_LOW], C(0, _LOW - _SPLIT)
        previous = None
        for place in range(CASCADE):
            lane = first + place
            mantissa, k0, k1 = self.mantissa[lane], self.word[0][lane], self.word[1][lane]
            takes_c = first == 0 or place % 2
            dsp = Dsp48e2(opmode=XY_M | (W_C if takes_c else W_ZERO) | (Z_PCIN if place else Z_ZERO),
                          registers={"a": 0, "d": 0, "b": 1})
            m.submodules[f"slice{lane}"] = dsp
            m.d.comb += [dsp.a.eq(k0), dsp.d.eq(k1 << _SHIFT), dsp.b.eq(mantissa)]
            if previous is not None:
                m.d.comb += dsp.pcin.eq(previous.pcout)
            if first == 0 and place in (0, 2):
                bias = _delay(m, self.bias, 1 + place, f"bias{place}")
                m.d.comb += dsp.c.eq(bias << _SHIFT if place else bias)
            if place == 1:
                m.d.comb += dsp.c.eq(1 << _FIELD - 1)
            previous = dsp
            m.submodules[f"low{lane}"] = low = LowLane()
            m.d.comb += [low.mantissa.eq(mantissa), low.word.eq(k1), low.upper_in.eq(upper), low.lower_in.eq(lower)]
            upper, lower = low.upper, low.lower
        total = Signal(_LOW, name=f"low_{first}")
        m.d.comb += [total.eq(Cat(upper[:_SPLIT], (upper[_SPLIT:] + lower)[:_LOW - _SPLIT])),
                     previous.c.eq(total << _SHIFT)]
        return total, previous.p


class Fields(wiring.Component):
    """The two fields in the result of a cascade (combinational).

    p : signed(48), S0 + 2^28 + H * 2^29; lower : S0; upper : H
    """

    def __init__(self):
        super().__init__({"p": In(signed(48)), "lower": Out(signed(_FIELD)), "upper": Out(signed(_SHIFT))})

    def elaborate(self, platform):
        m = Module()
        # The offset is the lower field's top bit: without it the field is signed.
        m.d.comb += [self.lower.eq(Cat(self.p[:_FIELD - 1], ~self.p[_FIELD - 1])),
                     self.upper.eq(self.p[_FIELD:_FIELD + _SHIFT])]
        return m


class BoothRow(wiring.Component):
    """``total = acc - digit * mantissa`` modulo 2^width, one LUT per bit in a carry chain (combinational).

    digit : three bits of a multiplier, the digit is -2 * digit[2] + digit[1] + digit[0]
    """

    def __init__(self, *, width):
        self.width = width
        super().__init__({"acc": In(width), "digit": In(3), "mantissa": In(width), "total": Out(width)})

    def elaborate(self, platform):
        m = Module()
        low, middle, high = self.digit
        # The complement of a multiple of the mantissa, and the missing one as the carry out of an extra place.
        one, negative = low ^ middle, ~high
        two = (high & ~middle & ~low) | (~high & middle & low)
        row = Signal(self.width)
        total = Signal(self.width + 1)
        m.d.comb += [
            row.eq(((one.replicate(self.width) & self.mantissa) | (two.replicate(self.width) & (self.mantissa << 1)))
                   ^ negative.replicate(self.width)),
            total.eq(Cat(C(1, 1), self.acc) + Cat(negative, row)), self.total.eq(total[1:]),
        ]
        return m


class LowLane(wiring.Component):
    """Subtracts the lower bits of mantissa * word from two sums, one cycle later.

    upper : 15 bits, takes the digits of word bits 0..5; lower : 9 bits that count 2^6, the other digits.
    The product is modulo 2^15 in upper + lower * 2^6.
    """

    def __init__(self):
        upper, lower = _LOW, _LOW - _SPLIT
        super().__init__({"mantissa": In(signed(MANTISSA_BITS)), "word": In(signed(KV_BITS)),
                          "upper_in": In(upper), "lower_in": In(lower), "upper": Out(upper), "lower": Out(lower)})

    def elaborate(self, platform):
        m = Module()
        digits = Cat(C(0, 1), self.word, self.word[-1])
        for name, value, target, places in (("upper", self.upper_in, self.upper, range(0, _SPLIT, 2)),
                                            ("lower", self.lower_in, self.lower, range(_SPLIT, KV_BITS, 2))):
            settled = []
            for place in places:
                width = _LOW - place
                m.submodules[f"row{place}"] = row = BoothRow(width=width)
                m.d.comb += [row.acc.eq(value), row.digit.eq(digits[place:place + 3]),
                             row.mantissa.eq(self.mantissa[:width])]
                settled.append(row.total[:2])
                value = row.total[2:]
            m.d.comb += target.eq(_register(m, Cat(*settled, value), name))
        return m


def _register(m, value, name):
    register = Signal.like(value, name=f"{name}_q", reset_less=True)
    m.d.sync += register.eq(value)
    return register


def _delay(m, value, cycles, name):
    for age in range(cycles):
        value = _register(m, value, f"{name}_{age}")
    return value
