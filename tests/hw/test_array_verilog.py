"""The PE array of the largest configuration becomes Verilog in a bounded time, and Verilator has nothing against it."""

import dataclasses
import os
import re

import pytest
from skipopu.hw.blocks.array import PeArray
from skipopu.hw.config import DSPS, preset
from skipopu.hw.verilog import to_verilog
from skipopu.sim.lint import lint

LIMIT = 60  # seconds of processor time


@pytest.mark.slow
def test_largest_array(tmp_path):
    """The whole array is linted in one piece: minutes, and 12 GiB."""
    config = preset("u280")
    begin = sum(os.times()[:4])
    text = to_verilog(PeArray(config=config), name="pe_array", flatten=False)
    seconds = sum(os.times()[:4]) - begin
    print(f"{config.lanes} x {config.columns}: {seconds:.1f} s, {len(text) / 1e6:.1f} MB")
    assert seconds < LIMIT
    assert len(re.findall(r"^  column_pair ", text, re.M)) == config.columns // 2
    assert len(re.findall(r"^module column_pair\b(?!\.)", text, re.M)) == 1
    lint(tmp_path, text, "pe_array")


@pytest.mark.parametrize("dsp", DSPS)
def test_small_array(dsp, tmp_path):
    config = dataclasses.replace(preset("tiny"), dsp=dsp)
    lint(tmp_path, to_verilog(PeArray(config=config), name="pe_array", flatten=False), "pe_array")
