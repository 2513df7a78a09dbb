"""Routers: per layer and module the vector whose product with the layer input decides whether a token executes.

SkipGPT's router is a linear layer of two outputs, execute and skip, and the larger one wins (arXiv 2506.04179). Only
the difference of its rows matters: a token executes if and only if ``difference . x + bias >= 0``, where x is the raw
input of the layer (before any norm) for both modules; a tie executes. SkipGPT's published training code puts a hidden
layer with ReLU in front; such a router has no single difference vector, so the hidden layer is kept and the overlay
refuses it.

The KV mode says what a token that skips attention leaves for the tokens behind it: "dense", its own keys and values of
that layer, as in SkipGPT's code; "reuse", those of the last layer where it executed, as in SkipOPU (arXiv 2603.14785).
In both modes layer 0 computes keys and values of every token.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from .errors import RouterError
from .model import GROUP

if TYPE_CHECKING:
    from .model import Model

__all__ = ["FORMAT_VERSION", "KV_MODES", "MODULES", "NAMED_ROUTERS", "Routers", "check_kv", "find_routers",
           "load_routers", "save_routers"]

FORMAT_VERSION = 2  # version 1 had no LoRA factors; files without them are still written so
KV_MODES = ("dense", "reuse")
MODULES = ("attention", "mlp")  # order of the axis of length 2 everywhere
_FORMAT = "skipopu-routers"
_LINEAR, _HIDDEN = ("difference", "bias"), ("hidden_weight", "hidden_bias")
_METADATA = ("version", "kv", "base_model", "layers", "width")
NAMED_ROUTERS = {f"smollm2:{kv}": f"smollm2-{kv}.safetensors" for kv in KV_MODES} | {
    "story:reuse": "story-reuse.safetensors"}
_FOLDER = Path(__file__).parent / "data"
_POINT = re.compile(r"(.+)@(\d*\.?\d+)")  # routers, and the skip rate wanted of them
_CHECKPOINTS = (".pth", ".pt")  # PyTorch's, as SkipGPT publishes its routers


def check_kv(kv: str) -> str:
    """``kv`` itself. Raises RouterError if it is none of KV_MODES."""
    if kv not in KV_MODES:
        raise RouterError(f"KV mode must be {' or '.join(KV_MODES)}, not {str(kv)[:40]!r}")
    return kv


@dataclass(frozen=True, eq=False, kw_only=True)
class Routers:
    """The routers of every layer, and the model they are for. Raises RouterError on a wrong shape, dtype or value.

    kv : one of KV_MODES
    base : identity of the model (``Model.identity``)
    difference : float16 or float32 [layers, 2, width], execute row less skip row; axis 1 as in MODULES
    bias : float32 [layers, 2], execute less skip
    hidden_weight : float16 or float32 [layers, 2, inner, width], and hidden_bias : float32 [layers, 2, inner], of
        two-layer routers; then ``difference`` is [layers, 2, inner] and reads ``relu(hidden_weight @ x + hidden_bias)``
    lora : by the name of a tensor of every layer, what the routers' training changed in it, float16: of a matrix
        [layers, rows, cols / 32], added to all 32 weights of a group, of a norm [layers, width], a relative change.
        `lora.merged` puts them into a model
    notes : what the file says of its origin, by name; does not change what the routers do
    """

    kv: str
    base: str
    difference: np.ndarray
    bias: np.ndarray
    hidden_weight: np.ndarray | None = None
    hidden_bias: np.ndarray | None = None
    lora: Mapping[str, np.ndarray] | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_kv(self.kv)
        if not self.base:
            raise RouterError("routers need the identity of their base model, which must not be empty")
        if (self.hidden_weight is None) != (self.hidden_bias is None):
            raise RouterError("routers have both hidden_weight and hidden_bias, or neither")
        first = self.difference if self.hidden_weight is None else self.hidden_weight
        if first.ndim != (3 if self.is_linear else 4) or not all(first.shape):
            raise RouterError(f"router weights must be [layers, 2, {'' if self.is_linear else 'inner, '}width], "
                              f"not {list(first.shape)}")
        layers, read = first.shape[0], first.shape[2]
        shapes = {"difference": (layers, 2, read), "bias": (layers, 2)}
        if not self.is_linear:
            shapes |= {"hidden_weight": (layers, 2, read, self.width), "hidden_bias": (layers, 2, read)}
        for name, shape in shapes.items():
            array = getattr(self, name)
            dtypes = ("float32",) if name.endswith("bias") else ("float16", "float32")
            if array.dtype not in dtypes:
                raise RouterError(f"router {name} must be {' or '.join(dtypes)}, not {array.dtype}")
            if array.shape != shape:
                raise RouterError(f"router {name} must be {list(shape)}, not {list(array.shape)}")
            if bad := int(np.count_nonzero(~np.isfinite(array))):
                raise RouterError(f"router {name} holds NaN or infinity ({bad} of {array.size})")
        for part, array in (self.lora or {}).items():
            if array.dtype != np.float16 or array.ndim not in (2, 3) or len(array) != self.layers:
                raise RouterError(f"router lora.{part} must be float16 [{self.layers} layers, .] or [{self.layers} "
                                  f"layers, ., .], not {array.dtype} {list(array.shape)}")
            if bad := int(np.count_nonzero(~np.isfinite(array))):
                raise RouterError(f"router lora.{part} holds NaN or infinity ({bad} of {array.size})")

    @property
    def is_linear(self) -> bool:
        """Whether the decision is one dot product, which is what the overlay computes."""
        return self.hidden_weight is None

    @property
    def essential(self) -> np.ndarray:
        """bool [layers, 2], the modules that execute for every input."""
        return ~self.difference.any(-1) & (self.bias >= 0)

    @property
    def layers(self) -> int:
        """Layers of the base model."""
        return self.difference.shape[0]

    @property
    def width(self) -> int:
        """Features of the residual stream that the routers read."""
        return (self.difference if self.hidden_weight is None else self.hidden_weight).shape[-1]

    def at(self, skip: float) -> Routers:
        """The same routers with all biases shifted so that about ``skip`` of the weights are left unread.

        Between two of the points that tuning measured, by a line. Raises RouterError if the routers carry no points, or
        ``skip`` is beyond them.
        """
        try:
            points = np.array(sorted(json.loads(self.notes.get("points", "[]"))), np.float64).reshape(-1, 2)
            if not np.isfinite(points).all():
                raise ValueError
        except (ValueError, TypeError):
            raise RouterError("the operating points in the metadata cannot be read") from None
        if not len(points):
            raise RouterError("these routers carry no other operating points; `skipopu tune` notes them")
        least, most = points[0, 0], points[-1, 0]
        if not least <= skip <= most:
            raise RouterError(f"these routers skip {least:.1%} to {most:.1%} of the weights, not {skip:.1%}")
        shift = np.interp(skip, points[:, 0], points[:, 1])
        return replace(self, bias=np.where(self.essential, self.bias, self.bias + shift).astype(np.float32))

    def require_linear(self) -> None:
        """Raises RouterError if the overlay cannot run these routers."""
        if not self.is_linear:
            raise RouterError(f"two-layer routers (hidden width {self.difference.shape[-1]}) run in the reference "
                              "only; the overlay needs linear routers")

    def require_model(self, model: Model) -> None:
        """Raises RouterError if the routers were made for another model: layers, width or identity differ."""
        for what, ours, theirs in (("layers", self.layers, model.config.layers),
                                   ("width", self.width, model.config.hidden)):
            if ours != theirs:
                raise RouterError(f"these routers are for a model with {what} {ours}, but {model.config.name} "
                                  f"has {theirs}")
        shapes = {part: (*tensor.shape[:-1], tensor.shape[-1] // (GROUP if len(tensor.shape) == 2 else 1))
                  for part, tensor in model.layer(0).items()}
        for part, array in (self.lora or {}).items():
            if array.shape[1:] != shapes.get(part):
                known = f"{list(shapes[part])}" if part in shapes else f"only {', '.join(shapes)}"
                raise RouterError(f"these routers have LoRA factors for {part} {list(array.shape[1:])}, but "
                                  f"{model.config.name} has {known}")
        if self.base != model.identity:
            raise RouterError(f"these routers are for the model with hash {self.base[:16]}, but {model.config.name} "
                              f"has {model.identity[:16] or 'none'}")


def save_routers(path: str | Path, routers: Routers) -> None:
    """Write a router file: safetensors, with what identifies the model, and the notes, in its metadata."""
    tensors = {name: getattr(routers, name) for name in (*_LINEAR, *(() if routers.is_linear else _HIDDEN))}
    tensors |= {f"lora.{part}": array for part, array in (routers.lora or {}).items()}
    about = {"format": _FORMAT, "version": str(FORMAT_VERSION if routers.lora else 1), "kv": routers.kv,
             "base_model": routers.base, "layers": str(routers.layers), "width": str(routers.width)}
    save_file({name: np.ascontiguousarray(array) for name, array in tensors.items()}, path,
              {**routers.notes, **about})


def find_routers(spec: str | Path, model: Model | None = None) -> Routers:
    """The routers of a name in NAMED_ROUTERS or of a file, checked against ``model`` if given.

    With ``@RATE`` behind it, at another of their operating points (`Routers.at`): "smollm2:reuse@0.1". A name wins over
    a file of the same name in the current folder. A file called .pth or .pt is a SkipGPT checkpoint, which needs
    ``model``; its KV mode is "dense". Raises RouterError, one line, as `load_routers` and `Routers.at`, or if there is
    neither a name nor a file.
    """
    if (point := _POINT.fullmatch(str(spec))) and not Path(spec).exists():
        try:
            return find_routers(point[1], model).at(float(point[2]))
        except RouterError as error:
            raise RouterError(f"{spec}: {str(error).removeprefix(f'{point[1]}: ')}") from None
    if (shipped := NAMED_ROUTERS.get(str(spec))) is not None:
        return load_routers(_FOLDER / shipped, model)
    if not Path(spec).exists():
        near = get_close_matches(str(spec), NAMED_ROUTERS, 1)
        raise RouterError(f"{spec}: no such router file or name; " + (f"did you mean {near[0]}?" if near else
                                                                     f"names are {', '.join(NAMED_ROUTERS)}"))
    if model is not None and Path(spec).suffix in _CHECKPOINTS:
        from .skipgpt_import import load_skipgpt_routers
        return load_skipgpt_routers(spec, model, kv="dense")
    return load_routers(spec, model)


def load_routers(path: str | Path, model: Model | None = None) -> Routers:
    """Read a router file, and check it against ``model`` if given.

    Raises RouterError, one line that begins with the path, if the file is damaged, has missing or extra tensors, an
    unknown version or KV mode, values that are not finite, or was made for another model.
    """
    try:
        metadata, tensors = _read(path)
        routers = _routers(metadata, tensors)
        if model is not None:
            routers.require_model(model)
    except RouterError as error:
        raise RouterError(f"{path}: {error}") from None
    return routers


def _read(path: str | Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    tensors = {}
    try:
        with safe_open(path, framework="np") as content:
            metadata = content.metadata() or {}
            for name in content.keys():  # noqa: SIM118 the handle is not a dict
                if (dtype := content.get_slice(name).get_dtype()) not in ("F16", "F32"):
                    raise RouterError(f"tensor {name} must be F16 or F32, not {dtype}")
                tensors[name] = content.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise RouterError(f"not a readable safetensors file ({error})") from None
    return metadata, tensors


def _routers(metadata: dict[str, str], tensors: dict[str, np.ndarray]) -> Routers:
    if metadata.get("format") != _FORMAT:
        raise RouterError(f"not a router file: its metadata must have format {_FORMAT}, "
                          f"not {metadata.get('format', 'none')[:40]!r}")
    if missing := [key for key in _METADATA if key not in metadata]:
        raise RouterError(f"the metadata lacks {', '.join(missing)}")
    if metadata["version"] not in ("1", str(FORMAT_VERSION)):
        raise RouterError(f"router files of version 1 or {FORMAT_VERSION} can be read, not "
                          f"{metadata['version'][:40]!r}")
    expected = (*_LINEAR, *(_HIDDEN if any(name in tensors for name in _HIDDEN) else ()))
    if metadata["version"] != "1":
        expected += tuple(name for name in tensors if name.startswith("lora."))
    for what, names in (("missing", [name for name in expected if name not in tensors]),
                        ("unexpected", [name for name in tensors if name not in expected])):
        if names:
            raise RouterError(f"{what} tensors: {', '.join(sorted(names))}")
    lora = {name.removeprefix("lora."): array for name, array in tensors.items() if name.startswith("lora.")}
    routers = Routers(kv=metadata["kv"], base=metadata["base_model"], lora=lora or None,
                      notes={key: value for key, value in metadata.items() if key not in ("format", *_METADATA)},
                      **{name: array for name, array in tensors.items() if "." not in name})  # type: ignore[arg-type]
    for key in ("layers", "width"):
        if metadata[key] != str(getattr(routers, key)):
            raise RouterError(f"the metadata has {key} {metadata[key][:40]}, but the tensors {getattr(routers, key)}")
    return routers
