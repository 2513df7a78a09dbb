"""Where the KV records of a sequence come from, for predictions: what the functional level knows of the ports."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from skipopu.golden.kv_memory import KvMemory
from skipopu.hw.config import OverlayConfig
from skipopu.hw.registers import FaultCause

from ..errors import RequestError
from ..passes.walk import Arguments, walk
from ..program import Program

__all__ = ["KvHistory", "Row"]


@dataclass(frozen=True)
class Row:
    """A record of every port. place : of one of those that are read

    read, buffered : bool [ports], from memory, or from the history buffer; kept : of those read, copied to it
    """

    place: int
    read: np.ndarray
    buffered: np.ndarray
    kept: np.ndarray


class KvHistory:
    """Places, pointers and tags of a sequence with KV reuse, advanced by the instructions of its runs in turn.

    Raises RequestError where the hardware would stop with a fault.
    """

    def __init__(self, config: OverlayConfig) -> None:
        self._config, self._memory = config, KvMemory(config)

    def follow(self, mnemonic: str, fields: dict[str, int]) -> list[Row]:
        """A STOREKV or LOADKV with reuse; rows of records of the latter."""
        if mnemonic == "storekv":
            for row in range(fields["rows"]):
                if fields["mask"] >> row & 1:
                    self._memory.store(fields["x"] + row, fields["layer"], fields["places"], _fail)
            return []
        ports = self._config.ports
        count = min(fields["rows"], self._config.tile_tokens)
        found = self._memory.load(fields["x"], count, fields["layer"], fields["record"], fields["buffer"],
                                  bool(fields["final"]), lambda places: None, _fail)
        rows = -(-count // ports)
        places, held, kept = (np.pad(part, (0, rows * ports - count), constant_values=empty).reshape(rows, ports)
                              for part, empty in zip(found, (-1, False, False)))
        return [Row(int(place[(place >= 0) & ~hit].max(initial=0)), (place >= 0) & ~hit, hit, fill)
                for place, hit, fill in zip(places, held, kept)]

    def replay(self, program: Program, arguments: Arguments) -> None:
        """A whole run of a program."""
        for _, mnemonic, _, fields in walk(program, arguments):
            if mnemonic in ("storekv", "loadkv") and fields["mask"] and fields["reuse"]:
                self.follow(mnemonic, fields)

    def store(self, position: int, routes: Sequence[tuple[int, int]]) -> None:
        """What a run before stored, with the rows that execute attention and MLP of each layer; not what it loaded."""
        for layer, (attention, _) in enumerate(routes):
            row = 0
            while attention >> row:
                if attention >> row & 1:
                    self._memory.store(position + row, layer, 1 << 62, _fail)
                row += 1


def _fail(cause: FaultCause, text: str, port: int) -> NoReturn:
    raise RequestError(f"fault {cause.name} behind port {port}: {text}")


