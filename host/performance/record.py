"""What the runs of a generation did, cycle by cycle: recorded where a device can, predicted where it cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..passes.walk import Arguments, walk
from ..program import Program
from ..routes import words_of_routes
from ..runtime import Accelerator, RunStats
from ..timeline import Block, Span, blocks, spans
from .cycles import predict
from .history import KvHistory
from .memory import memory_model

__all__ = ["Profiled", "Recording"]


@dataclass(frozen=True, eq=False, kw_only=True)
class Recording:
    """One run. Cycles count from its first instruction.

    label : "simulated" if an RTL said when things happened, "predicted" if the cycle model did
    spans : every instruction in the order of dispatch; fields : those of the same instruction with registers added
    ports : of each memory port, first and last cycle of every stretch in which data moved
    """

    program: Program
    stats: RunStats
    label: str
    spans: list[Span]
    fields: list[dict[str, int]]
    ports: list[list[tuple[int, int]]]

    @property
    def cycles(self) -> int:
        return max(span.done for span in self.spans) + 1

    @property
    def name(self) -> str:
        """What the run did, for people."""
        first, count = self.stats.position, self.stats.tokens
        if count > 1:
            return f"tokens {first}..{first + count - 1}"
        return f"token {first}"

    def blocks(self) -> list[Block]:
        """The run cut into the modules of its layers."""
        return blocks(self.program, self.spans)

    def executed(self, layer: int, module: str) -> np.ndarray:
        """bool [tokens]: who executes a module; all of them outside the layers and without routers."""
        routes = self.stats.routes
        if routes is None or layer < 0:
            return np.ones(self.stats.tokens, bool)
        return routes[layer, 0 if module == "attention" else 1]


class Profiled(Accelerator):
    """An accelerator that keeps a Recording of every run.

    memory : model of the memory for predictions, where the device cannot record
    """

    def __init__(self, *args: Any, memory: str = "ideal", **options: Any) -> None:
        super().__init__(*args, **options)
        self.memory = memory
        self.history = KvHistory(self.config) if self.map.kv == "reuse" else None
        self.recordings: list[Recording] = []

    def run(self, tokens: Sequence[int], head_row: int = 0, head_rows: int = 0, instructions: int = 0) -> None:
        sim = getattr(self.device, "sim", None)
        if sim is not None:
            sim.record()
        position = self.position
        super().run(tokens, head_row, head_rows, instructions)
        stats = self.stats[-1]
        routes: tuple[tuple[int, int], ...] = ()
        if stats.routes is not None:
            words = words_of_routes(stats.routes)
            routes = tuple(zip(words[::2], words[1::2]))
        arguments = Arguments(position, len(tokens), head_row, head_rows, routes)
        program, config = self.compiled.program, self.config
        fields = [found for *_, found in walk(program, arguments, tokens)]
        if sim is not None:
            events = sim.events()
            sim.record(False)
            found, ports, label = spans(program, events), _stretches(events, config.ports), "simulated"
        else:
            run = predict(config, program, arguments, tokens=tokens, channel=memory_model(self.memory, config),
                          program_at=self.map.address("program"), history=self.history)
            found, ports, label = run.spans, [run.moved] * config.ports, "predicted"
        first = found[0].dispatch
        self.recordings.append(Recording(
            program=program, stats=stats, label=label, fields=fields,
            spans=[Span(s.pc, s.unit, s.dispatch - first, s.start - first, s.done - first, s.dropped) for s in found],
            ports=[[(begin - first, end - first) for begin, end in port] for port in ports]))


def _stretches(events: np.ndarray, ports: int) -> list[list[tuple[int, int]]]:
    """First and last cycle of every stretch in which data moved, for each port."""
    cycles, found = events["cycle"].astype(np.int64), []
    for port in range(ports):
        moving = np.concatenate([[0], (events["memory"] >> port & 1).astype(np.int8), [0]])
        edges = np.diff(moving)
        begins = cycles[np.flatnonzero(edges[:-1] == 1)]
        ends = cycles[np.minimum(np.flatnonzero(edges == -1), len(cycles) - 1)] - 1
        found.append(list(zip(begins.tolist(), ends.tolist())))
    return found
