"""The float reference: a Llama in plain PyTorch, the top of the three levels that are compared with each other.

RMSNorm, rotary embedding on adjacent pairs, grouped-query attention, SwiGLU, tied or separate head; every weight is
dequantised first and every operation is the obvious one. The two modules of a layer are functions of their own, and
keys/values are computed apart from queries, so that routing decides per token what runs.
Its oracle is Hugging Face ``transformers`` on the same file. Follows Touvron et al., arXiv 2302.13971, and
Ainslie et al., arXiv 2305.13245, for the grouped heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from skipopu.host.model import Model

__all__ = ["KVCache", "ReferenceModel", "rms_norm", "rotate_pairs"]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise each row by its root mean square: ``x * weight / sqrt(mean(x^2) + eps)``.

    x : [..., hidden]; weight : [hidden]; eps : > 0, unit of x^2. Returns the shape of ``x``.
    """
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def rotate_pairs(x: Tensor, angles: Tensor) -> Tensor:
    """Rotate each adjacent pair (2i, 2i + 1) of a head by its angle.

    x : [batch, heads, tokens, head_dim]; angles : [tokens, head_dim / 2], radians. Returns the shape of ``x``.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class KVCache:
    """Rotated keys and values of the past, per layer [batch, kv_heads, tokens, head_dim]."""

    def __init__(self, layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers

    @property
    def length(self) -> int:
        """Tokens held by the last layer, that is, by all layers between two steps."""
        return 0 if self.keys[-1] is None else self.keys[-1].shape[2]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Add the new tokens' keys and values to ``layer``; returns all of them, oldest first."""
        past_keys, past_values = self.keys[layer], self.values[layer]
        if past_keys is not None and past_values is not None:
            keys, values = torch.cat((past_keys, keys), 2), torch.cat((past_values, values), 2)
        self.keys[layer], self.values[layer] = keys, values
        return keys, values


class ReferenceModel:
    """Float evaluation of a Model (or of anything with its ``config``, ``tensors``, ``rope_inv_freq``, ``layer``).

    dtype : of weights and arithmetic; float32, or float64 to bound the reference's own rounding
    ``weights``: name -> Tensor, [out, in] for linear layers, as in ``model.tensors``.
    """

    def __init__(self, model: Model, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> None:
        self.config = model.config
        self.weights = {name: torch.tensor(tensor.dequantise()).to(device, dtype)
                        for name, tensor in model.tensors.items()}
        self.head = self.weights["embedding" if model.config.tied_head else "head"]
        self.inv_freq = torch.tensor(model.rope_inv_freq).to(device)
        self._cache = KVCache(model.config.layers)

    def weight(self, layer: int, part: str) -> Tensor:
        """One tensor of a layer by its short name, for example ``weight(0, "q")``."""
        return self.weights[f"layers.{layer}.{part}"]

    def embed(self, tokens: Tensor) -> Tensor:
        """int [batch, tokens] -> residual stream [batch, tokens, hidden]."""
        return functional.embedding(tokens, self.weights["embedding"])

    def angles(self, positions: Tensor) -> Tensor:
        """Rotary angles [tokens, head_dim / 2], radians, of int positions [tokens], rounded to float32."""
        return torch.outer(positions.to(self.inv_freq.dtype), self.inv_freq).to(self.head.dtype)

    def _heads(self, layer: int, part: str, normed: Tensor) -> Tensor:
        """A projection split by head: [batch, tokens, hidden] -> [batch, heads of ``part``, tokens, head_dim]."""
        rows = functional.linear(normed, self.weight(layer, part))
        return rows.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def keys_values(self, layer: int, normed: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Rotated keys, and values, of the normalised input: each [batch, kv_heads, tokens, head_dim]."""
        keys = rotate_pairs(self._heads(layer, "k", normed), self.angles(positions))
        return keys, self._heads(layer, "v", normed)

    def attend(self, layer: int, normed: Tensor, positions: Tensor, keys: Tensor, values: Tensor,
               mask: Tensor) -> Tensor:
        """Queries of ``normed`` over the given keys and values, and the output projection.

        normed : [batch, tokens, hidden]; keys, values : [batch, kv_heads, past, head_dim], positions already applied
        mask : bool, broadcastable to [batch, heads, tokens, past], true where a query sees a key
        Returns [batch, tokens, hidden], what the attention module adds to the residual stream.
        """
        queries = rotate_pairs(self._heads(layer, "q", normed), self.angles(positions))
        group = self.config.heads // self.config.kv_heads  # consecutive query heads share a key/value head
        keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
        scores = queries @ keys.transpose(-1, -2) * self.config.head_dim ** -0.5
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        mixed = (weights @ values).transpose(1, 2).flatten(-2)
        return functional.linear(mixed, self.weight(layer, "o"))

    def attention(self, layer: int, x: Tensor, positions: Tensor, cache: KVCache | None = None) -> Tensor:
        """The attention module of a layer with its norm: x [batch, tokens, hidden] -> what it adds to x.

        positions : int [tokens], consecutive; cache : holds the tokens before, and gets these
        """
        normed = rms_norm(x, self.weight(layer, "attn_norm"), self.config.rms_eps)
        keys, values = self.keys_values(layer, normed, positions)
        if cache is not None:
            keys, values = cache.append(layer, keys, values)
        past = torch.arange(keys.shape[2], device=x.device) + positions[-1] + 1 - keys.shape[2]
        return self.attend(layer, normed, positions, keys, values, past <= positions[:, None])

    def mlp(self, layer: int, x: Tensor) -> Tensor:
        """The SwiGLU module of a layer with its norm: x [batch, tokens, hidden] -> what it adds to x."""
        normed = rms_norm(x, self.weight(layer, "mlp_norm"), self.config.rms_eps)
        gate = functional.silu(functional.linear(normed, self.weight(layer, "gate")))
        return functional.linear(gate * functional.linear(normed, self.weight(layer, "up")), self.weight(layer, "down"))

    def output(self, x: Tensor) -> Tensor:
        """Final norm and head: [batch, tokens, hidden] -> logits [batch, tokens, vocab]."""
        return functional.linear(rms_norm(x, self.weights["final_norm"], self.config.rms_eps), self.head)

    def logits(self, tokens: Tensor | Sequence[Sequence[int]], cache: KVCache | None = None) -> Tensor:
        """Logits [batch, tokens, vocab] of int tokens [batch, tokens], which follow those in ``cache``."""
        tokens = torch.as_tensor(tokens, device=self.head.device).long()
        start = cache.length if cache is not None else 0
        positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x = self.embed(tokens)
        for layer in range(self.config.layers):
            x = x + self.attention(layer, x, positions, cache)
            x = x + self.mlp(layer, x)
        return self.output(x)

    @torch.inference_mode()
    def forward(self, tokens: Tensor | Sequence[int]) -> Tensor:
        """Logits [tokens, vocab] of one whole sequence; leaves the state of ``step`` alone."""
        return self.logits(torch.as_tensor(tokens)[None])[0]

    @torch.inference_mode()
    def step(self, tokens: Tensor | Sequence[int]) -> Tensor:
        """Logits [tokens, vocab] of the next tokens of a sequence that ``reset`` began."""
        return self.logits(torch.as_tensor(tokens)[None], self._cache)[0]

    def reset(self) -> None:
        """Begin a new sequence for ``step``."""
        self._cache = KVCache(self.config.layers)
