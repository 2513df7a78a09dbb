"""Run one program on two devices and name the first instruction whose result differs.

After every run of the program the memory it wrote (keys, values, logits), the routes and the token it chose are
compared bit for bit. At a difference the run is repeated on both devices, cut after ever fewer instructions
(INSTRUCTION_LIMIT), and the rows written so far are compared through ``Device.inspect``: a binary search for the first
result that differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from skipopu.hw.registers import DebugBuffer

from .device import read_register
from .effects import Effect, Span, run_effects
from .errors import RequestError
from .passes.walk import Arguments
from .routes import words_of_routes
from .runtime import Accelerator

__all__ = ["Comparison", "Difference", "compare"]

_KINDS = {DebugBuffer.ABUF: "<f4", DebugBuffer.MBUF: "<i2", DebugBuffer.KVOUT: "<f2"}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The first value that differs. ``expected`` is of the first device, ``got`` of the second: bits and value.

    position, tokens : the run of the program; pc : -1 if no single instruction shows it
    place : buffer or region; row, element : index within it (superbeat and element for memory)
    """

    position: int
    tokens: int
    pc: int
    instruction: str
    tensor: str
    place: str
    row: int
    element: int
    expected: str
    got: str

    def __str__(self) -> str:
        return (f"first difference: {self.instruction}: {self.place} row {self.row} element {self.element}: expected "
                f"{self.expected}, got {self.got} (run of {self.tokens} tokens at position {self.position})")


@dataclass
class Comparison:
    """What was compared so far; ``difference`` ends it. ``logits``: values compared; ``generated``: token ids."""

    generated: list[int]
    runs: int = 0
    logits: int = 0
    difference: Difference | None = None

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return asdict(self) | {"equal": self.difference is None}


@dataclass(frozen=True)
class _Run:
    position: int
    tokens: list[int]
    effects: list[Effect]


class _Pair:
    """The device that is right and the one under test, both with the same program."""

    def __init__(self, expected: Accelerator, got: Accelerator) -> None:
        if expected.compiled is not got.compiled:
            raise RequestError("both devices must be given the same compiled model")
        self.both = (expected, got)
        self.config, self.program = expected.config, expected.compiled.program
        self.places = [0] * self.config.ports
        self.past: list[list[int]] = []  # tokens of the runs so far

    def run(self, tokens: list[int]) -> _Run:
        """One run on both, with the logits of every row."""
        expected, position = self.both[0], self.both[0].position
        for accelerator in self.both:
            accelerator.run(tokens, 0, len(tokens))
        words = [] if (routes := expected.stats[-1].routes) is None else words_of_routes(routes)
        arguments = Arguments(position, len(tokens), 0, len(tokens), tuple(zip(words[::2], words[1::2])))
        self.past.append(tokens)
        return _Run(position, tokens, run_effects(self.config, self.program, arguments, tokens, self.places))

    def cut(self, run: _Run, count: int) -> None:
        """Repeat the first ``count`` instructions of a run. The reset empties queues, memory stays, but with KV reuse
        all runs are repeated: no pointer of a record outlasts it.
        """
        for accelerator in self.both:
            accelerator.reset()
            if accelerator.map.kv == "reuse":
                for tokens in self.past[:-1]:
                    accelerator.run(tokens)
            accelerator.position = run.position
            accelerator.run(run.tokens, 0, len(run.tokens), instructions=count)

    def memory(self, span: Span) -> tuple[np.ndarray, np.ndarray]:
        """Bytes of a span on both, uint8 [superbeats, bytes]."""
        beat = self.config.port_bits // 8
        ports = range(self.config.ports) if span.port is None else (span.port,)
        first, second = (np.concatenate(
            [item.device.read_memory(port, span.address * beat, span.superbeats * beat).reshape(-1, beat)
             for port in ports], axis=1) for item in self.both)
        return first, second

    def routes(self, layer: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The routes of a layer on both, words of attention and MLP."""
        first, second = ((read_register(item.device, "ROUTES", 2 * layer),
                          read_register(item.device, "ROUTES", 2 * layer + 1)) for item in self.both)
        return first, second

    def rows(self, buffer: DebugBuffer, row: int) -> tuple[bytes, bytes]:
        """One row of an on-chip buffer on both."""
        first, second = (item.device.inspect(buffer, row) for item in self.both)
        return first, second


def compare(expected: Accelerator, got: Accelerator, prompt: Sequence[int], count: int) -> Iterator[Comparison]:
    """Feed ``prompt`` to both, then ``count`` tokens that ``expected`` chooses greedily; yields after each run.

    The last Comparison yielded has the verdict. Raises RequestError for a bad prompt or count, DeviceError if a device
    stops.
    """
    if count < 1:
        raise RequestError(f"count must be at least 1, not {count}")
    pair = _Pair(expected, got)
    result = Comparison([])
    expected.check_tokens(prompt)
    if len(prompt) + count - 1 > expected.context - expected.position:
        raise RequestError(f"{len(prompt)} + {count - 1} tokens do not fit into {expected.context} positions; "
                           f"generate fewer, or compile with a longer context")
    chunk = expected.map.chunk
    parts = [list(prompt[first : first + chunk]) for first in range(0, len(prompt), chunk)]
    while parts:
        run = pair.run(parts.pop(0))
        result.runs += 1
        result.logits += len(run.tokens) * expected.vocab
        if _differs(pair, run.effects) or expected.argmax() != got.argmax():
            result.difference = _find(pair, run)
        elif not parts:
            result.generated.append(expected.argmax())
            if len(result.generated) < count:
                parts.append(result.generated[-1:])
        yield result
        if result.difference:
            return


def _memory_difference(pair: _Pair, effects: Sequence[Effect]) -> tuple[Span, int, int] | None:
    """(span, superbeat in it, byte) of the first difference in what ``effects`` write to memory."""
    for span in (span for effect in effects for span in effect.spans):
        first, second = pair.memory(span)
        if (where := np.argwhere(first != second)).size:
            return span, int(where[0, 0]), int(where[0, 1])
    return None


def _differs(pair: _Pair, effects: Sequence[Effect]) -> bool:
    """Whether memory or routes differ after ``effects``."""
    return _other_route(pair, effects) is not None or _memory_difference(pair, effects) is not None


def _other_route(pair: _Pair, effects: Sequence[Effect]) -> Effect | None:
    """The first of ``effects`` that takes a route which differs."""
    for effect in effects:
        if effect.route is not None and len(set(pair.routes(effect.route))) > 1:
            return effect
    return None


def _chip_differences(pair: _Pair, effects: Sequence[Effect]) -> set[tuple[DebugBuffer, int]]:
    """(buffer, row) of everything written by ``effects`` that differs now."""
    written = {(buffer, int(row)) for effect in effects for buffer, rows in effect.rows.items() for row in rows}
    return {(buffer, row) for buffer, row in sorted(written) if len(set(pair.rows(buffer, row))) > 1}


def _find(pair: _Pair, run: _Run) -> Difference:
    """Search the run for its first different result; both devices are reset and cut in the search."""
    if not _differs(pair, run.effects):
        return _argmax(pair, run)
    verdict = _whole_run(pair, run)  # while the results of the whole run are still in memory
    cuts = [0] + [index + 1 for index, effect in enumerate(run.effects) if effect.cut]
    equal, differs = 0, len(cuts)
    while differs - equal > 1:  # differs = len(cuts) stands for the whole run, which is known to differ
        middle = (equal + differs) // 2
        pair.cut(run, cuts[middle])
        done = run.effects[: cuts[middle]]
        if _differs(pair, done) or _chip_differences(pair, done):
            differs = middle
        else:
            equal = middle
    if differs == len(cuts):
        return verdict
    pair.cut(run, cuts[differs])
    group = run.effects[cuts[equal] : cuts[differs]]
    rows = _chip_differences(pair, group)
    for effect in group:
        if _other_route(pair, [effect]) is not None:
            return _in_routes(pair, run, effect)
        if _memory_difference(pair, [effect]) is not None:
            return _in_memory(pair, run, effect)
        for buffer, written in effect.rows.items():
            for row in written:
                if (buffer, int(row)) in rows:
                    return _on_chip(pair, run, effect, buffer, int(row))
    return verdict


def _whole_run(pair: _Pair, run: _Run) -> Difference:
    """The difference as a whole run shows it, for when no cut shows one."""
    hint = " (cut runs agree, so the result depends on timing)"
    if (effect := _other_route(pair, run.effects)) is not None:
        return _in_routes(pair, run, effect, hint)
    effect = next(effect for effect in run.effects if _memory_difference(pair, [effect]) is not None)
    return _in_memory(pair, run, effect, hint)


def _argmax(pair: _Pair, run: _Run) -> Difference:
    """Equal logits, but another token chosen: only VLOGITS can be to blame."""
    effect = next(effect for effect in run.effects if effect.mnemonic == "vlogits")
    expected, got = (item.argmax() for item in pair.both)
    return _difference(run, effect.pc, pair.program.describe(effect.pc), pair.program.notes[effect.pc].tensor,
                       "ARGMAX_INDEX", 0, 0, str(expected), str(got))


def _difference(run: _Run, pc: int, instruction: str, tensor: str, place: str, row: int, element: int, expected: str,
                got: str) -> Difference:
    return Difference(position=run.position, tokens=len(run.tokens), pc=pc, instruction=instruction, tensor=tensor,
                      place=place, row=row, element=element, expected=expected, got=got)


def _in_routes(pair: _Pair, run: _Run, effect: Effect, hint: str = "") -> Difference:
    assert effect.route is not None
    first, second = pair.routes(effect.route)
    module = int(first[0] == second[0])
    return _difference(run, effect.pc, pair.program.describe(effect.pc) + hint, pair.program.notes[effect.pc].tensor,
                       "ROUTES", 2 * effect.route + module, 0, f"{first[module]:#b}", f"{second[module]:#b}")


def _in_memory(pair: _Pair, run: _Run, effect: Effect, hint: str = "") -> Difference:
    found = _memory_difference(pair, [effect])
    assert found is not None
    span, superbeat, byte = found
    kind = "<f4" if effect.mnemonic == "storel" else "<f2"
    first, second = (data[superbeat].tobytes() for data in pair.memory(span))
    element = byte // np.dtype(kind).itemsize
    place = "memory" if span.port is None else f"memory of port {span.port}"
    return _difference(run, effect.pc, pair.program.describe(effect.pc) + hint, pair.program.notes[effect.pc].tensor,
                       place, span.address + superbeat, element, _value(first, kind, element),
                       _value(second, kind, element))


def _on_chip(pair: _Pair, run: _Run, effect: Effect, buffer: DebugBuffer, row: int) -> Difference:
    kind = _KINDS[buffer]
    first, second = pair.rows(buffer, row)
    words = [np.frombuffer(data, f"<u{np.dtype(kind).itemsize}") for data in (first, second)]
    element = int(np.flatnonzero(words[0] != words[1])[0])
    return _difference(run, effect.pc, pair.program.describe(effect.pc), pair.program.notes[effect.pc].tensor,
                       buffer.name, row, element, _value(first, kind, element), _value(second, kind, element))


def _value(data: bytes, kind: str, element: int) -> str:
    """Bits and value of one element."""
    size = np.dtype(kind).itemsize
    bits = int.from_bytes(data[element * size : (element + 1) * size], "little")
    return f"{bits:#0{2 * size + 2}x} ({np.frombuffer(data, kind)[element]})"
