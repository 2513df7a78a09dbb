"""Where KV records lie with reuse, and what the history buffer holds: places, pointers, and the policy of the buffer.

Storage is handed out when a record is written: port p gives its places 0, 1, 2, ... in turn. A pointer for each
(position, layer) names the place; a position that skips a layer has none there, and its record is that of the last
layer it ran. The buffer changes no result, so that only its tags are kept here: they say which records are not read
from memory (`docs/kv-memory.md`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import numpy as np
from skipopu.hw.config import OverlayConfig
from skipopu.hw.registers import FaultCause

__all__ = ["KvMemory", "Tags"]

Fail = Callable[[FaultCause, str, int], NoReturn]


class Tags:
    """Tags of the history buffer: per row and port whether a record is kept, which (its place), and in which slot.

    Slots come from the port's stack of freed ones, then from those never used; ``fresh`` counts the latter.
    """

    def __init__(self, rows: int, ports: int) -> None:
        self.valid = np.zeros((rows, ports), bool)
        self.place = np.zeros((rows, ports), np.int64)
        self.slot = np.zeros((rows, ports), np.int64)
        self.stack = np.zeros((ports, rows), np.int64)
        self.depth = np.zeros(ports, np.int64)
        self.fresh = np.zeros(ports, np.int64)

    def clear(self) -> None:
        """Forget every record."""
        self.valid[:] = False
        self.depth[:] = self.fresh[:] = 0

    def visit(self, row: int, place: np.ndarray, keep: np.ndarray, beyond: np.ndarray,
              buffer: int) -> tuple[np.ndarray, np.ndarray]:
        """Ports that have the record of a row, and those that take it in, bool [ports]; frees what the policy says.

        place : int64 [ports], -1 where there is no record; keep, beyond : bool [ports], the record is used again in the
        next layer, and in the one after it; buffer : slots of a port
        """
        exists = place >= 0
        valid = self.valid[row] & exists
        free = buffer - self.fresh + self.depth
        hit = valid & (self.place[row] == place)
        fill = exists & ~hit & keep & ((free >= buffer >> 2) | beyond) & (valid | (free > 0))
        ports = np.flatnonzero(fill & ~valid)
        stacked = ports[self.depth[ports] > 0]
        self.depth[stacked] -= 1
        self.slot[row, stacked] = self.stack[stacked, self.depth[stacked]]
        new = np.setdiff1d(ports, stacked, assume_unique=True)
        self.slot[row, new] = self.fresh[new]
        self.fresh[new] += 1
        self.place[row, fill] = place[fill]
        freed = np.flatnonzero(valid & ~fill & ~(hit & keep))
        self.stack[freed, self.depth[freed]] = self.slot[row, freed]
        self.depth[freed] += 1
        self.valid[row, fill] = True
        self.valid[row, freed] = False
        return hit, fill


class KvMemory:
    """Pointers and tags of one overlay; row r of port p stands for position r * ports + p.

    places : int64 [rows, ports, layers], where each layer's record lies; written : bool of that shape, the layers that
    have one; following : int64 [ports], the next free place; begun : whether a sequence runs. A memory keeps places and
    written through a reset, but no sequence runs behind it.
    """

    def __init__(self, config: OverlayConfig) -> None:
        self.config = config
        rows = config.history_tokens // config.ports
        self.places = np.zeros((rows, config.ports, config.history_layers), np.int64)
        self.written = np.zeros((rows, config.ports, config.history_layers + 2), bool)  # no layer behind the last two
        self.following = np.zeros(config.ports, np.int64)
        self.begun = False
        self.tags = Tags(rows, config.ports)
        self._setting = (0, 0)

    def reset(self) -> None:
        """No sequence runs, nothing is buffered."""
        self.begun = False
        self.tags.clear()
        self._setting = (0, 0)

    def store(self, position: int, layer: int, places: int, fail: Fail) -> int:
        """The place for the record of a position, noted as its pointer; position 0 in layer 0 begins a sequence."""
        config = self.config
        row, port = divmod(position, config.ports)
        if position == 0 and layer == 0:
            self.following[:] = 0
            self.begun = True
            self.tags.clear()
        if not self.begun:
            fail(FaultCause.KV_POINTER, f"position {position} is stored, but no sequence begun", port)
        if position >= config.history_tokens or layer >= config.history_layers:
            fail(FaultCause.BUFFER_RANGE, f"layer {layer} of position {position}: {config.history_layers} layers of "
                                          f"{config.history_tokens} positions have pointers", 0)
        place = int(self.following[port])
        if place >= places:
            fail(FaultCause.KV_FULL, f"all {places} places of the port hold records", port)
        self.following[port] += 1
        self.places[row, port, layer] = place
        if layer == 0:
            self.written[row, port] = False
        self.written[row, port, layer] = True
        return place

    def load(self, first: int, count: int, layer: int, record: int, buffer: int, final: bool,
             check: Callable[[np.ndarray], None], fail: Fail) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the records that a layer reads at positions first..: (places int64 [count], which of them the buffer held,
        which it takes in: bool [count])

        check : raises the fault of a row's places, int64 [ports] (-1: no record), that lie beyond memory
        """
        config = self.config
        ports = config.ports
        if first + count > config.history_tokens or layer >= config.history_layers:
            fail(FaultCause.BUFFER_RANGE, f"layer {layer} of positions {first}..{first + count - 1}: "
                                          f"{config.history_layers} layers of {config.history_tokens} positions have "
                                          f"pointers", 0)
        if buffer * record > config.buffer_beats or buffer > config.history_tokens // ports:
            fail(FaultCause.BUFFER_RANGE, f"{buffer} records of {record} beats; the history buffer has "
                                          f"{config.buffer_beats} beats, tags for {config.history_tokens // ports}", 0)
        if (buffer, record) != self._setting:
            self.tags.clear()
            self._setting = buffer, record
        begin = first // ports
        rows = slice(begin, begin + -(-count // ports))
        exists = np.arange((rows.stop - begin) * ports).reshape(-1, ports) < count
        written = self.written[rows]
        latest = layer - written[:, :, layer::-1].argmax(2)
        places = np.take_along_axis(self.places[rows], latest[..., None], 2)[..., 0]
        known = written[:, :, : layer + 1].any(2) & (places < self.following) & self.begun
        places = np.where(exists, places, -1)
        held, kept = np.zeros_like(exists), np.zeros_like(exists)
        for index, row in enumerate(range(rows.start, rows.stop)):
            if len(bad := np.flatnonzero(exists[index] & ~known[index])):
                fail(FaultCause.KV_POINTER, f"the pointer of position {row * ports + bad[0]} in layer {layer} names no "
                                            f"record of this sequence", int(bad[0]))
            check(places[index])
            if buffer:
                after = written[index, :, layer + 1 : layer + 3]
                keep = ~after[:, 0] & (not final)
                held[index], kept[index] = self.tags.visit(row, places[index], keep, ~after[:, 1], buffer)
        return places.reshape(-1)[:count], held.reshape(-1)[:count], kept.reshape(-1)[:count]
