"""Tuning in steps: distil the unrouted model into the routed one while the share of skipped weights rises to its goal.

Three stages, one after the other in one run:

1. Routers alone, from biases that make cheap modules (by ablation) the likeliest to be skipped.
2. Routers and LoRA factors together. Gates are drawn with noise that shrinks; the skip rate that the loss asks for
   rises linearly until half of all steps (from the start, where a run begins with routers that skip already).
3. LoRA alone, under the decisions that the machine will take. When it begins, one shift of all scores brings the skip
   rate, measured on training text, to the goal.

The loss is the divergence from the unrouted model plus `sparsity` times the batch's distance from the wanted rate.
Every random number comes from (seed, step): a resumed run goes on bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from skipopu.golden.reference import ReferenceModel
from torch import Tensor

from ..errors import RouterError
from ..model import Model
from ..routers import Routers, check_kv
from .ablation import ablate, essential
from .student import FOLDED_SCALE, Exploration, Student, read_share
from .targets import Targets, divergence, sample_vocabulary

__all__ = ["ABLATION", "HeldOut", "Settings", "StepReport", "Tuner", "measure", "shift_to", "skip_rate", "skip_rates"]

CLIP = 1.0            # largest gradient norm, for router weights, biases and LoRA factors apart
BIAS_RATE = 10        # a bias stands alone where hundreds of weights move a score together
WARM_UP = 20          # steps of rising learning rate
LAST_RATE = 0.05      # of the learning rate, at the end of its cosine
START_BIAS = 2.5      # score of an average module at the start: 92% execute under noise
BIAS_SPREAD = 1.5     # how far ablation moves it at most
SAMPLED_VOCABULARY = 4096  # tokens that stand for all those that the teacher finds unlikely
CALIBRATION = 8       # sequences that coordinates are measured on
SHIFT_SEQUENCES = 24  # for a shift to the goal: skip rates differ from one sequence to the next
SHIFT_TOKENS = 128    # of each of them
NEAR = 0.002          # of a skip rate, near enough
SHIFTS = (-0.25, *(0.25 * step for step in range(13)))  # of all scores, for other operating points
LEAST_POINT = 0.03    # skip rate below which there is none
ABLATION = 128        # tokens, of two sequences, that each module is left out for


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What determines a run, besides the model and the tokens. Raises RouterError for a value out of its range."""

    kv: str
    skip: float                 # share of the layers' weights that decode leaves unread
    steps: int
    seed: int = 0
    batch: int = 4              # sequences a step
    lora: bool = True           # also change the weights; without, routers only
    router_rate: float = 3e-3   # learning rates
    lora_rate: float = 2e-3
    sparsity: float = 10.0      # nats per unit of skip rate that is lacking or too much
    protect: float = 0.6        # nats that leaving a module out may cost before it is essential
    routers_first: float = 0.05  # share of the steps in stage 1
    lora_last: float = 0.2      # share of the steps in stage 3
    ramp: float = 0.5           # share of the steps over which the wanted skip rate rises

    def __post_init__(self) -> None:
        check_kv(self.kv)
        if not 0 <= self.skip <= 0.9:
            raise RouterError(f"the skip rate must be 0..0.9, not {self.skip}")
        for name, least, most in (("steps", 1, 10**7), ("seed", 0, 2**31), ("batch", 1, 4096)):
            if not least <= getattr(self, name) <= most:
                raise RouterError(f"{name} must be {least}..{most}, not {getattr(self, name)}")
        for name in ("router_rate", "lora_rate", "sparsity", "protect"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise RouterError(f"{name} must be a positive number, not {getattr(self, name)}")
        if not 0 <= self.ramp <= 1:
            raise RouterError(f"ramp must be a share of the steps, 0..1, not {self.ramp}")
        if min(self.routers_first, self.lora_last) < 0 or self.routers_first + self.lora_last > 1:
            raise RouterError("routers_first and lora_last must be shares of the steps, together at most 1, not "
                              f"{self.routers_first} and {self.lora_last}")

    @property
    def freeze_at(self) -> int:
        """The first step of stage 3; never comes where there are no LoRA factors."""
        return self.steps if not self.lora else self.steps - int(self.lora_last * self.steps)

    def wanted(self, step: int) -> float:
        """The skip rate that the loss asks for."""
        return self.skip * min(1.0, (step + 1) / max(1, int(self.ramp * self.steps)))

    @property
    def lora_at(self) -> int:
        """The first step of stage 2."""
        return int(self.routers_first * self.steps)

    def rate(self, step: int, first: int = 0) -> float:
        """Learning rate relative to its peak, of what learns from step ``first`` on."""
        cosine = 0.5 + 0.5 * math.cos(math.pi * step / self.steps)
        return max(0.0, min(1.0, (step - first + 1) / WARM_UP)) * (LAST_RATE + (1 - LAST_RATE) * cosine)

    def explore(self, step: int, generator: torch.Generator) -> Exploration:
        """How gates are drawn: temperature 2 to 0.5; noise from 0.3 to 0.05 before the routers freeze, then none."""
        part = step / max(1, self.freeze_at)
        if part >= 1:
            return Exploration(temperature=0.5)
        return Exploration(2.0 - 1.5 * part, max(0.05, 0.3 * (1 - part)), generator)


@dataclass(frozen=True)
class StepReport:
    """One step: numbers of its batch; ``skip`` is the share of weights, the others count modules."""

    step: int
    loss: float
    divergence: float
    skip: float
    skip_attention: float
    skip_mlp: float


@dataclass(frozen=True)
class HeldOut:
    """The routed model, with the machine's decisions, on text that it was not tuned on."""

    perplexity: float
    unrouted_perplexity: float
    divergence: float   # nats per token from the unrouted model
    top1: float         # share of positions where both find the same token likeliest
    skip: float         # share of the layers' weights left unread in decode
    skip_attention: float
    skip_mlp: float


def skip_rates(gates: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Skip rates of gates [layers, batch, length, 2]: by weights, attention, MLP."""
    skipped = 1 - gates.mean((1, 2))
    return (skipped * share).sum(), skipped[:, 0].mean(), skipped[:, 1].mean()


@torch.inference_mode()
def measure(student: Student, model: Model, sequences: np.ndarray, *, gates: np.ndarray | None = None,
            teacher: dict[int, Tensor] | None = None) -> HeldOut:
    """Compare the routed with the unrouted model on int [n, length] tokens; both predict token t + 1 from 0..t.

    gates : bool [layers, n, length, 2] in place of the routers' decisions; teacher : keeps the unrouted model's
    log probabilities between calls on the same sequences
    """
    share = torch.tensor(read_share(model, student.kv), dtype=torch.float32, device=student.device)
    unrouted: ReferenceModel | None = None
    sums = np.zeros(7)
    for index, sequence in enumerate(torch.tensor(sequences.astype(np.int64), device=student.device)):
        expected = None if teacher is None else teacher.get(index)
        if expected is None:
            unrouted = unrouted or ReferenceModel(model, device=student.device)
            expected = unrouted.forward(sequence)[:-1].log_softmax(-1)
            if teacher is not None:
                teacher[index] = expected
        forced = None if gates is None else torch.tensor(gates[:, index, None], dtype=torch.float32).to(student.device)
        hidden, taken = student(sequence[None], gates=forced)
        got = student.logits(hidden[0, :-1]).log_softmax(-1)
        following = sequence[1:, None]
        numbers = (-got.gather(1, following).mean(), -expected.gather(1, following).mean(),
                   (expected.exp() * (expected - got)).sum(-1).mean(),
                   (expected.argmax(-1) == got.argmax(-1)).float().mean(), *skip_rates(taken, share))
        sums += np.array([float(number) for number in numbers])
    loss, unrouted_loss, *rest = (float(value) for value in sums / len(sequences))
    return HeldOut(math.exp(loss), math.exp(unrouted_loss), *rest)


@torch.inference_mode()
def skip_rate(student: Student, tokens: Tensor, share: Tensor) -> float:
    """Share of the weights that int tokens [n, length] leave unread under the machine's decisions."""
    gates = torch.cat([student(some)[1] for some in tokens.split(CALIBRATION)], 1)
    return float(skip_rates(gates, share)[0])


@torch.inference_mode()
def shift_to(student: Student, tokens: Tensor, share: Tensor, skip: float) -> None:
    """Add one number to all scores so that ``skip`` of the weights of int tokens [n, length] are left unread.

    share : float [layers, 2], `read_share`. Layer inputs change with the decisions, so the number is found by trying:
    ever larger steps until the rate lies between two tries, then by a line between the nearest.
    """
    start = student.bias.clone()
    low, high, at_low, at_high, shift, step = -8.0, 8.0, 1.0, 0.0, 0.0, 0.25
    for _ in range(8):
        student.bias.copy_(start + shift)
        found = skip_rate(student, tokens, share)
        if abs(found - skip) < NEAR:
            return
        low, high, at_low, at_high = (shift, high, found, at_high) if found > skip else (low, shift, at_low, found)
        if low == -8.0 or high == 8.0:  # one side is not yet found
            shift = max(low, min(high, shift + (step if found > skip else -step)))
            step *= 2
        else:
            shift = low + (high - low) * (at_low - skip) / max(at_low - at_high, 1e-9)
    student.bias.copy_(start + shift)


class Tuner:
    """A run of tuning on one model.

    sequences : int [n, length], training text; folder : where the teacher's outcomes are kept
    ``prepare`` before the first step of a new run, or `checkpoint.restore`.
    """

    def __init__(self, model: Model, sequences: np.ndarray, settings: Settings, folder: Path,
                 device: str | torch.device = "cpu") -> None:
        self.model, self.sequences, self.settings = model, sequences, settings
        self.targets = Targets(model, sequences, folder, device)
        self.share = torch.tensor(read_share(model, settings.kv), dtype=torch.float32, device=device)
        self.student = Student(model, settings.kv, np.zeros((model.config.layers, 2), bool), lora=settings.lora,
                               device=device)
        self.costs = np.zeros((model.config.layers, 2))
        self.step = 0
        student, lora = self.student, list(self.student.up.values())
        self.optimiser = torch.optim.Adam([{"params": [student.weight], "peak": settings.router_rate, "first": 0},
                                           {"params": [student.bias], "peak": BIAS_RATE * settings.router_rate,
                                            "first": 0},
                                           {"params": lora, "peak": settings.lora_rate, "first": settings.lora_at}],
                                          betas=(0.9, 0.98))

    def _some(self, count: int = CALIBRATION) -> Tensor:
        chosen = np.random.default_rng(self.settings.seed).permutation(len(self.sequences))[:count]
        return torch.tensor(self.sequences[chosen].astype(np.int64), device=self.student.device)

    def prepare(self, start: Routers | None = None) -> Iterator[int]:
        """Calibrate, measure each module by ablation, and set the first routers; yields the modules measured so far.

        start : routers of the same model to go on from, with their LoRA factors and essential modules (nothing is
            measured), in either KV mode; their scores are shifted to the goal
        """
        student = self.student
        student.calibrate(self._some())
        if start is not None:
            student.adopt(start)
            student.protected.copy_(torch.tensor(start.essential))
            self.shift_to_goal()
            return
        for done, (layer, module, cost) in enumerate(ablate(student, self._some(2)[:, :ABLATION]), 1):
            self.costs[layer, module] = cost
            yield done
        student.protected.copy_(torch.tensor(essential(self.costs, self.settings.protect)))
        if student.protected.all() and self.settings.skip:
            raise RouterError(f"every module costs more than protect {self.settings.protect} nats when left out, so "
                              "none can be skipped; raise protect")
        logs = np.log(np.maximum(self.costs, 1e-6))
        spread = np.clip(logs - np.median(logs), -BIAS_SPREAD, BIAS_SPREAD)
        with torch.no_grad():
            student.bias.copy_(torch.tensor(START_BIAS + spread))

    def batch(self, step: int) -> np.ndarray:
        """Indices of the sequences of a step: every sequence once before any comes again."""
        first, count = step * self.settings.batch, len(self.sequences)
        orders: dict[int, np.ndarray] = {}
        chosen = []
        for place in range(first, first + self.settings.batch):
            epoch = place // count
            if epoch not in orders:
                orders[epoch] = np.random.default_rng((self.settings.seed, epoch)).permutation(count)
            chosen.append(orders[epoch][place % count])
        return np.array(chosen)

    def advance(self) -> StepReport:
        """Take one step. Raises RouterError if the loss is not a number."""
        settings, student = self.settings, self.student
        if self.step == settings.freeze_at:
            self.shift_to_goal()
        indices = self.batch(self.step)
        kept, log_probs = self.targets(indices)
        tokens = torch.tensor(self.sequences[indices].astype(np.int64), device=student.device)
        routers_learn = self.step < settings.freeze_at
        lora_learns = self.step >= settings.lora_at
        for group, learns in zip(self.optimiser.param_groups, (routers_learn, routers_learn, lora_learns)):
            for parameter in group["params"]:
                parameter.requires_grad_(learns)
        generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + self.step)
        hidden, gates = student(tokens, settings.explore(self.step, generator))
        rows, offset, places = sample_vocabulary(kept, student.config.vocab, SAMPLED_VOCABULARY, generator)
        logits = student.logits(hidden.flatten(0, 1), rows) + offset
        away = divergence(logits, places.flatten(0, 1), log_probs.flatten(0, 1)).mean()
        skip, attention, mlp = skip_rates(gates, self.share)
        loss = away + settings.sparsity * (settings.wanted(self.step) - skip).abs()
        if not torch.isfinite(loss):
            raise RouterError(f"the loss is {float(loss.detach())} at step {self.step}; take lower learning rates")
        self.optimiser.zero_grad(set_to_none=True)
        loss.backward()
        for group in self.optimiser.param_groups:
            group["lr"] = group["peak"] * settings.rate(self.step, group["first"])
            torch.nn.utils.clip_grad_norm_(group["params"], CLIP)
        self.optimiser.step()
        self.step += 1
        return StepReport(self.step, *(float(value.detach()) for value in (loss, away, skip, attention, mlp)))

    def shift_to_goal(self, sequences: np.ndarray | None = None) -> None:
        """Add one number to all scores so that the skip rate on int sequences [n, length] is the goal; on training text
        if none are given."""
        shift_to(self.student, self._sample(sequences), self.share, self.settings.skip)

    def _sample(self, sequences: np.ndarray | None) -> Tensor:
        if sequences is None:
            return self._some(SHIFT_SEQUENCES)[:, :SHIFT_TOKENS]
        return torch.tensor(sequences[:, :SHIFT_TOKENS].astype(np.int64), device=self.student.device)

    @torch.no_grad()
    def operating_points(self, routers: Routers, sequences: np.ndarray) -> list[tuple[float, float]]:
        """Skip rates on int sequences [n, length], falling, and what reaches them when added to all biases there."""
        tokens, points = self._sample(sequences), []
        self.student.adopt(routers)
        start = self.student.bias.clone()
        for shift in SHIFTS:
            self.student.bias.copy_(start + shift)
            points.append((skip_rate(self.student, tokens, self.share), shift * FOLDED_SCALE))
            if points[-1][0] < LEAST_POINT:
                break
        self.student.bias.copy_(start)
        return points
