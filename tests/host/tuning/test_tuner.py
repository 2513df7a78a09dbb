"""Tuning on tiny models: essential modules stay, the skip rate reaches its goal, a resumed run goes on bit for bit."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from skipopu.golden.random_model import random_model
from skipopu.golden.routed import RoutedReference
from skipopu.host.errors import RouterError
from skipopu.host.evaluate import Evaluation
from skipopu.host.lora import merged
from skipopu.host.tuning.ablation import ablate, essential
from skipopu.host.tuning.checkpoint import restore, save
from skipopu.host.tuning.student import Student
from skipopu.host.tuning.tuner import Settings, Tuner, measure

MODEL = random_model(1, kinds=("f32",), layers=4)
TEXT = np.random.default_rng(0).integers(0, MODEL.config.vocab, (12, 24))
SETTINGS = Settings(kv="reuse", skip=0.4, steps=60, batch=2, protect=100.0, router_rate=0.01)


def started(tmp_path, settings=SETTINGS, model=MODEL, text=TEXT):
    tuner = Tuner(model, text, settings, tmp_path / "targets")
    for _ in tuner.prepare():
        pass
    return tuner


@pytest.mark.parametrize("kv", ["dense", "reuse"])
@pytest.mark.parametrize("skip", [0.2, 0.4])
def test_the_skip_rate_reaches_its_goal(tmp_path, kv, skip):
    tuner = started(tmp_path, replace(SETTINGS, kv=kv, skip=skip))
    reports = [tuner.advance() for _ in range(60)]
    assert reports[0].skip < 0.15
    assert measure(tuner.student, MODEL, TEXT).skip == pytest.approx(skip, abs=0.1)
    tuner.shift_to_goal()
    found = measure(tuner.student, MODEL, TEXT)
    assert found.skip == pytest.approx(skip, abs=0.08)
    assert found.divergence > 0
    assert [report.step for report in reports] == list(range(1, 61))


def test_tuning_beats_chance(tmp_path):
    tuner = started(tmp_path)
    for _ in range(60):
        tuner.advance()
    found = measure(tuner.student, MODEL, TEXT)
    gates = np.random.default_rng(0).random((4, 12, 24, 2)) >= np.array([found.skip_attention, found.skip_mlp])
    assert found.divergence < measure(tuner.student, MODEL, TEXT, gates=gates).divergence


def test_measure_agrees_with_the_routed_reference(tmp_path):
    tuner = started(tmp_path)
    for _ in range(30):
        tuner.advance()
    reference = RoutedReference(*merged(MODEL, tuner.student.routers()))
    plain = Student(MODEL, "reuse", np.ones((4, 2), bool))
    total, skipped = Evaluation(), []
    for sequence in TEXT[:3]:
        with torch.no_grad():
            whole = plain.logits(plain(torch.tensor(sequence)[None])[0])[0].numpy()
        total.add(whole[:-1], reference.forward(sequence)[:-1].numpy(), sequence[1:])
        skipped.append(1 - reference.decisions.mean((0, 2)))
    found, expected = measure(tuner.student, MODEL, TEXT[:3]), total.as_json()
    assert found.perplexity == pytest.approx(expected["perplexity"], rel=0.02)
    assert found.unrouted_perplexity == pytest.approx(expected["reference_perplexity"], rel=1e-4)
    assert found.divergence == pytest.approx(expected["kl"], rel=0.05)
    assert found.top1 == pytest.approx(expected["top1"], abs=0.03)
    assert (found.skip_attention, found.skip_mlp) == pytest.approx(tuple(np.mean(skipped, 0)), abs=0.01)


def test_ablation_finds_the_module_that_carries_the_answer():
    student = Student(MODEL, "dense", np.zeros((4, 2), bool))
    costs = np.zeros((4, 2))
    for layer, module, cost in ablate(student, torch.tensor(TEXT[:2])):
        costs[layer, module] = cost
    assert (costs > 0).all()
    gates = torch.ones(4, 2, 24, 2)
    gates[2, ..., 1] = 0
    with torch.no_grad():
        whole, without = (student.logits(student(torch.tensor(TEXT[:2]), gates=bits)[0]).log_softmax(-1)
                          for bits in (torch.ones_like(gates), gates))
    assert costs[2, 1] == pytest.approx(float((whole.exp() * (whole - without)).sum(-1).mean()), rel=1e-4)


def test_what_costs_too_much_or_is_no_number_is_essential():
    assert essential(np.array([[0.5, 0.6], [0.7, np.nan]]), 0.6).tolist() == [[False, False], [True, True]]


def test_essential_modules_always_execute(tmp_path):
    tuner = started(tmp_path)
    limit = float(np.sort(tuner.costs.ravel())[4])
    tuner = started(tmp_path, replace(SETTINGS, protect=limit, skip=0.3))
    protected = tuner.student.protected.numpy()
    assert protected.sum() == 3
    for _ in range(60):
        tuner.advance()
    routers = tuner.student.routers()
    assert not routers.difference[protected].any() and (routers.bias[protected] > 0).all()
    reference = RoutedReference(*merged(MODEL, routers))
    reference.forward(TEXT[0])
    assert reference.decisions.mean(-1)[protected].min() == 1
    assert reference.decisions.mean() < 0.95


def test_stages_train_what_they_should(tmp_path):
    settings = replace(SETTINGS, steps=20, routers_first=0.25, lora_last=0.5)
    tuner, seen = started(tmp_path, settings), []
    for _ in range(20):
        before = [parameter.detach().clone() for parameter in tuner.student.parameters()]
        tuner.advance()
        seen.append([not torch.equal(a, b) for a, b in zip(before, tuner.student.parameters())])
    weight, bias, *lora = zip(*seen)
    assert weight == (True,) * 10 + (False,) * 10
    assert bias == (True,) * 11 + (False,) * 9  # the eleventh step begins with the shift to the goal
    assert not any(any(part[:5]) for part in lora)
    assert all(all(part[6:]) for part in lora)


@pytest.mark.parametrize("stop", [1, 7, 13, 19])
def test_a_resumed_run_goes_on_bit_for_bit(tmp_path, stop):
    settings = replace(SETTINGS, steps=20, routers_first=0.2)
    tuner = started(tmp_path, settings)
    for _ in range(stop):
        tuner.advance()
    save(tmp_path / "c", tuner)
    expected = [tuner.advance() for _ in range(20 - stop)]
    resumed = Tuner(MODEL, TEXT, settings, tmp_path / "targets")
    restore(tmp_path / "c", resumed)
    assert resumed.step == stop
    assert [resumed.advance() for _ in range(20 - stop)] == expected
    assert all(torch.equal(a, b) for a, b in zip(tuner.student.state_dict().values(),
                                                 resumed.student.state_dict().values()))
    assert np.array_equal(resumed.costs, tuner.costs)


def test_a_batch_takes_every_sequence_once_before_any_again(tmp_path):
    tuner = Tuner(MODEL, TEXT, replace(SETTINGS, batch=5), tmp_path)
    order = np.concatenate([tuner.batch(step) for step in range(12)])
    for epoch in range(5):
        assert sorted(order[12 * epoch:12 * (epoch + 1)]) == list(range(12))
    assert not np.array_equal(order[:12], order[12:24])


def test_routers_to_start_from_are_taken_with_their_factors(tmp_path):
    first = started(tmp_path)
    protected = np.zeros((4, 2), bool)
    protected[1, 0] = protected[2, 1] = True
    first.student.protected.copy_(torch.tensor(protected))
    for _ in range(30):
        first.advance()
    routers = first.student.routers()
    second = Tuner(MODEL, TEXT, replace(SETTINGS, kv="dense"), tmp_path / "targets")
    for _ in second.prepare(routers):
        pass
    assert not second.costs.any() and np.array_equal(second.student.protected.numpy(), protected)
    again = second.student.routers()
    assert again.kv == "dense"
    assert np.allclose(again.difference, routers.difference, atol=1e-2, rtol=2e-3)
    assert np.allclose(again.lora["q"], routers.lora["q"], rtol=1e-3)


def test_a_run_from_routers_begins_at_the_goal(tmp_path):
    first = started(tmp_path, replace(SETTINGS, skip=0.4))
    for _ in range(60):
        first.advance()
    for skip in (0.1, 0.3, 0.6):
        second = Tuner(MODEL, TEXT, replace(SETTINGS, skip=skip), tmp_path / "targets")
        for _ in second.prepare(first.student.routers()):
            pass
        assert measure(second.student, MODEL, TEXT).skip == pytest.approx(skip, abs=0.02)


@pytest.mark.parametrize("bias", [-3.0, 3.0])
def test_too_much_skipping_costs_as_much_as_too_little(tmp_path, bias):
    tuner = started(tmp_path, replace(SETTINGS, skip=0.5, ramp=0.0, sparsity=100.0, lora=False))
    with torch.no_grad():
        tuner.student.bias.fill_(bias)
    report = tuner.advance()
    assert abs(report.skip - 0.5) > 0.4
    assert report.loss == pytest.approx(report.divergence + 100 * abs(report.skip - 0.5), rel=1e-4)
    assert (tuner.student.bias.mean() - bias) * bias < 0  # back towards the goal


@pytest.mark.parametrize(["changed", "message"], [
    ({"skip": -0.1}, r"the skip rate must be 0\.\.0\.9, not -0\.1"),
    ({"skip": 0.91}, r"the skip rate must be 0\.\.0\.9, not 0\.91"),
    ({"skip": math.nan}, r"the skip rate must be 0\.\.0\.9, not nan"),
    ({"kv": "sparse"}, "KV mode must be dense or reuse, not 'sparse'"),
    ({"steps": 0}, r"steps must be 1\.\.10000000, not 0"),
    ({"batch": 0}, r"batch must be 1\.\.4096, not 0"),
    ({"seed": -1}, r"seed must be 0\.\.2147483648, not -1"),
    ({"lora_rate": math.inf}, "lora_rate must be a positive number, not inf"),
    ({"router_rate": 0.0}, "router_rate must be a positive number, not 0.0"),
    ({"ramp": 1.5}, r"ramp must be a share of the steps, 0\.\.1, not 1\.5"),
    ({"lora_last": 0.8, "routers_first": 0.3}, "shares of the steps, together at most 1, not 0.3 and 0.8"),
])
def test_impossible_settings_are_refused(changed, message):
    with pytest.raises(RouterError, match=message):
        replace(SETTINGS, **changed)


def test_a_model_of_essential_modules_only_is_refused(tmp_path):
    with pytest.raises(RouterError, match="every module costs more than protect 1e-09 nats .* raise protect"):
        started(tmp_path, replace(SETTINGS, protect=1e-9))


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    tuner = started(tmp_path)
    with torch.no_grad():
        tuner.student.up["down"].fill_(math.nan)
    with pytest.raises(RouterError, match="the loss is nan at step 0; take lower learning rates"):
        tuner.advance()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tuner = started(folder)
    for _ in range(4):
        tuner.advance()
    save(folder / "c", tuner)
    return folder / "c"


@pytest.mark.parametrize(["settings", "model", "text", "message"], [
    (replace(SETTINGS, skip=0.3), MODEL, TEXT, "was made with skip 0.4, not 0.3; give the same settings, or start"),
    (replace(SETTINGS, kv="dense"), MODEL, TEXT, "was made with kv reuse, not dense"),
    (SETTINGS, random_model(5, kinds=("f32",), layers=4), TEXT, "was made with model random-1, not random-5"),
    (SETTINGS, MODEL, TEXT[:11], r"was made with tokens \[12, 24\] .*, not \[11, 24\]"),
])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, checkpoint, settings, model, text, message):
    with pytest.raises(RouterError, match=f"c: the checkpoint {message}") as error:
        restore(checkpoint, Tuner(model, text, settings, tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(["about", "tensors", "message"], [
    ({"format": "other"}, {}, "not a checkpoint of tuning: .* version 1, not 'other' and '1'"),
    ({"version": "9"}, {}, "not 'skipopu-tuning' and '9'"),
    ({"progress": "{}"}, {}, "settings or progress cannot be read"),
    ({"settings": "["}, {}, "settings or progress cannot be read"),
    ({"progress": json.dumps({"step": 4, "counts": {"nobody": 1}})}, {}, "counts steps of nobody"),
    ({}, {"student.weight": None}, "missing tensors: student.weight"),
    ({}, {"student.extra": np.zeros(1, np.float32)}, "unexpected tensors: student.extra"),
    ({}, {"student.bias": np.zeros((2, 2), np.float32)}, r"student.bias must be \[4, 2\], not \[2, 2\]"),
    ({}, {"exp_avg.weight": np.full((4, 2, 64), np.nan, np.float32)}, "exp_avg.weight holds NaN or infinity"),
])
def test_a_damaged_checkpoint_gets_one_clear_line(tmp_path, checkpoint, about, tensors, message):
    with safe_open(checkpoint, framework="np") as content:
        its_about = content.metadata()
    kept = {name: array for name, array in (load_file(checkpoint) | tensors).items() if array is not None}
    save_file(kept, tmp_path / "c", its_about | about)
    with pytest.raises(RouterError, match=f"c: .*{message}") as error:
        restore(tmp_path / "c", Tuner(MODEL, TEXT, SETTINGS, tmp_path / "targets"))
    assert "\n" not in str(error.value)


def test_a_file_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "c").write_bytes(b"\x80\x04nonsense")
    with pytest.raises(RouterError, match="c: not a readable safetensors file"):
        restore(tmp_path / "c", Tuner(MODEL, TEXT, SETTINGS, tmp_path / "targets"))
