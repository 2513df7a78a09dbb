"""When memory delivers: the superbeats of all ports in program order, through the read FIFOs of the load unit.

A `Channel` says when the beats of a burst arrive that was requested at some cycle. `Superbeats` requests bursts as the
readers of the hardware do (room in the FIFO, bursts in flight), each port at its own pace, and hands superbeats on as
their receiver takes them, or the records of each port.
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


Cycle = Any  #: a number, or float64 [ports]
_TOGETHER = 4  # bursts that are requested at once where the FIFOs hold at least 16 times as many


class Channel(Protocol):
    """Memory behind the ports, which are asked for the same bursts, not all at the same time."""

    def read(self, cycle: Cycle, beats: int, address: int,
             asked: np.ndarray | bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Cycles in which the first and the last beat of a burst arrive, by port; asked : bool [ports], if not all."""

    def write(self, cycle: int, beats: int, address: int, port: int | None, before: int = 0) -> float:
        """Cycle of the response to a burst whose last beat is there in ``cycle``; port : one, or all for None

        before : beats of the same run, which go first. All reads that may hold it up have been asked for.
        """

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
        self._next: Cycle = 0.0

    @property
    def share(self) -> float:
        return self.bandwidth

    def fetch_port(self) -> Channel:
        return IdealMemory(self.read_latency, self.write_latency, self.bandwidth)

    def read(self, cycle: Cycle, beats: int, address: int,
             asked: np.ndarray | bool = True) -> tuple[np.ndarray, np.ndarray]:
        first = np.maximum(cycle + self.read_latency, self._next)
        gap = 1 / self.bandwidth
        self._next = np.where(asked, first + beats * gap, self._next)
        return first, first + (beats - 1) * gap

    def write(self, cycle: int, beats: int, address: int, port: int | None, before: int = 0) -> float:
        return cycle + self.write_latency


class HbmMemory:
    """HBM2 pseudo-channels as `sim/hbm.h` times them, burst by burst.

    Rows that a stream will need are opened behind the accesses before, so only the first burst after a pause pays for
    opening. Refreshes come at another time on every port. Data of writes are taken while few reads are waiting.

    ports, beat_bytes : of the overlay; timing : `sim.hbm.HbmTiming`; begin : cycles since reset, which say how far the
        next refreshes are; first : number of the first port; ahead : beats that a reader asks for ahead of their use
    """

    _ACCESS = 32  # bytes
    _BACKLOG = 64  # accesses that may wait when data of writes are taken
    _LOG = 512  # bursts that are remembered

    def __init__(self, ports: int, beat_bytes: int, timing: Any, begin: int = 0, first: int = 0,
                 ahead: int = 0) -> None:
        natives = [timing.native(first + port) for port in range(ports)]
        one = natives[0]
        self._fetch_port = lambda: HbmMemory(1, WORD_BYTES, timing, begin, first + ports)
        self._core, self._slot, self._path, self._column = one.core, one.slot, one.path, one.column
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
        self._next = np.zeros(ports)  # cycle in which each port can deliver again
        self._log: deque[tuple[Cycle, np.ndarray]] = deque(maxlen=self._LOG)  # bursts: asked for, end of their data

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

    def read(self, cycle: Cycle, beats: int, address: int,
             asked: np.ndarray | bool = True) -> tuple[np.ndarray, np.ndarray]:
        bus, work = self._bus, beats * self._beat
        np.maximum(bus, cycle * self._core + (self._path + self._opening(address)), out=bus, where=asked)
        np.add(bus, work, out=bus, where=asked)
        end, early = bus.max(), []
        while self._due[0][0] < end:
            due, port = heappop(self._due)
            if due >= bus[port] or not (isinstance(asked, bool) or asked[port]):
                early.append((due, port))
                continue
            begin = bus[port] - work
            bus[port] = max(begin, due + self._pause) + work if begin >= due else bus[port] + self._pause
            heappush(self._due, (due + self._interval, port))
        for item in early:
            heappush(self._due, item)
        last, beat = bus / self._core, self._beat / self._core
        self._log.append((cycle, last))
        first = np.maximum(last - (beats - 1) * beat, self._next)
        last = np.maximum(last, first + (beats - 1) * max(beat, 1))
        np.add(last, max(beat, 1), out=self._next, where=asked)
        return first, last

    def _quiet(self, cycle: float, port: int | None) -> float:
        """First cycle from ``cycle`` on in which a port, or every one, takes data of writes."""
        backlog, now = self._BACKLOG * self._slot / self._core, np.full(len(self._bus), float(cycle))
        for asked, end in self._log:
            np.maximum(now, end - backlog, out=now, where=asked <= now)
        return float(now.max() if port is None else now[port])

    def write(self, cycle: int, beats: int, address: int, port: int | None, before: int = 0) -> float:
        data = (before + beats) * max(self._beat / self._core, 1)
        cycle = max(cycle, math.ceil(self._quiet(cycle - before - beats, port) + data))
        begin = cycle * self._core + self._path + self._turnaround + self._opening(address)
        work = beats * self._beat
        phase = self._phase if port is None else self._phase[port]
        since = (begin - phase) % self._interval
        # in a refresh, with the reads that wait for its end
        reads = np.minimum(since / self._core, self._ahead) * self._beat
        begin = begin + np.where(since < self._pause, self._pause - since + reads, 0)
        end = begin + work + np.where(self._interval - (begin - phase) % self._interval < work, self._pause, 0)
        ports = slice(None) if port is None else port
        self._bus[ports] = np.maximum(self._bus[ports], end)
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
    """What the readers of all ports deliver, in program order.

    feed : called when the readers need their next run, calls ``add_run``; returns False if there is none
    deliver : called when what is in front must be taken before more can be requested
    moved : first and last cycle of every stretch in which data arrived; taken : port beats taken out of the FIFOs
    gives : cycle in which the last superbeat was handed to its receiver
    """

    def __init__(self, config: OverlayConfig, channel: Channel, cycles: Cycles) -> None:
        self._config, self._channel, self._cycles = config, channel, cycles
        self.feed: Callable[[], bool] = lambda: False
        self.deliver: Callable[[], None] = lambda: None
        self.moved: list[tuple[int, int]] = []
        self.gives = -1
        ports = config.ports
        self._requested, self._popped, self._bursts, self._runs = (np.zeros(ports, int) for _ in range(4))
        self._ports, self._all = np.arange(ports), np.ones(ports, bool)
        together = max(min(_TOGETHER, config.fifo_beats // (16 * config.burst_beats)), 1)
        self._burst = together * config.burst_beats
        self._issue, self._free = np.zeros(ports), np.zeros(ports)  # last request; the next run can be taken
        self._left, self._address, self._asked = 0, 0, self._all  # of the run that is being requested
        # by port: when the last beats left the FIFO, bursts arrived whole, runs were taken; when a beat was last taken
        self._pops = np.full((config.fifo_beats, ports), -1.0)
        self._arrived = np.full((config.outstanding // together, ports), -1.0)
        self._begun = np.full((cycles.runs, ports), -1.0)
        self._given = np.full(ports, -1.0)
        self._queued: deque[_Burst] = deque()

    @property
    def taken(self) -> int:
        return int(self._popped.sum())

    def room(self) -> int:
        """First cycle in which every port can be given a run."""
        return int(self._begun[self._runs % len(self._begun), self._ports].max()) + 1

    def add_run(self, valid: int, count: int, address: int, asked: np.ndarray | None = None) -> int:
        """Beats that readers are asked for, seen by them in cycle ``valid``; returns when the last takes the run.

        asked : bool [ports], all by default
        """
        self.request_rest()
        asked = self._all if asked is None else asked
        taken = np.maximum(valid, self._free)
        np.maximum(self._issue, taken, out=self._issue, where=asked)
        self._left, self._address, self._asked = count if asked.any() else 0, address, asked
        self._begun[self._runs[asked] % len(self._begun), self._ports[asked]] = taken[asked]
        self._runs += asked
        return int(taken[asked].max(initial=valid))

    def request_rest(self) -> None:
        """Request what is left of the run."""
        while self._left:
            self._request()

    def request_run(self) -> None:
        """Request what is left, and begin the next run."""
        self.request_rest()
        if not self.feed():
            raise AssertionError("more superbeats are waited for than loads bring")

    def _request(self) -> None:
        """Request one burst."""
        fifo, asked, ports = len(self._pops), self._asked, self._ports
        beats = min(self._burst - self._address % self._burst, self._left)
        before = self._requested + (beats - 1 - fifo)  # beats that must have left the FIFO
        while (asked & (self._popped <= before)).any():
            self.deliver()
        slot = self._bursts % len(self._arrived)
        at = np.maximum(self._issue, np.ceil(np.maximum(self._pops[before % fifo, ports],
                                                        self._arrived[slot, ports]))) + 1
        begin, end = self._channel.read(at + 1, beats, self._address, True if asked is self._all else asked)
        self._arrived[slot[asked], ports[asked]] = end[asked]
        first, final = math.ceil(begin[asked].max()), math.ceil(end[asked].max())
        if self.moved and first <= self.moved[-1][1] + 1:
            self.moved[-1] = (self.moved[-1][0], max(final, self.moved[-1][1]))
        else:
            self.moved.append((first, final))
        wait = self._cycles.fifo
        self._queued.append(_Burst(asked, beats, begin + wait, end + wait))
        self._requested += beats * asked
        self._bursts += asked
        self._left -= beats
        self._address += beats
        np.copyto(self._issue, at, where=asked)
        if not self._left:
            np.copyto(self._free, at + 1, where=asked)

    def _next_burst(self) -> _Burst:
        """The burst in front."""
        while not self._queued:
            if self._left:
                self._request()
            else:
                self.request_run()
        return self._queued.popleft()

    def _pop(self, burst: _Burst, beats: int, first: Cycle, last: Cycle) -> None:
        """Beats leave the FIFOs of the ports of a burst, one after the other."""
        steps = np.arange(beats)[:, None]
        times = first + (last - first) / max(beats - 1, 1) * steps
        rows = (self._popped + steps) % len(self._pops)
        if burst.asked is self._all:
            self._pops[rows, self._ports] = times
            self._popped += beats
        else:
            asked = burst.asked
            self._pops[rows[:, asked], self._ports[asked]] = times[:, asked]
            self._popped += beats * asked

    def take(self, count: int, ready: int, each: int = 1) -> None:
        """Hand over superbeats to a receiver that takes one every ``each`` cycles from ``ready`` on."""
        while count:
            burst = self._next_burst()
            first, last = float(burst.first.max()), float(burst.last.max())
            part = min(burst.beats, count)
            gap = (last - first) / (burst.beats - 1) if burst.beats > 1 else 1.0
            end = first + gap * (part - 1)
            if part < burst.beats:
                rest = _Burst(burst.asked, burst.beats - part, np.array([end + gap]), np.array([last]))
                self._queued.appendleft(rest)
            begin = max(math.ceil(first) + 1, self.gives + 1, ready)
            given = max(begin + each * (part - 1), math.ceil(end) + 1)
            popped = max(first, self.gives)
            # a receiver that takes several cycles gives the superbeat up in the last of them
            last_popped = max(end, given - max(each, 1) if part > 1 else popped)
            self._pop(burst, part, popped, last_popped)
            self.gives = given + each - 1
            ready = self.gives + 1
            count -= part
        self._given[:] = self.gives

    def take_records(self, count: int, ready: np.ndarray) -> np.ndarray:
        """Hand over ``count`` beats of each port that was asked for the run in front, from ``ready`` on, a number for
        each port; returns when each port's last one was taken, of others when that of the run before."""
        while count:
            burst = self._next_burst()
            asked = burst.asked
            begin = np.maximum(np.maximum(np.ceil(burst.first), self._given) + 1, ready)
            given = np.maximum(begin + burst.beats - 1, np.ceil(burst.last) + 1)
            self._pop(burst, burst.beats, begin - 1, given - 1)
            np.copyto(self._given, given, where=asked)
            count -= burst.beats
        self.gives = max(self.gives, int(self._given.max()))
        return self._given


@dataclass(frozen=True)
class _Burst:
    """Beats in the FIFOs of the ports that were asked. first, last : cycles in which they can be taken, by port"""

    asked: np.ndarray
    beats: int
    first: np.ndarray
    last: np.ndarray
