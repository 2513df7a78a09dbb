"""The routed reference against one token at a time with a table of keys and values, and at the corners."""

import numpy as np
import pytest
import torch
from skipopu.golden.random_model import random_model
from skipopu.golden.reference import ReferenceModel, rms_norm
from skipopu.golden.routed import RandomRoutes, RoutedReference
from skipopu.host.errors import RouterError
from skipopu.host.routers import Routers

LAYERS, TOKENS = 4, 14
MODEL = random_model(1, layers=LAYERS)
PROMPT = torch.randint(0, 96, (TOKENS,), generator=torch.Generator().manual_seed(0))


def routers(kv="dense", *, seed=0, bias=0.0, scale=1.0, inner=None, model=MODEL):
    rng, layers, hidden = np.random.default_rng(seed), model.config.layers, {}
    if inner:
        hidden = {"hidden_weight": rng.standard_normal((layers, 2, inner, 64)).astype(np.float32),
                  "hidden_bias": rng.standard_normal((layers, 2, inner)).astype(np.float32)}
    difference = scale * rng.standard_normal((layers, 2, inner or 64))
    return Routers(kv=kv, base=model.identity, difference=difference.astype(np.float32),
                   bias=np.full((layers, 2), bias, np.float32), **hidden)


def one_token_at_a_time(tokens, bits, kv):
    """Logits by the definition: a table of each token's keys and values by layer, and which of them a layer sees."""
    plain, table, logits = ReferenceModel(MODEL), {}, []
    for token in range(len(tokens)):
        x, position = plain.embed(tokens[None, token:token + 1]), torch.tensor([token])
        for layer in range(LAYERS):
            normed = rms_norm(x, plain.weight(layer, "attn_norm"), MODEL.config.rms_eps)
            attention, mlp = bits[layer, :, token]
            stored = layer == 0 or kv == "dense" or attention
            table[layer, token] = plain.keys_values(layer, normed, position) if stored else table[layer - 1, token]
            if attention:
                keys, values = (torch.cat([table[layer, past][part] for past in range(token + 1)], 2)
                                for part in range(2))
                x = x + plain.attend(layer, normed, position, keys, values, torch.ones(1, 1, dtype=torch.bool))
            if mlp:
                x = x + plain.mlp(layer, x)
        logits.append(plain.output(x)[0, 0])
    return torch.stack(logits)


def corner(name):
    bits = np.ones((LAYERS, 2, TOKENS), bool)
    if name == "everybody skips":
        bits[:] = False
    elif name == "one token executes":
        bits[:, :, :-1] = False
    elif name == "a layer is skipped":
        bits[2] = False
    elif name == "alternating layers":
        bits[::2] = False
    elif name == "attention only":
        bits[:, 1] = False
    elif name == "random":
        bits = RandomRoutes(0.4, 5).bits(LAYERS, 0, TOKENS)
    return bits


@pytest.mark.parametrize("kv", ["dense", "reuse"])
@pytest.mark.parametrize("name", ["nobody skips", "everybody skips", "one token executes", "a layer is skipped",
                                  "alternating layers", "attention only", "random"])
def test_forced_routes_give_the_result_of_the_definition(kv, name):
    bits = corner(name)
    routed = RoutedReference(MODEL, routers(kv), force=bits)
    got, expected = routed.forward(PROMPT), one_token_at_a_time(PROMPT, bits, kv)
    assert ((got - expected).abs().max() / expected.abs().max()) < 1e-5
    assert np.array_equal(routed.decisions, bits)


def test_the_two_kv_modes_differ():
    dense, reuse = (RoutedReference(MODEL, routers(kv), force=corner("random")).forward(PROMPT)
                    for kv in ("dense", "reuse"))
    assert (dense - reuse).abs().max() > 1e-2


@pytest.mark.parametrize("kv", ["dense", "reuse"])
def test_all_executing_is_the_unrouted_reference_exactly(kv):
    routed = RoutedReference(MODEL, routers(kv, scale=0))  # every score is a tie, and ties execute
    assert torch.equal(routed.forward(PROMPT), ReferenceModel(MODEL).forward(PROMPT))
    assert routed.decisions.all() and routed.decisions.shape == (LAYERS, 2, TOKENS)


def test_nothing_runs_where_all_skip():
    routed = RoutedReference(MODEL, routers(scale=0, bias=-1))
    assert torch.equal(routed.forward(PROMPT), routed.output(routed.embed(PROMPT[None]))[0])
    assert not routed.decisions.any()


@pytest.mark.parametrize("inner", [None, 16], ids=["linear", "two-layer"])
@pytest.mark.parametrize("kv", ["dense", "reuse"])
@pytest.mark.parametrize("pieces", [[1] * TOKENS, [5, 1, 8]], ids=["singly", "chunks"])
def test_steps_equal_the_whole_sequence(inner, kv, pieces):
    routed = RoutedReference(MODEL, routers(kv, inner=inner))
    expected, decisions = routed.forward(PROMPT), routed.decisions
    assert 0.1 < decisions.mean() < 0.9
    for _ in range(2):  # the second pass shows that reset forgets the first
        routed.reset()
        got = torch.cat([routed.step(piece) for piece in PROMPT.split(pieces)])
        assert ((got - expected).abs().max() / expected.abs().max()) < 1e-5
        assert np.array_equal(routed.decisions, decisions)


def test_routers_read_the_raw_input_of_the_layer():
    made = routers(seed=3)
    routed = RoutedReference(MODEL, made)
    routed.forward(PROMPT)
    plain = ReferenceModel(MODEL)
    x = plain.embed(PROMPT[None])[0].double().numpy()
    scores = made.difference[0].astype(np.float64) @ x.T + made.bias[0][:, None]
    assert np.array_equal(routed.decisions[0], scores >= 0)  # both modules, although the MLP comes after attention


@pytest.mark.parametrize("below", [False, True], ids=["tie", "just below"])
def test_a_tie_executes_and_one_step_below_skips(below):
    made, value = routers(scale=0), ReferenceModel(MODEL).embed(PROMPT[:1]).numpy()[0, 7]
    made.difference[0, 1, 7] = 1
    made.bias[0, 1] = np.nextafter(-value, np.float32(-np.inf)) if below else -value
    routed = RoutedReference(MODEL, made)
    routed.forward(PROMPT[:1])
    assert routed.decisions[0, :, 0].tolist() == [True, not below]


def test_random_routes_depend_on_the_position_alone():
    whole = RandomRoutes(0.25, 3).bits(8, 0, 400)
    assert np.array_equal(whole[:, :, 100:], RandomRoutes(0.25, 3).bits(8, 100, 300))
    assert abs(whole.mean() - 0.75) < 0.02
    assert not np.array_equal(whole, RandomRoutes(0.25, 4).bits(8, 0, 400))
    assert RandomRoutes(0.0).bits(4, 0, 50).all()
    everything = RandomRoutes(1.0).bits(4, 0, 50)  # but the attention of layer 0
    assert everything[0, 0].all() and not everything[0, 1].any() and not everything[1:].any()
    assert whole[0, 0].all() and whole[:, 0].mean() == pytest.approx(0.75, abs=0.02)


def test_exact_routes_skip_the_same_of_every_token():
    whole = RandomRoutes(0.25, 3, exact=True).bits(8, 0, 40)
    assert np.array_equal(whole[:, :, 10:], RandomRoutes(0.25, 3, exact=True).bits(8, 10, 30))
    assert (whole.sum(0) == 6).all() and whole[0, 0].all() and not whole[0, 1].all()
    part = RandomRoutes(0.3, 3, exact=True).bits(8, 0, 400).sum(0)  # 2.4 of 8
    assert set(part.flat) == {5, 6} and part.mean() == pytest.approx(5.6, abs=0.05)
    everything = RandomRoutes(1.0, exact=True).bits(4, 0, 3)
    assert everything[0, 0].all() and not everything[1:].any() and not everything[:, 1].any()


def test_a_batch_is_its_sequences():
    routed, batch = RoutedReference(MODEL, routers("reuse")), torch.stack([PROMPT, PROMPT.flip(0)])
    for row, logits in zip(batch, routed.logits(batch)):
        assert (routed.forward(row) - logits).abs().max() < 1e-4


@pytest.mark.parametrize(["make", "message"], [
    (lambda: RandomRoutes(1.5), r"skip rate must be 0..1, not 1.5"),
    (lambda: RandomRoutes(0.5, -1), "seed must be at least 0, not -1"),
    (lambda: RoutedReference(MODEL, routers(), force=np.ones((2, 2, 4), bool)),
     r"must be bool \[4, 2, tokens\], not bool \[2, 2, 4\]"),
    (lambda: RoutedReference(MODEL, routers(), force=np.ones((4, 2, 3), bool)).forward(PROMPT),
     "cover 3 positions, but 14 are needed"),
    (lambda: RoutedReference(random_model(3, layers=LAYERS), routers()), "with hash random-1, but random-3"),
])
def test_impossible_routes_are_refused(make, message):
    with pytest.raises(RouterError, match=message):
        make()
