"""Lower linear layers to what the array multiplies: padded codes with one scale for as many blocks as share it.

Requires tensors of `Model`; guarantees mode, shapes and scales that `layout.pack_weights` takes. Values change
only where a note says so: float tensors become q8_0, and a tensor with a block in two groups, behind padded heads, is
requantised to q8_0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from skipopu.hw.config import OverlayConfig
from skipopu.hw.isa import INSTRUCTIONS, MatmulMode

from ..layout import interleave_gate_up, pad_to
from ..model import BASE, GROUP, QuantTensor
from ..quantise import quantise

__all__ = ["Linear", "Padding", "interleave", "lower_linear", "mode_of", "pair_kind", "same_kind", "shared_blocks"]

FLOAT16_MAX = 65504
_MODES = {"q8_0": MatmulMode.W8, "q4_0": MatmulMode.W4, "q4_1": MatmulMode.W4M}
_MOST_SHARED = next(item for item in INSTRUCTIONS if item.mnemonic == "matmul").fields["group"].maximum


@dataclass(frozen=True)
class Padding:
    """``count`` segments of ``size`` features, each padded with zeros to ``padded``."""

    count: int
    size: int
    padded: int

    def index(self) -> np.ndarray:
        """Source feature of each padded feature, -1 for a padding zero: int64 [count * padded]."""
        where = np.full((self.count, self.padded), -1)
        where[:, : self.size] = np.arange(self.count * self.size).reshape(self.count, self.size)
        return where.reshape(-1)

    @property
    def is_identity(self) -> bool:
        return self.size == self.padded


@dataclass(frozen=True, eq=False)
class Linear:
    """One matmul's weights: codes int8 [rows, cols], scale and minimum float16 [rows, cols / block / 2^group]."""

    mode: MatmulMode
    codes: np.ndarray
    scale: np.ndarray
    minimum: np.ndarray | None = None
    group: int = 0


def _take(array: np.ndarray, index: np.ndarray, axis: int) -> np.ndarray:
    """``array`` taken at ``index`` along ``axis``, zeros where the index is -1."""
    if len(index) == array.shape[axis] and (index == np.arange(len(index))).all():
        return array
    taken = np.take(array, np.maximum(index, 0), axis=axis)
    taken[(slice(None),) * axis + (index < 0,)] = 0
    return taken


def mode_of(kind: str) -> MatmulMode:
    """What multiplies weights of a kind; floats become q8_0."""
    return _MODES[BASE.get(kind, "q8_0")]


def shared_blocks(padding: Padding, block: int, group: int) -> tuple[int, np.ndarray] | None:
    """How many blocks of padded features share a scale, as log2, and the source's group that each such run takes it
    from, -1 for an all-zero run.

    group : source features that share a scale. None if some block would need the scales of two groups.
    """
    index = padding.index()
    index = np.where(index < 0, -1, index // group)
    for share in range(min(max(group // block, 1).bit_length() - 1, _MOST_SHARED), -1, -1):
        runs = np.pad(index, (0, -len(index) % (block << share)), constant_values=-1).reshape(-1, block << share)
        first = runs.max(axis=1)
        if ((runs == first[:, None]) | (runs < 0)).all():
            return share, first
    return None


def lower_linear(config: OverlayConfig, name: str, tensor: QuantTensor, rows: Padding, cols: Padding,
                 notes: list[str]) -> Linear:
    """Pad a linear tensor and give blocks their scales; appends to ``notes`` what was requantised.

    rows, cols : how output and input features are padded; ``cols`` to whole lanes
    """
    shared = None if tensor.codes is None else shared_blocks(cols, config.block, tensor.group)
    if shared is None:
        reason = "is " + tensor.kind if tensor.codes is None else f"({tensor.kind}) has groups across padded heads"
        notes.append(f"{name} {reason}: quantised to q8_0")
        values = _take(_take(tensor.dequantise(), cols.index(), 1), rows.index(), 0)
        width = values.shape[1]
        values = np.pad(values, ((0, 0), (0, pad_to(width, GROUP) - width)))
        tensor = quantise(values, "q8_0")
        assert tensor.codes is not None and tensor.scale is not None
        return Linear(MatmulMode.W8, tensor.codes[:, :width], tensor.scale,
                      group=(GROUP // config.block).bit_length() - 1)
    group, runs = shared
    parts = [tensor.codes, tensor.scale, tensor.minimum]
    indices = [cols.index(), runs, runs]
    lowered = [part if part is None else _take(_take(part, index, 1), rows.index(), 0)
               for part, index in zip(parts, indices)]
    return Linear(mode_of(tensor.kind), *lowered, group=group)  # type: ignore[arg-type, misc]


def pair_kind(first: str, second: str) -> str:
    """The kind that two tensors get which share a matmul (see `same_kind`), unless a large scale asks for q8_0."""
    bases = {BASE[first], BASE[second]}
    if first == second:
        return first
    return bases.pop() if len(bases) == 1 else "q4_1" if bases == {"q4_0", "q4_1"} else "q8_0"


def same_kind(first: QuantTensor, second: QuantTensor, name: str, notes: list[str]) -> list[QuantTensor]:
    """The two tensors in kinds of one mode, so that they can share a matmul: exact where one kind holds the other.

    Float tensors stay as they are, since `lower_linear` makes them q8_0.
    """
    if first.kind == second.kind:
        return [first, second]
    first, second = first.narrowed(), second.narrowed()
    kinds = {first.kind, second.kind}
    if len(kinds) == 1:
        return [first, second]
    if kinds == {"q4_0", "q4_1"} and max(_largest_scale(first), _largest_scale(second)) <= FLOAT16_MAX / 8:
        return [_as_q4_1(item) for item in (first, second)]
    lowered = []
    for item in (first, second):
        if item.kind == "q4_0":
            item = QuantTensor("q8_0", codes=item.codes, scale=item.scale)
        elif item.kind == "q4_1":
            notes.append(f"{name}: kinds {first.kind} and {second.kind} share a matmul: q4_1 quantised to q8_0")
            item = quantise(item.dequantise(), "q8_0")
        lowered.append(item)
    return lowered


def _largest_scale(tensor: QuantTensor) -> float:
    assert tensor.scale is not None
    return float(np.abs(tensor.scale).max())


def _as_q4_1(tensor: QuantTensor) -> QuantTensor:
    """q4_0 as q4_1 with minimum -8 * scale: exact, a power of two."""
    if tensor.kind == "q4_1":
        return tensor
    assert tensor.codes is not None and tensor.scale is not None
    minimum = tensor.scale * np.float16(-8)
    return QuantTensor("q4_1", codes=tensor.codes + np.int8(8), scale=tensor.scale, minimum=minimum)


def interleave(config: OverlayConfig, gate: Linear, up: Linear) -> Linear:
    """One matmul of gate and up, in alternate vector beats. Both have the same mode, group and shape."""
    minimum = None
    if gate.minimum is not None and up.minimum is not None:
        minimum = interleave_gate_up(config, gate.minimum, up.minimum)
    return Linear(gate.mode, interleave_gate_up(config, gate.codes, up.codes),
                  interleave_gate_up(config, gate.scale, up.scale), minimum, gate.group)
