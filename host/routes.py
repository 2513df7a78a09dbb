"""Routes that take the place of the routers' decisions, for measurements and tests; and the form in registers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import RouterError
from .routers import MODULES, Routers

if TYPE_CHECKING:
    from .model import Model

__all__ = ["Force", "RandomRoutes", "always_executing", "check_forced", "forced_routes", "routes_from_words",
           "words_of_routes"]


@dataclass(frozen=True)
class RandomRoutes:
    """Route bits drawn at random in place of the routers' decisions; each depends on seed, position and place only.

    Layer 0 computes keys and values in any case, so its attention always executes, and that of the other layers is
    skipped so much more often that the rate holds for the model.

    rate : part of the modules that are skipped, 0..1; exact : every token skips that part of the attentions and of the
        MLPs, as near as whole ones allow, and not only all tokens together
    Raises RouterError for a rate outside of that, or for a negative seed.
    """

    rate: float
    seed: int = 0
    exact: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rate <= 1:
            raise RouterError(f"the forced skip rate must be 0..1, not {self.rate}")
        if self.seed < 0:
            raise RouterError(f"the seed must be at least 0, not {self.seed}")

    def bits(self, layers: int, start: int, tokens: int) -> np.ndarray:
        """bool [layers, 2, tokens], true where a module executes, of the positions from ``start`` on."""
        rngs = [np.random.default_rng((self.seed, start + token)) for token in range(tokens)]
        if self.exact:
            return np.stack([self._exact(layers, rng) for rng in rngs], 2)
        drawn = [rng.random((layers, 2)) for rng in rngs]
        limit = np.full((layers, 2), self.rate)
        limit[1:, 0] *= layers / max(layers - 1, 1)
        limit[0, 0] = 0
        return np.array(drawn).reshape(tokens, layers, 2).transpose(1, 2, 0) >= limit[..., None]

    def _exact(self, layers: int, rng: np.random.Generator) -> np.ndarray:
        found = np.ones((layers, 2), bool)
        for module in range(2):
            first = 1 - module  # layer 0 always attends
            count = min(int(self.rate * layers + rng.random()), layers - first)
            found[first + rng.permutation(layers - first)[:count], module] = False
        return found


Force = RandomRoutes | np.ndarray  #: an array is bool [layers, 2, positions], true to execute


def check_forced(force: Force | None, layers: int) -> None:
    """Raises RouterError if ``force`` is an array, but not bool [layers, 2, positions]."""
    if isinstance(force, np.ndarray) and (force.dtype != bool or force.ndim != 3 or force.shape[:2] != (layers, 2)):
        raise RouterError(f"forced routes must be bool [{layers}, 2, tokens], not {force.dtype} {list(force.shape)}")


def forced_routes(force: Force, layers: int, start: int, tokens: int) -> np.ndarray:
    """bool [layers, 2, tokens], true where a module executes, of the positions from ``start`` on.

    Raises RouterError if ``force`` is an array that ends before them.
    """
    if isinstance(force, RandomRoutes):
        return force.bits(layers, start, tokens)
    if force.shape[2] < start + tokens:
        raise RouterError(f"forced routes cover {force.shape[2]} positions, but {start + tokens} are needed")
    return force[:, :, start : start + tokens]


def always_executing(model: Model, kv: str) -> Routers:
    """Routers for ``model`` that skip nothing, since every score is a tie: what forced routes need."""
    shape = (model.config.layers, len(MODULES), model.config.hidden)
    return Routers(kv=kv, base=model.identity, difference=np.zeros(shape, np.float16),
                   bias=np.zeros(shape[:2], np.float32))


def words_of_routes(routes: np.ndarray) -> list[int]:
    """Route registers of bool [layers, 2, rows]: attention, then MLP of each layer, bit t for row t."""
    bits = 1 << np.arange(routes.shape[2], dtype=np.int64)
    return (routes * bits).sum(-1).reshape(-1).tolist()


def routes_from_words(words: Sequence[int], rows: int) -> np.ndarray:
    """bool [layers, 2, rows] of route registers, as ``words_of_routes`` orders them."""
    found = np.array(words, np.int64).reshape(-1, len(MODULES), 1) >> np.arange(rows)
    return (found & 1).astype(bool)
