"""Merged changes of weights: exact in the 4-bit form, an identity of their own, one line for what does not fit."""

from dataclasses import replace

import numpy as np
import pytest
from skipopu.golden.random_model import random_model
from skipopu.golden.routed import RoutedReference
from skipopu.host.errors import RouterError
from skipopu.host.lora import add_deltas, merged
from skipopu.host.model import GROUP, KINDS
from skipopu.host.routers import Routers, load_routers, save_routers

MODELS = {kind: random_model(0, kinds=(kind,)) for kind in KINDS}
MODEL = MODELS["q4_1"]
PARTS = ("attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down")


def changes(parts, model=MODEL, seed=0, size=0.02):
    rng = np.random.default_rng(seed)
    found = {}
    for part in parts:
        shape = model.layer(0)[part].shape
        shape = (shape[0], shape[1] // GROUP) if len(shape) == 2 else shape
        found[part] = (rng.standard_normal((model.config.layers, *shape)) * size).astype(np.float16)
    return found


def routers(lora=None, model=MODEL):
    return Routers(kv="reuse", base=model.identity, difference=np.zeros((2, 2, 64), np.float16),
                   bias=np.ones((2, 2), np.float32), lora=lora)


@pytest.mark.parametrize(["kind", "tolerance"], [("f32", 1e-6), ("f16", 1e-3), ("q8_0", 5e-3), ("q4_0", 5e-4),
                                                 ("q4_1", 5e-4), ("q4_g128", 5e-4), ("q4m_g64", 5e-4)])
def test_a_change_is_added_to_every_weight_of_its_group(kind, tolerance):
    lora = changes(PARTS, MODELS[kind])
    model, plain = merged(MODELS[kind], routers(lora, MODELS[kind]))
    assert plain.lora is None
    for layer in range(2):
        for part, tensor in model.layer(layer).items():
            change, before = lora[part][layer].astype(np.float32), MODELS[kind].layer(layer)[part].dequantise()
            after = before * (1 + change) if change.ndim == 1 else before + change.repeat(GROUP, 1)
            assert np.abs(tensor.dequantise() - after).max() < tolerance
            assert np.abs(after - before).max() > 0.01


@pytest.mark.parametrize("kind", ["q4_0", "q4_1"])
def test_four_bit_codes_and_scales_stay(kind):
    before = MODELS[kind].layer(1)["gate"]
    after = merged(MODELS[kind], routers(changes(["gate"], MODELS[kind]), MODELS[kind]))[0].layer(1)["gate"]
    assert after.kind == "q4_1"
    assert np.array_equal(after.codes, before.codes + (8 if kind == "q4_0" else 0))
    assert np.array_equal(after.scale, before.scale)


def test_what_is_not_named_stays():
    model, _ = merged(MODEL, routers(changes(["v"])))
    assert all(model.tensors[name] is tensor for name, tensor in MODEL.tensors.items() if not name.endswith(".v"))


def test_small_deltas_do_not_survive_requantisation():
    # why tuning trains changes of whole groups: what is far below the step of the codes is rounded away
    before = MODEL.tensors["layers.0.gate"]
    delta = np.random.default_rng(0).standard_normal(before.shape).astype(np.float32) * before.scale.mean() * 0.04
    after = add_deltas(MODEL, {"layers.0.gate": lambda: delta}, "x").tensors["layers.0.gate"]
    assert np.count_nonzero(after.codes != before.codes) < 0.01 * before.codes.size


def test_merging_gives_an_identity_that_only_the_plain_routers_fit():
    model, plain = merged(MODEL, routers(changes(["q"])))
    plain.require_model(model)
    with pytest.raises(RouterError, match="hash"):
        plain.require_model(MODEL)
    other, _ = merged(MODEL, routers(changes(["q"], seed=1)))
    assert len({MODEL.identity, model.identity, other.identity}) == 3
    assert merged(MODEL, routers(changes(["q"])))[0].identity == model.identity


def test_without_changes_nothing_changes():
    own = routers()
    assert merged(MODEL, own) == (MODEL, own)


def test_unmerged_changes_do_not_run():
    with pytest.raises(RouterError, match="carry LoRA factors; merge them"):
        RoutedReference(MODEL, routers(changes(["v"])))


def test_saved_changes_come_back(tmp_path):
    lora = changes(PARTS)
    saved = replace(routers(lora), notes={"command": "skipopu tune", "tokens": "x"})
    save_routers(tmp_path / "r.safetensors", saved)
    loaded = load_routers(tmp_path / "r.safetensors", MODEL)
    assert loaded.notes == saved.notes
    assert loaded.lora.keys() == lora.keys()
    assert all(np.array_equal(loaded.lora[part], lora[part]) for part in lora)


@pytest.mark.parametrize(["array", "message"], [
    (np.zeros((2, 64, 2), np.float32), r"lora.q must be float16 \[2 layers, .\] or .*, not float32 \[2, 64, 2\]"),
    (np.zeros((1, 64, 2), np.float16), r"lora.q must be float16 \[2 layers, .*, not float16 \[1, 64, 2\]"),
    (np.zeros(2, np.float16), r"not float16 \[2\]"),
    (np.full((2, 64, 2), np.inf, np.float16), r"lora.q holds NaN or infinity \(256 of 256\)"),
])
def test_impossible_changes_are_refused(array, message):
    with pytest.raises(RouterError, match=message):
        routers({"q": array})


@pytest.mark.parametrize(["part", "shape", "message"], [
    ("q", (2, 64, 4), r"LoRA factors for q \[64, 4\], but random-0 has \[64, 2\]"),
    ("attn_norm", (2, 32), r"LoRA factors for attn_norm \[32\], but random-0 has \[64\]"),
    ("head", (2, 64, 2), "LoRA factors for head .*, but random-0 has only attn_norm, q, k, v, o, mlp_norm, gate, up"),
])
def test_changes_of_other_tensors_are_refused(part, shape, message):
    with pytest.raises(RouterError, match=message):
        merged(MODEL, routers({part: np.zeros(shape, np.float16)}))


@pytest.mark.parametrize("kind", ["q4_1", "q8_0"])
def test_a_sum_beyond_float16_is_refused(kind):
    tensor = MODELS[kind].tensors["layers.0.q"]
    model = MODELS[kind]
    if kind == "q4_1":
        huge = replace(tensor, minimum=np.full_like(tensor.minimum, 6e4))
        model = replace(model, tensors=dict(model.tensors) | {"layers.0.q": huge})
    changed = np.full((2, 64, 2), 65504, np.float16)
    with pytest.raises(RouterError, match="layers.0.q with its LoRA delta: "):
        merged(model, routers({"q": changed}, model))
