"""Import SkipGPT's checkpoints: routers in both published shapes, and LoRA deltas, merged into a model.

The checkpoints are PyTorch files of plain tensors and are read without running anything in them. A router is
``weight_predictor``, linear from the layer input to (execute, skip); the published training code puts ``hidden_layer``
and a ReLU in front of it. Rows are reduced to their difference here, in float32; the hidden layer has no such short
form, so two-layer routers run in the reference only. Names follow the training code of arXiv 2506.04179 (the layers may
carry any prefix before ``model.layers``, and a ``block`` around the original layer).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import torch

from .errors import RouterError
from .hf_import import LAYER_NAMES, interleave_rows
from .lora import add_deltas
from .model import Model, tensor_name
from .routers import MODULES, Routers, check_kv

__all__ = ["LORA_ALPHA", "load_skipgpt_routers", "merge_skipgpt_lora"]

LORA_ALPHA = 32.0  # of SkipGPT's training; the delta is B @ A * (alpha / rank)
_LORA_PARTS = {theirs: ours for ours, theirs in LAYER_NAMES.items() if "norm" not in ours}
_LORA_NAME = re.compile(r"model\.layers\.(\d{1,4})\.(?:block\.)?([a-z_.]+)\.lora_([AB])(?:\.default)?\.weight")
_SHOWN = 4  # names in an error


def load_skipgpt_routers(path: str | Path, model: Model, *, kv: str) -> Routers:
    """Read a router checkpoint for ``model``. A SkipGPT file names neither its base model nor a KV mode.

    kv : one of KV_MODES; SkipGPT trains for "dense"
    Returns linear or two-layer routers (``Routers.is_linear`` tells), with the identity of ``model`` as their base.
    Raises RouterError, one line that begins with the path, if the file is damaged, keys are missing or extra, layers or
    sizes are not those of ``model``, or a value is not finite.
    """
    check_kv(kv)
    try:
        return _routers(_read(path), model, kv)
    except RouterError as error:
        raise RouterError(f"{path}: {error}") from None


def merge_skipgpt_lora(path: str | Path, model: Model, *, alpha: float = LORA_ALPHA) -> Model:
    """A model with the LoRA deltas of a checkpoint added to its weights.

    Each weight that has a delta is dequantised, summed in float32 and quantised again in its own kind, so that it
    carries the rounding of that kind once more. The result has an identity of its own: import routers against it, not
    against ``model``. Raises RouterError, one line that begins with the path, for a damaged file, keys that are no LoRA
    pair, or sizes that are not those of ``model``.
    """
    try:
        pairs = _lora_pairs(_read(path), model)
        digest = hashlib.sha256(f"lora {alpha} {model.identity}".encode())
        deltas = {}
        for name, (down, up) in sorted(pairs.items()):
            digest.update(name.encode() + down.tobytes() + up.tobytes())
            deltas[name] = _delta(name, down, up * np.float32(alpha / len(down)), model.config.head_dim)
        return add_deltas(model, deltas, digest.hexdigest())
    except RouterError as error:
        raise RouterError(f"{path}: {error}") from None


def _delta(name: str, down: np.ndarray, up: np.ndarray, head_dim: int) -> Callable[[], np.ndarray]:
    if name.endswith((".q", ".k")):  # the model's rows are in rotary pairs
        up = up[interleave_rows(len(up) // head_dim, head_dim)]
    return lambda: up @ down


def _read(path: str | Path) -> dict[str, np.ndarray]:
    """The checkpoint's tensors, float32, by their names from ``model.layers`` on."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise RouterError(f"cannot be read ({error.strerror})") from None
    except Exception as error:  # a damaged archive or pickle fails in many ways
        raise RouterError(f"not a PyTorch checkpoint of plain tensors ({type(error).__name__})") from None
    if not isinstance(content, dict):
        raise RouterError(f"a checkpoint must be a dictionary of tensors, not {type(content).__name__}")
    tensors: dict[str, np.ndarray] = {}
    for key, value in content.items():
        if not (isinstance(key, str) and isinstance(value, torch.Tensor) and value.is_floating_point()):
            raise RouterError(f"entry {str(key)[:80]!r} is not a floating-point tensor")
        name = key[max(key.rfind("model.layers."), 0):]
        if name in tensors:
            raise RouterError(f"two tensors are called {name}, with different prefixes")
        tensors[name] = value.float().numpy()
    return tensors


def _names(names: Iterable[str]) -> str:
    """Some of the names, in order, and how many there are."""
    ordered = sorted(name[:80] for name in names)
    return ", ".join(ordered[:_SHOWN]) + (f" and {len(ordered) - _SHOWN} more" if len(ordered) > _SHOWN else "")


def _routers(tensors: dict[str, np.ndarray], model: Model, kv: str) -> Routers:
    layers, width = model.config.layers, model.config.hidden
    two_layer = any(".hidden_layer." in name for name in tensors)
    found = {int(match[1]) for name in tensors if (match := re.match(r"model\.layers\.(\d{1,4})\.router_", name))}
    if found and found == set(range(len(found))) and len(found) != layers:
        raise RouterError(f"these routers are for a model with layers {len(found)}, but {model.config.name} "
                          f"has {layers}")
    stacks: dict[str, list[np.ndarray]] = {}
    expected = {}
    for layer in range(layers):
        for module in MODULES:
            for linear in ("hidden_layer", "weight_predictor") if two_layer else ("weight_predictor",):
                for part in ("weight", "bias"):
                    expected[f"model.layers.{layer}.router_{module}.{linear}.{part}"] = f"{linear}.{part}"
    for what, names in ("missing", expected.keys() - tensors.keys()), ("unexpected", tensors.keys() - expected.keys()):
        if names:
            raise RouterError(f"{what} keys: {_names(names)}")
    inner = tensors["model.layers.0.router_attention.hidden_layer.bias"].size if two_layer else width
    shapes: dict[str, tuple[int, ...]] = {"weight_predictor.weight": (2, inner), "weight_predictor.bias": (2,),
                                          "hidden_layer.weight": (inner, width), "hidden_layer.bias": (inner,)}
    for name, kind in expected.items():
        if tensors[name].shape != shapes[kind]:
            raise RouterError(f"{name} must be {list(shapes[kind])} for {model.config.name}, "
                              f"not {list(tensors[name].shape)}")
        stacks.setdefault(kind, []).append(tensors[name])
    stacked = {kind: np.stack(arrays).reshape(layers, 2, *shapes[kind]) for kind, arrays in stacks.items()}
    weight, bias = stacked["weight_predictor.weight"], stacked["weight_predictor.bias"]
    for name in expected:
        if not np.isfinite(tensors[name]).all():
            raise RouterError(f"{name} holds NaN or infinity")
    return Routers(kv=kv, base=model.identity, difference=weight[:, :, 0] - weight[:, :, 1],
                   bias=bias[:, :, 0] - bias[:, :, 1], hidden_weight=stacked.get("hidden_layer.weight"),
                   hidden_bias=stacked.get("hidden_layer.bias"))


def _lora_pairs(tensors: dict[str, np.ndarray], model: Model) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """(A [rank, in], B [out, rank]) by the name of the tensor that they change."""
    halves: dict[str, dict[str, np.ndarray]] = {}
    for name, values in tensors.items():
        match = _LORA_NAME.fullmatch(name)
        part = match and _LORA_PARTS.get(match[2])
        if match is None or part is None:
            raise RouterError(f"unexpected keys: {name[:80]} is not half of a LoRA pair of a Llama layer")
        if int(match[1]) >= model.config.layers:
            raise RouterError(f"{name}: {model.config.name} has only {model.config.layers} layers")
        halves.setdefault(tensor_name(int(match[1]), part), {})[match[3]] = values
    if not halves:
        raise RouterError("the checkpoint holds no LoRA pairs")
    if missing := [f"{name} lora_{half}" for name, pair in halves.items() for half in "AB" if half not in pair]:
        raise RouterError(f"missing keys: {_names(missing)}")
    for name, pair in halves.items():
        down, up = pair["A"], pair["B"]
        rows, cols = model.tensors[name].shape
        if not (down.ndim == up.ndim == 2 and down.shape[0] and (len(up), down.shape[1]) == (rows, cols)
                and up.shape[1] == len(down)):
            raise RouterError(f"{name}: the LoRA pair must be [rank, {cols}] and [{rows}, rank], "
                              f"not {list(down.shape)} and {list(up.shape)}")
    return {name: (pair["A"], pair["B"]) for name, pair in halves.items()}
