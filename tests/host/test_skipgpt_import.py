"""SkipGPT checkpoints: both shapes of routers, merged LoRA deltas, and one clear line for each way to be wrong."""

import pickle

import numpy as np
import pytest
import torch
from skipopu.golden.random_model import random_model
from skipopu.host.errors import RouterError
from skipopu.host.hf_import import interleave_rows
from skipopu.host.skipgpt_import import load_skipgpt_routers, merge_skipgpt_lora

MODEL = random_model(0)  # 2 layers, 64 wide
PREDICTOR = "model.layers.1.router_mlp.weight_predictor"
HIDDEN = "model.layers.0.router_mlp.hidden_layer"


def checkpoint(*, two_layer=False, layers=2, width=64, seed=0, prefix=""):
    """The tensors of a published checkpoint of this size."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        for module in ("attention", "mlp"):
            name = f"{prefix}model.layers.{layer}.router_{module}"
            sizes = {"hidden_layer": (width // 4, width)} if two_layer else {}
            for linear, shape in (sizes | {"weight_predictor": (2, width // 4 if two_layer else width)}).items():
                tensors[f"{name}.{linear}.weight"] = torch.randn(shape, generator=generator)
                tensors[f"{name}.{linear}.bias"] = torch.randn(shape[0], generator=generator)
    return tensors


@pytest.fixture
def load(tmp_path):
    def load(tensors, model=MODEL, kv="dense"):
        torch.save(tensors, tmp_path / "router.pth")
        return load_skipgpt_routers(tmp_path / "router.pth", model, kv=kv)
    return load


@pytest.mark.parametrize("prefix", ["", "base_model.model."], ids=["stage 1", "stage 2"])
@pytest.mark.parametrize("two_layer", [False, True], ids=["linear", "two-layer"])
def test_routers_decide_like_the_larger_of_the_two_outputs(load, two_layer, prefix):
    tensors = checkpoint(two_layer=two_layer, prefix=prefix)
    routers = load(tensors, kv="reuse")
    assert (routers.kv, routers.base, routers.is_linear) == ("reuse", "random-0", not two_layer)
    x = torch.randn(500, 64, generator=torch.Generator().manual_seed(9))
    for layer in range(2):
        for index, module in enumerate(("attention", "mlp")):
            name, read = f"{prefix}model.layers.{layer}.router_{module}", x
            ours = x.numpy()
            if two_layer:
                read = torch.relu(x @ tensors[f"{name}.hidden_layer.weight"].T + tensors[f"{name}.hidden_layer.bias"])
                ours = np.maximum(ours @ routers.hidden_weight[layer, index].T + routers.hidden_bias[layer, index], 0)
            logits = read @ tensors[f"{name}.weight_predictor.weight"].T + tensors[f"{name}.weight_predictor.bias"]
            executes = ours @ routers.difference[layer, index] + routers.bias[layer, index] >= 0
            assert np.array_equal(executes, logits.argmax(-1).numpy() == 0)
            assert 10 < executes.sum() < 490


def test_half_precision_checkpoints_are_read_as_float32(load):
    tensors = {name: tensor.bfloat16() for name, tensor in checkpoint().items()}
    weight = tensors[f"{PREDICTOR}.weight"].float().numpy()
    routers = load(tensors)
    assert routers.difference.dtype == np.float32
    assert np.array_equal(routers.difference[1, 1], weight[0] - weight[1])


def changed(two_layer=False, **entries):
    tensors = checkpoint(two_layer=two_layer) | {name.replace("/", "."): value for name, value in entries.items()}
    return {name: value for name, value in tensors.items() if value is not None}


@pytest.mark.parametrize(["tensors", "message"], [
    (checkpoint(layers=3), "for a model with layers 3, but random-0 has 2"),
    (checkpoint(width=128), r"weight_predictor.weight must be \[2, 64\] for random-0, not \[2, 128\]"),
    (changed(**{f"{PREDICTOR}.bias": None}), f"missing keys: {PREDICTOR}.bias$"),
    (changed(**{f"model.layers.{n}.norm": torch.zeros(1) for n in range(6)}),
     "unexpected keys: model.layers.0.norm, .*model.layers.3.norm and 2 more"),
    (changed(**{f"{HIDDEN}.bias": torch.zeros(16)}), "missing keys: .*hidden_layer.bias, .* and 3 more"),
    (changed(True, **{f"{HIDDEN}.weight": torch.zeros(8, 64)}), r"hidden_layer.weight must be \[16, 64\]"),
    (changed(**{f"{PREDICTOR}.weight": torch.full((2, 64), torch.inf)}), f"{PREDICTOR}.weight holds NaN or infinity"),
    (changed(**{f"{PREDICTOR}.weight": torch.zeros(2, 64, dtype=torch.int8)}), "is not a floating-point tensor"),
    (checkpoint() | checkpoint(prefix="base_model.model."), "two tensors are called model.layers.0.router_attention"),
    ({}, "missing keys: model.layers.0.router_attention.weight_predictor.bias"),
    ([torch.zeros(1)], "must be a dictionary of tensors, not list"),
])
def test_a_bad_checkpoint_gets_one_clear_line(load, tensors, message):
    with pytest.raises(RouterError, match=f"router.pth: .*{message}") as error:
        load(tensors)
    assert "\n" not in str(error.value)


class Exploit:
    """Unpickled by a careless reader, it would run a command."""

    def __reduce__(self):
        return print, ("ran",)


@pytest.mark.parametrize("content", [b"", b"no checkpoint", pickle.dumps({"a": Exploit()}, protocol=2)],
                         ids=["empty", "text", "code"])
def test_what_is_no_checkpoint_is_not_run(tmp_path, content, capsys):
    (tmp_path / "router.pth").write_bytes(content)
    with pytest.raises(RouterError, match="router.pth: not a PyTorch checkpoint of plain tensors"):
        load_skipgpt_routers(tmp_path / "router.pth", MODEL, kv="dense")
    assert "ran" not in capsys.readouterr().out


def test_an_absent_file_and_an_unknown_mode_are_named(tmp_path):
    with pytest.raises(RouterError, match="router.pth: cannot be read"):
        load_skipgpt_routers(tmp_path / "router.pth", MODEL, kv="dense")
    with pytest.raises(RouterError, match="KV mode must be dense or reuse, not 'sparse'"):
        load_skipgpt_routers(tmp_path / "router.pth", MODEL, kv="sparse")


LORA = {"q": ("self_attn.q_proj", 64, 64), "v": ("self_attn.v_proj", 32, 64), "gate": ("mlp.gate_proj", 96, 64)}
HALF = "base_model.model.model.layers.0.block.self_attn.q_proj"


def lora(rank=4, layers=2, **changes):
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in range(layers):
        for name, rows, cols in LORA.values():
            prefix = f"base_model.model.model.layers.{layer}.block.{name}"
            tensors[f"{prefix}.lora_A.default.weight"] = torch.randn(rank, cols, generator=generator) / 8
            tensors[f"{prefix}.lora_B.default.weight"] = torch.randn(rows, rank, generator=generator) / 8
    return {name: value for name, value in (tensors | changes).items() if value is not None}


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_1"])
def test_lora_deltas_are_added_and_quantised_in_the_same_kind(tmp_path, kind):
    model, tensors = random_model(0, kinds=[kind]), lora()
    torch.save(tensors, tmp_path / "lora.pth")
    merged = merge_skipgpt_lora(tmp_path / "lora.pth", model, alpha=32)
    for name, before in model.tensors.items():
        after, part = merged.tensors[name], name.rpartition(".")[2]
        assert after.kind == before.kind
        if part not in LORA:
            assert after is before
            continue
        prefix = f"base_model.model.model.layers.{name.split('.')[1]}.block.{LORA[part][0]}"
        down, up = (tensors[f"{prefix}.lora_{half}.default.weight"].numpy() for half in "AB")
        delta = up @ down * 8  # alpha / rank
        if part == "q":
            delta = delta[interleave_rows(4, 16)]
        step = {"f32": 1e-6, "q8_0": 0.02, "q4_1": 0.2}[kind]
        assert np.abs(delta).max() > 1.5 * step
        assert np.abs(after.dequantise() - before.dequantise() - delta).max() < step


def test_a_merged_model_is_another_model(tmp_path):
    identities = {MODEL.identity}
    for number, tensors in enumerate([lora(), lora(rank=2)]):
        torch.save(tensors, tmp_path / "lora.pth")
        identities |= {merge_skipgpt_lora(tmp_path / "lora.pth", MODEL, alpha=a).identity for a in (16, 32)}
        assert len(identities) == 3 + 2 * number


@pytest.mark.parametrize(["tensors", "message"], [
    ({}, "holds no LoRA pairs"),
    (lora(layers=3), "random-0 has only 2 layers"),
    (lora(**{f"{HALF}.lora_A.default.weight": None}), "missing keys: layers.0.q lora_A$"),
    (lora(**{"model.layers.0.mlp.bias": torch.zeros(1)}), "unexpected keys: model.layers.0.mlp.bias is not half"),
    (lora(**{"model.layers.0.mlp.router.lora_A.weight": torch.zeros(1)}), "mlp.router.lora_A.weight is not half"),
    (lora(**{f"{HALF}.lora_A.default.weight": torch.zeros(4, 32)}),
     r"layers.0.q: the LoRA pair must be \[rank, 64\] and \[64, rank\], not \[4, 32\] and \[64, 4\]"),
    (lora(**{f"{HALF}.lora_A.default.weight": torch.full((4, 64), torch.nan)}), "layers.0.q .*must be finite"),
])
def test_bad_lora_gets_one_clear_line(tmp_path, tensors, message):
    torch.save(tensors, tmp_path / "lora.pth")
    with pytest.raises(RouterError, match=f"lora.pth: .*{message}") as error:
        merge_skipgpt_lora(tmp_path / "lora.pth", random_model(0, kinds=["q8_0"]))
    assert "\n" not in str(error.value)
