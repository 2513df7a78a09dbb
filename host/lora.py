"""Changes of a model's weights by tuning, merged before anything runs: the overlay knows no adapters.

Two kinds. Any delta can be added to a tensor, which is then quantised again in its own kind; small deltas do not
survive that, for rounding takes every weight back to the code it had (measured on SmolLM2: of a LoRA delta of 4% of the
quantisation step, 0.07% of the codes changed). What `skipopu tune` trains is made to survive: low-rank deltas
up @ down (LoRA, arXiv 2106.09685) whose down factor sums the 32 weights of a group, so that the product is one number
for each group, which the 4-bit form adds to the group's minimum. Nothing but float16's rounding of that is lost.
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
    if change.ndim == 1:
        return replace(tensor, values=tensor.dequantise() * (1 + change))
    tensor = tensor.narrowed()  # factors have a number for every 32 weights
    if tensor.kind not in ("q4_0", "q4_1"):
        return quantise(tensor.dequantise() + change.repeat(GROUP, 1), tensor.kind)
    assert tensor.codes is not None and tensor.scale is not None
    # a q4_0 code of -8..7 is the q4_1 code 0..15 less 8
    codes = tensor.codes if tensor.kind == "q4_1" else (tensor.codes + 8).astype(np.int8)
    minimum = -8 * tensor.scale.astype(np.float32) if tensor.minimum is None else tensor.minimum.astype(np.float32)
    with np.errstate(over="ignore"):  # infinity is refused by the tensor
        return QuantTensor("q4_1", codes=codes, scale=tensor.scale, minimum=(minimum + change).astype(np.float16))
