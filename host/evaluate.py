"""How near a device comes to the float reference on token sequences: perplexity, KL divergence, top-1 agreement."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import RequestError
from .generation import Generator
from .report import MEMORY, memory_report

__all__ = ["Evaluation", "evaluate", "load_sequences"]


@dataclass
class Evaluation:
    """Sums over the predictions so far: token t + 1 from the tokens 0..t of its sequence."""

    tokens: int = 0
    loss: float = 0.0  # nats
    reference_loss: float = 0.0
    divergence: float = 0.0
    agreed: int = 0
    decided: int = 0  # layers of all tokens where the device's routers decided
    attended: int = 0  # of these, where attention ran
    fed: int = 0  # and where the MLP ran
    both_decided: int = 0  # modules of all tokens for which the reference has routers too
    decided_alike: int = 0
    kv_bytes_written: int | None = None  # None where the device does not count them
    weight_bytes_read: int | None = None

    def add(self, reference: np.ndarray, device: np.ndarray, targets: np.ndarray) -> None:
        """Count rows of logits, float32 [rows, vocab] each, and the tokens that follow them."""
        expected, got = _log_softmax(reference), _log_softmax(device)
        rows = np.arange(len(targets))
        self.tokens += len(targets)
        self.reference_loss -= float(expected[rows, targets].sum())
        self.loss -= float(got[rows, targets].sum())
        self.divergence += float((np.exp(expected) * (expected - got)).sum())
        self.agreed += int((expected.argmax(1) == got.argmax(1)).sum())

    def add_decisions(self, reference: np.ndarray | None, device: np.ndarray | None) -> None:
        """Count the routes of one sequence, bool [layers, 2, tokens] each, or None without routers."""
        if device is None:
            return
        self.decided += device[:, 0].size
        self.attended += int(device[:, 0].sum())
        self.fed += int(device[:, 1].sum())
        if reference is not None:
            self.both_decided += device.size
            self.decided_alike += int((reference == device).sum())

    def add_memory(self, device: Generator) -> None:
        """Count the bytes of one sequence's runs, where the device does."""
        found = memory_report(getattr(device, "stats", ()), getattr(device, "config", None))
        for name in MEMORY:
            if found[name] is not None:
                setattr(self, name, (getattr(self, name) or 0) + found[name])

    def as_json(self) -> dict[str, Any]:
        """perplexity, reference_perplexity, kl (nats per token, from the reference), top1 (share), tokens.

        And of the device's routes, None without routers: skip_attention, skip_mlp (shares of the modules), and
        decision_agreement (share of the modules that the reference decides alike), None if that has no routers. And
        kv_bytes_written, weight_bytes_read.
        """
        def share(part: int, whole: int) -> float | None:
            return part / whole if whole else None

        count = self.tokens
        routes = {"skip_attention": share(self.decided - self.attended, self.decided),
                  "skip_mlp": share(self.decided - self.fed, self.decided),
                  "decision_agreement": share(self.decided_alike, self.both_decided)}
        return {"perplexity": math.exp(self.loss / count),
                "reference_perplexity": math.exp(self.reference_loss / count), "kl": self.divergence / count,
                "top1": self.agreed / count, "tokens": count, **routes,
                **{name: getattr(self, name) for name in MEMORY}}

    def copy(self) -> Evaluation:
        """What was counted so far, on its own."""
        return Evaluation(**asdict(self))


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def load_sequences(path: str | Path, limit: int | None = None) -> np.ndarray:
    """The array ``tokens`` of an .npz file, int64 [n, length]; its first ``limit`` sequences.

    Raises RequestError if the file is missing, not an .npz file, or its tokens are not whole numbers [n, length].
    """
    if limit is not None and limit < 1:
        raise RequestError(f"limit must be at least 1 sequence, not {limit}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            if not hasattr(archive, "files") or "tokens" not in archive.files:
                raise RequestError(f"{path}: must hold an array named tokens, not "
                                   f"{', '.join(getattr(archive, 'files', [])) or 'a single array'}")
            tokens = archive["tokens"]
    except RequestError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not an .npz file of plain arrays"
        raise RequestError(f"{path}: cannot be read ({reason})") from None
    if tokens.ndim != 2 or tokens.dtype.kind not in "ui" or tokens.shape[1] < 2 or not len(tokens):
        raise RequestError(f"{path}: tokens must be whole numbers [sequences, length of 2 or more], not {tokens.dtype} "
                           f"{list(tokens.shape)}")
    return tokens[:limit].astype(np.int64)


def evaluate(reference: Generator, device: Generator,
             sequences: Sequence[Sequence[int]] | np.ndarray) -> Iterator[Evaluation]:
    """Yield what was counted after each chunk of each sequence; both contexts are cleared for every sequence.

    ``device`` may be the reference itself. Raises RequestError for a token or a length that the model does not take.
    """
    total = Evaluation()
    for sequence in sequences:
        tokens = [int(token) for token in sequence]
        reference.clear()
        expected = np.concatenate(list(reference.evaluate(tokens)))
        if device is reference:
            parts: Iterator[np.ndarray] = iter([expected])
        else:
            device.clear()
            parts = device.evaluate(tokens)
        first = 0
        for got in parts:
            targets = np.array(tokens[first + 1 : first + 1 + len(got)])
            rows = slice(first, first + len(targets))
            if len(targets):
                total.add(expected[rows], got[: len(targets)], targets)
            first += len(got)
            if first == len(tokens):
                total.add_decisions(None if device is reference else reference.decisions, device.decisions)
                total.add_memory(device)
            yield total.copy()
