"""The functional level: runs overlay programs instruction by instruction, equal to the hardware bit for bit.

Units that work beside each other in hardware run here one instruction after another in program order; hazards, queues
and time do not exist. Weights and KV tiles are unpacked once and kept until memory changes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np
import torch
from skipopu.hw.config import OverlayConfig
from skipopu.hw.isa import (
    INSTRUCTIONS,
    MAX_LAYERS,
    ROUTER_ROWS_AT,
    Condition,
    Instruction,
    IsaError,
    KvFormat,
    RowList,
    Unit,
    decode,
)
from skipopu.hw.registers import FaultCause

from .arithmetic import widen_half
from .kv_records import pack_records
from .matrix import MatrixUnit
from .operands import KvTile, OperandCache, ProgramError, Span, linear, unpack_kv
from .state import BeatStream, MachineFault, MachineState, RowLists, Write, rows_of
from .vector import VectorUnit

__all__ = ["COUNTERS", "FunctionalMachine", "MachineFault", "ProgramError", "Write"]

COUNTERS = ("instructions", "dropped", "saturations", "weights_read", "kv_read", "kv_buffered", "activations_read",
            "kv_written", "logits_written")
WORD_BYTES = 32
ROWS_OF_CHUNK = {item.mnemonic for item in INSTRUCTIONS if item.unit == Unit.VECTOR and "heads" in item.fields} | {
    "matmul", "route", "storekv"}  #: whose `rows` counts tokens
Observer = Callable[[int, Instruction, dict[str, int], list[Write]], None]


def _signed(value: int, bits: int) -> int:
    """The low ``bits`` of value as a two's complement number."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


class FunctionalMachine(MachineState):
    """One overlay on the memories of its ports.

    memories : one writable uint8 array per port; a superbeat is one port beat of each at the same address
    threads : of the matrix products (torch); more than one only pays on an otherwise idle machine
    cache_bytes : most memory spent on unpacked weights and KV tiles

    observer : called after each instruction with (pc, instruction, fields with registers added, writes); of fields
        also ``mask``, the rows it runs for (bit t for row t)
    counters : of the last run, COUNTERS; bytes where they are read or written
    registers, pc : scalar registers and the instruction dispatched last
    routes : what `route` took in the last run: row bits (attention, MLP) by layer
    """

    def __init__(self, config: OverlayConfig, memories: Sequence[np.ndarray], threads: int = 1,
                 cache_bytes: int = 2 << 30) -> None:
        if len(memories) != config.ports:
            raise ValueError(f"{config.name} has {config.ports} memory ports, {len(memories)} memories were given")
        super().__init__(config)
        self.memories, self.threads = list(memories), threads
        self.cache = OperandCache(cache_bytes)
        self.observer: Observer | None = None
        self.registers = [0] * 16
        self.lists = RowLists(config.tokens)
        self.routes: dict[int, tuple[int, int]] = {}
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.pc = 0
        self.limit = 0
        self._words: dict[bytes, tuple[Instruction, dict[str, int]]] = {}
        self._per_beat = config.port_bits // 8
        per_tile = config.columns // config.vector_lanes
        self._results, self._logits = BeatStream(per_tile), BeatStream(per_tile)
        self._matrix = MatrixUnit(self, self.memories, self.cache, self._results, self._fail)
        self._vector = VectorUnit(self, self._results, self._logits, self._fail, self._matrix.value_exponent)
        self._units = {"loadw": self._loadw, "loada": self._loada, "loadkv": self._loadkv,
                       "matmul": self._matrix.execute, "dropw": self._matrix.drop_weights,
                       "storekv": self._storekv, "storel": self._storel}

    # ---- running

    def run(self, program_address: int, length: int, args: Sequence[int] = (), tokens: Sequence[int] = (),
            instruction_limit: int | None = None, limit: int | None = None,
            forced: Sequence[int] | None = None) -> None:
        """Run a program of ``length`` words at a byte address of port 0 until HALT, or for ``instruction_limit``.

        args : r1, r2, ... (up to 7, others 0); tokens : the token table (others 0)
        limit : superbeats of memory, by default what the shortest memory holds
        forced : words of ROUTES_FORCED (others 0) that `route` takes in place of the scores' decisions
        Raises MachineFault where the hardware stops with a fault, ProgramError where its behaviour is undefined. A
        consumer whose producer does not stand before it is a WATCHDOG fault. Buffers keep their contents between runs.
        """
        if len(args) > 7 or len(tokens) > self.config.tokens or len(forced or ()) > 2 * MAX_LAYERS:
            raise ValueError(f"at most 7 arguments, {self.config.tokens} tokens and {2 * MAX_LAYERS} forced words, not "
                             f"{len(args)}, {len(tokens)} and {len(forced or ())}")
        self.limit = min(len(memory) for memory in self.memories) // self._per_beat if limit is None else limit
        self.registers = [0, *(_signed(value, 32) for value in args), *[0] * (15 - len(args))]
        self._table = [*tokens, *[0] * (self.config.tokens - len(tokens))]
        self.counters = dict.fromkeys(COUNTERS, 0)
        self.lists.clear()
        self.routes = {}
        self._forced = None if forced is None else [*forced, *[0] * (2 * MAX_LAYERS - len(forced))]
        self.saturations = 0
        self._matrix.weights.clear()
        self._results.items.clear()
        self._logits.items.clear()
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            self._run(program_address, length, instruction_limit)
        finally:
            torch.set_num_threads(before)
            self.counters["saturations"] = self.saturations

    def reset(self) -> None:
        """State after power-up; memories, what was unpacked from them and the pointers of KV records are kept."""
        kv = self.kv
        super().__init__(self.config)
        self.kv = kv  # pointers are a memory too, but no sequence runs
        kv.reset()
        self._matrix.forget_tiles()

    def invalidate(self, address: int | None = None, size: int = 0) -> None:
        """Forget what was unpacked from these bytes of any port (all, without arguments): call after writing memory."""
        if address is None:
            self.cache.invalidate(0, 1 << 64)
        else:
            self.cache.invalidate(address // self._per_beat, -(-(address + size) // self._per_beat))

    def _run(self, program_address: int, length: int, instruction_limit: int | None) -> None:
        r, pc = self.registers, 0
        while not instruction_limit or self.counters["instructions"] < instruction_limit:
            self._at = pc
            item, raw = self._fetch(program_address, pc, length)
            self.counters["instructions"] += 1
            allowed, rows = self._allowed(raw["list"]), raw["rows"] + r[raw["rows_reg"]] & 0xFFF
            mask = allowed & (1 << rows) - 1
            values = raw | {"imm": _signed(raw["imm"] + r[raw["imm_reg"]], 32), "rows": rows,
                            "x": _signed(raw["x"] + r[raw["x_reg"]], 16), "mask": mask}
            following, writes = pc + 1, []
            if not allowed:
                self.counters["dropped"] += 1
            elif (not mask or rows > self.config.tokens) and item.mnemonic in ROWS_OF_CHUNK:
                self._refuse_rows(item.mnemonic, values)
            elif item.mnemonic == "halt":
                self._check_idle()
            elif item.mnemonic == "branch":
                if self._taken(raw):
                    following = raw["imm"] & 0xFFFFFFFF
                    if following >= length:
                        self._fail(FaultCause.FETCH_RANGE, f"branch to {following} in a program of {length}")
                values = raw
            elif item.mnemonic == "route":
                writes = self._route(values)
            elif item.unit == Unit.CONTROL:
                writes, values = self._scalar(item.mnemonic, raw), raw
            elif item.unit == Unit.VECTOR:
                writes = self._vector.execute(item.mnemonic, values)
            else:
                writes = self._units[item.mnemonic](values)
            self.pc = pc
            if self.observer:
                self.observer(pc, item, values, writes)
            if allowed and item.mnemonic == "halt":
                return
            pc = following

    def _fetch(self, program_address: int, pc: int, length: int) -> tuple[Instruction, dict[str, int]]:
        if pc >= length:
            self._fail(FaultCause.FETCH_RANGE, f"the program has {length} instructions")
        start = program_address + pc * WORD_BYTES
        word = self.memories[0][start : start + WORD_BYTES].tobytes()
        if len(word) < WORD_BYTES:
            self._fail(FaultCause.FETCH_ERROR, f"no memory at byte {start} of port 0")
        if word not in self._words:
            try:
                self._words[word] = decode(int.from_bytes(word, "little"))
            except IsaError as error:
                self._fail(FaultCause.ILLEGAL_OPCODE, str(error))
        return self._words[word]

    def _fail(self, cause: FaultCause, detail: str, port: int = 0) -> NoReturn:
        raise MachineFault(cause, self._at, detail, port)

    def _check_idle(self) -> None:
        for what, left in (("superbeats of weights", sum(count for _, count in self._matrix.weights)),
                           ("beats of matmul results", len(self._results)), ("beats of logits", len(self._logits))):
            if left:
                self._fail(FaultCause.WATCHDOG, f"halt with {left} {what} that nothing consumes")

    # ---- control unit

    def _allowed(self, kind: int) -> int:
        """The rows in a list, bit t for row t."""
        try:
            return self.lists.mask(kind) if kind else self.lists.every
        except ValueError:
            raise ProgramError(f"list must be a RowList, not {kind}") from None

    def _refuse_rows(self, mnemonic: str, values: dict[str, int]) -> NoReturn:
        """An instruction must count rows of a chunk and run for at least one of them."""
        if 1 <= values["rows"] <= self.config.tokens:
            raise ProgramError(f"{mnemonic}: none of the {values['rows']} rows is in the list "
                               f"{RowList(values['list']).name}, which has others")
        raise ProgramError(f"{mnemonic}: rows must be at least 1 and at most {self.config.tokens}, "
                           f"not {values['rows']}")

    def _route(self, values: dict[str, int]) -> list[Write]:
        layer, present = values["layer"], (1 << values["rows"]) - 1
        if self._forced is None:
            attention, mlp = (sum(1 << t for t, value in enumerate(row) if value >= 0) for row in self.scores.tolist())
        else:
            attention, mlp = self._forced[2 * layer : 2 * layer + 2]
        self.lists.attention, self.lists.mlp, self.lists.present = attention & present, mlp & present, present
        self.routes[layer] = attention & present, mlp & present
        return [Write("routes", np.array([layer]))]

    def _taken(self, raw: dict[str, int]) -> bool:
        left, right = self.registers[raw["rows_reg"]], self.registers[raw["x_reg"]]
        return {Condition.EQ: left == right, Condition.NE: left != right, Condition.LT: left < right,
                Condition.GE: left >= right}[Condition(raw["condition"])]

    def _scalar(self, mnemonic: str, raw: dict[str, int]) -> list[Write]:
        left, right, shift = self.registers[raw["imm_reg"]], self.registers[raw["rows_reg"]], raw["rows"] & 31
        if mnemonic == "token":
            if not 0 <= left < self.config.tokens:
                self._fail(FaultCause.TOKEN_RANGE, f"index {left} of a table of {self.config.tokens}")
            result = self._table[left]
        else:
            result = {"addi": raw["imm"] + left, "add": left + right, "sub": left - right, "shli": left << shift,
                      "shri": left >> shift, "muli": left * raw["x"], "min": min(left, right)}[mnemonic]
        if raw["rd"]:
            self.registers[raw["rd"]] = _signed(result, 32)
        return [Write("register", np.array([raw["rd"]]))]

    # ---- load unit

    def _range(self, address: int, count: int, port: int = 0) -> None:
        if address < 0 or address + count > self.limit:
            self._fail(FaultCause.MEMORY_RANGE,
                       f"superbeats {address}..{address + count - 1}, memory has {self.limit}", port)

    def _loadw(self, values: dict[str, int]) -> list[Write]:
        self._range(values["imm"], values["count"])
        self._matrix.weights.append((values["imm"], values["count"]))
        self.counters["weights_read"] += values["count"] * self.config.superbeat_bytes
        return []

    def _loada(self, values: dict[str, int]) -> list[Write]:
        rows, count, beats = values["rows"], values["count"], values["beats"]
        self._range(values["imm"], rows * count)
        name, first, size = "abuf", values["x"] & 0xFFFF, self.config.abuf_rows
        if first >= ROUTER_ROWS_AT:
            name, first, size = "routers", first - ROUTER_ROWS_AT, self.config.router_rows
        target = first + np.arange(rows)[:, None] * values["dst_stride"] + np.arange(beats)
        if target.max(initial=-1) >= size:
            self._fail(FaultCause.BUFFER_RANGE, f"{name} row {target.max()} of {size}")
        lanes = self.config.vector_lanes
        if beats * lanes * 4 > count * self.config.superbeat_bytes:
            raise ProgramError(f"loada.beats must fit in {count} superbeats, not be {beats}")
        words = linear(self.config, self.memories, values["imm"], rows * count).reshape(rows, -1).view(np.uint32)
        data = words[:, : beats * lanes].reshape(rows, beats, lanes)
        if name == "abuf":
            self.load_abuf(target, data)
        else:
            self.routers[:, target] = widen_half(np.stack((data, data >> 16)).astype(np.uint16))
        self.counters["activations_read"] += rows * count * self.config.superbeat_bytes
        return [Write(name, target.ravel())]

    def _loadkv(self, values: dict[str, int]) -> list[Write]:
        config, heads, head_beats, record = self.config, *(values[name] for name in ("heads", "head_beats", "record"))
        count, dims = min(values["rows"], config.tile_tokens), head_beats * config.beat_elements
        record_format = self._kv_format(values)
        if (not heads or not head_beats or dims % config.lanes
                or config.record_beats(heads, head_beats, record_format) > record):
            raise ProgramError(f"loadkv: {heads} heads of {head_beats} beats (whole lanes) must fit "
                               f"a record of {record}")
        if not count:
            raise ProgramError("loadkv: rows must be at least 1")
        if heads * dims // config.lanes > config.kvbuf_heads:
            self._fail(FaultCause.BUFFER_RANGE, f"{heads} KV heads of {dims}, the KV buffer has {config.kvbuf_heads} "
                                                f"x {config.lanes}")
        places, beats, held = self._places(values, count)
        addresses = values["imm"] + places * record

        def build() -> tuple[KvTile, list[Span]]:
            return (unpack_kv(config, self.memories, addresses, heads, head_beats, record_format),
                    [(int(addresses.min()), int(addresses.max()) + record)])

        self._matrix.tiles.append(self.cache.get(("kv", record_format, heads, head_beats, record,
                                                addresses.tobytes()), build))
        self.counters["kv_read"] += (beats - held) * self._per_beat
        self.counters["kv_buffered"] += held * self._per_beat
        return []

    def _places(self, values: dict[str, int], count: int) -> tuple[np.ndarray, int, int]:
        """(places of ``count`` records, port beats that make up their rows, those of them that the buffer holds)."""
        config, record, first = self.config, values["record"], values["x"]
        if not values["reuse"]:
            rows = -(-count // config.ports)
            self._range(values["imm"], rows * record)
            return np.arange(count) // config.ports, rows * config.ports * record, 0
        if first < 0 or first % config.ports:
            raise ProgramError(f"loadkv: position must be a multiple of {config.ports} ports, not {first}")

        def check(places: np.ndarray) -> None:
            addresses = values["imm"] + places * record
            for port in np.flatnonzero((places >= 0) & ((addresses < 0) | (addresses + record > self.limit))).tolist():
                self._range(int(addresses[port]), record, port)

        places, held, _ = self.kv.load(first, count, values["layer"], record, values["buffer"],
                                       bool(values["final"]), check, self._fail)
        return places, count * record, int(held.sum()) * record

    def _kv_format(self, values: dict[str, int]) -> KvFormat:
        """The format of an instruction's records."""
        known = list(KvFormat) if self.config.kv_narrow else [KvFormat.FP16]
        if values["format"] not in known:
            self._fail(FaultCause.KV_FORMAT, f"KV format {values['format']}; {self.config.name} has "
                                             f"{', '.join(item.name for item in known)}")
        return KvFormat(values["format"])

    # ---- store unit

    def _storekv(self, values: dict[str, int]) -> list[Write]:
        record, beat, ports = values["record"], self._per_beat, self.config.ports
        rows = rows_of(values["mask"]).tolist()
        if values["x"] < 0:
            raise ProgramError(f"storekv: position must not be negative, but is {values['x']}")
        record_format, size, heads = self._kv_format(values), record, 1
        if record_format != KvFormat.FP16:
            heads = values["heads"]
            size = 2 * heads * values["head_beats"]
            expected = self.config.record_beats(heads, values["head_beats"], record_format)
            if not size or heads > self.config.kvbuf_heads or record != expected:
                self._fail(FaultCause.BUFFER_RANGE, f"a {record_format.name} record of {heads} heads of "
                                                    f"{values['head_beats']} beats has {expected} beats, not {record}; "
                                                    f"the KV buffer has {self.config.kvbuf_heads} heads")
        if not values["reuse"]:
            self._kvout_range(rows[-1], size)
        addresses = []
        for t in rows:
            position = values["x"] + t
            place, port = divmod(position, ports)
            if values["reuse"]:
                place = self.kv.store(position, values["layer"], values["places"], self._fail)
                self._kvout_range(t, size)
            address = values["imm"] + place * record
            self._range(address, record, port)
            new = self.kvout[t * size : (t + 1) * size].reshape(1, 2, heads, -1)
            self.memories[port][address * beat : (address + record) * beat] = pack_records(
                self.config, new, record_format).ravel()
            addresses.append(address)
        self.cache.invalidate(min(addresses), max(addresses) + record)
        self.counters["kv_written"] += len(rows) * record * beat
        return [Write("memory", np.unique(np.array(addresses, np.int64)[:, None] + np.arange(record)))]

    def _kvout_range(self, row: int, size: int) -> None:
        end = (row + 1) * size
        if end > self.config.kvout_rows:
            self._fail(FaultCause.BUFFER_RANGE, f"kvout row {end - 1} of {self.config.kvout_rows}")

    def _storel(self, values: dict[str, int]) -> list[Write]:
        config, beat, count = self.config, self._per_beat, values["rows"] * values["count"]
        self._range(values["imm"], count)
        beats = count * config.superbeat_bytes // (4 * config.vector_lanes)
        flat = self._logits.take_flat(beats)
        if flat is None:
            self._fail(FaultCause.WATCHDOG, f"needs {beats} beats of logits, {len(self._logits)} are there")
        data = np.ascontiguousarray(flat, np.float32).view(np.uint8).reshape(count, config.ports, beat)
        for port, memory in enumerate(self.memories):
            memory[values["imm"] * beat : (values["imm"] + count) * beat] = data[:, port].ravel()
        self.cache.invalidate(values["imm"], values["imm"] + count)
        self.counters["logits_written"] += count * config.superbeat_bytes
        return [Write("memory", values["imm"] + np.arange(count))]
