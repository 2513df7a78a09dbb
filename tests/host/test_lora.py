"""Merged LoRA factors: the sum of both, an identity of its own, one clear line for what does not fit."""

from dataclasses import replace

import numpy as np
import pytest
from skipopu.golden.random_model import random_model
from skipopu.golden.routed import RoutedReference
from skipopu.host.errors import RouterError
from skipopu.host.lora import merged
from skipopu.host.routers import Routers, load_routers, save_routers

MODEL = random_model(0, kinds=("f32",))
QUANTISED = random_model(0, kinds=("q4_1",))


def factors(model, parts, rank=3, seed=0, size=0.2):
    rng = np.random.default_rng(seed)
    layers = model.config.layers
    found = {}
    for part in parts:
        rows, cols = model.layer(0)[part].shape
        found[part] = tuple((rng.standard_normal(shape) * size).astype(np.float16)
                            for shape in ((layers, rank, cols), (layers, rows, rank)))
    return found


def routers(model=MODEL, lora=None, base=None):
    return Routers(kv="reuse", base=base or model.identity, difference=np.zeros((2, 2, 64), np.float16),
                   bias=np.ones((2, 2), np.float32), lora=lora)


def test_the_product_is_added_to_the_named_matrices_only():
    lora = factors(MODEL, ["q", "down"])
    model, plain = merged(MODEL, routers(lora=lora))
    for layer in range(2):
        for part, tensor in model.layer(layer).items():
            expected = MODEL.layer(layer)[part].dequantise()
            if part in lora:
                down, up = (half[layer].astype(np.float32) for half in lora[part])
                expected = expected + up @ down
            assert np.allclose(tensor.dequantise(), expected, atol=1e-6)
    assert plain.lora is None


def test_a_merged_matrix_keeps_its_kind_and_is_near_the_sum():
    lora = factors(QUANTISED, ["gate"], size=0.3)
    model, _ = merged(QUANTISED, routers(QUANTISED, lora))
    tensor, base = model.layer(1)["gate"], QUANTISED.layer(1)["gate"]
    assert tensor.kind == base.kind == "q4_1"
    delta = lora["gate"][1][1].astype(np.float32) @ lora["gate"][0][1].astype(np.float32)
    wanted = base.dequantise() + delta
    assert np.square(tensor.dequantise() - wanted).mean() < np.square(base.dequantise() - wanted).mean() / 10


def test_merging_gives_an_identity_that_only_the_plain_routers_fit():
    lora = factors(MODEL, ["q"])
    model, plain = merged(MODEL, routers(lora=lora))
    plain.require_model(model)
    with pytest.raises(RouterError, match="hash"):
        plain.require_model(MODEL)
    other, _ = merged(MODEL, routers(lora=factors(MODEL, ["q"], seed=1)))
    assert len({MODEL.identity, model.identity, other.identity}) == 3
    assert merged(MODEL, routers(lora=lora))[0].identity == model.identity


def test_without_factors_nothing_changes():
    own = routers()
    assert merged(MODEL, own) == (MODEL, own)


def test_unmerged_factors_do_not_run():
    with pytest.raises(RouterError, match="carry LoRA factors; merge them"):
        RoutedReference(MODEL, routers(lora=factors(MODEL, ["v"])))


def test_saved_factors_come_back(tmp_path):
    lora = factors(MODEL, ["q", "k", "v", "o", "gate", "up", "down"])
    saved = replace(routers(lora=lora), notes={"command": "skipopu tune", "tokens": "x"})
    save_routers(tmp_path / "r.safetensors", saved)
    loaded = load_routers(tmp_path / "r.safetensors", MODEL)
    assert loaded.notes == saved.notes
    assert all(np.array_equal(loaded.lora[part][half], lora[part][half]) for part in lora for half in (0, 1))
    assert loaded.lora.keys() == lora.keys()


@pytest.mark.parametrize(["lora", "message"], [
    ({"q": (np.zeros((2, 3, 64), np.float32), np.zeros((2, 64, 3), np.float16))}, "lora_down.q must be float16"),
    ({"q": (np.zeros((1, 3, 64), np.float16), np.zeros((2, 64, 3), np.float16))}, "lora_down.q must be float16"),
    ({"q": (np.zeros((2, 3, 64), np.float16), np.zeros((2, 64), np.float16))}, "lora_up.q must be float16"),
    ({"q": (np.zeros((2, 3, 64), np.float16), np.zeros((2, 64, 4), np.float16))}, "share a rank .*, not 3 and 4"),
    ({"q": (np.full((2, 3, 64), np.inf, np.float16), np.zeros((2, 64, 3), np.float16))}, "lora_down.q holds NaN"),
])
def test_impossible_factors_are_refused(lora, message):
    with pytest.raises(RouterError, match=message):
        routers(lora=lora)


@pytest.mark.parametrize(["lora", "message"], [
    ({"q": (np.zeros((2, 3, 32), np.float16), np.zeros((2, 64, 3), np.float16))},
     r"LoRA factors for q \[64, 32\], but random-0 has \[64, 64\]"),
    ({"attn_norm": (np.zeros((2, 3, 64), np.float16), np.zeros((2, 64, 3), np.float16))},
     r"LoRA factors for attn_norm \[64, 64\], but random-0 has only q, k, v, o, gate, up, down"),
])
def test_factors_for_other_matrices_are_refused(lora, message):
    with pytest.raises(RouterError, match=message):
        merged(MODEL, routers(lora=lora))


def test_a_sum_beyond_float16_is_refused():
    huge = {"q": (np.full((2, 3, 64), 6e4, np.float16), np.full((2, 64, 3), 6e4, np.float16))}
    with pytest.raises(RouterError, match="layers.0.q with its LoRA delta: weights must be finite and at most 65504"):
        merged(QUANTISED, routers(QUANTISED, huge))
