"""`skipopu tune` as a user meets it: a router file that works, progress, resume, one line for each mistake."""

import json

import numpy as np
import pytest
from skipopu.golden.random_model import random_model, write_gguf
from skipopu.golden.routed import RoutedReference
from skipopu.host.cli import main
from skipopu.host.compiler import compile_model
from skipopu.host.evaluate import load_sequences
from skipopu.host.load import load_model
from skipopu.host.lora import merged
from skipopu.host.routers import find_routers
from skipopu.hw.config import preset


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tune")
    write_gguf(random_model(1), path / "m.gguf")
    write_gguf(random_model(2), path / "other.gguf")
    np.savez(path / "t.npz", tokens=np.random.default_rng(0).integers(0, 96, (10, 16)))
    np.savez(path / "foreign.npz", tokens=np.full((10, 16), 96))
    return path


def tune(folder, *options, output="r.safetensors", model="m.gguf", tokens="t.npz"):
    """Exit code of the command."""
    arguments = ["tune", "-m", str(folder / model), "--tokens", str(folder / tokens), "-o", str(folder / output),
                 "--held-out", "2", "--batch", "2", "--protect", "100", *options]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", ["skipopu", *arguments])
        main(arguments)
    return end.value.code


def test_routers_are_written_measured_and_run(folder, capsys):
    assert tune(folder, "--steps", "30", "--skip", "0.3", "--kv", "dense", output="a.safetensors") == 0
    printed = capsys.readouterr()
    assert "dense routers, held-out perplexity" in printed.out
    assert "step 25/30" in printed.err and "skipping" in printed.err
    model = load_model(folder / "m.gguf")
    routers = find_routers(folder / "a.safetensors", model)
    assert routers.kv == "dense"
    assert routers.notes["command"].startswith("skipopu ")
    assert str(folder) not in routers.notes["command"]
    assert json.loads(routers.notes["settings"])["skip"] == 0.3
    assert np.isfinite(RoutedReference(*merged(model, routers)).forward([1, 2, 3]).numpy()).all()
    changed, plain = merged(model, routers)
    compiled = compile_model(changed, preset("tiny"), 8, plain)
    assert compiled.map.kv == "dense"


def test_other_operating_points_are_noted_and_reached(folder, capsys):
    assert tune(folder, "--steps", "40", "--skip", "0.3", output="p.safetensors") == 0
    capsys.readouterr()
    path, skips = str(folder / "p.safetensors"), []
    own = find_routers(path)
    for rate in ("0.1", "0.2", "0.3"):
        routers = find_routers(f"{path}@{rate}")
        moved = routers.bias - own.bias
        assert np.array_equal(routers.difference, own.difference) and np.ptp(moved) < 1e-4
        assert evaluate(folder, "--device", "reference", "--routers", f"{path}@{rate}", "--json") == 0
        report = json.loads(capsys.readouterr().out)
        skips.append(report["skip_attention"] + report["skip_mlp"])
    assert skips[0] < skips[1] < skips[2]
    for rate, message in (("0.9", f"{path}@0.9: these routers skip "), ("0.0", f"{path}@0.0: these routers skip ")):
        assert evaluate(folder, "--routers", f"{path}@{rate}") == 1
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1


def test_a_run_is_resumed_from_its_checkpoint(folder, capsys):
    assert tune(folder, "--steps", "8", "--save-every", "4", output="b.safetensors") == 0
    whole = (folder / "b.safetensors").read_bytes()
    assert tune(folder, "--steps", "8", output="b.safetensors") == 1
    assert "b.safetensors.checkpoint is there from another run; give --resume" in capsys.readouterr().err
    assert tune(folder, "--steps", "8", "--save-every", "4", "--resume", output="b.safetensors") == 0
    assert find_routers(folder / "b.safetensors").difference.tobytes() in whole
    assert tune(folder, "--steps", "9", "--resume", output="b.safetensors") == 1
    assert "the checkpoint was made with steps 8, not 9" in capsys.readouterr().err


def test_tuning_goes_on_from_routers_in_the_other_mode(folder):
    assert tune(folder, "--steps", "4", "--kv", "reuse", output="c.safetensors") == 0
    assert tune(folder, "--steps", "4", "--kv", "dense", "--from", str(folder / "c.safetensors"),
                output="d.safetensors") == 0
    first, second = find_routers(folder / "c.safetensors"), find_routers(folder / "d.safetensors")
    assert (first.kv, second.kv) == ("reuse", "dense")
    assert "before" not in first.notes and second.notes["before"] == first.notes["command"]
    assert tune(folder, "--steps", "4", "--from", str(folder / "d.safetensors"), output="h.safetensors") == 0
    third = find_routers(folder / "h.safetensors")
    assert third.notes["before"] == f"{first.notes['command']}; {second.notes['command']}"


def evaluate(folder, *options):
    """Exit code of ``eval`` on the tokens of the folder."""
    with pytest.raises(SystemExit) as end:
        main(["eval", "-m", str(folder / "m.gguf"), "--tokens", str(folder / "t.npz"), *options])
    return end.value.code


def test_eval_measures_routed_text_on_the_reference(folder, capsys):
    assert tune(folder, "--steps", "30", "--skip", "0.4", output="g.safetensors") == 0
    capsys.readouterr()
    routers = ("--routers", str(folder / "g.safetensors"))
    assert evaluate(folder, "--device", "reference", *routers, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    model = load_model(folder / "m.gguf")
    reference, skipped = RoutedReference(*merged(model, find_routers(folder / "g.safetensors"))), []
    for sequence in load_sequences(folder / "t.npz"):
        reference.forward(sequence)
        skipped.append(1 - reference.decisions.mean((0, 2)))
    assert (report["skip_attention"], report["skip_mlp"]) == pytest.approx(tuple(np.mean(skipped, 0)))
    assert report["kl"] > 0 and report["perplexity"] != report["reference_perplexity"]


def test_eval_without_routers_skips_nothing(folder, capsys):
    assert evaluate(folder, "--device", "reference", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report.get("skip_mlp") is None and report["kl"] == 0


@pytest.mark.parametrize(["options", "files", "message"], [
    (["--skip", "0.95"], {}, "the skip rate must be 0..0.9, not 0.95"),
    (["--skip", "-0.1"], {}, "the skip rate must be 0..0.9, not -0.1"),
    (["--kv", "sparse"], {}, "KV mode must be dense or reuse, not 'sparse'"),
    (["--steps", "0"], {}, "steps must be 1..10000000, not 0"),
    (["--held-out", "10"], {}, "--held-out must be 1..9 of the 10 sequences, not 10"),
    (["--resume"], {}, "there is no checkpoint to resume from; leave out --resume"),
    (["--from", "nobody"], {}, "nobody: no such router file or name; names are smollm2:dense, smollm2:reuse"),
    (["--from", "smollm2:resue"], {}, "no such router file or name; did you mean smollm2:reuse?"),
    ([], {"model": "none.gguf"}, "no such file, folder or model name"),
    ([], {"tokens": "none.npz"}, "cannot be read"),
    ([], {"tokens": "foreign.npz"}, "tokens must be 0..95 for model random-1, not 96..96"),
    ([], {"output": "nowhere/r.safetensors"}, "there is no folder"),
])
def test_a_mistake_gets_one_line(folder, capsys, options, files, message):
    assert tune(folder, "--steps", "2", *options, **files) == 1
    printed = capsys.readouterr()
    assert message in printed.err
    assert len(printed.err.strip().splitlines()) == 1
    assert not printed.out


def test_routers_of_another_model_are_no_start(folder, capsys):
    assert tune(folder, "--steps", "2", output="e.safetensors") == 0
    assert tune(folder, "--steps", "2", "--from", str(folder / "e.safetensors"), model="other.gguf",
                output="f.safetensors") == 1
    assert "these routers are for the model with hash" in capsys.readouterr().err
