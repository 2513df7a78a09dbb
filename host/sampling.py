"""Choose the next token from logits: temperature, top-k, top-p, from a seed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import RequestError

__all__ = ["Sampler", "Sampling"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Settings. Raises RequestError for a value out of range.

    temperature : > 0, logits are divided by it; top_k : keep the k likeliest, 0 keeps all; top_p : keep the likeliest
    tokens whose probabilities reach this sum, in (0, 1]; seed : of the random numbers
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (self.temperature > 0 and np.isfinite(self.temperature)):
            raise RequestError(f"temperature must be above 0, not {self.temperature}; for the likeliest token use none")
        if self.top_k < 0:
            raise RequestError(f"top_k must be 0 (all) or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise RequestError(f"top_p must be above 0 and at most 1, not {self.top_p}")


class Sampler:
    """Draws tokens; the same settings and logits give the same tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def choose(self, logits: np.ndarray) -> int:
        """A token id from float32 [vocab]."""
        order = np.argsort(-logits, kind="stable")[: self.sampling.top_k or None]
        scaled = logits[order].astype(np.float64) / self.sampling.temperature
        weights = np.exp(scaled - scaled[0])
        total = np.cumsum(weights)
        # keep the token that crosses top_p
        keep = int(np.searchsorted(total, self.sampling.top_p * total[-1] * (1 - 1e-12))) + 1
        place = self._random.random() * total[min(keep, len(total)) - 1]
        return int(order[np.searchsorted(total, place, side="right")])
