"""Logic that moves into the blocks of the registers that take it: what moves, what stays, and that nothing changes."""

import random
import re

import pytest
from amaranth import Cat, ClockDomain, ClockSignal, Module, Mux, ResetSignal, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from skipopu.hw.sink import sink
from skipopu.hw.verilog import to_verilog
from skipopu.sim.pyverilator_step import open_interactive

TEXT = """module top(clk, rst, en, a, b, q, r, o);
  input clk;
  wire clk;
  input rst;
  input en;
  input [7:0] a;
  wire [7:0] a;
  input [7:0] b;
  output [7:0] q;
  reg [7:0] q = 8'h00;
  output [7:0] r;
  reg [7:0] r;
  output [7:0] o;
  wire [7:0] sum;
  wire [7:0] \\odd.name ;
  wire [7:0] once;
  wire [7:0] shown;
  wire [7:0] plain;
  wire [8:0] other;
  assign sum = a + b;
  assign \\odd.name  = sum ^ 8'h0f;
  assign once = a | b;
  assign shown = a & b;
  assign o = shown;
  assign plain = ~ a;
  assign other = a - b;
  always @(posedge clk, posedge rst)
    if (rst) q <= 8'h00;
    else if (en) q <= \\odd.name  + sum;
  always @(posedge clk)
    if (en) r <= once + shown + shown + plain + plain;
  always @(posedge clk)
    free <= other[7:0] + other[8:1];
endmodule
"""


def test_what_sinks_and_what_stays():
    found = sink(TEXT)
    task, rest = re.match(r"(.*)  task automatic sunk_1;\n.*?  endtask\n(.*)", found, re.S).groups()
    # One use, a port, next to nothing, no enable.
    assert re.findall(r"assign (\w+)", task + rest) == ["once", "shown", "o", "plain", "other"]
    assert "sum" not in task + rest and "odd.name" not in task + rest
    body = found[found.index("task"):found.index("endtask")]
    assert re.findall(r"reg \[7:0\] (\S+)", body) == ["sum", "\\odd.name"]
    assert body.index("sum = a + b;") < body.index("\\odd.name  = sum ^ 8'h0f;") < body.index("q <= \\odd.name  + sum;")
    assert ("  always @(posedge clk, posedge rst)\n  if (rst) begin\n    q <= 8'h00;\n  end else\n"
            "  if (en) sunk_1;\n") in rest
    assert "  always @(posedge clk)\n    if (en) r <= once + shown + shown + plain + plain;\n" in rest


def test_registers_of_one_group_share_a_block():
    text = TEXT.replace("if (en) r <= once + shown + shown + plain + plain;", "if (en) r <= sum;").replace(
        "@(posedge clk, posedge rst)\n    if (rst) q <= 8'h00;\n    else if", "@(posedge clk)\n    if")
    found = sink(text)
    assert found.count("endtask") == 1 and found.count("if (en)") == 1
    assert re.search(r"    q <= .*;\n    r <= sum;\n", found)
    # Of another group, or of another block too: it stays.
    assert "endtask" not in sink(TEXT.replace("free <= other[7:0]", "free <= sum"))


def test_wide_values_stay():
    assert "endtask" not in sink(TEXT.replace("wire [7:0] sum", "wire [64:0] sum"))
    assert "endtask" in sink(TEXT.replace("wire [7:0] sum", "wire [63:0] sum"))


def test_upper_bits_that_nothing_drives_are_left_out():
    text = TEXT.replace("wire [7:0] once", "wire [9:0] once").replace("assign once ", "assign once[7:0] ")
    found = sink(text.replace("<= once +", "<= once[7:0] +"))
    assert "  wire [7:0] once ;\n" in found and "  assign once  = a | b;\n" in found
    assert "  assign once[7:0] = a | b;\n" in sink(text)  # all of it is taken
    assert "  assign once[7:0] = a | b;\n" in sink(text.replace("<= once +", "<= once[8] +"))


class Mixed(wiring.Component):
    """Registers with and without enable and reset, that take shared, chained and partly driven values."""

    def __init__(self, seed):
        self.seed = seed
        super().__init__({"clk": In(1), "rst": In(1), "x": In(16), "y": In(16), "en": In(4), "out": Out(16 * 8)})

    def elaborate(self, platform):
        m, chance = Module(), random.Random(self.seed)
        m.domains.sync = ClockDomain(async_reset=True)
        m.d.comb += [ClockSignal().eq(self.clk), ResetSignal().eq(self.rst)]
        registers = [Signal(16, name=f"q{i}", init=i, reset_less=bool(i % 3 == 0)) for i in range(8)]
        values = [self.x, self.y, *registers]
        for index in range(40):
            a, b, c = (chance.choice(values) for _ in range(3))
            value = Signal(16, name=f"v{index}")
            m.d.comb += value.eq(chance.choice([a + b, a ^ b, a - c, Mux(c[3], a, b), a * b, Cat(a[4:], b[:4]),
                                                (a << 1) | c.any(), a >> b[:3]]))
            if index % 5 == 0:
                with m.If(a[index % 16]):
                    m.d.comb += value[4:9].eq(b[:5])
            values.append(value)
        shared = [Signal(16, name=f"shared{i}") for i in range(4)]
        m.d.comb += [signal.eq(values[-1 - i] + chance.choice(values)) for i, signal in enumerate(shared)]
        for index, register in enumerate(registers):
            with m.If(self.en[index % 4]):
                m.d.sync += register.eq(shared[index % 4] ^ (chance.choice(values[-20:]) & shared[index % 4]))
        m.d.comb += self.out.eq(Cat(registers))
        return m


@pytest.mark.parametrize("seed", range(2))
def test_nothing_changes(seed, tmp_path):
    texts = {}
    for sunk in (False, True):
        top = Mixed(seed)
        ports = {name: (getattr(top, name), None) for name in ("clk", "rst", "x", "y", "en", "out")}
        texts[sunk] = to_verilog(top, name="mixed", ports=ports, sunk=sunk)
    assert "endtask" in texts[True] and "endtask" not in texts[False]
    outputs = []
    for sunk, text in texts.items():
        sim, chance, seen = open_interactive(text, "mixed", folder=tmp_path / f"{sunk}"), random.Random(1), []
        for cycle in range(200):
            sim.io.rst = int(cycle in (0, 90))
            for name, bits in (("x", 16), ("y", 16), ("en", 4)):
                setattr(sim.io, name, chance.getrandbits(bits))
            sim.clock.tick()
            seen.append(int(sim.io.out))
        outputs.append(seen)
    assert outputs[0] == outputs[1] and len(set(outputs[0])) > 150
