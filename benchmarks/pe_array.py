"""The PE array against its targets, the paper and a conventional FP16 dot product.

Resources are Yosys's estimate after mapping, from `skipopu synth`; both sides go through the same flow. The unit's LUTs
hold its share of the alignment of both operands. The conventional side is `skipopu.bitstream.baseline`.
"""

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from common import machine
from skipopu.bitstream.estimate import estimate
from skipopu.bitstream.synth import TARGETS, SynthesisError
from skipopu.hw.blocks.array import PeArray
from skipopu.hw.config import PRESETS, ConfigError, preset
from skipopu.hw.verilog import YosysError, to_verilog
from skipopu.sim.lint import lint
from skipopu.sim.toolchain import ToolError


@dataclass(frozen=True)
class Line:
    """One line: our value, the conventional one, what the paper has, what is asked for, how ours was found."""

    name: str
    ours: float
    rival: float | None = None
    form: str = "{:,.0f}"
    paper: str = ""
    least: float | None = None
    aim: float | None = None
    better: Callable[[float, float], bool] = float.__le__
    how: str = "estimated"

    def cells(self):
        """name, ours, conventional, paper, at least, aim, verdict, how."""
        def show(value):
            return "" if value is None else self.form.format(value)

        verdict = "" if self.least is None else "MISSED"
        for asked, word in ((self.least, "met"), (self.aim, "aim met")):
            if asked is not None and self.better(float(self.ours), float(asked)):
                verdict = word
        return (self.name, show(self.ours), show(self.rival), self.paper, show(self.least), show(self.aim), verdict,
                self.how)


def show(lines):
    """Print the lines as one table."""
    table = [("", "ours", "conventional", "paper", "at least", "aim", "", ""), *(line.cells() for line in lines)]
    widths = [max(map(len, column)) for column in zip(*table)]
    for name, *cells in table:
        line = "  ".join([f"{name:<{widths[0]}}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths[1:-1])),
                          cells[-1]])
        print("  " + line.rstrip())


def lines(unit, array, rival):
    """The table of estimates of the unit, the whole array and the conventional dot product."""
    per_dsp = unit["products_per_cycle"] / unit["dsps"]
    ratio = unit["luts_per_product"] / unit["baseline_luts_per_product"] - 1
    shared = sum(part["count"] * part["luts"] for part in unit["parts"] if part["count"] < 1)
    more, less = float.__ge__, float.__le__
    yield Line("FP16 x FP16 products per DSP and cycle", per_dsp, rival["products_per_cycle"] / rival["dsps"], "{:g}",
               "2", 2, 2, more, "counted")
    yield Line("INT4 x FP16 products per DSP and cycle", per_dsp, None, "{:g}", "2", 2, 3, more, "counted")
    yield Line("packing error", 0, None, "{:g}", "not zero", 0, 0, less, "proven (tests/hw/test_dot_proof.py)")
    yield Line("error of a dot product of 64, mean relative", unit["error_mean_relative"],
               unit["baseline_error_mean_relative"], "{:.4%}", "0.116%", 0.0005, 0.0001, less, "measured")
    yield Line("  the same with FP16 adders in a cascade", unit["error_mean_relative"],
               unit["errors"]["cascade"]["mean_relative"], "{:.4%}", "0.490%", how="measured")
    yield Line("LUTs against the conventional dot product", ratio, None, "{:+.1%}", "-57.2%", -0.7, -0.85, less)
    yield Line("LUTs per product", unit["luts_per_product"], unit["baseline_luts_per_product"], "{:.1f}")
    yield Line("  of these, alignment", shared / unit["products_per_cycle"], 0, "{:.1f}")
    yield Line("FFs per product", unit["ffs"] / unit["products_per_cycle"], rival["ffs"] / rival["products_per_cycle"],
               "{:.1f}")
    yield Line("LUTs of the whole array", array["luts"])
    yield Line("  of the largest device", array["luts"] / array["device_luts"], None, "{:.1%}", "< 98.85%", 0.4, 0.2,
               less)
    yield Line("DSPs of the whole array", array["dsps"], None, "{:,.0f}", "4,096", how="counted")


def verilog_lines(config):
    """The array's way to Verilog, which must lint clean (ToolError otherwise)."""
    def spent():
        return sum(os.times()[:4])

    begin = spent()
    text = to_verilog(PeArray(config=config), name="pe_array", flatten=False)
    made = spent()
    yield Line("array to Verilog, s of a processor", made - begin, None, "{:.0f}", "", 60, how="measured")
    with tempfile.TemporaryDirectory() as folder:
        lint(Path(folder), text, "pe_array")
    yield Line("  lints clean in, s of a processor", spent() - made, None, "{:.0f}", how="measured")


def main():
    """Estimate and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="u280", help=f"{', '.join(PRESETS)} (default: %(default)s)")
    parser.add_argument("--target", default="xcup", help=f"{', '.join(TARGETS)} (default: %(default)s)")
    parser.add_argument("--no-verilog", action="store_true", help="leave out elaboration and lint")
    options = parser.parse_args()
    config = preset(options.config)

    def log(stage):
        print(f"\r\x1b[K{stage}", end="", file=sys.stderr, flush=True)

    unit, array, rival = (estimate(name, config.name, options.target, log if sys.stderr.isatty() else None)
                          for name in ("pe-unit", "pe-array", "baseline"))
    print(f"PE array of {config.lanes} lanes x {config.columns} columns ({config.name}), {options.target}; {machine()}")
    table = list(lines(unit, array, rival))
    if not options.no_verilog:
        table += verilog_lines(config)
    show(table)


if __name__ == "__main__":
    try:
        main()
    except (SynthesisError, ConfigError, YosysError, ToolError) as error:
        sys.exit(f"error: {error}")
