"""Proofs by SAT: a property in Verilog about components, for every input."""

import subprocess
import sys

from amaranth.back import rtlil

__all__ = ["prove"]

_RUNNER = """
import sys
from pyosys import libyosys as ys
design = ys.Design()
for command in sys.argv[1:]:
    ys.run_pass(command, design)
"""

# In place of a multiplier: a bijection that passes every bit of both operands on and keeps any carry out of the proof.
_OPAQUE = """
(* techmap_celltype = "$mul" *)
module opaque #(parameter A_SIGNED = 1, B_SIGNED = 1, A_WIDTH = 27, B_WIDTH = 18, Y_WIDTH = 45)
               (input [A_WIDTH-1:0] A, input [B_WIDTH-1:0] B, output [Y_WIDTH-1:0] Y);
  assign Y = {B, A};
  wire _TECHMAP_FAIL_ = A_WIDTH != 27 || B_WIDTH != 18 || Y_WIDTH != 45;
endmodule
"""


def prove(folder, components, verilog, *, skip=None, opaque=False):
    """Raise AssertionError, with the counterexample, unless the assertions of module ``proof`` hold for all inputs.

    folder : pathlib.Path for the intermediate files
    components : dict of module name to component, instantiated by ``verilog``
    skip : None for combinational logic; otherwise the assertions hold in cycle ``skip`` after any state whatever,
        which is the whole proof for a pipeline without feedback of at most ``skip`` stages
    opaque : replace 27 x 18 multipliers by an opaque bijection (the proof then is of what surrounds them)
    """
    commands = []
    for name, component in components.items():
        (folder / f"{name}.il").write_text(rtlil.convert(component, name=name, emit_src=False))
        commands.append(f"read_rtlil {folder / name}.il")
    (folder / "proof.v").write_text(verilog)
    (folder / "opaque.v").write_text(_OPAQUE)
    commands += [f"read_verilog -formal {folder / 'proof.v'}", "hierarchy -check -top proof", "proc", "flatten",
                 "opt -full", "wreduce", "opt -full"]
    if opaque:
        commands += [f"techmap -map {folder / 'opaque.v'}", "select -assert-none t:$mul", "opt -full"]
    time = "" if skip is None else f"-seq {skip + 1} -prove-skip {skip}"
    commands += ["select -assert-min 1 t:$assert t:$check", "chformal -lower",
                 f"sat {time} -prove-asserts -verify -show-public -timeout 120 proof"]
    done = subprocess.run([sys.executable, "-c", _RUNNER, *commands], capture_output=True, text=True, check=False)
    proven = "SAT proof finished - no model found: SUCCESS!" in done.stdout
    assert done.returncode == 0 and proven, (done.stdout + done.stderr)[-3000:]
