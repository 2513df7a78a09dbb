"""Read a GGUF file's metadata and tensor table, with every size checked against the file before use.

The ``gguf`` package's own reader trusts the counts in the file (a damaged array length makes it run without end) and
takes seconds to walk a vocabulary; the layout is small enough to read here. Its enumerations and block sizes are used.
Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2 and 3, little-endian).
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT, GGMLQuantizationType

from .errors import ModelError
from .model import GROUP, QuantTensor

__all__ = ["GgufFile", "GgufTensor", "SUPPORTED_TYPES"]

SUPPORTED_TYPES = ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0")
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass(frozen=True)
class GgufTensor:
    """One entry of the tensor table. ``shape`` is row-major (the file lists the fastest dimension first)."""

    name: str
    type_name: str
    shape: tuple[int, ...]
    raw: np.ndarray  # uint8 [bytes], a view of the mapped file

    def read(self) -> QuantTensor:
        """The tensor in its own quantised form; BF16 widens to f32. Raises ModelError if its type is unsupported."""
        if self.type_name not in SUPPORTED_TYPES:
            raise ModelError(f"tensor {self.name}: type {self.type_name} is not supported; supported are "
                             f"{', '.join(SUPPORTED_TYPES)} (requantise the file to one of them)")
        try:
            return self._unpack()
        except ModelError as error:
            raise ModelError(f"tensor {self.name}: {error}") from None

    def _unpack(self) -> QuantTensor:
        if self.type_name == "F32":
            return QuantTensor("f32", values=self.raw.view("<f4").reshape(self.shape))
        if self.type_name == "F16":
            return QuantTensor("f16", values=self.raw.view("<f2").reshape(self.shape))
        if self.type_name == "BF16":
            widened = self.raw.view("<u2").astype(np.uint32) << 16
            return QuantTensor("f32", values=widened.view(np.float32).reshape(self.shape))
        if len(self.shape) != 2:
            raise ModelError(f"a {self.type_name} tensor must have 2 dimensions, not {len(self.shape)}")
        rows, cols = self.shape
        groups = self.raw.reshape(rows, cols // GROUP, -1)  # [rows, groups, bytes of a block]

        def half(at: int) -> np.ndarray:
            return np.ascontiguousarray(groups[..., at:at + 2]).view("<f2")[..., 0]

        if self.type_name == "Q8_0":
            return QuantTensor("q8_0", codes=groups[..., 2:].reshape(self.shape).view(np.int8), scale=half(0))
        nibbles = groups[..., -16:]  # byte i holds element i (low nibble) and element i + 16 (high nibble)
        codes = np.concatenate([nibbles & 15, nibbles >> 4], axis=-1).reshape(self.shape).view(np.int8)
        if self.type_name == "Q4_0":
            return QuantTensor("q4_0", codes=codes - np.int8(8), scale=half(0))
        return QuantTensor("q4_1", codes=codes, scale=half(0), minimum=half(2))


class _Cursor:
    """Reads forward through the mapped file and refuses to pass its end."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.at = 0

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise ModelError(f"the file ends at byte {len(self.data)}, but {size} bytes are due at byte {self.at}; "
                             "it is truncated or damaged")
        self.at += size
        return self.data[self.at - size:self.at]

    def scalar(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def string(self) -> str:
        return str(self.take(self.scalar("Q")), "utf-8", "replace")

    def value(self, kind: int, nested: bool = False) -> Any:
        if kind in SCALARS:
            return self.scalar(SCALARS[kind])
        if kind == STRING:
            return self.string()
        if kind != ARRAY or nested:
            raise ModelError(f"metadata value of type {kind} at byte {self.at} is unknown; the file is damaged")
        item, count = self.scalar("I"), self.scalar("Q")
        if item in SCALARS:
            width = struct.calcsize("<" + SCALARS[item])
            return [entry for entry, in struct.iter_unpack("<" + SCALARS[item], self.take(width * count))]
        return [self.value(item, nested=True) for _ in range(count)]  # each item takes bytes, so the end stops it


class GgufFile:
    """A mapped GGUF file. ``metadata``: key -> Python value; ``tensors``: name -> GgufTensor.

    Raises ModelError, one line that begins with the path, for anything that is not a sound GGUF file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metadata: dict[str, Any] = {}
        self.tensors: dict[str, GgufTensor] = {}
        try:
            data = np.memmap(self.path, np.uint8, "r")
        except (OSError, ValueError) as error:  # ValueError: an empty file cannot be mapped
            raise ModelError(f"{self.path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
        try:
            self._parse(data)
        except ModelError as error:
            raise ModelError(f"{self.path}: {error}") from None

    def _parse(self, data: np.ndarray) -> None:
        cursor = _Cursor(memoryview(data))  # type: ignore[arg-type]
        if (magic := bytes(cursor.take(4))) != b"GGUF":
            raise ModelError(f"a GGUF file starts with b'GGUF', this one with {magic!r}")
        if (version := cursor.scalar("I")) not in (2, 3):
            raise ModelError(f"GGUF version must be 2 or 3, not {version} (convert the file with a current tool)")
        tensor_count, metadata_count = cursor.scalar("Q"), cursor.scalar("Q")
        for _ in range(metadata_count):
            key = cursor.string()
            self.metadata[key] = cursor.value(cursor.scalar("I"))
        table = []
        for _ in range(tensor_count):
            name, dimensions = cursor.string(), cursor.scalar("I")
            if not 1 <= dimensions <= 4:
                raise ModelError(f"tensor {name}: dimensions must be 1 to 4, not {dimensions}; the file is damaged")
            shape = tuple(reversed([cursor.scalar("Q") for _ in range(dimensions)]))
            table.append((name, shape, cursor.scalar("I"), cursor.scalar("Q")))
        align = self.metadata.get("general.alignment", GGUF_DEFAULT_ALIGNMENT)
        if not isinstance(align, int) or align < 1 or align & (align - 1):
            raise ModelError(f"general.alignment must be a power of two, not {align!r}")
        base = -(-cursor.at // align) * align
        for name, shape, type_id, offset in table:
            if name in self.tensors:
                raise ModelError(f"tensor {name} is listed twice")
            self.tensors[name] = _locate(data, base + offset, name, shape, type_id)


def _locate(data: np.ndarray, start: int, name: str, shape: tuple[int, ...], type_id: int) -> GgufTensor:
    try:
        kind = GGMLQuantizationType(type_id)
    except ValueError:
        raise ModelError(f"tensor {name}: unknown tensor type {type_id}; supported are "
                         f"{', '.join(SUPPORTED_TYPES)}") from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % block:
        raise ModelError(f"tensor {name}: {kind.name} needs rows of a multiple of {block} values, not {list(shape)}")
    end = start + math.prod(shape) // block * block_bytes
    if end > data.size:
        raise ModelError(f"tensor {name} ends at byte {end}, the file at {data.size}; it is truncated or damaged")
    return GgufTensor(name, kind.name, shape, data[start:end])
