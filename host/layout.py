"""Where everything lies in device memory, and the bytes themselves.

A superbeat is one beat on every port at the same address. A linear byte stream is striped over the ports superbeat by
superbeat; KV records are the exception (a record lies whole in one port), but the compiler never writes those.
"""

from __future__ import annotations

import numpy as np
from skipopu.hw.config import OverlayConfig
from skipopu.hw.isa import KvFormat, MatmulMode

__all__ = ["MemoryMap", "ceil_div", "interleave_gate_up", "kv_tile_superbeats", "pack_rows", "pack_weights", "pad_to",
           "record_beats", "row_superbeats", "scale_exponent", "stripe", "unpack_logits", "weight_superbeats"]

PLANES = {MatmulMode.W4: 1, MatmulMode.W4M: 1, MatmulMode.W8: 2}
_ROWS_AT_ONCE = 1024  # output features packed together: bounds the temporaries, keeps them in cache


def ceil_div(value: int, by: int) -> int:
    """``value / by`` rounded up, for whole numbers."""
    return -(-value // by)


def pad_to(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return ceil_div(value, multiple) * multiple


class MemoryMap:
    """Allocator of superbeat addresses: regions one after another, each starting on a burst boundary.

    Bursts then never cross 4 KiB early. ``regions``: name -> (address, superbeats); ``top``: the first free address.
    """

    def __init__(self, config: OverlayConfig) -> None:
        self.align = config.burst_beats
        self.regions: dict[str, tuple[int, int]] = {}
        self.top = 0

    def add(self, name: str, superbeats: int) -> int:
        """Address of a new region of that size."""
        if name in self.regions:
            raise KeyError(f"region {name!r} is allocated twice")
        address = self.top
        self.regions[name] = (address, superbeats)
        self.top = pad_to(address + superbeats, self.align)
        return address


def weight_superbeats(config: OverlayConfig, mode: MatmulMode, n_tiles: int, k_tiles: int, group: int = 0) -> int:
    """Length of the weight stream of one matmul: what its LOADW counts and its MATMUL consumes.

    n_tiles : of all heads; group : log2 of the blocks that share a scale
    """
    chunk_beats, sets = config.scale_chunk(mode == MatmulMode.W4M, group)
    all_sets = n_tiles * ceil_div(k_tiles, config.scale_tiles(group))
    return n_tiles * k_tiles * PLANES[mode] * config.tile_beats + ceil_div(all_sets, sets) * chunk_beats


def scale_exponent(mode: MatmulMode, scale: np.ndarray, minimum: np.ndarray | None = None) -> int:
    """Largest exponent field (at least 1) of FP16 scales and minima; W8's high plane counts four more."""
    parts = [scale] if minimum is None else [scale, minimum]
    largest = max(int((part.view(np.uint16) >> 10 & 31).max(initial=1)) for part in parts)
    return largest + (4 if mode == MatmulMode.W8 else 0)


def pack_weights(config: OverlayConfig, mode: MatmulMode, codes: np.ndarray, scale: np.ndarray,
                 minimum: np.ndarray | None = None, group: int = 0) -> np.ndarray:
    """The weight stream of one matmul: uint8 [superbeats, W], tiles n outer, k inner, scale chunks between.

    codes : int8 [rows, cols], output features x input features; cols a multiple of lanes
    scale, minimum : float16 [rows, cols / block / 2^group], rounded up; group : log2 of the blocks that share a scale
    Rows are padded with zeros to whole column tiles. W4: codes -8..7; W4M: 0..15; W8: -128..127.
    A chunk stands before the first tile that needs one of its sets; a set serves no two column tiles.
    """
    rows, cols = codes.shape
    columns, width, planes = config.columns, config.superbeat_bytes, PLANES[mode]
    k_tiles, n_tiles, share = cols // config.lanes, ceil_div(rows, columns), config.scale_tiles(group)
    chunk_beats, sets = config.scale_chunk(mode == MatmulMode.W4M, group)
    tile_beats, tile_bytes = planes * config.tile_beats, config.tile_beats * width
    per_n = ceil_div(k_tiles, share)  # scale sets of a column tile
    set_of = np.arange(n_tiles)[:, None] * per_n + np.arange(k_tiles) // share
    tile_at = (np.arange(n_tiles * k_tiles) * tile_beats + (set_of.reshape(-1) // sets + 1) * chunk_beats)[:, None]
    n, k = np.divmod(np.arange(0, n_tiles * per_n, sets), per_n)
    chunk_at = (n * k_tiles + k * share) * tile_beats + np.arange(len(n)) * chunk_beats
    out = np.zeros((weight_superbeats(config, mode, n_tiles, k_tiles, group), width), np.uint8)
    step = max(1, _ROWS_AT_ONCE // columns)
    for first in range(0, n_tiles, step):
        part = codes[first * columns : (first + step) * columns]
        count = ceil_div(len(part), columns)
        if len(part) < count * columns:
            part = np.pad(part, ((0, count * columns - len(part)), (0, 0)))
        part = part.reshape(count, columns, k_tiles, config.lanes).transpose(0, 2, 1, 3)
        part = np.ascontiguousarray(part).view(np.uint8).reshape(count * k_tiles, tile_bytes, 2)
        if mode == MatmulMode.W8:  # (q & 15) - 8, as a nibble
            part = np.stack((_nibbles(part >> 4), _nibbles((part & 15) ^ 8)), axis=1)
        else:
            part = _nibbles((part & 15) ^ (8 if mode == MatmulMode.W4M else 0))
        at = tile_at[first * k_tiles : (first + count) * k_tiles]
        out[at + np.arange(tile_beats)] = part.reshape(len(at), tile_beats, width)
    lines = max(config.blocks >> group, 1)  # scales of a column in one set
    chunks = np.zeros((len(chunk_at) * sets, 1 if minimum is None else 2, lines, columns), np.uint16)
    for index, values in enumerate((scale,) if minimum is None else (scale, minimum)):
        padded = np.zeros((n_tiles * columns, per_n * lines), np.uint16)
        padded[:rows] = np.ascontiguousarray(values).view(np.uint16)
        padded = padded.reshape(n_tiles, columns, per_n, lines).transpose(0, 2, 3, 1)
        chunks[: n_tiles * per_n, index] = padded.reshape(-1, lines, columns)
    out[chunk_at[:, None] + np.arange(chunk_beats)] = chunks.view(np.uint8).reshape(len(chunk_at), chunk_beats, width)
    return out


def _nibbles(codes: np.ndarray) -> np.ndarray:
    """uint8 [..., 2] codes 0..15 -> uint8 [...]: the first in the low nibble."""
    return codes[..., 0] | codes[..., 1] << 4


def interleave_gate_up(config: OverlayConfig, gate: np.ndarray, up: np.ndarray) -> np.ndarray:
    """Rows of gate and up in alternate vector beats: [rows, ...] twice -> [2 rows, ...]; rows a multiple of V."""
    rows = gate.shape[0]
    pair = np.stack([part.reshape(rows // config.vector_lanes, config.vector_lanes, *part.shape[1:])
                     for part in (gate, up)], axis=1)
    return pair.reshape(2 * rows, *gate.shape[1:])


def row_superbeats(config: OverlayConfig, elements: int) -> int:
    """Superbeats of one FP32 row: each row of a LOADA starts at a superbeat."""
    return ceil_div(4 * elements, config.superbeat_bytes)


def pack_rows(config: OverlayConfig, rows: np.ndarray) -> np.ndarray:
    """32-bit words [rows, elements] -> uint8 [superbeats, W], every row padded with zeros to whole superbeats."""
    width = config.superbeat_bytes // 4
    padded = np.zeros((len(rows), row_superbeats(config, rows.shape[1]) * width), rows.dtype)
    padded[:, : rows.shape[1]] = rows
    return padded.view(np.uint8).reshape(-1, config.superbeat_bytes)


def stripe(config: OverlayConfig, image: np.ndarray, address: int, stream: np.ndarray) -> None:
    """Write a linear stream, uint8 [superbeats, W], into memories of all ports, uint8 [P, bytes], at ``address``."""
    beat = config.port_bits // 8
    ports = image.reshape(config.ports, -1, beat)
    ports[:, address : address + len(stream)] = stream.reshape(len(stream), config.ports, beat).transpose(1, 0, 2)


def record_beats(config: OverlayConfig, kv_heads: int, head_dim: int, record_format: KvFormat = KvFormat.FP16) -> int:
    """Port beats of one token's K and V in one layer, every head padded to whole lanes."""
    return config.record_beats(kv_heads, pad_to(head_dim, config.lanes) // config.beat_elements, record_format)


def kv_tile_superbeats(config: OverlayConfig, record: int) -> int:
    """Superbeats of one KV tile: tile_tokens records, token t in port t mod P."""
    return config.tile_tokens // config.ports * record


def unpack_logits(config: OverlayConfig, stream: np.ndarray, rows: int, vocab: int) -> np.ndarray:
    """float32 stream of rows in the order (column tile, row, column) -> float32 [rows, vocab]."""
    flat = stream[: len(stream) // rows * rows]
    per_row = len(flat) // rows
    out = np.empty((rows, per_row), np.float32)
    for first in range(0, per_row, config.columns):
        last = min(first + config.columns, per_row)
        out[:, first:last] = flat[first * rows : last * rows].reshape(rows, last - first)
    return out[:, :vocab]
