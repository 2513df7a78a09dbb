"""The folder for AMD's tools, as far as it can be checked without them: lint, hierarchy, scripts, offsets, ports."""

import dataclasses
import json
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path
from xml.etree import ElementTree

import pytest
from skipopu.bitstream import alveo
from skipopu.bitstream.alveo import arguments, constraints, export, kernel_xml, link_config, package_script, placement
from skipopu.bitstream.boards import ALVEO, BoardError, alveo_board
from skipopu.host.cli import main
from skipopu.hw.config import preset
from skipopu.hw.kernel import KERNEL
from skipopu.hw.registers import Access, address, registers
from skipopu.hw.verilog import YosysError, run_yosys
from skipopu.sim.toolchain import find_toolchain
from xmlschema import XMLSchema

try:
    import tkinter
except ImportError:  # Python without Tk: scripts are checked for balance, and not run
    tkinter = None

SMALL = dataclasses.replace(preset("tiny"), name="tiny-slices", dsp="dsp48e2")
CELLS = "read_verilog -lib +/xilinx/cells_sim.v +/xilinx/cells_xtra.v"
BOARDS = pytest.mark.parametrize("board", ALVEO.values(), ids=list(ALVEO))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("export")
    names = export(alveo_board("u280"), SMALL, target)
    assert names == sorted(path.name for path in target.iterdir())
    return target


def lint(folder, source):
    """Verilator's warnings on a kernel, with the waivers of the exported folder."""
    tools = find_toolchain(need=())
    cells = files("pyosys") / "share" / "xilinx" / "cells_xtra.v"
    # The slices are black boxes there: nothing drives their outputs, nothing reads their parameters.
    boxes = folder / "boxes.vlt"
    boxes.write_text("`verilator_config\n" + "".join(f'lint_off -rule {rule} -file "*cells_xtra.v"\n'
                                                     for rule in ("UNDRIVEN", "UNUSEDPARAM")))
    done = subprocess.run([tools.verilator, "--lint-only", "-Wall", "--top-module", KERNEL, folder / "lint.vlt", boxes,
                           source, "-v", cells], env=tools.environment(), text=True, capture_output=True)
    return re.findall(r"%(?:Warning|Error)-?(\w*): (.*)", done.stderr)


def test_verilator_has_nothing_to_say_about_the_kernel(folder):
    assert lint(folder, folder / f"{KERNEL}.v") == []


@pytest.mark.parametrize(("old", "new", "rule"), [
    (r"(?m)^    \.clk\(", "    .clok(", "PINNOTFOUND"), (r"(?m)^    \.irq\(.*\),\n", "", "PINMISSING")])
def test_lint_finds_what_is_broken(folder, tmp_path, old, new, rule):
    text = (folder / f"{KERNEL}.v").read_text()
    broken, count = re.subn(old, new, text, count=1)
    assert count
    (tmp_path / f"{KERNEL}.v").write_text(broken)
    shutil.copy(folder / "lint.vlt", tmp_path)
    assert rule in {kind for kind, _ in lint(tmp_path, tmp_path / f"{KERNEL}.v")}


def test_every_module_of_the_kernel_is_there(folder, tmp_path):
    source = folder / f"{KERNEL}.v"
    text = source.read_text()
    assert "DSP48E2 #(" in text, "the array is made of slices"
    run_yosys([CELLS, f"read_verilog {source}", f"hierarchy -check -top {KERNEL}"], name=KERNEL)
    broken = tmp_path / "broken.v"
    broken.write_text(text.replace("DSP48E2 #(", "DSP48E9 #("))
    with pytest.raises(YosysError, match="DSP48E9"):
        run_yosys([CELLS, f"read_verilog {broken}", f"hierarchy -check -top {KERNEL}"], name=KERNEL)


def test_ports_are_those_that_the_description_names(folder):
    header = re.search(rf"^module {KERNEL}\((.*?)\);", (folder / f"{KERNEL}.v").read_text(), re.M | re.S)[1]
    ports = {name.strip() for name in header.split(",")}
    described = {port.get("name"): port for port in ElementTree.parse(folder / "kernel.xml").iter("port")}
    named = {port.rpartition("_")[0] for port in ports if "axi" in port}
    assert named == set(described)
    assert {"ap_clk", "ap_rst_n", "ap_clk_2", "ap_rst_n_2", "interrupt"} == {p for p in ports if "axi" not in p}
    for name, port in described.items():
        assert {f"{name}_{member}" for member in ("araddr", "arvalid", "arready", "rdata", "rvalid", "rready")} <= ports
        width = re.search(rf"put (?:\[(\d+):0\] )?{name}_rdata;", (folder / f"{KERNEL}.v").read_text())[1]
        assert int(width) + 1 == int(port.get("dataWidth"))


@BOARDS
def test_offsets_are_those_of_the_register_map(board):
    config = preset(board.config)
    kernel, = ElementTree.fromstring(kernel_xml(board, config))
    assert kernel.get("hwControlProtocol") == "user_managed" and kernel.get("name") == KERNEL
    found = list(kernel.iter("arg"))
    assert [arg.get("id") for arg in found] == [str(index) for index in range(len(found))]
    for arg in found:
        name, _, index = arg.get("name").rpartition("_")
        at = address(name, int(index)) if name == "PORT_BASE" else address(arg.get("name"))
        item = registers()[name if name == "PORT_BASE" else arg.get("name")]
        assert int(arg.get("offset"), 16) == at >= 0x10
        assert int(arg.get("size"), 16) == 4 * item.words and item.access == Access.READ_WRITE
    pointers = {arg.get("port"): arg.get("name") for arg in found if arg.get("addressQualifier") == "1"}
    assert pointers == {"mi_axi": "PROGRAM", **{f"m{p:02}_axi": f"PORT_BASE_{p:02}" for p in range(config.ports)}}


@BOARDS
def test_the_description_follows_the_schema(board):
    schema = XMLSchema(Path(__file__).with_name("kernel.xsd"))
    text = kernel_xml(board, preset(board.config))
    schema.validate(text)
    for old, new in (('mode="slave"', 'mode="both"'), ('addressQualifier="1"', 'addressQualifier="2"'),
                     (' id="3"', ' id="2"'), ('port="m07_axi"', 'port="m99_axi"'),
                     ('dataWidth="256"', 'dataWidth="200"'), (' workGroupSize="1"', "")):
        assert old in text and not schema.is_valid(text.replace(old, new, 1)), old


@BOARDS
def test_every_port_has_its_pseudo_channel_and_every_clock_its_rate(board):
    config = preset(board.config)
    text = link_config(board, config)
    banks = dict(re.findall(r"^sp=skipopu_1\.(\w+):HBM\[(\d+)\]$", text, re.M))
    assert banks == {**{f"m{p:02}_axi": str(p) for p in range(config.ports)}, "mi_axi": "0"}
    assert dict(re.findall(r"^freqHz=(\d+)000000:skipopu_1\.(\w+)$", text, re.M)) == {
        "225": "ap_clk", "450": "ap_clk_2"}


def balanced(text):
    """Whether every brace, bracket and quote of a script is closed."""
    text = re.sub(r"\\.|(?m:^\s*#.*$)", "", text)
    while text != (shorter := re.sub(r'\{[^][{}"]*\}|\[[^][{}"]*\]|"[^][{}"]*"', "", text)):
        text = shorter
    return not re.search(r'[][{}"]', text)


def interpreter():
    """Tcl that answers unknown commands with a name and remembers them."""
    tcl = tkinter.Tcl()
    tcl.eval("""
        proc unknown args { lappend ::calls $args; return "$args" }
        proc get_cells args { lappend ::calls "get_cells $args"; return [list [lindex $args end]] }
    """)
    tcl.eval("set calls {}")
    return tcl


def calls(tcl):
    return [tcl.splitlist(call) for call in tcl.splitlist(tcl.eval("set calls"))]


@BOARDS
def test_scripts_are_complete_tcl_and_run_to_their_end(board, tmp_path):
    config = preset(board.config)
    for text in (package_script(board, config), placement(board, config), constraints(board)):
        cut = text[:text.rindex("{") + 1]
        assert balanced(text) and not balanced(cut)
        if tkinter:
            tcl = interpreter()
            assert [tcl.getboolean(tcl.call("info", "complete", script)) for script in (text, cut)] == [True, False]
    if not tkinter:
        return
    script = tmp_path / "package_kernel.tcl"
    script.write_text(package_script(board, config))
    tcl = interpreter()
    tcl.call("source", str(script))
    seen = calls(tcl)
    assert seen[0][:3] == ("create_project", "-force", "package") and seen[0][-1] == board.part
    assert seen[-1][0] == "package_xo"
    added = [call[1] for call in seen if call[0] == "ipx::add_register"]
    assert added == [item.name for item in arguments(config)]
    associated = {call[2] for call in seen if call[0] == "ipx::associate_bus_interfaces" and call[1] == "-busif"}
    assert associated == {"s_axi_control", "mi_axi", *(f"m{p:02}_axi" for p in range(config.ports))}


def test_placement_names_cells_that_exist_and_leaves_no_unit_out(folder):
    if not tkinter:
        return
    run_yosys([CELLS, f"read_verilog {folder / KERNEL}.v", f"hierarchy -top {KERNEL}",
               f"tee -q -o {folder / 'cells.txt'} select -list */t:*"],
              name=KERNEL)
    inside = {}
    for line in (folder / "cells.txt").read_text().splitlines():
        module, _, cell = line.partition("/")
        inside.setdefault(module, set()).add(cell)
    tcl = interpreter()
    tcl.eval(placement(alveo_board("u280"), SMALL))
    parts = [call[-1].partition("/")[2] for call in calls(tcl) if call[0] == "get_cells" and "-quiet" in call]
    for part in parts:
        *scopes, cell = part.split("/")
        module = ".".join([KERNEL, *scopes])
        assert any(re.fullmatch(cell.replace("*", ".*"), name) for name in inside[module]), part
    units = {part.split("/")[1] for part in parts if part.startswith("overlay/")}
    assert units == {"load", "store", "fetch", "control", "csr", "kvbuf", "compute", "vector"}
    pairs = [part for part in parts if part.startswith("overlay/compute/array/")]
    assert len(set(pairs)) == len(pairs) == SMALL.columns // 2


def test_cards_differ_in_memory_and_part():
    u280, u55c = ALVEO["u280"], ALVEO["u55c"]
    assert (u280.channels * u280.channel_bytes, u55c.channels * u55c.channel_bytes) == (8 << 30, 16 << 30)
    assert u280.part != u55c.part and u280.platform != u55c.platform


@BOARDS
def test_the_command_writes_the_folder(board, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(alveo, "kernel_text", lambda board, config: "module skipopu; endmodule\n")
    target = tmp_path / "new" / board.name
    with pytest.raises(SystemExit) as stop:
        main(["export", "--board", board.name, "-o", str(target), "--json"])
    report = json.loads(capsys.readouterr().out)
    assert not stop.value.code and report["files"] == sorted(path.name for path in target.iterdir())
    assert (report["board"], report["config"]) == (board.name, board.config)
    assert f"-part {board.part}\n" in (target / "package_kernel.tcl").read_text()
    assert f"PLATFORM ?= {board.platform}\n" in (target / "Makefile").read_text()
    assert board.title in (target / "README.md").read_text()


def test_the_command_names_the_boards(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export", "--board", "vcu118", "-o", str(tmp_path)])
    captured = capsys.readouterr()
    assert stop.value.code == 1 and captured.out == ""
    assert captured.err == "skipopu: unknown board 'vcu118'; known for export: u280, u55c\n"


def test_every_step_of_the_makefile_uses_files_of_the_folder(folder):
    text = (folder / "Makefile").read_text()
    named = set(re.findall(r"\b[\w]+\.(?:tcl|v|xml|xdc|cfg|vlt|cpp)\b", text))
    assert named == {path.name for path in folder.iterdir()} & named and len(named) == 8
    if shutil.which("make"):
        dry = subprocess.run(["make", "-n", "-C", folder, "all"], text=True, capture_output=True, check=True).stdout
        assert dry.index("vivado -mode batch") < dry.index("v++ --link")


def test_boards_that_are_unknown_or_too_small(tmp_path):
    with pytest.raises(BoardError, match="unknown board 'u28', did you mean 'u280'.; known for export: u280, u55c"):
        alveo_board("u28")
    narrow = dataclasses.replace(ALVEO["u280"], channels=1)
    with pytest.raises(BoardError, match="tiny-slices has 2 memory ports, u280 has 1; take a configuration with fewer"):
        export(narrow, SMALL, tmp_path / "none")
    assert not (tmp_path / "none").exists()
