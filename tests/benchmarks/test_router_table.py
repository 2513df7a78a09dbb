"""The table of router quality: its rows are there, and the routers' own row is what the reference measures."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from skipopu.golden.random_model import random_model, write_gguf
from skipopu.golden.routed import RoutedReference
from skipopu.host.load import load_model
from skipopu.host.lora import merged
from skipopu.host.routers import load_routers, save_routers
from skipopu.host.tuning.student import Student

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "routers.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("table")
    write_gguf(random_model(1, layers=3), path / "m.gguf")
    text = np.random.default_rng(0).integers(0, 96, (5, 20))
    np.savez(path / "t.npz", tokens=text)
    student = Student(load_model(path / "m.gguf"), "reuse", np.array([[1, 0], [0, 0], [0, 0]], bool), lora=True)
    student.calibrate(torch.tensor(text))
    with torch.no_grad():
        student.weight.normal_(generator=torch.Generator().manual_seed(0))
        student.bias.fill_(0.7)
        for up in student.up.values():
            up.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    save_routers(path / "r.safetensors", student.routers())
    return path


def run(folder, *options):
    return subprocess.run([sys.executable, SCRIPT, "--model", folder / "m.gguf", *options], capture_output=True,
                          text=True, timeout=300)


def test_rows_of_the_table(folder):
    done = run(folder, folder / "r.safetensors", "--tokens", folder / "t.npz", "--last", "4")
    assert done.returncode == 0, done.stderr
    lines = [re.split(r"\s{2,}", line.strip()) for line in done.stdout.splitlines()]
    assert done.stdout.startswith("random-1: 4 sequences of 20 tokens from t.npz; all measured")
    rows = {line[0]: [float(cell.rstrip("%")) for cell in line[1:]] for line in lines[2:]}
    assert list(rows)[0] == "unrouted" and list(rows)[2:] == [
        "random at these rates", "static", "static, base model", "nothing skipped",
        *(f"shifted to {share}%" for share in (5, 10, 15, 20, 25, 30)), "routers without LoRA",
        "random, without LoRA", "before merging (float32)"]
    own = rows[str(folder / "r.safetensors")]
    model = load_model(folder / "m.gguf")
    reference, skipped = RoutedReference(*merged(model, load_routers(folder / "r.safetensors"))), []
    for sequence in np.load(folder / "t.npz")["tokens"][-4:]:
        reference.forward(sequence)
        skipped.append(1 - reference.decisions.mean((0, 2)))
    assert own[4:] == pytest.approx((100 * np.mean(skipped, 0)).tolist(), abs=1)
    random = rows["random at these rates"]
    assert random[4:] == pytest.approx(own[4:], abs=8)
    assert rows["nothing skipped"][3:] == [0, 0, 0]
    assert [rows[f"shifted to {share}%"][3] for share in (5, 15, 25)] == pytest.approx([5, 15, 25], abs=4)
    for name in ("static", "static, base model"):  # one module more or less is up to a fifth of the weights here
        assert rows[name][3] == pytest.approx(own[3], abs=13)
        assert {round(rate) for rate in rows[name][4:]} <= {0, 33, 67, 100}  # whole modules of three layers


@pytest.mark.parametrize(["options", "message"], [
    (["nobody", "--tokens", "t.npz"], "nobody: no such router file or name"),
    (["r.safetensors", "--tokens", "none.npz"], "none.npz: cannot be read"),
    (["r.safetensors", "--tokens", "m.txt"], "has no tokenizer for m.txt"),
])
def test_router_table_mistakes_are_one_line(folder, options, message):
    done = run(folder, *(folder / part if "." in part else part for part in options))
    assert done.returncode == 1 and message in done.stderr and "Traceback" not in done.stderr
