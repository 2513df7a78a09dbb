"""`skipopu train` as a user meets it: a model and routers that run on every level, and one line for each mistake."""

import json

import numpy as np
import pytest
import torch
from skipopu.golden.routed import RoutedReference
from skipopu.host.cli import main
from skipopu.host.gguf_file import GgufFile
from skipopu.host.load import load_model
from skipopu.host.routers import find_routers
from skipopu.host.tuning.stories import tell
from skipopu.host.tuning.training import Recipe, Trainer, blank_model
from skipopu.host.tuning.words import pack

SMALL = ["--stories", "60", "--held-out", "10", "--layers", "2", "--hidden", "32", "--heads", "2", "--mlp", "32",
         "--steps", "60", "--batch", "4"]


def train(folder, *options, small=SMALL):
    arguments = ["train", "-o", str(folder / "small.gguf"), *small, *options]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", ["skipopu", *arguments])
        main(arguments)
    return end.value.code or 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("train")
    assert train(path) == 0
    return path


def test_model_and_routers_are_written_with_their_recipe(folder):
    model = load_model(folder / "small.gguf")
    routers = find_routers(folder / "small-reuse.safetensors", model)
    assert {tensor.kind for name, tensor in model.tensors.items() if "norm" not in name} == {"q4_0", "f16"}
    about = json.loads(GgufFile(folder / "small.gguf").metadata["general.description"])
    assert about["command"].startswith("skipopu train -o small.gguf") and str(folder) not in about["command"]
    assert json.loads(about["recipe"])["steps"] == 60
    assert routers.kv == "reuse" and json.loads(routers.notes["recipe"]) == json.loads(about["recipe"])
    text, _ = next(tell(1))
    assert model.tokenizer.decode(model.tokenizer.encode(text)) == text


def test_the_stated_loss_is_that_of_the_files(folder):
    model = load_model(folder / "small.gguf")
    routers = find_routers(folder / "small-reuse.safetensors", model)
    reference = RoutedReference(model, routers)
    rows = pack([text for text, _ in tell(60)], model.tokenizer, 104)[-10:]
    nats = count = 0
    for row in rows:
        ended = int(np.flatnonzero(row == 0)[1])
        logits = reference.forward(row[:ended]).log_softmax(-1)
        nats -= float(logits[torch.arange(ended), row[1:ended + 1]].sum())
        count += ended
    stated = json.loads(routers.notes["held_out"])["final"]
    assert nats / count == pytest.approx(stated["loss"], rel=2e-3)  # embedding and routers are float16 in the files
    assert 0.05 < stated["skip"] < 0.6


def test_it_learns_and_the_same_command_gives_the_same_files(folder, tmp_path):
    assert train(tmp_path) == 0
    assert (tmp_path / "small.gguf").read_bytes() == (folder / "small.gguf").read_bytes()
    for part in ("difference", "bias"):
        assert np.array_equal(*(getattr(find_routers(path / "small-reuse.safetensors"), part)
                                for path in (folder, tmp_path)))
    held_out = json.loads(find_routers(folder / "small-reuse.safetensors").notes["held_out"])
    assert held_out["final"]["loss"] < 0.8 * np.log(load_model(folder / "small.gguf").config.vocab)


def test_weights_that_learn_are_those_of_the_four_bit_form(folder):
    model = load_model(folder / "small.gguf")
    trainer = Trainer(blank_model(model.config, 1), pack([text for text, _ in tell(20)], model.tokenizer, 104),
                      Recipe(steps=20, batch=2))
    for _ in range(20):
        trainer.advance()
    trainee = trainer.trainee
    trainee.refit()
    trainee.lay()
    for name, tensor in trainee.quantised().items():
        np.testing.assert_allclose(trainee._reference.weights[name].detach().numpy(), tensor.dequantise(), atol=1e-6)


@pytest.mark.parametrize("options, message", [
    (["--skip", "1.5"], "the skip rate must be 0..0.9, not 1.5"),
    (["--rate", "0"], "the learning rate must be between 0 and 1, not 0.0"),
    (["--steps", "3"], "steps must be 10..10000000, not 3"),
    (["--mlp", "40"], "--mlp must be a multiple of 32 for 4-bit weights, not 40"),
    (["--held-out", "60"], "--held-out must be 1..59 of the 60 stories, not 60"),
    (["--vocab", "9"], "more than 9; give simpler text or a larger --vocab"),
    (["--context", "40"], "more than the context of 40; shorten it, or give a larger --context"),
    (["--kv", "none"], "KV mode must be dense or reuse, not 'none'"),
    (["--heads", "3", "--head-dim", "32", "--kv-heads", "2"], "kv_heads must divide the 3 heads, not be 2"),
    (["--text", "nobody.txt"], "nobody.txt: No such file or directory"),
    (["-o", "nowhere/model.gguf"], "there is no folder nowhere to write it to"),
])
def test_mistakes(tmp_path, capsys, options, message):
    assert train(tmp_path, *options) == 1
    err = capsys.readouterr().err
    assert message in err.splitlines()[-1] and "Traceback" not in err
    assert not list(tmp_path.iterdir())
