"""The example scripts and the notebook run as they are, and print what they promise."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[2] / "examples"


def run(script, *options):
    """Standard output of a script that must succeed."""
    done = subprocess.run([sys.executable, FOLDER / script, *options], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_generate_tells_a_story():
    out = run("generate.py", "Lily was a", "--tokens", "12", "--config", "ulx3s")
    assert re.match(r"Lily was a (good|brave|happy) little girl\. She .*\n\d+ tokens skipped \d+% of attention", out)


def test_generate_samples_from_a_seed():
    options = ("--tokens", "20", "--seed", "3")
    assert run("generate.py", *options) == run("generate.py", *options) != run("generate.py", *options[:2])


def test_compare_finds_the_rtl_equal():
    out = run("compare.py", "--tokens", "4").splitlines()
    assert len(out) == 2 + 4 - 1 + 1 and all("are equal" in line for line in out[:-1])  # 8 tokens of prompt, 4 a run
    assert out[-1].startswith("Tom was a brave little boy. He")


def test_counters_are_read():
    *lines, last = run("counters.py", "--tokens", "4").splitlines()
    cycles = [int(line.split("%")[0].split()[-2].replace(",", "")) for line in lines[1:]]
    assert len(lines) == 1 + 2 + 3 and all(1000 < count < 100_000 for count in cycles)
    assert re.fullmatch(r"[\d,]+ cycles a token \(simulated\) are [\d,]+ tokens/s at 25 MHz \(predicted\)", last)


@pytest.mark.parametrize("script, options, message", [
    ("generate.py", ["Once upon a dragon"], "generate: the model has no token for ' dragon'"),
    ("counters.py", ["--config", "huge"], "counters: unknown configuration 'huge'"),
    ("compare.py", ["--devices", "rtl"], "compare: --devices must name two of"),
])
def test_mistakes_are_one_line(script, options, message):
    done = subprocess.run([sys.executable, FOLDER / script, *options], capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr.startswith(message) and done.stderr.count("\n") == 1


def test_notebook_runs_and_says_what_it_said():
    """Text outputs are those in the file but for their numbers, which follow the hardware; pictures are there."""
    notebook = nbformat.read(FOLDER / "story.ipynb", 4)
    said = [_text(cell) for cell in notebook.cells]
    assert sum(map(bool, said)) >= 4 and any(_pictures(cell) for cell in notebook.cells)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": FOLDER}}).execute()
    assert [_text(cell) for cell in notebook.cells] == said
    assert any(_pictures(cell) for cell in notebook.cells)


def _text(cell):
    text = "".join(output["text"] for output in cell.get("outputs", []) if output.get("name") == "stdout")
    return re.sub(r" *\d[\d,]*", " N", text)  # columns of numbers are as wide as the numbers


def _pictures(cell):
    return [output for output in cell.get("outputs", []) if "image/png" in output.get("data", {})]
