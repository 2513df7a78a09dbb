"""Which modules a model cannot do without: each is left out alone, for all tokens, and the divergence measured."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from .student import Student

__all__ = ["ablate"]


@torch.inference_mode()
def ablate(student: Student, tokens: Tensor) -> Iterator[tuple[int, int, float]]:
    """Yield (layer, module, KL divergence in nats per token from the whole model) for every module; 1 is the MLP.

    tokens : int [batch, length], a few hundred in all; a token whose attention is left out obeys the KV mode
    """
    gates = torch.ones(student.config.layers, *tokens.shape, 2, device=tokens.device)
    whole = student.logits(student(tokens, gates=gates)[0]).log_softmax(-1)
    for layer in range(student.config.layers):
        for module in range(2):
            gates[layer, ..., module] = 0
            without = student.logits(student(tokens, gates=gates)[0]).log_softmax(-1)
            gates[layer, ..., module] = 1
            yield layer, module, float((whole.exp() * (whole - without)).sum(-1).mean())


def essential(costs: np.ndarray, limit: float) -> np.ndarray:
    """bool [layers, 2], true where leaving the module out costs more than ``limit`` nats or is not a number."""
    return ~(costs <= limit)
