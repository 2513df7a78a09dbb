"""The routed float reference: a Llama whose tokens decide, layer by layer, whether attention and MLP run for them.

Both routers of a layer read its raw input, before any norm; a module that runs adds its plain result to the residual
stream, unscaled. Later queries still see a token that skips attention: with its own keys and values of that layer (KV
mode "dense", SkipGPT's code, arXiv 2506.04179) or with those of the last layer where it executed ("reuse", SkipOPU,
arXiv 2603.14785; keys are rotated by position only, so they move between layers as they are). Layer 0 computes keys and
values of every token in both modes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from skipopu.host.errors import RouterError
from skipopu.host.routes import Force, RandomRoutes, check_forced, forced_routes
from torch import Tensor

from .reference import KVCache, ReferenceModel, rms_norm

if TYPE_CHECKING:
    from collections.abc import Sequence

    from skipopu.host.model import Model
    from skipopu.host.routers import Routers

__all__ = ["RandomRoutes", "RoutedCache", "RoutedReference"]


class RoutedCache(KVCache):
    """A KVCache that also holds the decisions of the past, bool [layers, 2, batch, tokens]."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers)
        self.routes: Tensor | None = None


class RoutedReference(ReferenceModel):
    """Float evaluation of a Model with Routers, linear or two-layer. They must be for that model and without LoRA
    factors, which `skipopu.host.lora.merged` adds to a model, else RouterError.

    force : takes the place of the routers' decisions: RandomRoutes, or bool [layers, 2, positions], true to execute
    ``decisions`` : bool [layers, 2, tokens] of the sequence so far, after ``forward`` or ``step``; of the first
    sequence after ``logits`` of several. Axis 1 is (attention, MLP).
    Decisions come from a floating-point sum: one that is closer to 0 than its rounding may differ between ``forward``
    and ``step``.
    """

    def __init__(self, model: Model, routers: Routers, *, force: Force | None = None,
                 dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> None:
        super().__init__(model, dtype=dtype, device=device)
        routers.require_model(model)
        if routers.lora:
            raise RouterError("these routers carry LoRA factors; merge them into the model first (host.lora.merged)")
        check_forced(force, model.config.layers)
        self.kv, self.force = routers.kv, force
        parts = (routers.difference, routers.bias, routers.hidden_weight, routers.hidden_bias)
        self._difference, self._bias, self._hidden_weight, self._hidden_bias = (
            None if part is None else torch.tensor(part).to(device, dtype) for part in parts)
        self.decisions = np.zeros((model.config.layers, 2, 0), bool)
        self._cache: RoutedCache = RoutedCache(model.config.layers)

    def decide(self, layer: int, x: Tensor) -> Tensor:
        """The routers' decisions: layer input [batch, tokens, hidden] -> bool [2, batch, tokens], true to execute."""
        rows = x[None]
        if self._hidden_weight is not None:
            weight, bias = self._hidden_weight[layer], self._hidden_bias[layer]
            rows = torch.relu(torch.einsum("bth,mih->mbti", x, weight) + bias[:, None, None])
        scores = (rows * self._difference[layer][:, None, None]).sum(-1) + self._bias[layer][:, None, None]
        return scores >= 0  # a tie executes

    def _forced(self, start: int, batch: int, tokens: int) -> Tensor | None:
        """The forced decisions bool [layers, 2, batch, tokens] of the positions from ``start`` on."""
        if self.force is None:
            return None
        bits = forced_routes(self.force, self.config.layers, start, tokens)
        return torch.tensor(bits, device=self.head.device)[:, :, None].expand(-1, -1, batch, -1)

    def logits(self, tokens: Tensor | Sequence[Sequence[int]], cache: KVCache | None = None) -> Tensor:
        """Logits [batch, tokens, vocab] of int tokens [batch, tokens] that follow those in ``cache``, a RoutedCache."""
        tokens = torch.as_tensor(tokens, device=self.head.device).long()
        cache = RoutedCache(self.config.layers) if cache is None else cache
        assert isinstance(cache, RoutedCache)
        start = cache.length
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        visible = torch.arange(start + tokens.shape[1], device=tokens.device) <= positions[:, None]
        forced, routes = self._forced(start, *tokens.shape), []
        x = self.embed(tokens)
        keys = values = x  # layer 0 replaces them whatever the decisions
        for layer in range(self.config.layers):
            executes = self.decide(layer, x) if forced is None else forced[layer]
            routes.append(executes)
            normed = rms_norm(x, self.weight(layer, "attn_norm"), self.config.rms_eps)
            new_keys, new_values = self.keys_values(layer, normed, positions)
            if layer and self.kv == "reuse":
                own = executes[0][:, None, :, None]
                new_keys, new_values = torch.where(own, new_keys, keys), torch.where(own, new_values, values)
            keys, values = new_keys, new_values
            added = self.attend(layer, normed, positions, *cache.append(layer, keys, values), visible)
            x = torch.where(executes[0][..., None], x + added, x)
            x = torch.where(executes[1][..., None], x + self.mlp(layer, x), x)
        past = [] if cache.routes is None else [cache.routes]
        cache.routes = torch.cat([*past, torch.stack(routes)], -1)
        self.decisions = cache.routes[:, :, 0].cpu().numpy()
        return self.output(x)

    def reset(self) -> None:
        """Begin a new sequence for ``step``."""
        self._cache = RoutedCache(self.config.layers)
