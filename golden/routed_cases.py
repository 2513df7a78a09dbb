"""Random routed Llamas with routes that reach every corner: one list for all levels that are compared.

Routes are forced where a corner asks for them. Where routers decide by themselves, their biases lie in gaps between the
scores of the prompt's tokens, so that levels with different rounding must decide alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from skipopu.host.model import Model
from skipopu.host.routers import KV_MODES, Routers
from skipopu.host.routes import Force, RandomRoutes
from skipopu.hw.config import OverlayConfig
from torch import Tensor

from .random_model import random_model
from .routed import RoutedReference

__all__ = ["RoutedCase", "routed_case", "routed_cases", "routed_names"]

SPARE = 8  #: positions behind the prompt for which routes are forced too
LAYERS = 4
CORNERS = ("nobody skips", "everybody skips", "one token executes", "first token executes", "a layer is skipped",
           "alternating layers", "attention only", "mlp only", "single-token prompt", "chunk boundary", "random",
           "ties", "own decisions", "own decisions, another model")
KINDS = ("q8_0", "q4_0", "q4_1")
GEOMETRIES: tuple[dict[str, int], ...] = (
    {}, {"heads": 6, "kv_heads": 2, "vocab": 101}, {"heads": 7, "kv_heads": 1, "head_dim": 32},
    {"heads": 2, "kv_heads": 2, "head_dim": 128}, {"heads": 4, "kv_heads": 4, "head_dim": 8, "hidden": 96, "mlp": 160})


class RoutedCase(NamedTuple):
    """A model with its routers, what is forced in their place (None: they decide), and a prompt."""

    name: str
    model: Model
    routers: Routers
    force: Force | None
    prompt: list[int]


def routed_names() -> list[str]:
    """The names of all cases."""
    return [f"{corner}, {kv}" for corner in CORNERS for kv in KV_MODES]


def routed_cases(config: OverlayConfig, names: Sequence[str] | None = None) -> Iterator[RoutedCase]:
    """The cases with these names, by default all, for the chunks and tiles of a configuration."""
    for name in routed_names() if names is None else names:
        yield routed_case(name, config)


def routed_case(name: str, config: OverlayConfig) -> RoutedCase:
    """One case; the same on every machine."""
    seed = routed_names().index(name)
    corner, _, kv = name.rpartition(", ")
    # ties are made from the embedding's values, which must be exact sums of few bits
    kind = "q8_0" if corner == "ties" else KINDS[seed % len(KINDS)]
    model = random_model(100 + seed, kinds=(kind,), layers=LAYERS, **GEOMETRIES[seed % len(GEOMETRIES)])
    rng = np.random.default_rng(seed)
    length = {"single-token prompt": 1, "chunk boundary": 2 * config.tokens + 1,
              "random": config.tile_tokens + config.tokens // 2}.get(corner, config.tokens + 3)
    prompt = rng.integers(0, model.config.vocab, min(length, model.config.context - SPARE)).tolist()
    difference = rng.standard_normal((LAYERS, 2, model.config.hidden)) * model.config.hidden**-0.5
    routers = Routers(kv=kv, base=model.identity, difference=difference.astype(np.float16),
                      bias=np.zeros((LAYERS, 2), np.float32))
    force: Force | None = None
    if corner == "ties":
        _tie(model, routers, prompt)
    elif corner.startswith("own"):
        _separate(model, routers, prompt)
    elif corner == "random":
        force = RandomRoutes(0.25, seed)
    else:
        force = _forced(corner, len(prompt), config, rng)
    return RoutedCase(name, model, routers, force, prompt)


def _forced(corner: str, length: int, config: OverlayConfig, rng: np.random.Generator) -> np.ndarray:
    bits = np.ones((LAYERS, 2, length + SPARE), bool)
    match corner:
        case "everybody skips":
            bits[:] = False
        case "one token executes":
            bits[:] = False
            bits[:, :, length // 2] = True
        case "first token executes":
            bits[:, :, 1:] = False
        case "a layer is skipped":
            bits[2] = False
        case "alternating layers":
            bits[::2] = False
        case "attention only":
            bits[:, 1] = False
        case "mlp only":
            bits[:, 0] = False
        case "single-token prompt":
            bits = rng.random(bits.shape) < 0.5
        case "chunk boundary":  # the tokens on both sides of it, and every other one
            bits[1:, :, config.tokens - 1 : config.tokens + 1] = False
            bits[2:, :, ::2] = False
            bits[3, 1] = True
    return bits


def _separate(model: Model, routers: Routers, prompt: list[int]) -> None:
    """Put each bias into the widest gap between the scores of the prompt in the middle of their order."""
    for layer in range(LAYERS):
        seen = _Inputs(model, routers)
        seen.forward(prompt)
        scores = np.sort(routers.difference[layer].astype(np.float64) @ seen.inputs[layer].T)
        middle = scores[:, len(prompt) // 4 : len(prompt) - len(prompt) // 4]
        widest = np.diff(middle).argmax(1)
        for module, at in enumerate(widest):
            routers.bias[layer, module] = -middle[module, at : at + 2].mean()


class _Inputs(RoutedReference):
    """Remembers the input of every layer: ``inputs`` float64 [tokens, hidden] each."""

    inputs: list[np.ndarray]

    def decide(self, layer: int, x: Tensor) -> Tensor:
        self.inputs = [*(self.inputs if layer else []), x[0].double().numpy()]
        return super().decide(layer, x)


def _tie(model: Model, routers: Routers, prompt: list[int]) -> None:
    """In layer 0 the first token's MLP score is exactly 0, and its attention's one unit below; elsewhere all tie."""
    routers.difference[:] = 0
    row = model.tensors["embedding"].take_rows(np.array(prompt[:1])).dequantise()[0]
    feature = int(np.flatnonzero((np.abs(row) < 1) & (np.abs(row) > 0.1))[0])
    routers.difference[0, :, feature] = 1
    routers.bias[0] = -row[feature] - np.float32(2.0**-24), -row[feature]
