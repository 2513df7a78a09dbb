"""Text that a model writes itself: what routers are tuned on where there is no other text.

Distillation needs no labels and wants tokens as the model meets them, which its own samples are. Many sequences are
sampled at once, so that each weight is read once for all of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from skipopu.golden.reference import ReferenceModel, rms_norm, rotate_pairs
from torch import Tensor
from torch.nn import functional

from ..errors import RequestError
from ..model import Model

__all__ = ["self_text"]


def _truncated(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    """One token for each row of ``logits``, from its ``top_k`` likeliest at ``temperature``."""
    values, tokens = logits.topk(min(top_k, logits.shape[-1]))
    drawn = torch.multinomial((values / temperature).softmax(-1), 1, generator=generator)
    return tokens.gather(1, drawn)[:, 0]


@torch.inference_mode()
def self_text(model: Model, prompts: Sequence[Sequence[int]], length: int, *, temperature: float = 0.9,
              top_k: int = 50, seed: int = 0) -> Iterator[Tensor]:
    """Continue prompts of equal length to ``length`` tokens, all at once; what follows an end of text follows anyway.

    Yields int64 [prompts], the next token of each, ``length - len(prompt)`` times. Raises RequestError for prompts of
    unequal length or a length beyond the model's context.
    """
    rows = torch.as_tensor([list(prompt) for prompt in prompts]) if len({*map(len, prompts)}) == 1 else torch.empty(0)
    if rows.numel() == 0 or not rows.shape[1] < length <= model.config.context:
        raise RequestError(f"prompts must be of one length, shorter than the {length} tokens asked for, which the "
                           f"context of {model.config.context} must hold")
    reference, config = ReferenceModel(model), model.config
    shape = (config.layers, len(rows), config.kv_heads, length, config.head_dim)
    keys, values = torch.empty(shape), torch.empty(shape)
    generator = torch.Generator().manual_seed(seed)
    token, start = rows, 0
    while start + token.shape[1] < length:
        end = start + token.shape[1]
        positions = torch.arange(start, end)
        mask = torch.arange(end) <= positions[:, None]
        x = reference.embed(token)
        for layer in range(config.layers):
            normed = rms_norm(x, reference.weight(layer, "attn_norm"), config.rms_eps)
            new = reference.keys_values(layer, normed, positions)
            keys[layer, :, :, start:end], values[layer, :, :, start:end] = new
            queries = functional.linear(normed, reference.weight(layer, "q")).unflatten(-1, (-1, config.head_dim))
            queries = rotate_pairs(queries.transpose(1, 2), reference.angles(positions))
            mixed = functional.scaled_dot_product_attention(queries, keys[layer, :, :, :end], values[layer, :, :, :end],
                                                            attn_mask=mask, enable_gqa=True)
            x = x + functional.linear(mixed.transpose(1, 2).flatten(-2), reference.weight(layer, "o"))
            x = x + reference.mlp(layer, x)
        token = _truncated(reference.output(x[:, -1:])[:, 0], temperature, top_k, generator)
        yield token
        token, start = token[:, None], end
