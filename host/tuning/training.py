"""Training a small routed Llama from nothing, so that its 4-bit form is what is trained.

Three stages, one after the other in one run:

1. Plain: float weights, every module executes.
2. Routed: linear weights are rounded to the 4-bit form in the forward pass (the gradient passes straight through), and
   routers learn with noise what can be skipped, while the share of weights they must leave unread rises to its goal.
3. Settled: one shift of all scores brings the skip rate to the goal, then the routers are left alone and the weights
   learn under the decisions that the machine will take.

Every random number comes from the seed and the step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import RequestError
from ..model import GROUP, Model, ModelConfig, QuantTensor, tensor_shapes
from ..quantise import quantise
from .student import Exploration, Student, read_share
from .tuner import shift_to, skip_rates
from .words import END

__all__ = ["Recipe", "Trainee", "Trainer", "Unseen", "blank_model"]

KIND = "q4_0"         # of linear weights and head: 4 bits, one scale for 32
REFIT = 10            # steps between two fits of the scales
CLIP = 1.0            # largest gradient norm
WARM_UP = 15          # of the steps, one part in so many has a rising learning rate
LAST_RATE = 0.05      # of the learning rate, at the end of its cosine
ROUTER_RATE = 3e-3    # of the routers' weights; biases learn ten times as fast
START_BIAS = 2.5      # score of an average module when routing begins: 92% execute under noise
SPARSITY = 5.0        # nats per unit of skip rate that is lacking
CALIBRATION = 16      # sequences that routers' coordinates and the final shift are measured on


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What determines a run, besides the geometry and the text. Raises RequestError for a value out of its range."""

    steps: int
    batch: int = 24              # sequences a step
    rate: float = 4e-3           # learning rate of the weights, at its peak
    skip: float = 0.25           # share of the layers' weights that decode leaves unread
    kv: str = "reuse"
    seed: int = 0
    plain: float = 0.4           # share of the steps in stage 1
    settled: float = 0.25        # share of the steps in stage 3

    def __post_init__(self) -> None:
        for name, least, most in (("steps", 10, 10**7), ("batch", 1, 4096), ("seed", 0, 2**31)):
            if not least <= getattr(self, name) <= most:
                raise RequestError(f"{name} must be {least}..{most}, not {getattr(self, name)}")
        if not 0 <= self.skip <= 0.9:
            raise RequestError(f"the skip rate must be 0..0.9, not {self.skip}")
        if not 0 < self.rate < 1:
            raise RequestError(f"the learning rate must be between 0 and 1, not {self.rate}")

    @property
    def routed_at(self) -> int:
        """The first step of stage 2."""
        return int(self.plain * self.steps)

    @property
    def settled_at(self) -> int:
        """The first step of stage 3."""
        return self.steps - int(self.settled * self.steps)

    def wanted(self, step: int) -> float:
        """The skip rate that the loss asks for in stage 2: it rises over the first half."""
        return self.skip * min(1.0, 2 * (step + 1 - self.routed_at) / (self.settled_at - self.routed_at))

    def scale(self, step: int) -> float:
        """Learning rate relative to its peak."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return min(1.0, (step + 1) / max(1, self.steps // WARM_UP)) * (LAST_RATE + (1 - LAST_RATE) * cosine)

    def explore(self, step: int, generator: torch.Generator) -> Exploration:
        """How gates are drawn in stage 2: temperature 2 to 0.5, noise 0.3 to 0.05."""
        part = (step - self.routed_at) / (self.settled_at - self.routed_at)
        return Exploration(2.0 - 1.5 * part, max(0.05, 0.3 * (1 - part)), generator)


@dataclass(frozen=True)
class Unseen:
    """Nats per token on stories that were not trained on, each from its beginning to its end token."""

    loss: float
    skip: float  # share of the layers' weights left unread
    skip_attention: float
    skip_mlp: float


def blank_model(config: ModelConfig, seed: int) -> Model:
    """A model with random weights, as training begins."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        part = name.rpartition(".")[2]
        if part.endswith("norm"):
            tensors[name] = QuantTensor("f32", values=np.ones(shape, np.float32))
            continue
        deviation = shape[-1] ** -0.5 / ((2 * config.layers) ** 0.5 if part in ("o", "down") else 1)
        tensors[name] = QuantTensor("f32", values=rng.normal(0, deviation, shape).astype(np.float32))
    return Model(config=config, tensors=tensors, identity="untrained")


class Trainee(Student):
    """A routed Llama all of whose weights learn.

    floats : Parameter by tensor name; ``rounds`` : whether the forward pass takes linear weights in their 4-bit form
    ``lay`` must be called after every change of the weights.
    """

    def __init__(self, model: Model, kv: str) -> None:
        super().__init__(model, kv, np.zeros((model.config.layers, 2), bool))
        self.floats = {name: nn.Parameter(value) for name, value in self._reference.weights.items()}
        self.linear = [name for name in self.floats if name != "embedding" and not name.endswith("norm")]
        self.rounds = False
        self._scales: dict[str, Tensor] = {}

    def refit(self) -> None:
        """Fit the scales of the 4-bit form to the weights as they are."""
        for name, tensor in self.quantised().items():
            assert tensor.scale is not None
            self._scales[name] = torch.tensor(tensor.scale.astype(np.float32))[..., None]

    def quantised(self) -> dict[str, QuantTensor]:
        """The linear weights in their 4-bit form, by tensor name."""
        groups = torch.cat([self.floats[name].detach().reshape(-1, GROUP) for name in self.linear]).numpy()
        whole, found, first = quantise(groups, KIND), {}, 0
        assert whole.codes is not None and whole.scale is not None
        for name in self.linear:
            rows, cols = self.floats[name].shape
            part = slice(first, first + rows * cols // GROUP)
            found[name] = QuantTensor(KIND, codes=whole.codes[part].reshape(rows, cols),
                                      scale=whole.scale[part].reshape(rows, cols // GROUP))
            first = part.stop
        return found

    def _rounded(self, name: str) -> Tensor:
        value, scale = self.floats[name], self._scales[name]
        groups = value.detach().unflatten(-1, (-1, GROUP))
        codes = (groups / torch.where(scale == 0, 1.0, scale)).round().clamp(-8, 7)
        return value + ((codes * scale).flatten(-2) - value.detach())

    def lay(self) -> None:
        """Put the weights where the forward pass finds them."""
        for name, value in self.floats.items():
            rounded = self.rounds and name in self._scales
            self._reference.weights[name] = self._rounded(name) if rounded else value
        self._reference.head = self._reference.weights["head"]

    def model(self, model: Model) -> Model:
        """``model`` with the trained weights: linear ones in 4 bits, the embedding in float16."""
        tensors = {name: QuantTensor("f32", values=value.detach().numpy().copy())
                   for name, value in self.floats.items() if name.endswith("norm")}
        tensors["embedding"] = quantise(self.floats["embedding"].detach().numpy(), "f16")
        return Model(config=model.config, tokenizer=model.tokenizer, tensors=tensors | self.quantised())


class Trainer:
    """A run of training; ``advance`` takes one step, ``finish`` after the last.

    sequences : int [n, length], from `words.pack`
    """

    def __init__(self, model: Model, sequences: np.ndarray, recipe: Recipe) -> None:
        self.base, self.sequences, self.recipe = model, sequences, recipe
        self.share = torch.tensor(read_share(model, recipe.kv), dtype=torch.float32)
        self.trainee = trainee = Trainee(model, recipe.kv)
        self.step = 0
        weights = list(trainee.floats.values())
        self._router_parts = (trainee.weight, trainee.bias)
        self.optimiser = torch.optim.AdamW([
            {"params": weights, "peak": recipe.rate, "weight_decay": 0.01},
            {"params": [trainee.weight], "peak": ROUTER_RATE, "weight_decay": 0.0},
            {"params": [trainee.bias], "peak": 10 * ROUTER_RATE, "weight_decay": 0.0}], betas=(0.9, 0.98))

    def advance(self) -> tuple[float, float]:
        """Take one step; returns the loss in nats per token and the skip rate of its batch.

        Raises RequestError if the loss is not a number.
        """
        recipe, trainee = self.recipe, self.trainee
        if self.step == recipe.routed_at:
            self._begin_routing()
        if self.step == recipe.settled_at:
            self.settle()
        routed, learning = self.step >= recipe.routed_at, recipe.routed_at <= self.step < recipe.settled_at
        if trainee.rounds and self.step % REFIT == 0:
            trainee.refit()
        for parameter in self._router_parts:
            parameter.requires_grad_(learning)
        trainee.lay()
        random = np.random.default_rng((recipe.seed, self.step))
        tokens = torch.tensor(self.sequences[random.integers(len(self.sequences), size=recipe.batch)])
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + self.step)
        gates = None if routed else self._all(tokens)
        hidden, taken = trainee(tokens[:, :-1], recipe.explore(self.step, generator) if learning else None, gates=gates)
        loss = functional.cross_entropy(trainee.logits(hidden).flatten(0, 1), tokens[:, 1:].flatten())
        skip = skip_rates(taken, self.share)[0]
        asked = loss + SPARSITY * (recipe.wanted(self.step) - skip).clamp(min=0) if learning else loss
        if not torch.isfinite(loss):
            raise RequestError(f"the loss is {float(loss.detach())} at step {self.step}; take a lower --rate")
        self.optimiser.zero_grad(set_to_none=True)
        asked.backward()
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * recipe.scale(self.step)
            nn.utils.clip_grad_norm_(group["params"], CLIP)
        self.optimiser.step()
        self.step += 1
        return float(loss.detach()), float(skip.detach())

    def _all(self, tokens: Tensor) -> Tensor:
        return torch.ones(self.base.config.layers, len(tokens), tokens.shape[1] - 1, 2)

    def _some(self) -> Tensor:
        return torch.tensor(self.sequences[:CALIBRATION, :-1])

    def _begin_routing(self) -> None:
        trainee = self.trainee
        trainee.rounds = True
        trainee.refit()
        trainee.lay()
        trainee.calibrate(self._some())
        with torch.no_grad():
            trainee.bias.fill_(START_BIAS)

    @torch.no_grad()
    def settle(self) -> None:
        """Fit the scales to the weights, and shift the routers' scores so that the skip rate is the goal."""
        trainee = self.trainee
        trainee.refit()
        trainee.lay()
        shift_to(trainee, self._some(), self.share, self.recipe.skip)

    @torch.inference_mode()
    def measure(self, sequences: np.ndarray, *, rounded: bool = True, routed: bool = True) -> Unseen:
        """The loss on other sequences, with weights in 4 bits or float, with the routers' decisions or without."""
        trainee = self.trainee
        before, trainee.rounds = trainee.rounds, rounded
        if rounded:
            trainee.refit()
        trainee.lay()
        nats, count, rates = 0.0, 0, np.zeros(3)
        for part in np.array_split(sequences, max(1, len(sequences) // 32)):
            tokens = torch.tensor(part)
            hidden, gates = trainee(tokens[:, :-1], gates=None if routed else self._all(tokens))
            found = functional.cross_entropy(trainee.logits(hidden).transpose(1, 2), tokens[:, 1:], reduction="none")
            ended = (tokens[:, 1:] == END).cumsum(1)
            story = ended - (tokens[:, 1:] == END).long() == 0  # up to and with the first END
            nats += float(found[story].sum())
            count += int(story.sum())
            rates += len(part) * np.array([float(rate) for rate in skip_rates(gates, self.share)])
        trainee.rounds = before
        trainee.lay()
        return Unseen(nats / count, *(float(rate) for rate in rates / len(sequences)))
