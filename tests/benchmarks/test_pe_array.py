"""The benchmark of the array prints ours beside the conventional dot product, the paper and what is asked for."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def run(*options):
    return subprocess.run([sys.executable, FOLDER / "pe_array.py", *options], capture_output=True, text=True,
                          timeout=500)


def test_table_has_every_figure():
    done = run("--config", "tiny", "--target", "ecp5")
    assert done.returncode == 0, done.stderr
    for pattern in (r"FP16 x FP16 products per DSP and cycle +[\d.]+ +[\d.]+ +2 +2 +2 +(aim met|met|MISSED) +counted",
                    r"packing error +0 +not zero +0 +0 +aim met +proven",
                    r"error of a dot product of 64, mean relative +0\.0\d+% +0\.0\d+% +0\.116% +0\.0500% +0\.0100%",
                    r"LUTs against the conventional dot product +[+-][\d.]+% +-57\.2% +-70\.0% +-85\.0%",
                    r"of these, alignment +[\d.]+ ", r"LUTs of the whole array +[\d,]+ +estimated",
                    r"array to Verilog, s of a processor +\d+ +60 +met +measured",
                    r"lints clean in, s of a processor +\d+ "):
        assert re.search(pattern, done.stdout), (pattern, done.stdout)


@pytest.mark.parametrize(("options", "message"), [
    (["--config", "huge"], "error: unknown configuration 'huge'"), (["--target", "ice40"], "error: unknown target"),
])
def test_mistakes_are_one_line(options, message):
    done = run(*options)
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr


def test_verdicts(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    from pe_array import Line
    verdicts = [Line("", value, least=2, aim=3, better=float.__ge__).cells()[6] for value in (1, 2, 3)]
    assert verdicts == ["MISSED", "met", "aim met"]
    assert [Line("", value, least=-0.7, aim=-0.85).cells()[6] for value in (-0.6, -0.8, -0.9)] == verdicts
    assert Line("", 1).cells()[6] == ""
