"""Where the cycles of recorded runs went: by cause, by layer, by instruction; and against the roofs of the hardware."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from skipopu.hw.config import OverlayConfig
from skipopu.hw.isa import MatmulMode, Unit, decode, disassemble

from ..layout import weight_superbeats
from ..timeline import Span, covered
from .record import Recording

__all__ = [
    "CAUSES", "Cost", "Point", "Usage", "as_json", "breakdown", "by_instruction", "by_layer", "costliest", "roofline",
]

#: What a cycle counts for, the first that holds: data moved on a port; nothing moved, and the array had a command; only
#: the vector unit had one; only the store unit; nobody did anything but wait.
CAUSES = ("memory", "array", "vector", "store", "waiting")
_CAUSE_OF = {Unit.LOAD: "memory", Unit.COMPUTE: "array", Unit.VECTOR: "vector", Unit.STORE: "store"}
_WEIGHTS = (MatmulMode.W4, MatmulMode.W4M, MatmulMode.W8)


@dataclass(frozen=True)
class Usage:
    """All executions of one instruction class.

    cycles : of the run that count for it, see CAUSES; busy : its unit did this; waited : from dispatch to begin
    """

    mnemonic: str
    unit: str
    count: int
    cycles: int
    busy: int
    waited: int


@dataclass(frozen=True)
class Cost:
    """All executions of one instruction of the program. cycles : of the runs that count for it, see CAUSES"""

    pc: int
    count: int
    cycles: int
    note: str
    text: str


@dataclass(frozen=True)
class Point:
    """One kind of matmul. products : multiplications asked for; bytes : read from memory for them; cycles : it took"""

    name: str
    products: int
    bytes: int
    cycles: int

    @property
    def intensity(self) -> float:
        return self.products / max(self.bytes, 1)

    @property
    def rate(self) -> float:
        return self.products / max(self.cycles, 1)


def _causes(recording: Recording) -> np.ndarray:
    """Index into CAUSES of every cycle of a run."""
    last = recording.cycles
    moved = covered([(begin, end + 1) for port in recording.ports for begin, end in port], 0, last)
    by_unit = {unit: covered([(span.start, span.done + 1) for span in recording.spans if span.unit == unit], 0, last)
               for unit in (Unit.COMPUTE, Unit.VECTOR, Unit.STORE)}
    found = np.full(last, CAUSES.index("waiting"))
    for name, mask in (("store", by_unit[Unit.STORE]), ("vector", by_unit[Unit.VECTOR]),
                       ("array", by_unit[Unit.COMPUTE]), ("memory", moved)):
        found[mask] = CAUSES.index(name)
    return found


def _counts(causes: np.ndarray) -> dict[str, int]:
    return dict(zip(CAUSES, np.bincount(causes, minlength=len(CAUSES)).tolist()))


def breakdown(recordings: Sequence[Recording]) -> dict[str, int]:
    """Cycles of all runs by cause; their sum is that of the runs."""
    total = dict.fromkeys(CAUSES, 0)
    for recording in recordings:
        for name, count in _counts(_causes(recording)).items():
            total[name] += count
    return total


def by_layer(recordings: Sequence[Recording]) -> list[dict[str, Any]]:
    """For each layer and module in order (layer -1: outside the layers): cycles, also by cause, executions skipped."""
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for recording in recordings:
        causes = _causes(recording)
        for block in recording.blocks():
            row = rows.setdefault((block.layer, block.module), {
                "layer": block.layer, "module": block.module, "cycles": 0, "tokens": 0, "skipped": 0,
                **dict.fromkeys(CAUSES, 0)})
            executed = recording.executed(block.layer, block.module)
            row["cycles"] += block.cycles
            row["tokens"] += len(executed)
            row["skipped"] += int((~executed).sum())
            for name, count in _counts(causes[block.begin:block.end]).items():
                row[name] += count
    return [rows[key] for key in sorted(rows, key=lambda key: (key[0] < 0, key[0], key[1]))]


def by_instruction(recordings: Sequence[Recording]) -> list[Usage]:
    """Every instruction class that ran, the busiest first; dropped ones under ``dropped``."""
    found: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for recording in recordings:
        for span, cycles, busy in _own_cycles(recording):
            name = "dropped" if span.dropped else decode(recording.program.words[span.pc])[0].mnemonic
            entry = found[name, span.unit.name.lower()]
            for index, value in enumerate((1, cycles, busy, span.start - span.dispatch)):
                entry[index] += value
    return sorted((Usage(name, unit, *entry) for (name, unit), entry in found.items()),
                  key=lambda usage: (-usage.cycles, -usage.busy, usage.mnemonic))


def _own_cycles(recording: Recording) -> Iterator[tuple[Span, int, int]]:
    """Each span with the cycles that count for it, and those in which its unit did it and nothing before it."""
    causes, last = _causes(recording), dict.fromkeys(Unit, 0)
    sums = {unit: np.concatenate([[0], np.cumsum(causes == CAUSES.index(name))]) for unit, name in _CAUSE_OF.items()}
    for span in recording.spans:
        if span.unit == Unit.CONTROL:
            yield span, 0, 1
            continue
        begin, end = max(span.start, last[span.unit]), span.done + 1
        last[span.unit] = max(last[span.unit], end)
        yield span, int(sums[span.unit][end] - sums[span.unit][min(begin, end)]), max(end - begin, 0)


def costliest(recordings: Sequence[Recording], count: int = 10) -> list[Cost]:
    """The instructions of the program for which most cycles count, over all executions."""
    cycles: dict[int, int] = defaultdict(int)
    times: dict[int, int] = defaultdict(int)
    for recording in recordings:
        for span, own, _ in _own_cycles(recording):
            if span.unit != Unit.CONTROL:
                cycles[span.pc] += own
                times[span.pc] += 1
    if not cycles:
        return []
    program = recordings[0].program
    return [Cost(pc, times[pc], cycles[pc], str(program.notes[pc]), disassemble(program.words[pc]))
            for pc in sorted(cycles, key=lambda pc: (-cycles[pc], pc))[:count]]


def roofline(config: OverlayConfig, recordings: Sequence[Recording]) -> list[Point]:
    """Each kind of matmul over all layers, decode (one token) and chunks apart; the largest first."""
    sums: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for recording in recordings:
        rows = recording.stats.tokens
        for span, fields in zip(recording.spans, recording.fields, strict=True):
            if span.unit != Unit.COMPUTE or span.dropped or "mode" not in fields:
                continue
            note, mode = recording.program.notes[span.pc], MatmulMode(fields["mode"])
            kind = mode.name if mode not in _WEIGHTS else note.tensor.rpartition(".")[2]
            listed = (fields["mask"] & ((1 << fields["rows"]) - 1)).bit_count() * fields["groups"]
            tiles = fields["heads"] * fields["n_tiles"] * fields["k_tiles"]
            entry = sums[f"{kind}, {'decode' if rows == 1 else 'chunk'}"]
            entry[0] += tiles * listed * config.lanes * config.columns
            entry[1] += _bytes(config, mode, fields)
            entry[2] += span.done - span.start
    return sorted((Point(name, *entry) for name, entry in sums.items()), key=lambda point: -point.cycles)


def _bytes(config: OverlayConfig, mode: MatmulMode, fields: dict[str, int]) -> int:
    """Bytes of memory behind the tiles of a matmul; a tile of keys or values is FP16 there."""
    if mode in _WEIGHTS:
        beats = weight_superbeats(config, mode, fields["heads"] * fields["n_tiles"], fields["k_tiles"], fields["group"])
        return beats * config.superbeat_bytes
    return fields["heads"] * fields["n_tiles"] * fields["k_tiles"] * config.lanes * config.columns * 2


def as_json(config: OverlayConfig, recordings: Sequence[Recording]) -> dict[str, Any]:
    """All of the above as plain values."""
    return {
        "cycles": sum(recording.cycles for recording in recordings), "breakdown": breakdown(recordings),
        "layers": by_layer(recordings), "instructions": [asdict(item) for item in by_instruction(recordings)],
        "costliest": [asdict(item) for item in costliest(recordings)],
        "roofline": [asdict(item) | {"intensity": item.intensity, "rate": item.rate}
                     for item in roofline(config, recordings)],
        "roofs": {"products_per_cycle": config.lanes * config.columns, "bytes_per_cycle": config.superbeat_bytes},
    }
