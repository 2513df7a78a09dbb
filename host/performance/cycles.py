"""The cycle model: what a run of a program costs, from its instructions alone.

The program is walked as control would; every instruction gets the cycles in which it leaves control, begins and ends.
What the model knows: the order of each unit, hazards between units, the depth of the queues, one superbeat per cycle
from memory as far ahead as the FIFOs reach, the cost of every tile of the array, results on their way from the array
to the vector unit, and the latencies of the pipelines (`timing.Cycles`). No values are computed, so a model of any size
takes seconds; decisions of routers are arguments. What the history buffer holds depends on decisions of the past: a
`history.KvHistory` that knows them says where each record comes from; without one all of them come from memory.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from skipopu.hw.config import OverlayConfig
from skipopu.hw.isa import Destination, KvFormat, MatmulMode, Unit

from ..layout import ceil_div
from ..passes.check import TAKES_STREAM
from ..passes.walk import Arguments, Decide, walk
from ..program import WORD_BYTES, Program
from ..timeline import Span
from .history import KvHistory, Row
from .memory import Channel, IdealMemory, Superbeats
from .timing import Cycles

__all__ = ["Predicted", "predict"]

_WEIGHTS = (MatmulMode.W4, MatmulMode.W4M, MatmulMode.W8)
_NO_BEATS = ("vset", "vinit", "vbias")


@dataclass(eq=False, slots=True)
class _Command:
    """One instruction on its way; -1 is not known yet.

    dispatch : leaves control; enter : into the queue of its unit; pop : out of it; start, done : of its execution
    rows : of its list; before : the one before it in its unit; after : those of other units that must be done before
    left : superbeats that a load has to deliver; records : rows of records of a load, as they are found
    asked : cycles in which the readers of each row's records were asked for them
    writes : (last beat handed over, beats, address, port) of the runs of a store whose responses nobody waits for yet
    """

    pc: int
    unit: Unit
    mnemonic: str
    fields: dict[str, int]
    dispatch: int
    enter: int = -1
    pop: int = -1
    start: int = -1
    done: int = -1
    dropped: bool = False
    rows: int = 0
    before: _Command | None = None
    after: list[_Command] = field(default_factory=list)
    left: int = 0
    records: list[Row] = field(default_factory=list)
    asked: list[int] = field(default_factory=list)
    writes: list[tuple[int, int, int, int | None]] = field(default_factory=list)


@dataclass(eq=False)
class Predicted:
    """One run as the cycle model sees it.

    cycles : as the counter of that name; beats : port beats read, kv_beats of them records; weight_superbeats : read
    kv_buffered : port beats of records from the history buffer
    beats_written : port beats written; kv_written : of them records
    array_rows : cycles in which the array multiplies; tile_cycles : what its tiles take if nothing keeps them waiting
    vector_beats : beats of all vector instructions
    spans : every instruction in the order of dispatch
    moved : first and last cycle of each stretch in which data arrive from memory
    """

    cycles: int = 0
    beats: int = 0
    weight_superbeats: int = 0
    kv_beats: int = 0
    kv_buffered: int = 0
    beats_written: int = 0
    kv_written: int = 0
    array_rows: int = 0
    tile_cycles: int = 0
    vector_beats: int = 0
    spans: list[Span] = field(default_factory=list)
    moved: list[tuple[int, int]] = field(default_factory=list)

    def bytes_read(self, config: OverlayConfig) -> int:
        return self.beats * config.port_bits // 8


def predict(config: OverlayConfig, program: Program, arguments: Arguments, *, tokens: Sequence[int] = (),
            channel: Channel | None = None, decide: Decide | None = None, program_at: int = 0,
            history: KvHistory | None = None, cycles: Cycles | None = None) -> Predicted:
    """One run of a program with ideal memory, or the given one.

    tokens : the token table, for the addresses of embeddings; decide : rows that execute, of each layer, in place of
    ``arguments.routes``; program_at : superbeat address of the program; history : of the sequence so far, which this
    run continues; without it no KV record comes from the history buffer
    """
    machine = _Machine(config, program, channel or IdealMemory(), cycles or Cycles(), history,
                       program_at * config.port_bits // 8 // WORD_BYTES)
    return machine.run(arguments, tokens, decide)


class _Machine:
    def __init__(self, config: OverlayConfig, program: Program, channel: Channel, cycles: Cycles,
                 history: KvHistory | None, offset: int) -> None:
        self.config, self.program, self.cycles, self.channel, self.history = config, program, cycles, channel, history
        self.found = Predicted()
        self.all: list[_Command] = []
        self.units: dict[Unit, list[_Command]] = {unit: [] for unit in Unit}
        self.readers: dict[int, dict[Unit, _Command]] = {1 << bit: {} for bit in range(16)}
        self.writers: dict[int, dict[Unit, _Command]] = {1 << bit: {} for bit in range(16)}
        self.slot = 0  # cycle in which the last command entered its queue
        # fetch
        self.offset, self.slots = offset % cycles.line_words, config.cache_words // cycles.line_words
        self.port = channel.fetch_port()
        self.lines: dict[int, tuple[int, int]] = {}  # slot -> (line, valid from)
        self.fill, self.filled = 0, 0
        self.filling: deque[int] = deque()
        # loads
        self.stream = Superbeats(config, channel, cycles)
        self.stream.feed, self.stream.deliver = self._request_load, self._deliver
        self.requested = 0  # loads
        self.loader = 0  # cycle in which the load unit can take the next command, or prepare the next record
        self.runs: deque[tuple[int, int, np.ndarray | None]] = deque()  # count, address, ports: of the load requested
        self.following: _Command | None = None  # it, if it follows the history
        self.hits = np.full(config.ports, -1)  # cycle of the last record from the history buffer of each port
        self.jobs: deque[_Command] = deque()  # loads requested, not delivered
        self.kv_tiles: list[int] = []  # cycle in which the last superbeat of each KV tile was written
        self.kv_read = {MatmulMode.QK: 0, MatmulMode.PV: 0}
        self.released: list[int] = []
        # array
        self.waiting: deque[_Command] = deque()  # compute commands whose results nobody takes yet
        self.array_free = 0
        self.drained = deque([-1] * 4, 4)  # last column tiles
        self.halves = deque([True, True], 2)  # last two matmuls: their rows fill half a bank of accumulators at most
        self.results = deque([-1, -1], 2)  # last two matmuls: their last result was drained
        self.drain, self.issued = -1, -1  # last beat drained, taken by the vector unit
        self.vector_free = 0
        self.pace = cycles.pace if config.compact else 1
        self.logits = 0  # cycle of the last beat of logits

    # ---- control ---------------------------------------------------------------------------------------------------
    def run(self, arguments: Arguments, tokens: Sequence[int], decide: Decide | None) -> Predicted:
        cycles, last_pc, execute, scalar = self.cycles, -2, 0, True
        read = take = -1  # cycles in which the word was read from the cache, and taken by control
        for pc, mnemonic, unit, fields in walk(self.program, arguments, tokens, decide):
            if pc != last_pc + 1:  # the first, or behind a branch
                read = execute + 1
                self._request_lines(pc, read)
            read = max(read if pc != last_pc + 1 else take, self._line_valid(pc))
            take = max(read + 1, execute + 1 if scalar else execute)
            self._request_lines(pc + 1, read + 1)
            execute, last_pc, scalar = take + 1, pc, False
            if not fields["mask"]:
                self.all.append(_Command(pc, Unit.CONTROL, mnemonic, fields, execute, start=execute, done=execute,
                                         dropped=True))
                continue
            if unit != Unit.CONTROL:
                execute = self._dispatch(pc, unit, mnemonic, fields, execute)
                continue
            scalar = True
            if mnemonic == "token":
                execute += cycles.wait
            elif mnemonic == "route":
                vectors = self.units[Unit.VECTOR]
                execute = max(execute + cycles.wait, self._done(vectors[-1]) + 1 if vectors else 0)
            elif mnemonic == "halt":
                execute = max(execute, self._finish() + cycles.halt)
            self.all.append(_Command(pc, unit, mnemonic, fields, execute, start=execute, done=execute))
        found = self.found
        found.cycles = execute + cycles.start
        found.beats, found.moved = self.stream.taken, self.stream.moved
        found.spans = [Span(c.pc, c.unit, c.dispatch, c.start, c.done, c.dropped) for c in self.all]
        return found

    def _line_valid(self, pc: int) -> int:
        """Cycle from which the line of a word is in the cache."""
        return self.lines[(pc + self.offset) // self.cycles.line_words % self.slots][1]

    def _request_lines(self, pc: int, now: int) -> None:
        """Fetch comes to a word: it requests its line and those behind it, unless they are there."""
        cycles, slots = self.cycles, self.slots
        line = (pc + self.offset) // cycles.line_words
        last = (len(self.program.words) - 1 + self.offset) // cycles.line_words
        for ahead in range(line, min(line + min(cycles.prefetch, slots - 1), last) + 1):
            held, arrives = self.lines.get(ahead % slots, (-1, 0))
            if held == ahead:
                continue
            at = max(now, self.fill + 1, arrives)
            if len(self.filling) >= cycles.prefetch:
                at = max(at, self.filling.popleft() + 1)
            _, arrived = self.port.read(at + 1, cycles.line_words, ahead * cycles.line_words)
            self.filled = math.ceil(np.max(arrived)) + cycles.fetch
            self.fill = at
            self.filling.append(self.filled)
            self.lines[ahead % slots] = (ahead, self.filled)

    def _dispatch(self, pc: int, unit: Unit, mnemonic: str, fields: dict[str, int], execute: int) -> int:
        """Hand a command to its unit; returns the cycle in which it leaves control."""
        queue = self.units[unit]
        push = max(execute, self.slot)
        depth, most = self.config.unit_queue(unit)
        window = min(self.cycles.window, most)
        if len(queue) >= window:
            push = max(push, self._done(queue[-window]) + 1)
        enter = push + 1
        if len(queue) >= depth:
            enter = max(enter, self._popped(queue[-depth]) + 1)
        self.slot = enter
        command = _Command(pc, unit, mnemonic, fields, push, enter, before=queue[-1] if queue else None)
        command.rows = (fields["mask"] & ((1 << fields["rows"]) - 1)).bit_count()
        if fields.get("reuse"):
            self._follow(command)
        self._find_hazards(command)
        self.all.append(command)
        queue.append(command)
        match unit:
            case Unit.COMPUTE:
                self.waiting.append(command)
            case Unit.VECTOR:
                self._vector(command)
            case Unit.STORE:
                self._store(command)
        if unit == Unit.COMPUTE and mnemonic == "dropw" and len(self.waiting) == 1:
            self._drop(self.waiting.popleft())
        return push

    def _follow(self, command: _Command) -> None:
        """Records with reuse: where the history has them."""
        if self.history is not None:
            command.records = self.history.follow(command.mnemonic, command.fields)
        elif command.mnemonic == "loadkv":
            ports, f = self.config.ports, command.fields
            count = min(f["rows"], self.config.tile_tokens)
            exists = np.arange(ceil_div(count, ports) * ports).reshape(-1, ports) < count
            none = np.zeros(ports, bool)
            command.records = [Row(f["x"] // ports + row, mask, none, none) for row, mask in enumerate(exists)]

    def _find_hazards(self, command: _Command) -> None:
        reads, writes = command.fields["reads"], command.fields["writes"]
        for bit in self.readers:
            if (reads | writes) & bit:
                command.after += [other for unit, other in self.writers[bit].items() if unit != command.unit]
            if writes & bit:
                command.after += [other for unit, other in self.readers[bit].items() if unit != command.unit]
        for bit in self.readers:
            if reads & bit:
                self.readers[bit][command.unit] = command
            if writes & bit:
                self.writers[bit][command.unit] = command

    def _arrive(self, command: _Command, free: int) -> int:
        """The command is taken by its unit, which is free from a cycle on; returns the cycle."""
        before = command.before
        ready = max((self._done(other) + self.cycles.unblock for other in command.after), default=0)
        command.pop = max(command.enter + 1, ready, max(before.start, before.pop + 1) if before else 0)
        command.start = max(command.pop + 1, free)
        return command.start

    def _done(self, command: _Command) -> int:
        """Cycle in which a command is done."""
        if command.writes:
            self._end_store(command)
        while command.done < 0:
            if command.unit != Unit.LOAD:
                raise AssertionError(f"{command.mnemonic} at {command.pc} is waited for before its results are taken")
            self._deliver()
        return command.done

    def _popped(self, command: _Command) -> int:
        """Cycle in which a command has left its queue."""
        while command.pop < 0:
            if command.unit != Unit.LOAD:
                raise AssertionError(f"{command.mnemonic} at {command.pc} keeps the queue of its unit full")
            self.stream.request_run()
        return command.pop

    def _finish(self) -> int:
        return max((self._done(queue[-1]) for queue in self.units.values() if queue), default=0)

    # ---- loads ---------------------------------------------------------------------------------------------------
    def _request_load(self) -> bool:
        """The readers have requested everything: the next command gets there. False if there is none."""
        loads = self.units[Unit.LOAD]
        if self.runs:
            return self._request_run()
        if self.requested == len(loads):
            return False
        config, cycles, index = self.config, self.cycles, self.requested
        command, fields = loads[index], loads[index].fields
        self.requested += 1
        if index >= cycles.ahead:  # a job leaves its queue when the one before is delivered
            self._done(loads[index - cycles.ahead])
        start = self._arrive(command, self.loader)
        check = start + 2
        if index > cycles.ahead:
            check = max(check, self._done(loads[index - cycles.ahead - 1]) + 1)
        runs: list[tuple[int, int, np.ndarray | None]]
        if command.records:
            runs = [(fields["record"], fields["imm"] + row.place * fields["record"], row.read)
                    for row in command.records]
        else:
            match command.mnemonic:
                case "loadkv":
                    command.left = ceil_div(min(fields["rows"], config.tile_tokens), config.ports) * fields["record"]
                case "loada":
                    command.left = fields["count"] * fields["rows"]
                case _:
                    command.left = fields["count"]
            runs = [(command.left, fields["imm"], None)] if command.left else []
        self.jobs.append(command)
        self.loader = check + 1
        self.runs += runs
        self.following = command if command.records else None
        return bool(runs) and self._request_run() or self._request_load()

    def _request_run(self) -> bool:
        """The next run of the load that is being requested goes to the readers."""
        count, address, asked = self.runs.popleft()
        queued = max(self.loader + (self.cycles.record if self.following else 0), self.stream.room())
        self.stream.add_run(queued, count, address, asked)
        if self.following:
            self.following.asked.append(queued)
        self.loader = queued + (not (self.following and self.runs))
        return True

    def _deliver(self) -> None:
        """Deliver the load in front to a receiver that is not the array."""
        if not self.jobs:
            self.stream.request_run()
        command = self.jobs.popleft()
        if command.mnemonic == "loadw":
            raise AssertionError(f"loads wait behind the weights of {command.pc}, which nobody takes")
        if command.mnemonic == "loadkv":
            self._deliver_records(command)
        else:
            self._deliver_rows(command)
        command.done = (self.kv_tiles[-1] + self.cycles.exponents if command.mnemonic == "loadkv" else
                        self.stream.gives) + self.cycles.loaded

    def _deliver_records(self, command: _Command) -> None:
        """A KV tile: each port by itself, records from memory and from the history buffer side by side."""
        stream, number, record = self.stream, len(self.kv_tiles), command.fields["record"]
        ready = self.released[number - 2] + 1 if number > 1 else 0
        if not command.records:
            end = stream.take_records(command.left, np.full(self.config.ports, ready)).max()
            self.found.kv_beats += command.left * self.config.ports
        for index, row in enumerate(command.records):
            while len(command.asked) <= index:
                stream.request_run()
            begin = np.maximum(self.hits, max(ready, command.asked[index] + self.cycles.hit))
            np.copyto(self.hits, begin + record, where=row.buffered)
            if row.read.any():
                end = stream.take_records(record, np.where(row.kept, np.maximum(self.hits, ready), ready)).max()
            end = max(end if row.read.any() or index else 0, self.hits.max())
            self.found.kv_beats += int(row.read.sum()) * record
            self.found.kv_buffered += int(row.buffered.sum()) * record
        self.kv_tiles.append(int(end))

    def _deliver_rows(self, command: _Command) -> None:
        parts = self.config.superbeat_bytes // (4 * self.config.vector_lanes)
        beats, count = command.fields["beats"], command.fields["count"]
        for _ in range(command.fields["rows"]):
            whole, rest = divmod(beats, parts)
            whole = min(whole, count)
            if whole:
                self.stream.take(whole, 0, parts)
            if count > whole:
                self.stream.take(count - whole, 0, min(rest + 1, parts) if count == whole + 1 else 1)

    def _take_weights(self, count: int, ready: int) -> int:
        """Superbeats for the array, which takes one a cycle from ``ready`` on; returns the cycle of the last."""
        while count:
            while not self.jobs or self.jobs[0].mnemonic != "loadw" or not self.jobs[0].left:
                if not self.jobs:
                    self.stream.request_run()
                elif self.jobs[0].mnemonic == "loadw":
                    self.jobs.popleft().done = self.stream.gives + self.cycles.loaded
                else:
                    self._deliver()
            job = self.jobs[0]
            part = min(count, job.left)
            self.stream.take(part, ready)
            ready = self.stream.gives + 1
            job.left -= part
            count -= part
            self.found.weight_superbeats += part
            if not job.left:
                job.done = self.stream.gives + 1
                self.jobs.popleft()
        return self.stream.gives

    # ---- array -----------------------------------------------------------------------------------------------------
    def _begin(self, command: _Command) -> int:
        """The compute unit takes a command."""
        return self._arrive(command, self.array_free)

    def _drop(self, command: _Command) -> None:
        begin = self._begin(command)
        last = self._take_weights(command.fields["count"], begin + 1) if command.fields["count"] else begin
        command.done = last + 1
        self.array_free = last + 2

    def _array(self, consumer: _Command) -> int:
        """Run the matmul whose results a vector instruction takes; returns the cycle of the last beat taken."""
        command = self.waiting.popleft()
        while command.mnemonic == "dropw":
            self._drop(command)
            command = self.waiting.popleft()
        config, cycles, found, f = self.config, self.cycles, self.found, command.fields
        self.array_free = max(self.array_free, self.results[0] + 1)
        begin = self._begin(command)
        self._arrive(consumer, self.vector_free)
        self.issued = max(self.issued, consumer.start)
        mode, rows = MatmulMode(f["mode"]), command.rows * f["groups"]
        planes = 2 if mode == MatmulMode.W8 else 1
        inner, span = f["k_tiles"] * planes, rows * config.passes  # span: cycles that the rows of a tile take
        weights = mode in _WEIGHTS
        vectors = config.columns // config.vector_lanes
        ready = begin + 1
        if weights:
            chunk, per_chunk = config.scale_chunk(mode == MatmulMode.W4M, f["group"])
            share, tile = config.scale_tiles(f["group"]), config.tile_beats
        else:
            tile = config.lanes * config.columns // (config.kv_step * config.beat_elements)
            ready = self._kv_ready(mode, begin)
        number, end, ahead = 0, begin, int(cycles.shadow)  # number: of a set of scales in the stream; end: last row
        found.array_rows += f["heads"] * f["n_tiles"] * inner * rows
        found.tile_cycles += f["heads"] * f["n_tiles"] * inner * max(tile + (0 if ahead else span - 1), span)
        self.halves.append(f["groups"] * f["rows"] <= config.acc_rows // 2)
        for _ in range(f["heads"]):
            left = f["beats"]
            for _ in range(f["n_tiles"]):
                bank = self.drained[0 if all(self.halves) else 2] + 1
                if not weights:
                    first = max(ready + tile - 1 + ahead, end + 1, bank)
                    end = first + span - 1 + (inner - 1) * max(tile + (0 if ahead else span - 1), span)
                    ready = end - span + 1 if ahead else end + 1
                elif span == 1:
                    first_beats = tile + (0 if number % per_chunk else chunk)
                    first = max(self._take_weights(first_beats, ready) + ahead, bank)
                    sets = ceil_div(f["k_tiles"], share)
                    chunks = ceil_div(number + sets, per_chunk) - (number // per_chunk + 1)
                    rest = (inner - 1) * tile + chunks * chunk
                    end = self._take_weights(rest, first + 1 - ahead) + ahead if rest else first
                    ready = end + 1 - ahead
                    number += sets
                else:
                    for k in range(f["k_tiles"]):
                        for plane in range(planes):
                            begins = not (plane or k % share or number % per_chunk)
                            beats = tile + chunk * begins
                            first = max(self._take_weights(beats, ready) + ahead, end + 1)
                            if not k and not plane:
                                first = max(first, bank)
                            end = first + span - 1
                            ready = first if ahead else end + 1
                        number += not k % share
                beats = min(vectors, left) * rows
                left -= min(vectors, left)
                if not beats:
                    beats = rows
                beats *= self.pace
                drain = max(end + cycles.array, self.drain + 1, self.issued)
                issue = max(drain + 1, self.issued + 1)
                # a column tile that waited drains beside others, of which every second accumulates in its bank
                missed = beats // (2 * tile) if drain > end + cycles.array and inner > 1 and all(self.halves) else 0
                beats += missed
                self.issued = issue + beats - 1
                self.drain = drain if beats == 1 else max(drain + beats - 1, self.issued - 1)
                self.drained.append(self.drain)
        self.results.append(self.drain)
        command.done = end + 1
        self.array_free = end + 2
        if mode == MatmulMode.PV:
            self.released.append(end)
        return self.issued

    def _kv_ready(self, mode: MatmulMode, begin: int) -> int:
        """Cycle of the first superbeat of a KV tile for a matmul that begins."""
        number = self.kv_read[mode]
        self.kv_read[mode] += 1
        while len(self.kv_tiles) <= number:
            self._deliver()
        return max(begin, self.kv_tiles[number]) + self.cycles.kv

    # ---- vector and store ------------------------------------------------------------------------------------------
    def _vector(self, command: _Command) -> None:
        name, f, cycles = command.mnemonic, command.fields, self.cycles
        if name in TAKES_STREAM:
            last = self._array(command)
            beats = f["heads"] * f["groups"] * f["beats"] * command.rows
        elif name in _NO_BEATS:
            command.done = self._arrive(command, self.vector_free) + 1
            self.vector_free = command.done + 1
            return
        else:
            beats = f["heads"] * f["groups"] * f["beats"] * command.rows
            last = self._arrive(command, self.vector_free) + beats * self.pace
        self.found.vector_beats += beats
        kvout = name == "vrope" and f["dest"] == Destination.KVOUT
        command.done = last + cycles.done["vrope to KVOUT" if kvout else name]
        self.vector_free = max(command.done + 1, last + cycles.scalars.get(name, 0))
        if name == "vlogits":
            self.logits = last

    def _store(self, command: _Command) -> None:
        config, cycles, f = self.config, self.cycles, command.fields
        start = self._arrive(command, self._done(command.before) + 1 if command.before else 0)
        if command.mnemonic == "storel":
            count = f["rows"] * f["count"]
            command.writes = [(max(start + cycles.store, self.logits + cycles.logits), count, f["imm"], None)]
            self.found.beats_written += count * config.ports
            return
        last = start + cycles.store - 1
        moving, elements = f["record"], config.beat_elements
        if f["format"]:  # KVOUT is read for the exponents, which a tree of four to one finds, and for each plane
            passes = 3 if f["format"] == KvFormat.B12 else 2
            tree = ceil_div(elements.bit_length() - 1, 2)
            moving = passes * 2 * f["heads"] * f["head_beats"] + tree + cycles.pack
        for row in range(f["rows"]):
            if not f["mask"] >> row & 1:
                last += 1
                continue
            last += moving + cycles.place * f["reuse"]
            position = f["x"] + row
            command.writes.append((last, f["record"], f["imm"] + position // config.ports * f["record"],
                                   position % config.ports))
            last += cycles.record_end
            self.found.beats_written += f["record"]
            self.found.kv_written += f["record"]
        if not command.writes:
            command.done = last + cycles.settle

    def _end_store(self, command: _Command) -> None:
        """Responses to what a store wrote: as late as possible, since reads that were asked for before hold it up."""
        responses, burst_beats = [], self.config.burst_beats
        for last, beats, address, port in command.writes:
            burst = min((address + beats - 1) % burst_beats + 1, beats)
            # a record's last burst waits for the one before it, which began only when all of it was there; logits come
            # slower than they are written
            before = 0 if port is None else min(beats - burst, burst_beats)
            sent = last + self.cycles.write + max(burst, before)
            responses.append(self.channel.write(sent, burst, address + beats - burst, port, beats - burst))
        command.writes = []
        command.done = int(max(responses)) + self.cycles.settle
