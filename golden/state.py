"""What the machine holds between instructions, how it is addressed, and how it stops."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from skipopu.hw.config import OverlayConfig
from skipopu.hw.isa import RowList
from skipopu.hw.registers import FaultCause

from .arithmetic import LOWEST, widen
from .kv_memory import KvMemory

__all__ = ["ALPHA_DROP", "BeatStream", "MAXIMUM_INIT", "MachineFault", "MachineState", "Nest", "RowLists", "Write",
           "nest", "rows_of"]

MAXIMUM_INIT = -32768  #: running maximum of a fresh softmax state
ALPHA_DROP = 127  #: rescale exponent that means: forget


class MachineFault(Exception):
    """The machine stopped: ``cause`` (FaultCause), ``pc`` (instruction index), ``port``, ``detail`` (one line)."""

    def __init__(self, cause: FaultCause, pc: int, detail: str, port: int = 0) -> None:
        super().__init__(f"{cause.name} at instruction {pc}: {detail}")
        self.cause, self.pc, self.detail, self.port = cause, pc, detail, port


class Write(NamedTuple):
    """Rows of one buffer that an instruction changed (superbeats, for buffer "memory")."""

    buffer: str
    rows: np.ndarray


class RowLists:
    """The rows of the chunk that instructions run for, as control keeps them: bit t of a mask stands for row t.

    attention, mlp : rows that execute the module; present : rows of the last `route`. All of them before the first.
    """

    def __init__(self, tokens: int) -> None:
        self.every = (1 << tokens) - 1
        self.clear()

    def clear(self) -> None:
        """Back to the start of a run."""
        self.attention = self.mlp = self.present = self.every

    def mask(self, kind: int) -> int:
        """Rows in a RowList; 0 drops an instruction. Raises ValueError for what is no RowList."""
        match RowList(kind):
            case RowList.ATTENTION:
                return self.attention
            case RowList.MLP:
                return self.mlp
            case RowList.MLP_ONLY:
                return self.mlp & ~self.attention
            case RowList.NOT_MLP:
                return self.present & ~self.mlp
            case RowList.NO_ATTENTION:
                return 0 if self.attention else self.every
            case RowList.NO_MLP:
                return 0 if self.mlp else self.every
        return self.every


@lru_cache(maxsize=4096)
def rows_of(mask: int) -> np.ndarray:
    """The rows in a mask, ascending."""
    return np.array([t for t in range(mask.bit_length()) if mask >> t & 1], np.int64)


@dataclass(frozen=True)
class Nest:
    """The loops of an instruction: ``shape`` (h, g, t, beats) and the offset of each beat, int64 of that shape."""

    shape: tuple[int, int, int, int]
    rows: np.ndarray  #: the t of each place along the third axis
    offset: np.ndarray
    span: int  #: largest offset + 1
    dense: bool  #: offsets are 0, 1, 2, ... in the order of the array


@lru_cache(maxsize=4096)
def nest(heads: int, groups: int, mask: int, beats: int, head_stride: int, group_stride: int, row_stride: int) -> Nest:
    """The loops with these counts and strides; the loop over t takes the rows in ``mask``."""
    rows = rows_of(mask)
    offset = (np.arange(heads)[:, None, None, None] * head_stride + np.arange(groups)[:, None, None] * group_stride
              + rows[:, None] * row_stride + np.arange(beats))
    return Nest(offset.shape, rows, offset, int(offset.max(initial=-1)) + 1,
                bool(np.array_equal(offset.ravel(), np.arange(offset.size))))


class BeatStream:
    """Vector beats between two units. Beats leave in the order h, n, g, t, c in which the array delivers them.

    per_tile : beats of one row in one column tile
    """

    def __init__(self, per_tile: int) -> None:
        self.per_tile = per_tile
        self.items: list[np.ndarray] = []  # [h, g, t, beats, V], or what is left of one: [beats, V] in stream order

    def __len__(self) -> int:
        return sum(item.size // item.shape[-1] for item in self.items)

    def put(self, values: np.ndarray) -> None:
        """Append [h, g, t, beats, V]."""
        self.items.append(values)

    def take(self, shape: tuple[int, int, int, int]) -> np.ndarray | None:
        """The next beats as [*shape, V] (h, g, t, beats); None if there are not enough."""
        if self.items and self.items[0].shape[:-1] == shape:
            return self.items.pop(0)
        flat = self.take_flat(int(np.prod(shape)))
        if flat is None:
            return None
        values = np.empty_like(flat)
        values[_stream_order(*shape, self.per_tile)] = flat
        return values.reshape(*shape, flat.shape[-1])

    def take_flat(self, beats: int) -> np.ndarray | None:
        """The next beats in stream order, [beats, V]; None if there are not enough."""
        if beats > len(self):
            return None
        parts: list[np.ndarray] = []
        while beats:
            item = self.items.pop(0)
            if item.ndim == 5:
                item = item.reshape(-1, item.shape[-1])[_stream_order(*item.shape[:4], self.per_tile)]
            parts.append(item[:beats])
            if len(item) > beats:
                self.items.insert(0, item[beats:])
            beats -= len(parts[-1])
        return np.concatenate(parts) if parts else np.empty((0, 1))


@lru_cache(maxsize=256)
def _stream_order(heads: int, groups: int, rows: int, beats: int, per_tile: int) -> np.ndarray:
    """Index of each beat of the stream in the array [h, g, t, beats]."""
    index = np.arange(heads * groups * rows * beats).reshape(heads, groups, rows, beats)
    return np.concatenate([index[h, :, :, n : n + per_tile].ravel() for h in range(heads)
                           for n in range(0, beats, per_tile)] or [index.ravel()])


class MachineState:
    """Buffers and scalars of the overlay; V = vector lanes, K = lanes, E = FP16 elements of a port beat.

    abuf float32 [abuf_rows, V]; mbuf int16 [mbuf_rows, K] with mbuf_exponents int16 and mbuf_sums int32 [mbuf_rows,
    blocks] and mbuf_emax int16 [mbuf_rows]; kvout uint16 [kvout_rows, E], FP16 bits; softmax states maximum, alpha
    and total, int64 [state_rows]; sumsq int64 [tokens]; inv_n, eps; argmax_index, argmax_value (FP32 bits).
    For attention and MLP: routers float64 [2, router_rows, V], their weights; router_bias and scores (of each row that
    was scored last) int64 [2] and [2, tokens], units of 2^-24. kv: where KV records lie with reuse.
    """

    def __init__(self, config: OverlayConfig) -> None:
        self.config = config
        self.abuf = np.zeros((config.abuf_rows, config.vector_lanes), np.float32)
        self.ordinary = True  # no row of abuf holds a subnormal number or exponent field 255
        self.mbuf = np.zeros((config.mbuf_rows, config.lanes), np.int16)
        self.mbuf_exponents = np.zeros((config.mbuf_rows, config.blocks), np.int16)
        self.mbuf_sums = np.zeros((config.mbuf_rows, config.blocks), np.int32)
        self.mbuf_emax = np.zeros(config.mbuf_rows, np.int16)
        self.kvout = np.zeros((config.kvout_rows, config.beat_elements), np.uint16)
        self.maximum = np.full(config.state_rows, MAXIMUM_INIT, np.int64)
        self.total = np.zeros(config.state_rows, np.int64)
        self.alpha = np.zeros(config.state_rows, np.int64)
        self.sumsq = np.zeros(config.tokens, np.int64)
        self.inv_n = self.eps = np.float64(0)
        self.row_scale: dict[tuple, np.ndarray] = {}  # 1 / rms by (first row, mask), until sumsq changes
        self.routers = np.zeros((2, config.router_rows, config.vector_lanes))
        self.router_bias = np.zeros(2, np.int64)
        self.scores = np.full((2, config.tokens), -1, np.int64)
        self.kv = KvMemory(config)
        self.argmax_index = 0
        self.argmax_value = int(np.float32(LOWEST).view(np.uint32))
        self.saturations = 0

    def read_abuf(self, rows: np.ndarray | slice) -> np.ndarray:
        """Rows of ABUF as operands, FP32 in float64 [..., V]."""
        stored = self.abuf[rows]
        return stored.astype(np.float64) if self.ordinary else widen(stored)

    def load_abuf(self, rows: np.ndarray, values: np.ndarray) -> None:
        """Set rows of ABUF to raw FP32 bits (uint32 [..., V])."""
        field = values >> 23 & 255
        if ((field == 255) | (field == 0) & (values << 1 != 0)).any():
            self.ordinary = False
        self.abuf.view(np.uint32)[rows] = values

    def snapshot(self, buffers: Iterable[str]) -> dict[str, np.ndarray]:
        """Copies of the named buffers, for comparison."""
        return {name: np.array(getattr(self, name)) for name in buffers}
