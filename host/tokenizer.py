"""Text to tokens and back, from GGUF metadata or a Hugging Face folder, on top of the ``tokenizers`` library.

Decoding is defined here on bytes: each token is a byte string, a text is their concatenation read as UTF-8. That makes
decoding token by token equal to decoding at once, and half a character is never shown.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from .errors import ModelError

__all__ = ["StreamDecoder", "Tokenizer"]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # tokenizer.ggml.token_type
SPACE = "\u2581"  # how SentencePiece writes a space
LLAMA3_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                r"|\s*[\r\n]+|\s+(?!\S)|\s+")
# tokenizer.ggml.pre -> the pre-tokenizer it names
PRE_TOKENIZERS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "llama-bpe": [pre_tokenizers.Split(Regex(LLAMA3_SPLIT), "isolated"),
                  pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
}


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: themselves if visible Latin-1, else 256 onwards in order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + index): byte for index, byte in enumerate(hidden)}


BYTE_OF_CHARACTER = _byte_of_character()


def _bytes_of_piece(piece: str, byte_level: bool) -> bytes:
    if byte_level:
        if all(character in BYTE_OF_CHARACTER for character in piece):
            return bytes(BYTE_OF_CHARACTER[character] for character in piece)
        return piece.encode()
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
        return bytes.fromhex(match[1])
    return piece.replace(SPACE, " ").encode()


class StreamDecoder:
    """Decodes tokens as they come; text appears as soon as, and only when, its last byte is known.

    It continues a text (a prompt), so a leading space is kept, which ``Tokenizer.decode`` may strip.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int) -> str:
        """The text that ``token`` completes, possibly empty."""
        return self._utf8.decode(self._tokenizer.token_bytes(token, self._skip_special))

    def finish(self) -> str:
        """U+FFFD if the tokens ended inside a character, else empty."""
        return self._utf8.decode(b"", final=True)


class Tokenizer:
    """Encodes and decodes; made by ``from_gguf`` or ``from_folder``.

    bos_id : prepended by ``encode`` where ``add_bos``; special : tokens that are markers, not text
    """

    def __init__(self, backend: Backend, *, byte_level: bool, strip_space: bool, bos_id: int | None,
                 add_bos: bool) -> None:
        self._backend = backend
        self._byte_level = byte_level
        self._strip_space = strip_space
        self.bos_id = bos_id
        self.add_bos = add_bos and bos_id is not None
        added = backend.get_added_tokens_decoder()
        self.special = frozenset(token for token, entry in added.items() if entry.special)
        self._pieces: list[str] = []
        self._bytes: list[bytes] = []
        by_id = {token: piece for piece, token in backend.get_vocab(with_added_tokens=True).items()}
        for token in range(max(by_id, default=-1) + 1):
            piece = by_id.get(token, "")
            self._pieces.append(piece)
            self._bytes.append(piece.encode() if token in added else _bytes_of_piece(piece, byte_level))
        # without a token for each byte the library leaves out what it cannot say
        self._lacks_bytes = byte_level and not set(BYTE_OF_CHARACTER) <= set(self._pieces)

    @property
    def vocab(self) -> int:
        """Number of tokens; a model's vocabulary may be padded beyond it."""
        return len(self._pieces)

    def piece(self, token: int | None) -> str:
        """A token as the vocabulary writes it; empty for None and beyond the vocabulary."""
        return self._pieces[token] if token is not None and 0 <= token < self.vocab else ""

    def token_bytes(self, token: int, skip_special: bool = True) -> bytes:
        """The bytes a token stands for; none for a marker if ``skip_special``, none beyond the vocabulary."""
        if not 0 <= token < self.vocab or skip_special and token in self.special:
            return b""
        return self._bytes[token]

    def encode(self, text: str, *, special: bool = True, bos: bool | None = None) -> list[int]:
        """Token ids of ``text``.

        special : read markers such as ``<|im_end|>`` in the text as their token; False for text from strangers
        bos : prepend the beginning-of-sequence token; None: as the model wants
        """
        self._backend.encode_special_tokens = not special
        try:
            tokens = self._backend.encode(text, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError):  # the library calls such a string no string
            raise ModelError("the text holds a lone surrogate and is not valid Unicode") from None
        if self._lacks_bytes and self.decode(tokens, skip_special=False) != text:
            pieces = (piece for piece, _ in self._backend.pre_tokenizer.pre_tokenize_str(text))
            lacking = next((piece for piece in pieces if self._backend.token_to_id(piece) is None), "")
            word = _bytes_of_piece(lacking, True).decode("utf-8", "replace")
            raise ModelError(f"the model has no token for {word!r}; its vocabulary is {self.vocab - len(self.special)} "
                             f"words and marks")
        prefix = [self.bos_id] if (self.add_bos if bos is None else bos) and self.bos_id is not None else []
        return prefix if not tokens else tokens if tokens[:1] == prefix else prefix + tokens

    def decode(self, tokens: Iterable[int], *, skip_special: bool = True) -> str:
        """The text of ``tokens``; bytes that are not UTF-8 become U+FFFD."""
        text = b"".join(self.token_bytes(token, skip_special) for token in tokens).decode("utf-8", "replace")
        return text[1:] if self._strip_space and text.startswith(" ") else text

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder for tokens that come one at a time."""
        return StreamDecoder(self, skip_special)

    def save(self, path: str | Path) -> None:
        """Write the tokenizer in Hugging Face's ``tokenizer.json`` form, which ``from_folder`` reads."""
        self._backend.save(str(path))

    def to_dict(self) -> dict[str, Any]:
        """All of the tokenizer as JSON values; ``from_dict`` makes the same tokenizer of it."""
        return {"backend": self._backend.to_str(), "byte_level": self._byte_level, "strip_space": self._strip_space,
                "bos_id": self.bos_id, "add_bos": self.add_bos}

    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Tokenizer:
        """From ``to_dict``."""
        options = dict(state)
        return cls(Backend.from_str(options.pop("backend")), **options)

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """From ``tokenizer.ggml.*``: model "gpt2" (byte-level BPE) or "llama" (SentencePiece BPE).

        Raises ModelError if the metadata is incomplete or names another tokenizer.
        """
        kind = metadata.get("tokenizer.ggml.model")
        tokens = _strings(metadata, "tokenizer.ggml.tokens")
        types = metadata.get("tokenizer.ggml.token_type", [NORMAL] * len(tokens))
        if not isinstance(types, list) or len(types) != len(tokens):
            raise ModelError(f"metadata tokenizer.ggml.token_type must list {len(tokens)} types, one per token")
        pre = metadata.get("tokenizer.ggml.pre", "gpt-2")
        if kind == "gpt2":
            backend, strip_space, add_bos = _byte_level_backend(metadata, tokens, pre), False, pre == "llama-bpe"
        elif kind == "llama":
            strip_space = add_bos = True
            if metadata.get("tokenizer.ggml.add_space_prefix") is False:
                strip_space = False
            backend = _sentencepiece_backend(metadata, tokens, types, strip_space)
        else:
            raise ModelError(f"tokenizer {kind!r} is not supported; supported: 'gpt2', 'llama'")
        for type_id, is_special in (CONTROL, True), (USER_DEFINED, False):
            backend.add_tokens([AddedToken(token, special=is_special, normalized=False)
                                for token, its in zip(tokens, types, strict=True) if its == type_id and token])
        bos = metadata.get("tokenizer.ggml.bos_token_id")
        if bos is not None and (not isinstance(bos, int) or not 0 <= bos < len(tokens)):
            raise ModelError(f"metadata bos_token_id must be a token from 0 to {len(tokens) - 1}, not {bos!r}")
        return cls(backend, byte_level=kind == "gpt2", strip_space=strip_space, bos_id=bos,
                   add_bos=bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos)))

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """From a Hugging Face folder's ``tokenizer.json`` (and ``tokenizer_config.json`` for the marker tokens).

        Raises ModelError if it is missing, malformed, or neither byte-level nor byte-fallback BPE.
        """
        path = Path(folder) / "tokenizer.json"
        try:
            backend = Backend.from_file(str(path))
        except Exception as error:  # noqa: BLE001 the library raises plain Exception
            raise ModelError(f"{path}: not a usable tokenizer ({error})") from None
        description = json.loads(backend.to_str())
        decoder = json.dumps(description["decoder"])
        byte_level = '"ByteLevel"' in decoder
        if not byte_level and not description["model"].get("byte_fallback"):
            raise ModelError(f"{path}: only byte-level and byte-fallback tokenizers are supported, "
                             f"not {description['model']['type']} with decoder {decoder[:60]}")
        bos = backend.token_to_id(token_text(read_json(Path(folder) / "tokenizer_config.json"), "bos_token"))
        return cls(backend, byte_level=byte_level, strip_space='"Strip"' in decoder, bos_id=bos,
                   add_bos=bos is not None and backend.encode("").ids[:1] == [bos])


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, empty if there is no such file. Raises ModelError if it is something else."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path}: must hold a JSON object, not {type(content).__name__}")
    return content


def token_text(tokenizer_config: Mapping[str, Any], key: str) -> str:
    """The text of ``bos_token`` or ``eos_token``, which is written as a string or as an object; empty if absent."""
    entry = tokenizer_config.get(key)
    return str(entry.get("content", "") if isinstance(entry, dict) else entry or "")


def _strings(metadata: Mapping[str, Any], key: str) -> list[str]:
    value = metadata.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise ModelError(f"metadata {key} must be a list of strings")
    return value


def _bpe(*arguments: Any, **options: Any) -> models.BPE:
    try:
        return models.BPE(*arguments, **options)
    except Exception as error:  # noqa: BLE001 the library raises plain Exception
        raise ModelError(f"the tokenizer's merges do not fit its tokens ({error})") from None


def _byte_level_backend(metadata: Mapping[str, Any], tokens: list[str], pre: Any) -> Backend:
    if not isinstance(pre, str) or pre not in PRE_TOKENIZERS:
        raise ModelError(f"pre-tokenizer {pre!r} is not supported; supported: {', '.join(PRE_TOKENIZERS)}")
    whole = pre == "llama-bpe"  # a piece that is a token is taken as it is; a vocabulary of words needs no merges
    listed = _strings(metadata, "tokenizer.ggml.merges") if "tokenizer.ggml.merges" in metadata or not whole else []
    merges = [(merge[:1] + left, right) for merge in listed for left, _, right in [merge[1:].partition(" ")]]
    vocab = {token: index for index, token in enumerate(tokens)}
    backend = Backend(_bpe(vocab, merges, ignore_merges=whole))
    backend.pre_tokenizer = pre_tokenizers.Sequence(PRE_TOKENIZERS[pre])
    backend.decoder = decoders.ByteLevel()  # for ``save``: it tells readers the kind
    return backend


def _sentencepiece_backend(metadata: Mapping[str, Any], tokens: list[str], types: list[int], prefix: bool) -> Backend:
    """SentencePiece merges the neighbours whose union scores highest: BPE, with the merges ranked by that score."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens) or not isinstance(scores[0], float):
        raise ModelError(f"metadata tokenizer.ggml.scores must list {len(tokens)} scores, one per token")
    normal = {token for token, its_type in zip(tokens, types, strict=True) if its_type == NORMAL}
    merges = [(-scores[index], index, token[:cut], token[cut:])
              for index, token in enumerate(tokens) if token in normal
              for cut in range(1, len(token)) if token[:cut] in normal and token[cut:] in normal]
    unknown = next((token for token, its_type in zip(tokens, types, strict=True) if its_type == UNKNOWN), None)
    backend = Backend(_bpe({token: index for index, token in enumerate(tokens)},
                           [(left, right) for _, _, left, right in sorted(merges)],
                           unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in types))
    space = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), space]) if prefix else space
    backend.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(),
                                         *([decoders.Strip(" ", 1, 0)] if prefix else [])])
    return backend
