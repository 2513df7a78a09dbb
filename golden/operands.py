"""Tile operands read from memory: weight streams and KV tiles, unpacked once and kept until memory changes.

Codes are kept as float32 so that a matrix product forms the block dots: all partial sums are integers below 2^24 (times
one power of two per block), hence exact in any order of addition.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from skipopu.hw.config import OverlayConfig
from skipopu.hw.isa import KvFormat, MatmulMode

from .arithmetic import half_parts
from .kv_records import unpack_records

__all__ = ["KvTile", "OperandCache", "ProgramError", "WeightTiles", "linear", "scale_places", "unpack_kv",
           "unpack_weights", "weight_superbeats"]

_PLANES = {MatmulMode.W4: 1, MatmulMode.W4M: 1, MatmulMode.W8: 2}
Span = tuple[int, int]
_CHUNK = 2048  #: columns multiplied together: keeps a row's scaled dots in the processor's cache


class ProgramError(ValueError):
    """A program whose effect the instruction set leaves undefined; the message names the field."""


@dataclass(frozen=True)
class WeightTiles:
    """Unpacked weight stream of one head of a matmul, cut into chunks of columns.

    codes : per chunk float32 [planes * blocks, block, columns], W4M 0..15, W8 high and low nibble as planes
    scale : per chunk float64 [planes * blocks, columns], sig * 2^(es - scale_exponent)
    minimum : per chunk, likewise [blocks, columns], or None
    """

    codes: list[np.ndarray]
    scale: list[np.ndarray]
    minimum: list[np.ndarray] | None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in [*self.codes, *self.scale, *(self.minimum or [])])


@dataclass(frozen=True)
class KvTile:
    """One KV tile: mantissas float32 and exponents int32 [heads, tokens].

    key : [heads, dims / block, block, tokens]; value : [heads, tokens / block, block, dims]
    """

    key: np.ndarray
    value: np.ndarray
    key_exponent: np.ndarray
    value_exponent: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.key.nbytes + self.value.nbytes


class OperandCache:
    """Most recently used operands by key, each with the spans of superbeats [first, last) it was read from."""

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes = limit, 0
        self.entries: OrderedDict[tuple, tuple[Any, list[Span]]] = OrderedDict()

    def get(self, key: tuple, build: Callable[[], tuple[Any, list[Span]]]) -> Any:
        """The operand under ``key``; if it is not there, what ``build`` makes of the spans it returns with it."""
        if key in self.entries:
            self.entries.move_to_end(key)
            return self.entries[key][0]
        value, spans = build()
        self.entries[key] = value, spans
        self.bytes += _size(value)
        while self.bytes > self.limit and len(self.entries) > 1:
            self._drop(next(iter(self.entries)))
        return value

    def invalidate(self, first: int, last: int) -> None:
        """Forget what was read from superbeats that overlap [first, last)."""
        for key in {key for key, (_, spans) in self.entries.items()
                    for begin, end in spans if begin < last and first < end}:
            self._drop(key)

    def _drop(self, key: tuple) -> None:
        self.bytes -= _size(self.entries.pop(key)[0])


def _size(value: Any) -> int:
    return sum(item.nbytes for item in (value if isinstance(value, list) else [value]))


def linear(config: OverlayConfig, memories: list[np.ndarray], address: int, count: int) -> np.ndarray:
    """Superbeats as one linear stream: uint8 [count, W]."""
    beat = config.port_bits // 8
    parts = [memory[address * beat : (address + count) * beat].reshape(count, beat) for memory in memories]
    return np.stack(parts, 1).reshape(count, config.superbeat_bytes)


def weight_superbeats(config: OverlayConfig, mode: MatmulMode, column_tiles: int, k_tiles: int, group: int) -> int:
    """Superbeats of the weight stream of a matmul of so many column tiles (of all heads)."""
    return len(scale_places(config, mode, column_tiles, k_tiles, group)[0])


def scale_places(config: OverlayConfig, mode: MatmulMode, column_tiles: int, k_tiles: int,
                  group: int) -> tuple[np.ndarray, np.ndarray]:
    """(superbeats of a weight stream that are scales, bool; number of the scale set of each tile, int)."""
    beats, sets = config.scale_chunk(mode == MatmulMode.W4M, group)
    served = np.arange(k_tiles) // config.scale_tiles(group)  # within a column tile, which begins a set of its own
    number = (np.arange(column_tiles)[:, None] * (served[-1] + 1) + served).reshape(-1)
    begins = np.diff(number // sets, prepend=-1) > 0  # a chunk, at a tile
    runs = np.tile([beats, _PLANES[mode] * config.tile_beats], (len(number), 1))
    runs[~begins, 0] = 0
    return np.repeat(np.tile([True, False], len(number)), runs.reshape(-1)), number


def unpack_weights(config: OverlayConfig, mode: MatmulMode, stream: np.ndarray, heads: int, n_tiles: int, k_tiles: int,
                   group: int, scale_exponent: int) -> list[WeightTiles]:
    """The tiles of a matmul's weight stream, uint8 [superbeats, W], one `WeightTiles` per head.

    group : log2 of the blocks that share a scale
    Raises ProgramError if a scale's exponent exceeds ``scale_exponent``.
    """
    lanes, columns, blocks, planes = config.lanes, config.columns, config.blocks, _PLANES[mode]
    with_minimum = mode == MatmulMode.W4M
    beats = config.scale_chunk(with_minimum, group)[0]
    kinds, lines = 2 if with_minimum else 1, max(blocks >> group, 1)
    is_scale, number = scale_places(config, mode, heads * n_tiles, k_tiles, group)
    halves = stream[is_scale].reshape(-1, beats * config.superbeat_bytes).view(np.uint16)
    halves = halves.reshape(-1, kinds, lines, columns)[number]  # of each tile
    halves = np.repeat(halves, blocks // lines, axis=2)
    packed = stream[~is_scale].reshape(-1, planes, columns, lanes // 2)  # column n of a tile: K / 2 bytes
    nibbles = np.stack((packed & 15, packed >> 4), -1).reshape(heads, n_tiles, k_tiles, planes, columns, lanes)
    signed = (nibbles.astype(np.int8) ^ 8) - 8
    if with_minimum:
        signed += 8
    elif mode == MatmulMode.W8:
        signed[:, :, :, 1] += 8
    codes = signed.transpose(0, 3, 2, 5, 1, 4).reshape(  # [heads, planes, k, lanes, n, columns]
        heads, planes * k_tiles * blocks, config.block, n_tiles * columns)
    significand, field = half_parts(halves)
    if int(field.max()) + 4 * (planes - 1) > scale_exponent:
        raise ProgramError(f"matmul.scale_exponent must be at least {int(field.max()) + 4 * (planes - 1)}, the largest "
                           f"exponent among the scales, not {scale_exponent}")
    values = np.ldexp(significand.astype(np.float64), field - scale_exponent)
    values = values.reshape(heads, n_tiles, k_tiles, kinds, blocks, columns).transpose(0, 3, 2, 4, 1, 5).reshape(
        heads, kinds, k_tiles * blocks, n_tiles * columns)
    scale = values[:, 0]
    if planes == 2:
        scale = np.concatenate((scale * 16, scale), 1)
    cuts = [slice(first, first + _CHUNK) for first in range(0, n_tiles * columns, _CHUNK)]
    return [WeightTiles([codes[h, :, :, part].astype(np.float32, order="C") for part in cuts],
                        [np.ascontiguousarray(scale[h, :, part]) for part in cuts],
                        [np.ascontiguousarray(values[h, 1, :, part]) for part in cuts] if with_minimum else None)
            for h in range(heads)]


def unpack_kv(config: OverlayConfig, memories: list[np.ndarray], addresses: np.ndarray, heads: int,
              head_beats: int, record_format: KvFormat) -> KvTile:
    """The KV tile of the records at up to tile_tokens superbeat addresses, record i behind port i mod P; others are 0.
    """
    beat, dims = config.port_bits // 8, head_beats * config.beat_elements
    length = config.record_beats(heads, head_beats, record_format)
    records = np.zeros((config.tile_tokens, length, beat), np.uint8)
    for port, memory in enumerate(memories[: len(addresses)]):
        index = addresses[port :: config.ports, None] + np.arange(length)
        records[port : len(addresses) : config.ports] = memory[: len(memory) // beat * beat].reshape(-1, beat)[index]
    mantissa, exponent = unpack_records(config, records, record_format, heads, head_beats)
    mantissa = mantissa.astype(np.float32)
    return KvTile(
        np.ascontiguousarray(mantissa[:, 0].transpose(1, 2, 0)).reshape(heads, -1, config.block, config.tile_tokens),
        np.ascontiguousarray(mantissa[:, 1].transpose(1, 0, 2)).reshape(heads, -1, config.block, dims),
        np.ascontiguousarray(exponent[:, 0].T), np.ascontiguousarray(exponent[:, 1].T))
