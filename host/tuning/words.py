"""Text of few different words as training data: a tokenizer with a token for each, and sequences of equal length."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import pre_tokenizers

from ..errors import RequestError
from ..tokenizer import CONTROL, NORMAL, PRE_TOKENIZERS, Tokenizer

__all__ = ["END", "pack", "read_stories", "word_tokenizer"]

END = 0  # the token before every story, and behind it
_END_PIECE = "<|end|>"
_PRE = "llama-bpe"
_MULTIPLE = 8  # of the vocabulary: logits leave the overlay so many at once, or more


def read_stories(path: str | Path) -> list[str]:
    """The lines of a text file that are not empty. Raises RequestError if there are none, or it is not UTF-8."""
    try:
        stories = [line.strip() for line in Path(path).read_text("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}: must be UTF-8 text, one story a line ({error.reason})") from None
    if not stories:
        raise RequestError(f"{path}: holds no text; one story a line is expected")
    return stories


def word_tokenizer(stories: Sequence[str], most: int) -> tuple[Tokenizer, dict[str, Any]]:
    """A tokenizer whose tokens are the pieces of the stories, the commonest first, and its GGUF metadata.

    A piece is a word with the space before it, or punctuation. The vocabulary is filled up to a multiple of 8 with
    tokens that no text has. Raises RequestError for more than ``most`` tokens.
    """
    split = pre_tokenizers.Sequence(PRE_TOKENIZERS[_PRE])
    counts = Counter(piece for story in stories for piece, _ in split.pre_tokenize_str(story))
    pieces = [_END_PIECE, *sorted(counts, key=lambda piece: (-counts[piece], piece))]
    pieces += [f"<|unused{index}|>" for index in range(-len(pieces) % _MULTIPLE)]
    if len(pieces) > most:
        raise RequestError(f"the text has {len(counts)} different words and marks, which make {len(pieces)} tokens, "
                           f"more than {most}; give simpler text or a larger --vocab")
    metadata = {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _PRE, "tokenizer.ggml.tokens": pieces,
        "tokenizer.ggml.token_type": [CONTROL if piece.startswith("<|") else NORMAL for piece in pieces],
        "tokenizer.ggml.add_bos_token": True}
    return Tokenizer.from_gguf(metadata | {"tokenizer.ggml.bos_token_id": END}), metadata


def pack(stories: Sequence[str], tokenizer: Tokenizer, length: int) -> np.ndarray:
    """int64 [stories, length]: each story between two END tokens, and as much of those that follow as there is room.

    Raises RequestError for a story that does not fit, and for text that the tokenizer does not know.
    """
    encoded = [[*tokenizer.encode(story, bos=True), END] for story in stories]
    longest = max(range(len(encoded)), key=lambda index: len(encoded[index]))
    if len(encoded[longest]) > length:
        raise RequestError(f"story {longest + 1} has {len(encoded[longest])} tokens with its marks, more than the "
                           f"context of {length}; shorten it, or give a larger --context")
    rows = np.empty((len(encoded), length), np.int64)
    for index, row in enumerate(rows):
        text, following = list(encoded[index]), index
        while len(text) < length:
            following = (following + 1) % len(encoded)
            text += encoded[following][1:]  # the END before it is there
        row[:] = text[:length]
    return rows
