"""When each instruction of a run was dispatched, began and ended, from what a device recorded.

Units are in order in themselves: the k-th command a unit begins or ends is the k-th that was dispatched to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from skipopu.hw.isa import Unit, decode

from .program import Program

__all__ = ["Block", "Span", "blocks", "covered", "exposed", "spans"]

_UNITS = tuple(unit for unit in Unit if unit != Unit.CONTROL)


@dataclass(frozen=True, slots=True)
class Span:
    """One executed instruction, in cycles of the device. CONTROL instructions begin and end where they leave control;
    so do dropped ones, whose unit is CONTROL whatever they would have used."""

    pc: int
    unit: Unit
    dispatch: int
    start: int
    done: int
    dropped: bool = False


@dataclass(frozen=True, slots=True)
class Block:
    """The cycles from the end of the block before to the end of this one; layer -1 outside the layers."""

    layer: int
    module: str
    begin: int
    end: int

    @property
    def cycles(self) -> int:
        return self.end - self.begin


def spans(program: Program, events: np.ndarray) -> list[Span]:
    """Every instruction of one run in the order of dispatch. events : records of ``NativeSim.events``"""
    units = [decode(word)[0].unit for word in program.words]
    begun: dict[Unit, list[int]] = {unit: [] for unit in _UNITS}
    ended: dict[Unit, list[int]] = {unit: [] for unit in _UNITS}
    for unit in _UNITS:
        begun[unit] = events["cycle"][events["start"] >> unit & 1 != 0].tolist()
        ended[unit] = events["cycle"][events["done"] >> unit & 1 != 0].tolist()
    taken = dict.fromkeys(_UNITS, 0)
    found = []
    for event in events[events["dispatch"] != 0]:
        pc, cycle, dropped = int(event["pc"]), int(event["cycle"]), bool(event["dropped"])
        unit = units[pc]
        if dropped or unit == Unit.CONTROL:
            found.append(Span(pc, Unit.CONTROL, cycle, cycle, cycle, dropped))
            continue
        index = taken[unit]
        taken[unit] += 1
        if index >= len(begun[unit]) or index >= len(ended[unit]):
            raise ValueError(f"instruction {pc} has no {'begin' if index >= len(begun[unit]) else 'end'} in "
                             f"{len(events)} events: record whole runs")
        found.append(Span(pc, unit, cycle, begun[unit][index], ended[unit][index]))
    return found


def blocks(program: Program, run: Sequence[Span]) -> list[Block]:
    """The run cut into the modules of its layers, in order, each ending with the last instruction of its own.

    What overlaps two modules (weights that are loaded ahead) counts for the one that is still computing.
    """
    if not run:
        return []
    ends: dict[tuple[int, str], int] = {}  # in the order of the run
    for span in run:
        note = program.notes[span.pc]
        end = 0 if decode(program.words[span.pc])[0].unit == Unit.LOAD else span.done  # dropped ones too
        key = (note.layer, note.module)
        ends[key] = max(ends.get(key, 0), end)
    cut, begin = [], run[0].dispatch
    for key, last in ends.items():
        end = max(last, begin)
        cut.append(Block(*key, begin, end))
        begin = end
    return cut


def covered(intervals: Sequence[tuple[int, int]], first: int, last: int) -> np.ndarray:
    """bool [last - first], true in the cycles inside any of the intervals (begin, end), end excluded."""
    steps = np.zeros(last - first + 1, np.int64)
    for begin, end in intervals:
        begin, end = max(begin, first), min(end, last)
        if begin < end:
            steps[begin - first] += 1
            steps[end - first] -= 1
    return np.cumsum(steps[:-1]) > 0


def exposed(program: Program, run: Sequence[Span], events: np.ndarray) -> dict[str, int]:
    """Cycles in which memory moved nothing and the compute unit had no command, by what the vector unit then did.

    Returns mnemonic -> cycles, with "" where it did nothing either.
    """
    first, last = int(events["cycle"][0]), int(events["cycle"][-1])
    still = np.repeat(events["memory"][:-1] == 0, np.diff(np.asarray(events["cycle"], np.int64)).astype(int))
    alone = still & ~covered([(span.start, span.done) for span in run if span.unit == Unit.COMPUTE], first, last)
    found = {}
    for mnemonic in sorted({decode(program.words[span.pc])[0].mnemonic for span in run if span.unit == Unit.VECTOR}):
        own = covered([(span.start, span.done) for span in run if span.unit == Unit.VECTOR
                       and decode(program.words[span.pc])[0].mnemonic == mnemonic], first, last)
        found[mnemonic] = int((alone & own).sum())
        alone &= ~own
    return found | {"": int(alone.sum())}
