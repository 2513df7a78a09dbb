"""The DSP48E2 slice: one description, as a behavioural model and as the primitive of Xilinx UltraScale(+) devices.

Only what the PE array and the KV buffer need (`dot.py`, `kvbuf.py`) exists, and anything else is refused: the
multiplier always takes the pre-adder's sum, and the ALU adds or subtracts. Names and encodings are those of AMD's user
guide UG579.

          A ─[a]─┐ INMODE                              OPMODE    ALUMODE
          D ─[d]─┴─(D + A)─[ad]─┐                  X, Y = M ─┐
          B ─[b]────────────────┴─(27 x 18)─[m]─── W = 0, C ─┼─ Z ± (W + X + Y) ─[p]─ P, PCOUT
          C ─[c]────────────────────────────────── Z = 0, PCIN ┘
"""

from amaranth.hdl import C, Cat, ClockSignal, Instance, Module, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from ..emission import Emission

__all__ = ["ADD", "INMODE_D_PLUS_A", "SUBTRACT", "W_C", "W_ZERO", "XY_M", "Z_PCIN", "Z_ZERO", "Dsp48e2"]

_TARGETS = (None, "generic", "dsp48e2")

INMODE_D_PLUS_A = 0b00100
XY_M = 0b00_000_01_01  #: X and Y multiplexers: the product (its two partial sums)
W_ZERO, W_C = 0b00_000_00_00, 0b11_000_00_00
Z_ZERO, Z_PCIN = 0b00_000_00_00, 0b00_001_00_00
ADD, SUBTRACT = 0b0000, 0b0011  #: ALUMODE: Z + (W + X + Y), Z - (W + X + Y)

_OPMODES = {w | XY_M | z for w in (W_ZERO, W_C) for z in (Z_ZERO, Z_PCIN)}
_REGISTERS = {"a": 1, "b": 2, "c": 1, "d": 1, "ad": 1, "m": 1, "p": 1}


class Dsp48e2(wiring.Component):
    """A multiplication of a sum, and an addition: ``p = z ± (w + (a + d) * b)``, modulo 2^48.

    Members
    -------
    a, d : signed(27), pre-adder; their sum wraps modulo 2^27 as in the slice, keep it within 27 bits
    b : signed(18)
    c : signed(48), `c_latency` cycles before its result
    pcin : signed(48), one cycle before its result if ``p`` is registered; only from another slice's ``pcout``
    p, pcout : signed(48), `latency` cycles after ``a``, ``b`` and ``d``; the same value, ``pcout`` for the cascade only
    en : In(2), only if ``enabled``: the registers of operands advance with bit 0, that of the result with bit 1

    Otherwise every register advances in every cycle; none is reset.

    Parameters
    ----------
    opmode : XY_M | (W_ZERO or W_C) | (Z_ZERO or Z_PCIN)
    alumode : ADD or SUBTRACT
    inmode : INMODE_D_PLUS_A
    registers : dict of pipeline registers a, b, c, d, ad, m, p that differ from the fully pipelined slice
    enabled : the registers have enables; then there are none between operands and result
    target : "generic" (its behaviour), "dsp48e2" (the primitive), or None: what the `Emission` asks for

    Raises ValueError for anything else, and when the two operands of the multiplier would not meet.
    """

    def __init__(self, *, opmode=XY_M, alumode=ADD, inmode=INMODE_D_PLUS_A, registers=None, enabled=False,
                 target=None):
        self.registers = {**_REGISTERS, **(registers or {})}
        if target not in _TARGETS:
            raise ValueError(f"target must be None, generic or dsp48e2, not {target!r}")
        if opmode not in _OPMODES:
            raise ValueError(f"opmode must be X = Y = M, W = 0 or C, Z = 0 or PCIN "
                             f"({', '.join(f'{mode:09b}' for mode in sorted(_OPMODES))}), not {opmode:09b}")
        if alumode not in (ADD, SUBTRACT):
            raise ValueError(f"alumode must be {ADD:04b} (add) or {SUBTRACT:04b} (subtract), not {alumode:04b}")
        if inmode != INMODE_D_PLUS_A:
            raise ValueError(f"inmode must be {INMODE_D_PLUS_A:05b} (D + A), not {inmode:05b}")
        for name, count in self.registers.items():
            if name not in _REGISTERS:
                raise ValueError(f"registers are {', '.join(_REGISTERS)}, not {name!r}")
            if count not in range(_REGISTERS[name] + 1):
                raise ValueError(f"register {name} must be 0..{_REGISTERS[name]}, not {count}")
        stages = self.registers
        if stages["a"] != stages["d"]:
            raise ValueError(f"operands must meet in the pre-adder: registers a = d, "
                             f"not {stages['a']} and {stages['d']}")
        if stages["b"] != stages["a"] + stages["ad"]:
            raise ValueError(f"operands must meet in the multiplier: registers b = a + ad, not {stages['b']} and "
                             f"{stages['a']} + {stages['ad']}")
        if enabled and (stages["ad"] or stages["m"]):
            raise ValueError(f"with enables there must be no registers between operands and result, "
                             f"not ad = {stages['ad']}, m = {stages['m']}")
        self.opmode, self.alumode, self.inmode, self.target = opmode, alumode, inmode, target
        self.enabled = enabled
        super().__init__({
            "a": In(signed(27)), "b": In(signed(18)), "c": In(signed(48)), "d": In(signed(27)), "pcin": In(signed(48)),
            "p": Out(signed(48)), "pcout": Out(signed(48)), **({"en": In(2)} if enabled else {}),
        })

    @property
    def latency(self):
        """Cycles from ``a``, ``b``, ``d`` to ``p``."""
        return self.registers["b"] + self.registers["m"] + self.registers["p"]

    @property
    def c_latency(self):
        """Cycles from ``c`` to ``p``."""
        return self.registers["c"] + self.registers["p"]

    def elaborate(self, platform):
        m = Module()
        asked = isinstance(platform, Emission) and platform.primitives
        if self.target == "dsp48e2" or asked and self.target is None:
            m.submodules.slice = self._primitive()
        else:
            self._behaviour(m)
        return m

    def _behaviour(self, m):
        def stage(value, width, name):
            """``value`` cut to ``width`` bits behind the registers called ``name``."""
            for index in range(self.registers[name]):
                register = Signal(signed(width), name=f"{name}{index + 1}", reset_less=True)
                with m.If(self.en[name == "p"] if self.enabled else 1):
                    m.d.sync += register.eq(value)
                value = register
            cut = Signal(signed(width), name=f"{name}_out")
            m.d.comb += cut.eq(value)
            return cut

        multiplicand = stage(stage(self.a, 27, "a") + stage(self.d, 27, "d"), 27, "ad")
        product = stage(multiplicand * stage(self.b, 18, "b"), 45, "m")
        w = stage(self.c, 48, "c") if self.opmode & W_C == W_C else C(0)
        z = self.pcin if self.opmode & Z_PCIN else C(0)
        total = w + product
        result = stage(z - total if self.alumode == SUBTRACT else z + total, 48, "p")
        m.d.comb += [self.p.eq(result), self.pcout.eq(result)]

    def _primitive(self):
        stages = self.registers
        enables = ("A1", "A2", "AD", "ALUMODE", "B1", "B2", "C", "CARRYIN", "CTRL", "D", "INMODE", "M", "P")
        resets = ("A", "ALLCARRYIN", "ALUMODE", "B", "C", "CTRL", "D", "INMODE", "M", "P")
        return Instance(
            "DSP48E2",
            p_AMULTSEL="AD", p_BMULTSEL="B", p_PREADDINSEL="A", p_A_INPUT="DIRECT", p_B_INPUT="DIRECT",
            p_USE_MULT="MULTIPLY", p_USE_SIMD="ONE48", p_USE_WIDEXOR="FALSE", p_USE_PATTERN_DETECT="NO_PATDET",
            p_AREG=stages["a"], p_ACASCREG=stages["a"], p_BREG=stages["b"], p_BCASCREG=stages["b"],
            p_CREG=stages["c"], p_DREG=stages["d"], p_ADREG=stages["ad"], p_MREG=stages["m"], p_PREG=stages["p"],
            # Constant controls need no registers.
            p_INMODEREG=0, p_OPMODEREG=0, p_ALUMODEREG=0, p_CARRYINREG=0, p_CARRYINSELREG=0,
            i_CLK=ClockSignal(), i_INMODE=C(self.inmode, 5), i_OPMODE=C(self.opmode, 9), i_ALUMODE=C(self.alumode, 4),
            i_CARRYIN=C(0, 1), i_CARRYINSEL=C(0, 3), i_CARRYCASCIN=C(0, 1), i_MULTSIGNIN=C(0, 1),
            i_ACIN=C(0, 30), i_BCIN=C(0, 18), i_A=Cat(self.a, self.a[-1].replicate(3)), i_B=self.b, i_C=self.c,
            i_D=self.d, i_PCIN=self.pcin if self.opmode & Z_PCIN else C(0, 48), o_P=self.p, o_PCOUT=self.pcout,
            **{f"i_CE{name}": self.en[name == "P"] if self.enabled else C(1, 1) for name in enables},
            **{f"i_RST{name}": C(0, 1) for name in resets})
