"""The student: its decisions are those of the folded routers, its LoRA those of the merged model, gradients arrive."""

import numpy as np
import pytest
import torch
from skipopu.golden.random_model import random_model
from skipopu.golden.routed import RoutedReference
from skipopu.host.errors import RouterError
from skipopu.host.lora import merged
from skipopu.host.routers import KV_MODES, Routers
from skipopu.host.tuning.student import (
    BIAS_PEAK,
    FOLDED_PEAK,
    FOLDED_SCALE,
    LINEAR_PARTS,
    NORM_PARTS,
    Exploration,
    Student,
    read_share,
)

MODEL = random_model(3, kinds=("f32",), layers=3)  # f32, so that merging rounds nothing away
TOKENS = torch.tensor(np.random.default_rng(0).integers(0, MODEL.config.vocab, (2, 24)))


def make(kv="reuse", lora=True, protected=(), model=MODEL, seed=0):
    """A calibrated student with random routers, about half of whose scores are negative, and random LoRA factors."""
    flags = np.zeros((model.config.layers, 2), bool)
    for place in protected:
        flags[place] = True
    student = Student(model, kv, flags, lora=lora)
    student.calibrate(TOKENS)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        student.weight.normal_(generator=generator)
        student.bias.normal_(generator=generator)
        for parameter in student.up.values():
            parameter.normal_(0, 0.1, generator=generator)
    return student


def executed(gates):
    """Gates [layers, batch, length, 2] as bool [layers, 2, length] of the first sequence, like `decisions`."""
    return gates[:, 0].permute(0, 2, 1).bool().numpy()


@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("lora", [False, True])
def test_folded_routers_decide_and_answer_as_the_student(kv, lora):
    student = make(kv, lora, protected=[(1, 0), (2, 1)])
    reference = RoutedReference(*merged(MODEL, student.routers()))
    expected = reference.forward(TOKENS[0])
    with torch.no_grad():
        hidden, gates = student(TOKENS[:1])
    assert np.array_equal(executed(gates), reference.decisions)
    assert 0.1 < gates.mean() < 0.9
    assert gates[1, ..., 0].all() and gates[2, ..., 1].all()
    # the factors are float16 in the routers: about three digits of what they add
    assert torch.allclose(student.logits(hidden)[0], expected, atol=2e-2, rtol=1e-2)


def test_rounding_to_float16_leaves_scores_near():
    student = make(lora=False)
    difference, bias = student.folded()
    inputs = []
    with torch.no_grad():
        student(TOKENS, inputs=inputs)
        for layer, x in enumerate(inputs):
            raw = x @ torch.tensor(difference[layer].astype(np.float32)).T + torch.tensor(bias[layer])
            assert torch.allclose(raw / FOLDED_SCALE, student.scores(layer, x), atol=0.02)


def test_folded_weights_stay_in_float16_however_small_a_feature_is():
    student = make(lora=False)
    student.deviation[0, 5] = 1e-6
    difference, bias = student.folded()
    assert np.isfinite(difference).all() and np.isfinite(bias).all()
    assert np.abs(difference).max() <= FOLDED_PEAK
    magnitudes = np.abs(difference[difference != 0])
    assert magnitudes.min() >= np.finfo(np.float16).tiny  # the overlay reads subnormal numbers as 0


def test_folded_biases_are_those_that_the_overlay_takes():
    student = make(lora=False)
    student.mean[1] = 200.0
    student.bias.data[2, 1] = 300.0
    difference, bias = student.folded()
    assert np.abs(bias).max() <= BIAS_PEAK * 1.01 and np.abs(bias[1:]).max() > BIAS_PEAK * 0.5
    x = torch.randn(50, MODEL.config.hidden, generator=torch.Generator().manual_seed(1)) + student.mean[1]
    raw = x.double() @ torch.tensor(difference[1].astype(np.float64)).T + torch.tensor(bias[1])
    scores = student.scores(1, x)
    assert ((raw >= 0) == (scores >= 0)).float().mean() > 0.97 and 0.05 < (raw >= 0).float().mean() < 0.95


def test_without_training_the_lora_factors_change_nothing():
    student = Student(MODEL, "dense", np.ones((3, 2), bool), lora=True)
    expected = RoutedReference(MODEL, Student(MODEL, "dense", np.ones((3, 2), bool)).routers()).forward(TOKENS[0])
    with torch.no_grad():
        assert torch.allclose(student.logits(student(TOKENS[:1])[0])[0], expected, atol=1e-4)


@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_gradients_reach_every_router_that_may_skip(kv, noise):
    student = make(kv, protected=[(1, 1)])
    explore = Exploration(1.0, noise, torch.Generator().manual_seed(0))
    student(TOKENS, explore)[0].square().sum().backward()
    for gradient in (student.weight.grad.abs().sum(-1), student.bias.grad.abs()):
        arrives = gradient > 0
        assert not arrives[1, 1]
        assert arrives.sum() == 5
    assert all(parameter.grad.abs().sum() > 0 for parameter in student.up.values())


def test_a_router_that_skips_hears_what_it_missed():
    student = make(lora=False)
    with torch.no_grad():
        student.weight.zero_()
        student.bias.fill_(-1)  # nobody executes
    hidden, gates = student(TOKENS, Exploration())
    assert not gates.any()
    hidden.square().sum().backward()
    assert (student.bias.grad != 0).all()


def test_a_token_far_on_the_wrong_side_finds_back():
    student = make(lora=False)
    with torch.no_grad():
        student.weight.zero_()
        student.bias.fill_(-100)
    student(TOKENS, Exploration(0.5))[0].square().sum().backward()
    assert (student.bias.grad != 0).all()


def test_noise_draws_gates_in_proportion():
    student = make(lora=False)
    with torch.no_grad():
        student.weight.zero_()
        student.bias.fill_(1.0)
        gates = student(TOKENS.repeat(20, 4), Exploration(1.0, 1.0, torch.Generator().manual_seed(1)))[1]
    assert gates.mean().item() == pytest.approx(1 / (1 + np.exp(-1)), abs=0.01)


@pytest.mark.parametrize("kv", KV_MODES)
def test_adopted_routers_come_back(kv):
    first = make("reuse", seed=1)
    second = Student(MODEL, kv, np.zeros((3, 2), bool), lora=True)
    second.calibrate(TOKENS)
    second.adopt(first.routers())
    again = second.routers()
    assert again.kv == kv
    assert np.allclose(again.difference, first.routers().difference, atol=1e-2, rtol=2e-3)
    assert np.allclose(again.bias, first.routers().bias, atol=1e-2, rtol=1e-3)
    for part in (*LINEAR_PARTS, *NORM_PARTS):
        assert np.allclose(again.lora[part], first.routers().lora[part], rtol=1e-3)


def test_routers_without_factors_are_adopted_too():
    second = make(seed=2)
    before = {part: up.detach().clone() for part, up in second.up.items()}
    second.adopt(make("dense", lora=False, seed=1).routers())
    assert all(torch.equal(up, before[part]) for part, up in second.up.items())


def test_the_first_token_has_coordinates_like_the_others():
    x = []
    student = make(lora=False)
    student._reference.weights["embedding"][5] *= 1000
    tokens = TOKENS.clone()
    tokens[:, 0] = 5
    student.calibrate(tokens)
    with torch.no_grad():
        student(tokens, inputs=x)
    for layer, rows in enumerate(x):
        seen = (rows - student.mean[layer]).abs() / student.deviation[layer]
        assert seen[:, 0].max() <= 1.5  # on average of the sequences 1
        assert rows[:, 0].abs().max() > 10 * rows[:, 1:].abs().max() or layer


def test_two_layer_routers_are_not_adopted():
    two_layer = Routers(kv="dense", base=MODEL.identity, difference=np.zeros((3, 2, 8), np.float16),
                        bias=np.zeros((3, 2), np.float32), hidden_weight=np.zeros((3, 2, 8, 64), np.float16),
                        hidden_bias=np.zeros((3, 2, 8), np.float32))
    with pytest.raises(RouterError, match="two-layer routers"):
        make().adopt(two_layer)


def test_read_share_counts_weights():
    # 64 wide, 4 heads and 2 KV heads of 16, MLP 96: q and o 4096 each, k and v 2048 each, MLP 18432 a layer
    reuse, dense = read_share(MODEL, "reuse"), read_share(MODEL, "dense")
    assert reuse[1].tolist() == pytest.approx([12288 / 92160, 18432 / 92160])
    assert dense[1].tolist() == pytest.approx([8192 / 92160, 18432 / 92160])
    assert reuse[0].tolist() == pytest.approx(dense[0].tolist())  # layer 0 computes keys and values in both modes
    assert reuse.sum() == pytest.approx(1 - 4096 / 92160)
