"""Low-rank changes of a model's weights (LoRA, arXiv 2106.09685), merged into them before anything runs.

The overlay knows no adapters: a changed matrix is dequantised, summed in float32 and quantised again in its own kind,
so that it carries the rounding of that kind once more. Merged, a routed model costs what its base costs.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from .errors import ModelError, RouterError
from .model import Model, tensor_name
from .quantise import quantise
from .routers import Routers

__all__ = ["add_deltas", "merged"]


def add_deltas(model: Model, deltas: Mapping[str, Callable[[], np.ndarray]], identity: str) -> Model:
    """A model with some tensors changed, each quantised again in its own kind.

    deltas : by tensor name, what gives the float32 [rows, cols] to add; identity : of the result
    Raises RouterError, one line that names the tensor, for a sum that its kind cannot hold.
    """
    tensors = dict(model.tensors)
    for name, delta in deltas.items():
        try:
            tensors[name] = quantise(tensors[name].dequantise() + delta(), tensors[name].kind)
        except ModelError as error:
            raise RouterError(f"{name} with its LoRA delta: {error}") from None
    return replace(model, tensors=tensors, identity=identity)


def merged(model: Model, routers: Routers) -> tuple[Model, Routers]:
    """The model that routers run on, with their LoRA factors added, and the routers without them, for that model.

    Both are returned as they are if there are no factors. The merged model has an identity of its own: what is compiled
    or measured with it is never taken for the base. Raises RouterError if the routers are for another model, or the
    changed weights are beyond float16.
    """
    routers.require_model(model)
    if not routers.lora:
        return model, routers
    digest = hashlib.sha256(f"lora {model.identity}".encode())
    deltas = {}
    for part, (down, up) in sorted(routers.lora.items()):
        digest.update(part.encode() + str(down.shape).encode() + down.tobytes() + up.tobytes())
        for layer in range(model.config.layers):
            deltas[tensor_name(layer, part)] = _product(up[layer], down[layer])
    result = add_deltas(model, deltas, digest.hexdigest())
    return result, replace(routers, base=result.identity, lora=None)


def _product(up: np.ndarray, down: np.ndarray) -> Callable[[], np.ndarray]:
    return lambda: up.astype(np.float32) @ down.astype(np.float32)
