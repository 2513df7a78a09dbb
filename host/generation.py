"""Text generation and evaluation on anything that turns tokens into logits: a device, or the float reference."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from .errors import RequestError
from .sampling import Sampler, Sampling

__all__ = ["Generator"]


class Generator(ABC):
    """One model with one context that grows.

    vocab : token ids are 0..vocab - 1; context : positions there is room for; eos_ids : what ends a text
    position : tokens in the context so far; finish : why the last ``generate`` ended: "length", "stop" or "context"
    """

    vocab: int
    context: int
    eos_ids: tuple[int, ...]
    position: int = 0
    finish: str = ""

    @property
    def decisions(self) -> np.ndarray | None:
        """bool [layers, 2, position], true where attention and MLP ran for a token; None without routers."""
        return None

    @abstractmethod
    def prefill(self, tokens: Sequence[int]) -> int:
        """Append a prompt; returns the likeliest next token. Logits of the last token are then available."""

    @abstractmethod
    def step(self, token: int) -> int:
        """Append one token; returns the likeliest next one."""

    @abstractmethod
    def logits(self) -> np.ndarray:
        """Logits of the last step, float32 [rows, vocab]; the last row belongs to the last token."""

    @abstractmethod
    def evaluate(self, tokens: Sequence[int]) -> Iterator[np.ndarray]:
        """Append tokens; yields the logits of every token, float32 [rows of a chunk, vocab]."""

    @abstractmethod
    def clear(self) -> None:
        """Forget the context."""

    def check_tokens(self, tokens: Sequence[int]) -> None:
        """Raises RequestError if ``tokens`` are none, not of this model, or do not fit into the context."""
        if not len(tokens):
            raise RequestError("the prompt is empty; give at least one token")
        for token in tokens:
            if not 0 <= token < self.vocab:
                raise RequestError(f"token ids must be 0..{self.vocab - 1}, not {token}")
        if len(tokens) > self.context - self.position:
            raise RequestError(f"{len(tokens)} tokens do not fit: the context holds {self.context} positions, "
                               f"{self.position} are used; clear it, or compile with a longer context")

    def generate(self, prompt: Sequence[int], count: int, sampling: Sampling | None = None,
                 stop: Collection[int] | None = None) -> Iterator[int]:
        """Yield up to ``count`` tokens that continue ``prompt``; each as soon as it is known.

        sampling : None takes the likeliest token, found on the device
        stop : token ids that end the generation (and are not yielded); by default the model's
        Ends early when the context is full; ``finish`` says why it ended. The prompt is appended to the context.
        """
        sampler = Sampler(sampling) if sampling is not None else None
        stop = self.eos_ids if stop is None else stop
        self.finish = "length"
        if count < 1:
            raise RequestError(f"count must be at least 1, not {count}")
        token = self.prefill(prompt)
        for index in range(count):
            if sampler is not None:
                token = sampler.choose(self.logits()[-1])
            if token in stop:
                self.finish = "stop"
                return
            yield token
            if index + 1 == count:
                return
            if self.position == self.context:
                self.finish = "context"
                return
            token = self.step(token)
