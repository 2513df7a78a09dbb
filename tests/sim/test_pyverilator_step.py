"""PyVerilator opens a design and steps it."""

import pytest
from skipopu.sim import pyverilator_step
from skipopu.sim.pyverilator_step import open_interactive
from skipopu.sim.toolchain import ToolError

COUNTER = """
module counter(input clk, input rst, input en, input [69:0] wide, output reg [7:0] count, output reg [69:0] copy);
  always @(posedge clk) begin
    copy <= wide;
    if (rst) count <= 0; else if (en) count <= count + 1;
  end
endmodule
"""


def test_counter_steps_holds_and_wraps(tmp_path):
    sim = open_interactive(COUNTER, "counter")
    sim.io.rst = 1
    sim.clock.tick()
    sim.io.rst, sim.io.en = 0, 1
    seen = []
    for _ in range(257):
        sim.clock.tick()
        seen.append(int(sim.io.count))
    assert seen == [n % 256 for n in range(1, 258)]
    sim.io.en, sim.io.wide = 0, (1 << 69) | 5
    sim.clock.tick()
    assert (int(sim.io.count), int(sim.io.copy)) == (1, (1 << 69) | 5)


def test_missing_module_is_named():
    with pytest.raises(ValueError, match=r"expected a module named adder, the text has \['counter'\]"):
        open_interactive(COUNTER, "adder")


def test_missing_make_is_named(tmp_path, monkeypatch):
    (tmp_path / "g++").write_text("#!/bin/sh\n")
    (tmp_path / "g++").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ToolError, match=r"^make not found: install GNU make \(Debian/Ubuntu: apt install"):
        open_interactive(COUNTER, "counter")


def test_all_names_exist():
    assert all(hasattr(pyverilator_step, name) for name in pyverilator_step.__all__)
