"""Check a finished program by walking it as control would, for the corner cases of its arguments.

Every dispatched instruction is checked: reads find rows that were written, masks name exactly the regions it touches,
addresses stay in their region, streams pair up (LOADW with MATMUL, MATMUL with the vector instruction that takes its
rows, VLOGITS with STOREL), and no load stands where it could block the memory stream. A failure is a fault of the
compiler, not of its user.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import numpy as np
from skipopu.hw.isa import Condition, Destination, MatmulMode, Register, Resource, Unit, decode

from ..errors import CompileError
from ..layout import weight_superbeats
from ..plan import Plan
from ..program import Program

__all__ = ["Arguments", "CheckError", "check_program", "corner_arguments", "walk"]

RESOURCES = {"x": Resource.X, "scores": Resource.SCORES, "out": Resource.OUT, "gain0": Resource.GAIN0,
             "gain1": Resource.GAIN1, "rope": Resource.ROPE, "mx": Resource.MX, "mq": Resource.MQ, "mp": Resource.MP,
             "mo": Resource.MO, "mh": Resource.MH, "kvout": Resource.KVOUT, "kv": Resource.KVMEM,
             "logits": Resource.LOGITS}
TAKES_STREAM = ("vadd", "vrope", "vswiglu", "vscore", "vmerge", "vlogits")
READS_ABUF = ("vnorm", "vadd", "vprob", "vmerge", "vscale")
WRITES_ABUF = ("vadd", "vscore", "vmerge")
WRITES_MBUF = ("vnorm", "vadd", "vswiglu", "vprob", "vscale")
ARITHMETIC: dict[str, tuple[Callable[[int, int], int], str]] = {  # and the second operand: a field or rows_reg
    "addi": (operator.add, "imm"), "add": (operator.add, "rows_reg"), "sub": (operator.sub, "rows_reg"),
    "shli": (operator.lshift, "rows"), "shri": (operator.rshift, "rows"), "muli": (operator.mul, "x"),
    "min": (min, "rows_reg"),
}
_STEP_LIMIT = 10_000_000


class CheckError(CompileError):
    """The compiler produced a wrong program; the message names the instruction."""


@dataclass(frozen=True)
class Arguments:
    """Values of the argument registers of one run."""

    position: int
    tokens: int
    head_row: int = 0
    head_rows: int = 0


def corner_arguments(plan: Plan) -> list[Arguments]:
    """First and last positions, shortest and longest chunks, with and without head."""
    most = min(plan.chunk, plan.context)
    cases = [Arguments(0, 1, 0, 1), Arguments(0, most), Arguments(0, most, most - 1, 1),
             Arguments(plan.context - most, most, 0, most), Arguments(plan.context - 1, 1, 0, 1)]
    return list(dict.fromkeys(cases))


def walk(program: Program, arguments: Arguments,
         tokens: Sequence[int] = ()) -> Iterator[tuple[int, str, Unit, dict[str, int]]]:
    """Dispatched instructions of one run: (pc, mnemonic, unit, fields with registers already added).

    tokens : the token table, 0 where it is shorter
    Raises CheckError if the program leaves its words or does not end.
    """
    registers = [0] * 16
    registers[Register.POSITION], registers[Register.TOKENS] = arguments.position, arguments.tokens
    registers[Register.HEAD_ROW], registers[Register.HEAD_ROWS] = arguments.head_row, arguments.head_rows
    decoded = [decode(word) for word in program.words]
    pc = 0
    for _ in range(_STEP_LIMIT):
        if not 0 <= pc < len(decoded):
            raise CheckError(f"the program runs to {pc}, outside its {len(decoded)} instructions")
        item, raw = decoded[pc]
        fields = dict(raw)
        left, right = registers[raw["imm_reg"]], registers[raw["rows_reg"]]
        if item.unit != Unit.CONTROL:
            for name in ("imm", "rows", "x"):
                fields[name] += registers[raw[f"{name}_reg"]]
        yield pc, item.mnemonic, item.unit, fields
        target = pc + 1
        match item.mnemonic:
            case "halt":
                return
            case "branch":
                other = registers[raw["x_reg"]]
                taken = {Condition.EQ: right == other, Condition.NE: right != other, Condition.LT: right < other,
                         Condition.GE: right >= other}[Condition(raw["condition"])]
                target = raw["imm"] if taken else target
            case "token":
                registers[raw["rd"]] = tokens[left] if left < len(tokens) else 0
            case mnemonic if mnemonic in ARITHMETIC:
                operation, operand = ARITHMETIC[item.mnemonic]
                registers[raw["rd"]] = operation(left, right if operand == "rows_reg" else raw[operand])
        registers[Register.ZERO] = 0
        pc = target
    raise CheckError(f"the program does not end within {_STEP_LIMIT} instructions")


@cache
def _offsets(*loops: tuple[int, int]) -> np.ndarray:
    """Sorted offsets of nested loops given as (count, stride)."""
    total = np.zeros(1, np.int64)
    for count, stride in loops:
        total = (total[:, None] + np.arange(count) * stride).reshape(-1)
    return np.unique(total)


@dataclass
class _State:
    """What has happened so far in one run."""

    plan: Plan
    regions: Mapping[str, tuple[int, int]]
    written: dict[str, np.ndarray]
    spans: dict[str, list[tuple[int, int, str]]]
    weights: int | None = None  # superbeats of the LOADW that waits for its MATMUL
    tiles: list[str] = field(default_factory=list)  # matmuls still to come for the KV tiles loaded
    results: list[tuple[int, ...]] = field(default_factory=list)  # rows the vector unit has to take
    logits: int | None = None  # bytes that wait for STOREL
    reads: Resource = Resource(0)
    writes: Resource = Resource(0)

    def require(self, holds: bool, message: str) -> None:
        if not holds:
            raise CheckError(message)

    def touch(self, space: str, index: np.ndarray, write: bool, fresh: bool = False) -> None:
        """Account for an access to rows of an on-chip buffer, all in one region; ``fresh``: need not be written yet."""
        low, high = int(index[0]), int(index[-1])
        name = next((name for first, end, name in self.spans[space] if first <= low and high < end), None)
        self.require(name is not None, f"rows {low}..{high} of {space} are not inside one region")
        assert name is not None
        if write:
            self.written[space][index] = True
            self.writes |= RESOURCES[name]
        else:
            self.require(fresh or bool(self.written[space][index].all()),
                         f"{name} is read before all of it is written")
            self.reads |= RESOURCES[name]

    def memory(self, address: int, count: int, kinds: tuple[str, ...], write: bool = False) -> None:
        """Account for an access to superbeats of memory, all in one region of the kinds given."""
        name = next((name for name, (first, size) in self.regions.items()
                     if first <= address and address + count <= first + size), None)
        kind = (name or "").split(".")[0]
        self.require(name is not None and kind in kinds,
                     f"superbeats {address}..{address + count - 1} are not in a region of {'/'.join(kinds)}")
        if kind in ("kv", "logits"):
            if write:
                self.writes |= RESOURCES[kind]
            else:
                self.reads |= RESOURCES[kind]


def check_program(program: Program, plan: Plan, regions: Mapping[str, tuple[int, int]],
                  cases: list[Arguments] | None = None) -> None:
    """Walk ``program`` for each of ``cases`` (by default the corner cases). Raises CheckError at the first mistake."""
    for arguments in corner_arguments(plan) if cases is None else cases:
        state = _fresh(plan, regions)
        for pc, mnemonic, unit, fields in walk(program, arguments):
            try:
                _step(state, mnemonic, unit, fields)
            except CheckError as error:
                raise CheckError(f"{program.describe(pc)}: {error} ({arguments})") from None


def _fresh(plan: Plan, regions: Mapping[str, tuple[int, int]]) -> _State:
    config, at = plan.config, plan.addresses()
    ratio, kvout = config.lanes // config.vector_lanes, config.beat_elements // config.vector_lanes
    spans = {"abuf": [(at[name], at[name] + size, name) for name, size in plan.abuf().items()],
             "mbuf": [(at[name] * ratio, (at[name] + size) * ratio, name) for name, size in plan.mbuf().items()],
             "kvout": [(0, config.kvout_rows * kvout, "kvout")]}
    sizes = {"abuf": config.abuf_rows, "mbuf": config.mbuf_rows * ratio, "kvout": config.kvout_rows * kvout}
    return _State(plan, regions, {space: np.zeros(size, bool) for space, size in sizes.items()}, spans)


def _step(state: _State, mnemonic: str, unit: Unit, f: dict[str, int]) -> None:
    state.reads = state.writes = Resource(0)
    if unit == Unit.LOAD:
        state.require(state.weights is None, "a load stands between LOADW and its MATMUL")
    if mnemonic in ("loada", "matmul", "storekv", "storel") or unit == Unit.VECTOR and "heads" in f:
        state.require(1 <= f["rows"] < 1 << 12, f"rows must be 1..4095, not {f['rows']}")
    if unit == Unit.LOAD:
        _load(state, mnemonic, f)
    elif unit == Unit.COMPUTE:
        _matmul(state, f)
    elif unit == Unit.VECTOR and "heads" in f:
        _vector(state, mnemonic, f)
    elif unit == Unit.STORE:
        _store(state, mnemonic, f)
    elif mnemonic == "halt":
        state.require(state.weights is None and not state.tiles and not state.results and state.logits is None,
                      "the program ends with a stream that nobody takes")
    for name, stated, found in (("reads", f["reads"], state.reads), ("writes", f["writes"], state.writes)):
        if stated != found:
            raise CheckError(f"{name} must be {found!r}, not {Resource(stated)!r}")


def _load(state: _State, mnemonic: str, f: dict[str, int]) -> None:
    config = state.plan.config
    if mnemonic == "loadw":
        state.memory(f["imm"], f["count"], ("layers", "head"))
        state.weights = f["count"]
    elif mnemonic == "loada":
        state.memory(f["imm"], f["rows"] * f["count"], ("embedding", "rope", "layers", "final_norm"))
        state.require(f["beats"] * config.vector_lanes * 4 <= f["count"] * config.superbeat_bytes,
                      "a row has fewer superbeats than ABUF rows")
        state.touch("abuf", f["x"] + _offsets((f["rows"], f["dst_stride"]), (f["beats"], 1)), write=True)
    else:
        record = 2 * f["heads"] * f["head_beats"]
        state.require(f["record"] == record, f"record must be {record}, not {f['record']}")
        used = f["heads"] * f["head_beats"] * config.beat_elements // config.lanes
        state.require(used <= config.kvbuf_heads, f"the KV buffer holds {config.kvbuf_heads} heads, not {used}")
        state.memory(f["imm"], config.tile_tokens // config.ports * record, ("kv",))
        state.tiles += ["QK", "PV"]


def _matmul(state: _State, f: dict[str, int]) -> None:
    config, mode = state.plan.config, MatmulMode(f["mode"])
    if mode in (MatmulMode.QK, MatmulMode.PV):
        state.require(state.tiles[:1] == [mode.name], f"{mode.name} but the KV tiles wait for {state.tiles[:1]}")
        state.tiles.pop(0)
    else:
        needed = f["heads"] * weight_superbeats(config, mode, f["n_tiles"], f["k_tiles"])
        state.require(state.weights == needed, f"consumes {needed} superbeats, LOADW brought {state.weights}")
        state.weights = None
    accumulators = f["groups"] * f["rows"]
    state.require(accumulators <= config.acc_rows, f"{accumulators} accumulator rows of {config.acc_rows}")
    per_tile = config.columns // config.vector_lanes
    state.require((f["n_tiles"] - 1) * per_tile < f["beats"] <= f["n_tiles"] * per_tile,
                  f"beats must end in the last of {f['n_tiles']} column tiles, not be {f['beats']}")
    ratio = config.lanes // config.vector_lanes
    state.touch("mbuf", f["x"] * ratio + _offsets(
        (f["heads"], f["head_stride"] * ratio), (f["groups"], f["group_stride"] * ratio),
        (f["rows"], f["row_stride"] * ratio), (f["k_tiles"] * ratio, 1)), write=False)
    state.results.append((f["heads"], f["groups"], f["rows"], f["beats"]))


def _vector(state: _State, mnemonic: str, f: dict[str, int]) -> None:
    config = state.plan.config
    ratio = config.lanes // config.vector_lanes
    loops = (f["heads"], f["groups"], f["rows"], f["beats"])
    if mnemonic in TAKES_STREAM:
        state.require(state.results[:1] == [loops], f"takes rows {loops}, the array delivers {state.results[:1]}")
        state.results.pop(0)
    src, dst = f["imm"] & 0xFFFF, f["imm"] >> 16 & 0xFFFF
    beats = f["beats"] // 2 if mnemonic == "vswiglu" else f["beats"]
    offsets = _offsets((f["heads"], f["head_stride"]), (f["groups"], f["group_stride"]), (f["rows"], f["row_stride"]),
                       (beats, 1))
    if mnemonic in ("vnorm", "vadd"):
        state.touch("abuf", f["table"] + _offsets((beats, 1)), write=False)
    if mnemonic == "vrope" and f["wrap"]:
        state.touch("abuf", f["table"] + _offsets((f["rows"], f["table_stride"]), (2 * f["wrap"], 1)), write=False)
    if mnemonic in READS_ABUF:
        # the first tile's VMERGE ignores what it reads
        state.touch("abuf", src + offsets, write=False, fresh=mnemonic == "vmerge")
    if mnemonic in WRITES_ABUF:
        state.touch("abuf", src + offsets, write=True)
    if mnemonic in WRITES_MBUF or (mnemonic == "vrope" and f["dest"] != Destination.KVOUT):
        aligned = not any(value % ratio for value in (dst, f["row_stride"], f["group_stride"], f["head_stride"],
                                                      f["vector"]))
        state.require(aligned and f["vector"] > 0 and beats % f["vector"] == 0,
                      f"aligned vectors must start at MBUF rows (multiples of {ratio} beats) and fill the row")
        state.touch("mbuf", dst + offsets, write=True)
    elif mnemonic == "vrope":
        state.touch("kvout", dst + offsets, write=True)
    if mnemonic in ("vscore", "vprob", "vmerge"):
        states = (f["heads"] * f["groups"] - 1) * config.tokens + f["rows"]
        state.require(states <= config.state_rows, f"{states} softmax states of {config.state_rows}")
    if mnemonic == "vlogits":
        state.require(0 < f["imm"] <= beats * config.vector_lanes, "logits that count must lie inside the row")
        state.logits = f["rows"] * beats * config.vector_lanes * 4


def _store(state: _State, mnemonic: str, f: dict[str, int]) -> None:
    config = state.plan.config
    if mnemonic == "storel":
        size = f["rows"] * f["count"] * config.superbeat_bytes
        state.require(state.logits == size, f"stores {size} bytes, VLOGITS sends {state.logits}")
        state.logits = None
        state.memory(f["imm"], f["rows"] * f["count"], ("logits",), write=True)
        return
    beats = f["rows"] * f["record"] * config.beat_elements // config.vector_lanes
    state.touch("kvout", _offsets((beats, 1)), write=False)
    first, last = (position // config.ports for position in (f["x"], f["x"] + f["rows"] - 1))
    state.memory(f["imm"] + first * f["record"], (last - first + 1) * f["record"], ("kv",), write=True)
