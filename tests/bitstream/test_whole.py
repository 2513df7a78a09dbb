"""Whole configurations: every unit counted once, repeated parts as often as they occur, beside device and paper."""

import json
import re
from collections import Counter

import pytest
from skipopu.bitstream import whole
from skipopu.bitstream.synth import TARGETS
from skipopu.host.cli import main
from skipopu.hw.config import PRESETS
from skipopu.hw.top import Overlay
from skipopu.hw.verilog import to_rtlil


@pytest.fixture
def made(monkeypatch):
    """Synthesis that counts one LUT and two block memories for every component; what was made, in order."""
    components = []

    def synthesise(component, on, *, name, log):
        for item in (component, getattr(component, "_crossing", component)):
            item._MustUse__silence = True  # it is made, and not elaborated
        components.append(component)
        log(f"{name}: counted")
        return Counter({"LUT4": 1, "DP16KD": 2} if on.name == "ecp5" else {"LUT6": 1, "RAMB18E2": 2, "URAM288": 1})

    monkeypatch.setattr(whole, "synthesise", synthesise)
    return components


def test_every_unit_of_the_overlay_is_counted(made):
    whole.whole("tiny", "xcup", lambda stage: None)
    inside = {type(component).__name__ for component in made}
    overlay = to_rtlil(Overlay(config=PRESETS["tiny"]), name="top")
    top = overlay.split("module \\top\n", 1)[1].split("\nend\n")[0]
    units = set(re.findall(r"^  cell \\top\S* \\(\w+)$", top, re.M))
    assert units == {"control", "csr", "fetch", "load", "kvbuf", "compute", "vector", "store"}
    assert {"Control", "Csr", "Fetch", "LoadUnit", "KvBuffer", "ComputeUnit", "VectorUnit", "StoreUnit"} <= inside


def test_parts_of_a_block_are_shown_but_not_counted_twice(made):
    report = whole.whole("tiny", "xcup", lambda stage: None)
    outer = [block for block in report["blocks"] if not block["within"]]
    assert report["total"]["LUT"] == sum(block["LUT"] for block in outer) == 8
    pairs = next(block for block in report["blocks"] if block["name"] == "two columns")
    assert (pairs["count"], pairs["LUT"], pairs["BRAM36"]) == (8, 8, 8)
    assert {block["within"] for block in report["blocks"]} <= {None, *(block["name"] for block in outer)}


def test_a_kernel_has_a_crossing_for_each_port(made):
    report = whole.whole("u280", "xcup", lambda stage: None)
    crossings = [block for block in report["blocks"] if "crossing" in block["name"]]
    assert [block["count"] for block in crossings] == [32, 1]
    assert made[0].config.dsp == "dsp48e2" and report["total"]["LUT"] == 8 + 33


def test_shares_are_of_the_device_and_beside_the_paper(made):
    report = whole.whole("u280", "xcup", lambda stage: None)
    assert report["available"] == {"LUT": 1_303_680, "FF": 2_607_360, "DSP": 9_024, "BRAM36": 2_016, "URAM": 960}
    for name, share in report["shares"].items():
        assert share == report["total"][name] / report["available"][name]
    assert report["paper"] == {"LUT": 0.9885, "FF": 0.6399, "DSP": 0.5117, "URAM": 0.5333}
    text = list(whole.lines(report))
    assert text[0] == "u280 on XCU280 (estimated)" and "98.85%" in text[-1] and "51.17%" in text[-1]
    assert any(line.startswith("  of which 64 x two columns") for line in text)


def test_the_board_of_open_tools_has_resources_of_its_own(made):
    report = whole.whole("ulx3s", "ecp5", lambda stage: None)
    assert report["available"] == {"LUT": 83_640, "FF": 83_640, "MULT18": 156, "EBR": 208}
    assert made[0].config.dsp == "mult18x18d" and not report["paper"]
    assert list(whole.lines(report))[-1].startswith("share")


def test_the_command_takes_the_family_of_the_configuration(made, capsys):
    for config, target in (("ulx3s", "ecp5"), ("tiny", "xcup")):
        with pytest.raises(SystemExit) as stop:
            main(["synth", "--config", config, "--json"])
        report = json.loads(capsys.readouterr().out)
        assert not stop.value.code and (report["config"], report["target"]) == (config, target)
        assert "estimated" in report["labels"]["total"] and report["labels"]["paper"] == "reported by SkipOPU"


@pytest.mark.parametrize("block", [*whole._BLOCKS, *whole._KERNEL], ids=lambda block: block.title)
def test_every_block_can_be_made(block):
    text = to_rtlil(block.make(PRESETS["tiny"]), name="synth_top")
    assert "module \\synth_top" in text and block.count(PRESETS["tiny"]) >= 1


@pytest.mark.parametrize("on", TARGETS.values(), ids=list(TARGETS))
def test_devices_have_what_is_counted(on):
    assert all(count > 0 for count in whole._counts(on.available, on).values())
