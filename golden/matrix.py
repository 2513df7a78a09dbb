"""The compute unit: exact integer dots of aligned rows with weights or KV tiles (`docs/numerics.md`, Weights)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import numpy as np
import torch
from skipopu.hw.isa import MatmulMode
from skipopu.hw.registers import FaultCause

from .arithmetic import from_int
from .operands import KvTile, OperandCache, ProgramError, WeightTiles, linear, unpack_weights, weight_superbeats
from .state import BeatStream, MachineState, Write, nest

__all__ = ["MatrixUnit"]

SLOTS = 2  #: KV tiles that the KV buffer holds
ATTENTION_LIMIT = (1 << 14) - 1  #: largest mantissa of a query or probability


class MatrixUnit:
    """Executes MATMUL on the mantissas of ``state``; delivers to ``results``.

    weights : (address, superbeats) loaded and not yet consumed; tiles : KV tiles loaded, oldest first
    scored : how many of them have been through QK; PV takes the oldest and drops it
    """

    def __init__(self, state: MachineState, memories: list[np.ndarray], cache: OperandCache, results: BeatStream,
                 fail: Callable[[FaultCause, str], NoReturn]) -> None:
        self.state, self.memories, self.cache, self.results, self.fail = state, memories, cache, results, fail
        self.weights: list[tuple[int, int]] = []
        self.tiles: list[KvTile] = []
        self.scored = 0

    def forget_tiles(self) -> None:
        """Empty the KV buffer."""
        self.tiles.clear()
        self.scored = 0

    def drop_weights(self, values: dict[str, int]) -> list[Write]:
        """One DROPW."""
        self._take(values["count"])
        return []

    def execute(self, values: dict[str, int]) -> list[Write]:
        """One MATMUL with its registers already added, for the rows in its ``mask``; its results go to the stream."""
        state, config, k_tiles = self.state, self.state.config, values["k_tiles"]
        span = nest(values["heads"], values["groups"], values["mask"], k_tiles, values["head_stride"],
                    values["group_stride"], values["row_stride"])
        if not span.offset.size or not values["n_tiles"]:
            raise ProgramError("matmul: heads, groups, rows, n_tiles and k_tiles must be at least 1")
        width = values["beats"] * config.vector_lanes
        if width > values["n_tiles"] * config.columns or width <= (values["n_tiles"] - 1) * config.columns:
            raise ProgramError(f"matmul.beats must reach into the last of {values['n_tiles']} column tiles, "
                               f"not be {values['beats']}")
        if values["groups"] * len(span.rows) > config.acc_rows or values["x"] < 0 or (
                values["x"] + span.span > config.mbuf_rows):
            self.fail(FaultCause.BUFFER_RANGE, f"{values['groups']} x {len(span.rows)} accumulator rows, mbuf rows "
                                                f"{values['x']}..{values['x'] + span.span - 1}")
        rows = values["x"] + span.offset  # [h, g, t, k]
        emax = state.mbuf_emax[rows[..., 0]].astype(np.int64)  # [h, g, t]
        drop = state.mbuf_exponents[rows] - emax[..., None, None]
        if drop.max() > 0:
            raise ProgramError("matmul reads a vector whose first row is not the first row of an aligned vector")
        # A block whose shift is 63 or more contributes 0 or -1 at any such shift, so powers of two stay ordinary.
        scale = np.ldexp(1.0, np.maximum(drop, -63))  # [h, g, t, k, blocks]
        mantissas = state.mbuf[rows]
        mode = values["mode"]
        if mode in (MatmulMode.QK, MatmulMode.PV) and np.abs(mantissas).max() > ATTENTION_LIMIT:
            raise ProgramError(f"matmul {MatmulMode(mode).name} reads mantissas beyond {ATTENTION_LIMIT}: only vrope "
                               f"and vprob write what it may read")
        x = mantissas.reshape(*scale.shape, config.block) * scale[..., None]
        heads, shape = values["heads"], emax.shape
        # to [h, blocks, rows, block]
        x = x.reshape(heads, -1, scale.shape[-2] * scale.shape[-1], config.block).swapaxes(1, 2)
        if mode in (MatmulMode.W4, MatmulMode.W4M, MatmulMode.W8):
            sums = (state.mbuf_sums[rows] * scale).reshape(heads, -1, x.shape[1])  # [h, rows, blocks]
            acc = np.stack([_weighted(tiles, part, total) for tiles, part, total in
                            zip(self._operand(MatmulMode(mode), values), x, sums)])[..., :width]
            exponent = emax[..., None] + values["scale_exponent"] - 39
        elif mode in (MatmulMode.QK, MatmulMode.PV):
            acc, exponent = self._attend(mode, x, width, emax)
        else:
            raise ProgramError(f"matmul.mode must be a MatmulMode, not {mode}")
        y = from_int(acc.reshape(*shape, width), exponent)
        self.results.put(y.reshape(*shape, -1, config.vector_lanes))
        return []

    def _take(self, need: int) -> list[tuple[int, int]]:
        """(address, superbeats) of the next ``need`` superbeats of the weight stream."""
        ranges, missing = [], need
        while missing and self.weights:
            address, count = self.weights.pop(0)
            used = min(count, missing)
            ranges.append((address, used))
            missing -= used
            if used < count:
                self.weights.insert(0, (address + used, count - used))
        if missing:
            self.fail(FaultCause.WATCHDOG, f"needs {need} superbeats of weights, {missing} are missing")
        return ranges

    def _operand(self, mode: MatmulMode, values: dict[str, int]) -> list[WeightTiles]:
        """The next weight stream, unpacked; one item per head."""
        sizes = values["heads"], values["n_tiles"], values["k_tiles"], values["group"]
        ranges = self._take(weight_superbeats(self.state.config, mode, sizes[0] * sizes[1], *sizes[2:]))

        def build() -> tuple[list[WeightTiles], list[tuple[int, int]]]:
            stream = np.concatenate([linear(self.state.config, self.memories, *part) for part in ranges])
            return (unpack_weights(self.state.config, mode, stream, *sizes, values["scale_exponent"]),
                    [(address, address + count) for address, count in ranges])

        return self.cache.get(("weights", mode, *sizes, values["scale_exponent"], *ranges), build)

    def _attend(self, mode: int, x: np.ndarray, width: int, emax: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """QK or PV: (accumulators [h, rows, width], exponents [h, g, t, width or 1])."""
        place = self.scored if mode == MatmulMode.QK else 0
        if place >= min(len(self.tiles), SLOTS) or mode == MatmulMode.PV and not self.scored:
            self.fail(FaultCause.WATCHDOG, f"{MatmulMode(mode).name} without a KV tile ({len(self.tiles)} loaded, "
                                            f"{self.scored} scored)")
        tile = self.tiles[place]
        operand = tile.key if mode == MatmulMode.QK else tile.value
        if operand.shape[0] < x.shape[0] or operand.shape[1] != x.shape[1]:
            raise ProgramError(f"matmul {MatmulMode(mode).name} of {x.shape[0]} heads x {x.shape[1]} blocks does not "
                               f"fit the KV tile: {operand.shape[0]} x {operand.shape[1]}")
        dots = x @ operand[: x.shape[0]].astype(np.float64)  # [h, blocks, rows, columns]
        dots *= 64
        acc = np.floor(dots, out=dots).sum(1)
        if acc.shape[-1] < width:
            acc = np.pad(acc, ((0, 0), (0, 0), (0, width - acc.shape[-1])))
        acc = acc[..., :width]
        if mode == MatmulMode.PV:
            self.tiles.pop(0)
            self.scored -= 1
            return acc, emax[..., None] - 20
        self.scored += 1
        return acc, emax[..., None] + tile.key_exponent[: x.shape[0], None, None, :width] - 45

    def value_exponent(self) -> np.ndarray:
        """V exponents, int [heads, tokens], of the tile whose PV is next."""
        if not self.tiles:
            self.fail(FaultCause.WATCHDOG, "probabilities without a KV tile")
        return self.tiles[0].value_exponent


def _weighted(tiles: WeightTiles, x: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Accumulators float64 [rows, columns] of x float64 [blocks, rows, block], its sums [rows, blocks]; both scaled by
    the block's power of two."""
    planes = tiles.codes[0].shape[0] // len(x)
    rows = torch.from_numpy(np.ascontiguousarray(np.concatenate([x] * planes), np.float32))
    columns = []
    for chunk, (codes, scale) in enumerate(zip(tiles.codes, tiles.scale)):
        dots = torch.bmm(rows, torch.from_numpy(codes)).numpy()  # [planes * blocks, rows, columns], exact
        acc = np.empty((dots.shape[1], dots.shape[2]))
        term = np.empty_like(scale)
        for row, total in enumerate(acc):
            np.multiply(dots[:, row], scale, out=term)
            np.floor(term, out=term).sum(0, out=total)
            if tiles.minimum is not None:
                np.multiply(sums[row][:, None], tiles.minimum[chunk], out=term)
                total += np.floor(term, out=term).sum(0)
        columns.append(acc)
    return np.concatenate(columns, 1)
