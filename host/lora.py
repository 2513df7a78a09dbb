"""Changes of a model's weights by tuning, merged before anything runs: the overlay knows no adapters.

Two kinds. Any delta, such as LoRA's (arXiv 2106.09685), can be added to a tensor, which is then quantised again in its
own kind; small deltas do not survive that, for rounding takes every weight back to the code it had (measured on
SmolLM2: of a LoRA delta of 4% of the quantisation step, 0.07% of the codes changed). What `skipopu tune` trains is made
to survive: one factor for each group of 32 weights, with which the quantised forms multiply the group's scale (and
minimum), after PEQA (arXiv 2305.14152). Nothing but float16's rounding of that is lost.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from .errors import ModelError, RouterError
from .model import GROUP, Model, QuantTensor, tensor_name
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
    """The model that routers run on, with their changes in its weights, and the routers without them, for that model.

    Both are returned as they are if there are no changes. The merged model has an identity of its own: what is compiled
    or measured with it is never taken for the base. Raises RouterError if the routers are for another model, or the
    changed weights are beyond float16.
    """
    routers.require_model(model)
    if not routers.lora:
        return model, routers
    digest, tensors = hashlib.sha256(f"lora {model.identity}".encode()), dict(model.tensors)
    for part, changes in sorted(routers.lora.items()):
        digest.update(part.encode() + changes.tobytes())
        for layer, change in enumerate(changes.astype(np.float32)):
            name = tensor_name(layer, part)
            try:
                tensors[name] = _changed(tensors[name], change)
            except ModelError as error:
                raise RouterError(f"{name} with its LoRA delta: {error}") from None
    result = replace(model, tensors=tensors, identity=digest.hexdigest())
    return result, replace(routers, base=result.identity, lora=None)


def _changed(tensor: QuantTensor, change: np.ndarray) -> QuantTensor:
    factor = 1 + change
    if change.ndim == 1:
        return replace(tensor, values=tensor.dequantise() * factor)
    if tensor.scale is None:
        return quantise(tensor.dequantise() * factor.repeat(GROUP, 1), tensor.kind)
    with np.errstate(over="ignore"):  # infinity is refused by the tensor
        parts = {name: (array.astype(np.float32) * factor).astype(np.float16)
                 for name in ("scale", "minimum") if (array := getattr(tensor, name)) is not None}
    return replace(tensor, **parts)
