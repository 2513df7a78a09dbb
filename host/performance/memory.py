"""When memory delivers: the superbeats of all ports in program order, through the read FIFOs of the load unit.

A `Channel` says when the beats of a burst arrive that was requested at some cycle. `Superbeats` requests bursts as the
readers of the hardware do (room in the FIFO, bursts in flight) and hands superbeats on as their receiver takes them.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from importlib import import_module
from typing import Any, Protocol

import numpy as np
from skipopu.hw.config import OverlayConfig

from ..errors import RequestError
from ..program import WORD_BYTES
from .timing import Cycles

__all__ = ["Channel", "HbmMemory", "IdealMemory", "MODELS", "Superbeats", "memory_model"]


class Channel(Protocol):
    """Memory behind the ports, all of which are asked for the same bursts at the same time."""

    def read(self, cycle: int, beats: int, address: int) -> tuple[float, float]:
        """Cycles in which the first and the last beat of a burst arrive on the slowest port."""

    def write(self, cycle: int, beats: int, address: int, port: int | None) -> float:
        """Cycle of the response to a burst whose last beat arrives in ``cycle``; port : one, or all for None."""

    @property
    def share(self) -> float:
        """The part of the cycles in which a stream of reads gets a beat."""

    def fetch_port(self) -> Channel:
        """The memory behind the port that instructions are fetched from."""


@dataclass
class IdealMemory:
    """Fixed latency, one beat per cycle and port, or a part of that. As the simulator's default."""

    read_latency: int = 32
    write_latency: int = 8
    bandwidth: float = 1.0

    def __post_init__(self) -> None:
        self._next = 0.0

    @property
    def share(self) -> float:
        return self.bandwidth

    def fetch_port(self) -> Channel:
        return IdealMemory(self.read_latency, self.write_latency, self.bandwidth)

    def read(self, cycle: int, beats: int, address: int) -> tuple[float, float]:
        first = max(cycle + self.read_latency, self._next)
        gap = 1 / self.bandwidth
        self._next = first + beats * gap
        return first, first + (beats - 1) * gap

    def write(self, cycle: int, beats: int, address: int, port: int | None) -> float:
        return cycle + self.write_latency


class HbmMemory:
    """HBM2 pseudo-channels as `sim/hbm.h` times them, burst by burst on all ports at once.

    Rows that a stream will need are opened behind the accesses before, so only the first burst after a pause pays for
    opening. Refreshes come at another time on every port. Writes are few; they hold up no reads.

    ports, beat_bytes : of the overlay; timing : `sim.hbm.HbmTiming`; begin : cycles since reset, which say how far the
        next refreshes are; first : number of the first port; ahead : beats that a reader asks for ahead of their use
    """

    _ACCESS = 32  # bytes

    def __init__(self, ports: int, beat_bytes: int, timing: Any, begin: int = 0, first: int = 0,
                 ahead: int = 0) -> None:
        natives = [timing.native(first + port) for port in range(ports)]
        one = natives[0]
        self._fetch_port = lambda: HbmMemory(1, WORD_BYTES, timing, begin, first + ports)
        self._core, self._path, self._column = one.core, one.path, one.column
        self._activate, self._precharge, self._response = one.activate, one.precharge, one.write_response
        self._interval, self._turnaround = one.refresh_interval, one.turnaround
        self._pause = one.refresh + one.activate + one.column  # from a refresh to the next data
        # neighbouring accesses alternate between two groups of banks, unless a beat is less than an access
        same = max(self._ACCESS // beat_bytes, 1)
        self._beat = max(beat_bytes // self._ACCESS, 1) * one.slot + (same - 1) / same * one.same_group
        self._beat_bytes = beat_bytes
        self._ahead = ahead
        now = begin * one.core
        self._due = [(native.phase + max(math.ceil((now - native.phase) / self._interval), 0) * self._interval - now,
                      port) for port, native in enumerate(natives)]
        self._phase = np.array([due for due, _ in self._due])
        heapify(self._due)  # the next refresh of each port
        self._bus = np.zeros(ports)  # when the data bus of each port is free
        self._rows: dict[int, int] = {}  # open rows, by the bits that choose banks
        self._next = 0.0  # cycle in which the ports can deliver again

    @property
    def share(self) -> float:
        return min(1.0, self._core / self._beat) * (1 - self._pause / self._interval)

    def fetch_port(self) -> Channel:
        return self._fetch_port()

    def _opening(self, address: int) -> int:
        """Time from the arrival of a burst to its first data, by the state of its row; opens the row."""
        place = address * self._beat_bytes // self._ACCESS >> 6
        before, row = self._rows.get(place & 7), place >> 3
        self._rows[place & 7] = row
        if before == row:
            return self._column
        return self._column + self._activate + (0 if before is None else self._precharge)

    def read(self, cycle: int, beats: int, address: int) -> tuple[float, float]:
        bus, work = self._bus, beats * self._beat
        np.maximum(bus, cycle * self._core + self._path + self._opening(address), out=bus)
        bus += work
        end, early = bus.max(), []
        while self._due[0][0] < end:
            due, port = heappop(self._due)
            if due >= bus[port]:
                early.append((due, port))
                continue
            begin = bus[port] - work
            bus[port] = max(begin, due + self._pause) + work if begin >= due else bus[port] + self._pause
            heappush(self._due, (due + self._interval, port))
        for item in early:
            heappush(self._due, item)
        last, beat = float(bus.max()) / self._core, self._beat / self._core
        first = max(last - (beats - 1) * beat, self._next)
        last = max(last, first + (beats - 1) * max(beat, 1))
        self._next = last + max(beat, 1)
        return first, last

    def write(self, cycle: int, beats: int, address: int, port: int | None) -> float:
        begin = cycle * self._core + self._path + self._turnaround + self._opening(address)
        work = beats * self._beat
        phase = self._phase if port is None else self._phase[port]
        since = (begin - phase) % self._interval
        # in a refresh, with the reads that wait for its end
        reads = np.minimum(since / self._core, self._ahead) * self._beat
        begin = begin + np.where(since < self._pause, self._pause - since + reads, 0)
        end = begin + work + np.where(self._interval - (begin - phase) % self._interval < work, self._pause, 0)
        return max(math.ceil(float(np.max(end)) / self._core), cycle + 1) + self._response // self._core


MODELS = ("ideal", "hbm")  #: names of memory models


def memory_model(memory: str, config: OverlayConfig) -> Channel:
    """The memory of that name behind all ports of a configuration. Raises RequestError for an unknown name."""
    if memory not in MODELS:
        raise RequestError(f"memory must be {' or '.join(MODELS)}, not {memory!r}")
    if memory == "ideal":
        return IdealMemory()
    return HbmMemory(config.ports, config.port_bits // 8, import_module("skipopu.sim.hbm").HbmTiming(),
                     ahead=config.fifo_beats)


class Superbeats:
    """Superbeats in program order.

    feed : called when the readers need their next run, calls ``add_run``; returns False if there is none
    deliver : called when superbeats must be taken before more can be requested
    moved : first and last cycle of every stretch in which data arrived; taken : superbeats taken out of the FIFOs
    gives : cycle in which the last superbeat was handed to its receiver
    """

    def __init__(self, config: OverlayConfig, channel: Channel, cycles: Cycles) -> None:
        self._config, self._channel, self._cycles = config, channel, cycles
        self.feed: Callable[[], bool] = lambda: False
        self.deliver: Callable[[], None] = lambda: None
        self.moved: list[tuple[int, int]] = []
        self.taken = 0
        self.gives = -1
        self._requested = 0
        self._issue = 0  # cycle of the last request
        self._free = 0  # cycle in which the readers can take the next run
        self._left = 0  # beats of the run that are not requested
        self._address = 0
        self._queued: deque[tuple[int, int, float, float]] = deque()  # index, count, first, last: in the FIFO
        self._popped: deque[tuple[int, int, float, float]] = deque()  # index, count, first, last: taken
        self._flying: deque[float] = deque()

    def add_run(self, valid: int, count: int, address: int) -> int:
        """Beats that the readers are asked for, seen by them in cycle ``valid``; returns when they take the run."""
        self.request_rest()
        taken = max(valid, self._free)
        self._issue, self._left, self._address = max(self._issue, taken), count, address
        return taken

    def request_rest(self) -> None:
        """Request what is left of the run."""
        while self._left:
            self._request()

    def request_run(self) -> None:
        """Request what is left, and begin the next run."""
        self.request_rest()
        if not self.feed():
            raise AssertionError("more superbeats are waited for than loads bring")

    def _pop_time(self, index: int) -> float:
        """Cycle in which a superbeat left the FIFO."""
        while index >= self.taken:
            self.deliver()
        queue = self._popped
        while queue[0][0] + queue[0][1] <= index:
            queue.popleft()
        first_index, count, first, last = queue[0]
        return first + (last - first) * (index - first_index) / max(count - 1, 1)

    def _request(self) -> None:
        """Request one burst."""
        config = self._config
        beats = min(config.burst_beats - self._address % config.burst_beats, self._left)
        last = self._requested + beats - 1
        at = self._issue + 1
        if last >= config.fifo_beats:
            at = max(at, math.ceil(self._pop_time(last - config.fifo_beats)) + 1)
        if len(self._flying) >= config.outstanding:
            at = max(at, math.ceil(self._flying.popleft()) + 1)
        begin, end = self._channel.read(at + 1, beats, self._address)
        self._flying.append(end)
        first, final = math.ceil(begin), math.ceil(end)
        if self.moved and first <= self.moved[-1][1] + 1:
            self.moved[-1] = (self.moved[-1][0], final)
        else:
            self.moved.append((first, final))
        wait = self._cycles.fifo
        self._queued.append((self._requested, beats, begin + wait, end + wait))
        self._requested += beats
        self._left -= beats
        self._address += beats
        self._issue = at
        if not self._left:
            self._free = at + 1

    def take(self, count: int, ready: int, each: int = 1) -> None:
        """Hand over superbeats to a receiver that takes one every ``each`` cycles from ``ready`` on."""
        while count:
            while not self._queued:
                if self._left:
                    self._request()
                else:
                    self.request_run()
            index, size, first, last = self._queued.popleft()
            part = min(size, count)
            gap = (last - first) / (size - 1) if size > 1 else 1.0
            end = first + gap * (part - 1)
            if part < size:
                self._queued.appendleft((index + part, size - part, end + gap, last))
            begin = max(math.ceil(first) + 1, self.gives + 1, ready)
            given = max(begin + each * (part - 1), math.ceil(end) + 1)
            popped = max(first, self.gives)
            self._popped.append((index, part, popped, max(end, given - max(each, 1) if part > 1 else popped)))
            # a receiver that takes several cycles gives the superbeat up in the last of them
            self.gives = given + each - 1
            ready = self.gives + 1
            count -= part
            self.taken += part
