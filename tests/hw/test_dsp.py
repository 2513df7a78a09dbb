"""The DSP slice: its model is the documented arithmetic for every input, its primitive has the same ports."""

import random
import re

import pytest
from amaranth.back import rtlil
from amaranth.sim import Simulator
from proof import prove
from skipopu.hw.blocks.dsp import ADD, SUBTRACT, W_C, W_ZERO, XY_M, Z_PCIN, Z_ZERO, Dsp48e2
from skipopu.hw.verilog import to_rtlil

NONE = dict.fromkeys(("a", "b", "c", "d", "ad", "m", "p"), 0)
MODES = {(w, z, alu): dict(opmode=w | XY_M | z, alumode=alu)
         for w in (W_ZERO, W_C) for z in (Z_ZERO, Z_PCIN) for alu in (ADD, SUBTRACT)}
PIPELINES = [NONE, {}, {**NONE, "m": 1}, {**NONE, "p": 1}, {"ad": 0, "b": 1}, {"a": 0, "d": 0, "b": 1}, {"c": 0}]

PROOF = """
module proof(input clk, input signed [26:0] a, d, input signed [17:0] b, input signed [47:0] c, pcin);
  {registers}
  wire signed [26:0] ad = a{ab} + d{ab};
  wire signed [44:0] product = ad * b{ab};
  wire signed [47:0] expected = {z} {sign} ({w} + product);
  wire signed [47:0] p, pcout;
  dut dut ({clock} .a(a), .b(b), .c(c), .d(d), .pcin(pcin), .p(p), .pcout(pcout));
  always @* begin assert(p == {result}); assert(pcout == {result}); end
endmodule
"""


def proof_text(mode, dsp):
    """UG579: P = Z + (W + X + Y) or Z - (W + X + Y), X + Y = M = B * (D + A), W and Z as the multiplexers say."""
    w, z, alumode = mode
    lines, names = [], {}
    ports = (("a", 27, dsp.latency), ("b", 18, dsp.latency), ("d", 27, dsp.latency), ("c", 48, dsp.c_latency),
             ("pcin", 48, dsp.registers["p"]))
    for port, width, cycles in ports:
        names[port] = port
        for age in range(1, cycles + 1):
            lines.append(f"reg signed [{width - 1}:0] {port}_{age}; "
                         f"always @(posedge clk) {port}_{age} <= {names[port]};")
            names[port] = f"{port}_{age}"
    assert names["a"][1:] == names["b"][1:] == names["d"][1:]
    clocked = any(dsp.registers.values())
    return PROOF.format(registers="\n  ".join(lines), ab=names["a"][1:], z=names["pcin"] if z == Z_PCIN else "48'sd0",
                        w=names["c"] if w == W_C else "48'sd0", sign="-" if alumode == SUBTRACT else "+",
                        clock=".clk(clk), .rst(1'b0)," if clocked else "", result="expected")


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(f"{part:x}" for part in mode))
def test_arithmetic_of_every_mode_is_the_documented_one(mode, tmp_path):
    """All 168 input bits at once: the multipliers of both sides merge, what is left for SAT is all around them."""
    dsp = Dsp48e2(**MODES[mode], registers=NONE)
    prove(tmp_path, {"dut": dsp}, proof_text(mode, dsp))


@pytest.mark.parametrize("registers", PIPELINES, ids=str)
@pytest.mark.parametrize("mode", [(W_C, Z_PCIN, SUBTRACT), (W_ZERO, Z_ZERO, ADD)], ids=["subtract", "add"])
def test_every_port_reaches_the_result_after_its_documented_cycles(mode, registers, tmp_path):
    """From any state of the registers. The product is an opaque bijection of its operands here: its value is the
    subject of the proof above, the way of each operand bit through the registers of this one."""
    dsp = Dsp48e2(**MODES[mode], registers=registers)
    skip = max(dsp.latency, dsp.c_latency)
    prove(tmp_path, {"dut": dsp}, proof_text(mode, dsp), skip=skip, opaque=True)


def test_a_wrong_claim_is_refuted(tmp_path):
    mode = (W_C, Z_PCIN, SUBTRACT)
    dsp = Dsp48e2(**MODES[mode], registers=NONE)
    with pytest.raises(AssertionError, match="FAIL"):
        prove(tmp_path, {"dut": dsp}, proof_text((W_C, Z_PCIN, ADD), dsp))


def test_simulates_at_full_rate():
    """One new operation a cycle, corners of every operand first, then random ones."""
    dsp = Dsp48e2(opmode=W_C | XY_M | Z_ZERO, alumode=SUBTRACT)
    generator = random.Random(1)
    widths = {"a": 27, "b": 18, "c": 48, "d": 27}
    rows = [{port: generator.choice([-1 << width - 1, -1, 0, 1, (1 << width - 1) - 1]) if row < 50
             else generator.randrange(-1 << width - 1, 1 << width - 1) for port, width in widths.items()}
            for row in range(150)]

    def wrap(value, width):
        return (value + (1 << width - 1)) % (1 << width) - (1 << width - 1)

    async def bench(context):
        for cycle in range(len(rows) + dsp.latency):
            for port, age in (("a", 0), ("b", 0), ("d", 0), ("c", dsp.latency - dsp.c_latency)):
                if 0 <= cycle - age < len(rows):
                    context.set(getattr(dsp, port), rows[cycle - age][port])
            if cycle >= dsp.latency:
                row = rows[cycle - dsp.latency]
                expected = wrap(-row["c"] - wrap(row["a"] + row["d"], 27) * row["b"], 48)
                assert (context.get(dsp.p), context.get(dsp.pcout)) == (expected, expected), (cycle, row)
            await context.tick()

    simulator = Simulator(dsp)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()


def test_enabled_registers_hold():
    """Operands and result advance with an enable each."""
    dsp = Dsp48e2(opmode=W_C | XY_M, registers={"b": 1, "ad": 0, "m": 0}, enabled=True)
    assert dsp.latency == dsp.c_latency == 2
    generator = random.Random(2)

    async def bench(context):
        held, result = None, None
        for _ in range(200):
            a, b, c, d = (generator.randrange(-1 << width - 2, 1 << width - 2) for width in (27, 18, 47, 27))
            en = generator.randrange(4)
            for port, value in ((dsp.a, a), (dsp.b, b), (dsp.c, c), (dsp.d, d), (dsp.en, en)):
                context.set(port, value)
            await context.tick()
            result = held if en & 2 else result
            held = c + (a + d) * b if en & 1 else held
            assert result is None or context.get(dsp.p) == result

    simulator = Simulator(dsp)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()


def test_primitive_has_the_same_ports_and_its_settings():
    for mode in MODES.values():
        generic, primitive = Dsp48e2(**mode), Dsp48e2(**mode, target="dsp48e2")
        assert generic.signature == primitive.signature
        assert (generic.latency, generic.c_latency) == (primitive.latency, primitive.c_latency) == (4, 2)
        text = rtlil.convert(primitive, name="top", emit_src=False)
        assert to_rtlil(Dsp48e2(**mode), name="top", primitives=True) == text
        assert " \\DSP48E2 " not in to_rtlil(Dsp48e2(**mode), name="top")
        assert text.count(r"cell \DSP48E2 ") == 1
        assert not re.search(r"cell \$(mul|add|sub|dff)", text)
        settings = dict(re.findall(r"parameter \\?(?:signed )?\\(\w+) (\S+)", text))
        assert settings["AMULTSEL"] == '"AD"'
        for register, count in generic.registers.items():
            value = settings[f"{register.upper()}REG"]
            assert int(value.split("'")[-1], 2 if "'" in value else 10) == count, register
        ports = dict(re.findall(r"connect \\(\w+) (\S+)", text))
        assert ports["OPMODE"] == f"9'{mode['opmode']:09b}" and ports["ALUMODE"] == f"4'{mode['alumode']:04b}"


def test_enables_of_the_primitive():
    dsp = Dsp48e2(registers={"b": 1, "ad": 0, "m": 0}, enabled=True, target="dsp48e2")
    ports = dict(re.findall(r"connect \\(\w+) (.+)", rtlil.convert(dsp, name="top", emit_src=False)))
    assert {name: ports[f"CE{name}"] for name in ("A1", "B1", "C", "D")} == dict.fromkeys(
        ("A1", "B1", "C", "D"), r"\en [0]")
    assert ports["CEP"] == r"\en [1]"


@pytest.mark.parametrize("settings, message", [
    (dict(target="ecp6"), "target must be None, generic or dsp48e2, not 'ecp6'"),
    (dict(opmode=0b000110101), "opmode must be X = Y = M, W = 0 or C, Z = 0 or PCIN .*, not 000110101"),
    (dict(opmode=0), "not 000000000"),
    (dict(alumode=1), r"alumode must be 0000 \(add\) or 0011 \(subtract\), not 0001"),
    (dict(inmode=0b01100), r"inmode must be 00100 \(D \+ A\), not 01100"),
    (dict(registers={"a": 2}), "register a must be 0..1, not 2"),
    (dict(registers={"x": 1}), "registers are a, b, c, d, ad, m, p, not 'x'"),
    (dict(registers={"d": 0}), "must meet in the pre-adder: registers a = d, not 1 and 0"),
    (dict(enabled=True), "no registers between operands and result, not ad = 1, m = 1"),
    (dict(registers={"ad": 0}), r"must meet in the multiplier: registers b = a \+ ad, not 2 and 1 \+ 0"),
])
def test_refuses_what_the_lanes_do_not_need(settings, message):
    with pytest.raises(ValueError, match=message):
        Dsp48e2(**settings)
