"""The routers of SmolLM2 that come with the package: how they were made is in them, and commands find them by name."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from skipopu.golden.routed import RoutedReference
from skipopu.host.cli import main
from skipopu.host.load import load_model
from skipopu.host.lora import merged
from skipopu.host.passes.routers import router_biases, router_rows
from skipopu.host.routers import KV_MODES, NAMED_ROUTERS, find_routers

ROOT = Path(__file__).resolve().parents[2]
HELD_OUT = 0.25  # share of weights that the shipped routers leave unread on text they were not tuned on


@pytest.fixture(scope="module")
def model():
    return load_model("smollm2")


def report(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main([*arguments, "--json"])
    assert not end.value.code
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kv", KV_MODES)
def test_the_file_says_what_made_it_and_what_it_measured(model, kv):
    routers = find_routers(f"smollm2:{kv}", model)
    assert routers.kv == kv
    assert routers.notes["command"].startswith("skipopu tune -m smollm2 --tokens selftext.npz ")
    assert f"--kv {kv} --skip 0.25" in routers.notes["command"]
    assert json.loads(routers.notes["settings"])["skip"] == 0.25
    found = json.loads(routers.notes["held_out"])
    assert found["skip"] == pytest.approx(HELD_OUT, abs=0.005)
    assert found["perplexity"] > found["unrouted_perplexity"] and 0 < found["divergence"] < 1 and found["top1"] > 0.5
    assert all(step in routers.notes["before"] for step in ("--kv reuse --skip 0.25", "-o smollm2-reuse"))
    assert np.abs(router_biases(routers)).max() < 128 << 24 and router_rows(routers, 576).any()


@pytest.mark.parametrize("kv", KV_MODES)
def test_decisions_of_the_merged_model_at_two_points(model, kv):
    text = model.tokenizer.encode("The history of the city begins with a small village beside the river, where its "
                                  "first houses were built. Today it is known for its markets and music.")
    skipped = []
    for name in (f"smollm2:{kv}", f"smollm2:{kv}@0.1"):
        reference = RoutedReference(*merged(model, find_routers(name, model)))
        assert np.isfinite(reference.forward(text).numpy()).all()
        decisions = reference.decisions
        assert (decisions.any(2) & ~decisions.all(2)).sum() > 5  # modules that some of these tokens skip, not all
        skipped.append(1 - decisions.mean())
    assert 0.12 < skipped[0] < 0.4 and 0.02 < skipped[1] < skipped[0] - 0.05


@pytest.mark.parametrize("kv", KV_MODES)
def test_commands_know_the_name(capsys, tmp_path, kv):
    routed = ("-m", "smollm2", "--routers", f"smollm2:{kv}")
    found = report(capsys, "generate", *routed, "-p", "The capital of France is", "-n", "2", "--device", "reference")
    assert len(found["tokens"]) == 2 and found["skip_mlp"] > 0
    compared = report(capsys, "compare", *routed, "-p", "One, two", "-n", "2", "--devices", "functional,functional")
    assert compared["equal"]
    np.savez(tmp_path / "t.npz", tokens=np.arange(1000, 1024).reshape(1, 24))
    evaluated = report(capsys, "eval", *routed, "--tokens", str(tmp_path / "t.npz"), "--device", "reference")
    assert evaluated["kl"] > 0 and evaluated["skip_mlp"] > 0


def test_an_installed_package_holds_them(tmp_path):
    built = subprocess.run([sys.executable, "-c", "import setuptools; setuptools.setup()", "-q", "egg_info",
                            "--egg-base", tmp_path, "build_py", "--build-lib", tmp_path / "lib"], cwd=ROOT,
                           capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    for name in NAMED_ROUTERS.values():
        path = tmp_path / "lib" / "skipopu" / "host" / "data" / name
        assert path.read_bytes() == (ROOT / "host" / "data" / name).read_bytes()
        assert path.stat().st_size < 8 << 20
    code = "from skipopu.host import routers; print(routers.__file__, routers.find_routers('smollm2:reuse').kv)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "lib")},
                          capture_output=True, text=True)
    assert done.stdout == f"{tmp_path}/lib/skipopu/host/routers.py reuse\n", done.stderr
