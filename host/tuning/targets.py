"""What the student learns from: the unrouted model's likeliest next tokens at every position, kept on disk.

A sequence is read by the teacher once, when a step first asks for it, however many epochs and runs use it. The rest of
the vocabulary is one more outcome, so that the divergence stays a true one: never negative, zero only for equality.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch
from skipopu.golden.reference import ReferenceModel
from torch import Tensor

from ..model import Model

__all__ = ["Targets", "divergence", "sample_vocabulary"]

KEPT = 64  # outcomes a position; SmolLM2's own samples have 96% of the probability there
FORMAT = 1


def sample_vocabulary(tokens: Tensor, vocab: int, count: int,
                      generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The part of the vocabulary that a step computes logits for, since most of the head's rows hardly matter.

    tokens : int, any shape, all of them taken; count : how many others are drawn to stand for the rest
    Returns the rows of the head int64 [n], what to add to their logits float32 [n] (the drawn ones count for all that
    were not drawn, so that the sum of exponentials keeps its expectation), and ``tokens`` as places in the rows.
    """
    taken, places = tokens.unique(return_inverse=True)
    other = torch.ones(vocab, dtype=torch.bool)
    other[taken.cpu()] = False
    pool = other.nonzero()[:, 0]
    drawn = pool[torch.randperm(len(pool), generator=generator)[:count]]
    offset = torch.zeros(len(taken) + len(drawn))
    if len(drawn):
        offset[len(taken):] = float(np.log(len(pool) / len(drawn)))
    return torch.cat((taken, drawn.to(tokens.device))), offset.to(tokens.device), places


def divergence(logits: Tensor, tokens: Tensor, log_probs: Tensor) -> Tensor:
    """KL divergence of student from teacher in nats, [rows], over the kept tokens and the rest as one outcome.

    logits : [rows, vocabulary] of the student; tokens : int [rows, kept]; log_probs : [rows, kept] of the teacher
    """
    student = logits.gather(-1, tokens) - logits.logsumexp(-1, keepdim=True)
    kept = (log_probs.exp() * (log_probs - student)).sum(-1)
    rest = (1 - log_probs.exp().sum(-1)).clamp(min=1e-6)
    student_rest = (1 - student.exp().sum(-1)).clamp(min=1e-6)
    return kept + rest * (rest / student_rest).log()


class Targets:
    """The teacher's outcomes on training sequences, computed on demand.

    sequences : int [n, length]; folder : where they are kept, for this model and these sequences only
    Raises OSError if the folder cannot be written.
    """

    def __init__(self, model: Model, sequences: np.ndarray, folder: Path, device: str | torch.device = "cpu") -> None:
        self._model, self._sequences, self._device = model, sequences, device
        self._teacher: ReferenceModel | None = None
        kept = min(KEPT, model.config.vocab)
        digest = hashlib.sha256(f"{FORMAT} {kept} {model.identity} {sequences.shape}".encode())
        digest.update(np.ascontiguousarray(sequences, np.int64).tobytes())
        folder.mkdir(parents=True, exist_ok=True)
        shapes: dict[str, tuple[type, tuple[int, ...]]] = {
            "tokens": (np.int32, (*sequences.shape, kept)), "log_probs": (np.float16, (*sequences.shape, kept)),
            "done": (np.uint8, (len(sequences),))}
        for name, (dtype, shape) in shapes.items():
            path = folder / f"{digest.hexdigest()[:16]}.{name}"
            if not path.exists() or path.stat().st_size != np.dtype(dtype).itemsize * int(np.prod(shape)):
                np.memmap(path, dtype, "w+", shape=shape).flush()
                if name != "done":  # a sequence is done only where all of it is there
                    path.with_suffix(".done").unlink(missing_ok=True)
            setattr(self, f"_{name}", np.memmap(path, dtype, "r+", shape=shape))

    _tokens: np.ndarray
    _log_probs: np.ndarray
    _done: np.ndarray

    @torch.inference_mode()
    def _compute(self, index: int) -> None:
        self._teacher = self._teacher or ReferenceModel(self._model, device=self._device)
        log_probs = self._teacher.forward(self._sequences[index]).log_softmax(-1)
        values, tokens = log_probs.topk(self._tokens.shape[-1])
        self._tokens[index], self._log_probs[index] = tokens.cpu().numpy(), values.cpu().numpy()
        self._done[index] = 1

    def __call__(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Kept tokens, int64 [n, length, kept], and their log probabilities, float32, of sequences int [n]."""
        for index in indices:
            if not self._done[index]:
                self._compute(int(index))
        return (torch.tensor(self._tokens[indices].astype(np.int64)).to(self._device),
                torch.tensor(self._log_probs[indices].astype(np.float32)).to(self._device))
