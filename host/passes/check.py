"""Check a finished program by walking it as control would, for the corner cases of its arguments and of its routes.

Every instruction that is not dropped is checked: reads find rows that were written, masks name exactly the regions it
touches, addresses stay in their region, streams pair up (LOADW with MATMUL or DROPW, MATMUL with the vector instruction
that takes its rows, VLOGITS with STOREL), every row is scored before its route is taken, and no load stands where it
could block the memory stream (`load_order`). A failure is a fault of the compiler, not of its user.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
from skipopu.hw.isa import ROUTER_ROWS_AT, Destination, MatmulMode, Resource, Unit

from ..layout import weight_superbeats
from ..plan import Plan
from ..program import Program
from .load_order import LoadOrder
from .walk import Arguments, CheckError, rows_in, walk

__all__ = ["CheckError", "check_program", "corner_arguments"]

RESOURCES = {"x": Resource.X, "scores": Resource.SCORES, "out": Resource.OUT, "gain0": Resource.GAIN0,
             "gain1": Resource.GAIN1, "rope": Resource.ROPE, "mx": Resource.MX, "mq": Resource.MQ, "mp": Resource.MP,
             "mo": Resource.MO, "mh": Resource.MH, "kvout": Resource.KVOUT, "kv": Resource.KVMEM,
             "logits": Resource.LOGITS, "routers": Resource.GAIN0}
TAKES_STREAM = ("vadd", "vrope", "vswiglu", "vscore", "vmerge", "vlogits")
READS_ABUF = ("vnorm", "vadd", "vprob", "vmerge", "vscale")
WRITES_ABUF = ("vadd", "vscore", "vmerge")
WRITES_MBUF = ("vnorm", "vadd", "vswiglu", "vprob", "vscale")
_TILE_SLOTS = 2  # KV tiles that the KV buffer holds


def corner_arguments(plan: Plan) -> list[Arguments]:
    """First and last positions, shortest and longest chunks, with and without head; with routers, corners of routes."""
    most = min(plan.chunk, plan.context)
    whole, end = Arguments(0, most, most - 1, 1), Arguments(plan.context - most, most, 0, most)
    cases = [Arguments(0, 1, 0, 1), Arguments(0, most), whole, end, Arguments(plan.context - 1, 1, 0, 1)]
    if plan.kv:
        last, even, odd = 1 << most - 1, 0x55555555, 0xAAAAAAAA
        nobody, everybody = (0, 0), (-1, -1)
        patterns = [(nobody,), ((-1, 0),), ((0, -1),), ((1, 1),), ((last, last),), ((1, 0), (0, last)),
                    (everybody, nobody), (nobody, everybody), ((even, odd), (odd, odd), (0, even))]
        cases += [replace(whole, routes=routes) for routes in patterns] + [replace(end, routes=patterns[-1])]
    return list(dict.fromkeys(cases))


@cache
def _offsets(*loops: tuple[int | tuple[int, ...], int]) -> np.ndarray:
    """Sorted offsets of nested loops given as (count, stride), or (values that it takes, stride)."""
    total = np.zeros(1, np.int64)
    for values, stride in loops:
        index = np.arange(values) if isinstance(values, int) else np.array(values)
        total = (total[:, None] + index * stride).reshape(-1)
    return np.unique(total)


@dataclass
class _State:
    """What has happened so far in one run."""

    plan: Plan
    regions: Mapping[str, tuple[int, int]]
    position: int  # first of the run
    written: dict[str, np.ndarray]
    spans: dict[str, list[tuple[int, int, str]]]
    order: LoadOrder
    weights: list[tuple[int, int]] = field(default_factory=list)  # (load, superbeats) that nobody has taken
    tiles: list[tuple[str, int]] = field(default_factory=list)  # (matmul still to come, load) of KV tiles
    results: list[tuple[object, ...]] = field(default_factory=list)  # rows the vector unit has to take
    scored: set[int] = field(default_factory=set)  # rows whose decisions are not taken
    logits: int | None = None  # bytes that wait for STOREL
    reads: Resource = Resource(0)
    writes: Resource = Resource(0)

    def require(self, holds: bool, message: str) -> None:
        if not holds:
            raise CheckError(message)

    def take_weights(self, needed: int) -> tuple[int, ...]:
        """Numbers of the loads that bring the next superbeats of weights, which must be as many as needed."""
        taken, found = 0, []
        while self.weights and taken < needed:
            load, count = self.weights.pop(0)
            taken += count
            found.append(load)
        self.require(taken == needed, f"consumes {needed} superbeats, LOADW brought {taken}")
        return tuple(found)

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

    def memory(self, address: int, count: int, kinds: tuple[str, ...], write: bool = False) -> int:
        """Account for an access to superbeats of memory, all in one region of the kinds given. Returns where in it."""
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
        return address - self.regions[name or ""][0]


def check_program(program: Program, plan: Plan, regions: Mapping[str, tuple[int, int]],
                  cases: list[Arguments] | None = None) -> None:
    """Walk ``program`` for each of ``cases`` (by default the corner cases). Raises CheckError at the first mistake."""
    for arguments in corner_arguments(plan) if cases is None else cases:
        state = _fresh(plan, regions, arguments.position)
        for pc, mnemonic, unit, fields in walk(program, arguments):
            try:
                if fields["mask"]:
                    _step(state, mnemonic, unit, fields)
            except CheckError as error:
                raise CheckError(f"{program.describe(pc)}: {error} ({arguments})") from None


def _fresh(plan: Plan, regions: Mapping[str, tuple[int, int]], position: int) -> _State:
    config, at = plan.config, plan.addresses()
    ratio, kvout = config.lanes // config.vector_lanes, config.beat_elements // config.vector_lanes
    spans = {"abuf": [(at[name], at[name] + size, name) for name, size in plan.abuf().items()],
             "mbuf": [(at[name] * ratio, (at[name] + size) * ratio, name) for name, size in plan.mbuf().items()],
             "kvout": [(0, config.kvout_rows * kvout, "kvout")], "routers": [(0, config.router_rows, "routers")]}
    sizes = {"abuf": config.abuf_rows, "mbuf": config.mbuf_rows * ratio, "kvout": config.kvout_rows * kvout,
             "routers": config.router_rows}
    return _State(plan, regions, position, {space: np.zeros(size, bool) for space, size in sizes.items()}, spans,
                  LoadOrder(config.queue_depth))


def _step(state: _State, mnemonic: str, unit: Unit, f: dict[str, int]) -> None:
    state.reads = state.writes = Resource(0)
    counts_rows = unit == Unit.VECTOR and "heads" in f or mnemonic in ("matmul", "storekv", "route")
    if counts_rows or mnemonic in ("loada", "storel"):
        state.require(1 <= f["rows"] < 1 << 12, f"rows must be 1..4095, not {f['rows']}")
    rows = rows_in(f) if counts_rows else ()
    state.require(bool(rows) or not counts_rows, "none of its rows is in its list, which has others")
    weights: tuple[int, ...] = ()
    tile = 0
    if unit == Unit.LOAD:
        _load(state, mnemonic, f)
    elif unit == Unit.COMPUTE:
        weights, tile = _compute(state, mnemonic, f, rows)
    elif unit == Unit.VECTOR and "heads" in f:
        _vector(state, mnemonic, f, rows)
    elif unit == Unit.STORE:
        _store(state, mnemonic, f, rows)
    elif mnemonic == "route":
        state.require(state.scored >= set(rows), f"rows {sorted(set(rows) - state.scored)} are not scored")
        state.scored.clear()
    elif mnemonic == "halt":
        state.require(not (state.weights or state.tiles or state.results or state.logits is not None),
                      "the program ends with a stream that nobody takes")
        state.require(not state.written["kvout"].any(), "the program ends with keys and values that nobody stores")
    for name, stated, found in (("reads", f["reads"], state.reads), ("writes", f["writes"], state.writes)):
        if stated != found:
            raise CheckError(f"{name} must be {found!r}, not {Resource(stated)!r}")
    state.order.step(unit, f, weights, tile, gives=mnemonic == "matmul", takes=mnemonic in TAKES_STREAM)


def _load(state: _State, mnemonic: str, f: dict[str, int]) -> None:
    config, number = state.plan.config, state.order.loads + 1
    if mnemonic == "loadw":
        state.memory(f["imm"], f["count"], ("layers", "head"))
        state.weights.append((number, f["count"]))
    elif mnemonic == "loada":
        state.memory(f["imm"], f["rows"] * f["count"], ("embedding", "rope", "layers", "final_norm"))
        state.require(f["beats"] * config.vector_lanes * 4 <= f["count"] * config.superbeat_bytes,
                      "a row has fewer superbeats than ABUF rows")
        first = f["x"] & 0xFFFF
        space, first = ("abuf", first) if first < ROUTER_ROWS_AT else ("routers", first - ROUTER_ROWS_AT)
        state.touch(space, first + _offsets((f["rows"], f["dst_stride"]), (f["beats"], 1)), write=True)
    else:
        _load_tile(state, f)
        state.tiles += [("QK", number), ("PV", number)]
        state.require(len(state.tiles) <= 2 * _TILE_SLOTS, f"the KV buffer holds {_TILE_SLOTS} tiles")


def _record(state: _State, f: dict[str, int]) -> int:
    """Port beats of a record of LOADKV or STOREKV."""
    config, wanted = state.plan.config, state.plan.kv_format
    state.require(f["format"] == wanted, f"format must be {wanted.name}, not {f['format']}")
    record = config.record_beats(f["heads"], f["head_beats"], wanted)
    state.require(f["record"] == record, f"record must be {record}, not {f['record']}")
    return record


def _load_tile(state: _State, f: dict[str, int]) -> None:
    config, record = state.plan.config, _record(state, f)
    used = f["heads"] * f["head_beats"] * config.beat_elements // config.lanes
    state.require(used <= config.kvbuf_heads, f"the KV buffer holds {config.kvbuf_heads} heads, not {used}")
    tokens = min(f["rows"], config.tile_tokens)
    state.require(tokens >= 1, "rows must be at least 1")
    first = f["x"]
    if not f["reuse"]:
        first = state.memory(f["imm"], -(-tokens // config.ports) * record, ("kv",)) // record * config.ports
    else:
        state.memory(f["imm"], state.plan.places * record, ("kv",))
    if first + tokens <= state.position:  # stored by runs before
        state.reads &= ~Resource.KVMEM
    if not f["reuse"]:
        return
    state.require(0 <= f["x"] <= config.history_tokens - tokens and f["x"] % config.ports == 0,
                  f"positions {f['x']}..{f['x'] + tokens - 1} are not all among the {config.history_tokens} that have "
                  f"pointers, from a multiple of {config.ports} on")
    state.require(f["layer"] < config.history_layers, f"pointers have {config.history_layers} layers, not {f['layer']}")
    state.require(f["buffer"] * record <= config.buffer_beats and f["buffer"] * config.ports <= config.history_tokens,
                  f"the history buffer has {config.buffer_beats} beats, not {f['buffer']} records of {record}")


def _compute(state: _State, mnemonic: str, f: dict[str, int],
             rows: tuple[int, ...]) -> tuple[tuple[int, ...], int]:
    """Returns the numbers of the loads of its weights, and of its KV tile (0 if none)."""
    if mnemonic == "dropw":
        return state.take_weights(f["count"]), 0
    config, mode = state.plan.config, MatmulMode(f["mode"])
    weights: tuple[int, ...] = ()
    tile = 0
    if mode in (MatmulMode.QK, MatmulMode.PV):
        waiting = [name for name, _ in state.tiles[:1]]
        state.require(waiting == [mode.name], f"{mode.name} but the KV tiles wait for {waiting}")
        _, tile = state.tiles.pop(0)
    else:
        weights = state.take_weights(weight_superbeats(config, mode, f["heads"] * f["n_tiles"], f["k_tiles"],
                                                       f["group"]))
    accumulators = f["groups"] * len(rows)
    state.require(accumulators <= config.acc_rows, f"{accumulators} accumulator rows of {config.acc_rows}")
    per_tile = config.columns // config.vector_lanes
    state.require((f["n_tiles"] - 1) * per_tile < f["beats"] <= f["n_tiles"] * per_tile,
                  f"beats must end in the last of {f['n_tiles']} column tiles, not be {f['beats']}")
    ratio = config.lanes // config.vector_lanes
    state.touch("mbuf", f["x"] * ratio + _offsets(
        (f["heads"], f["head_stride"] * ratio), (f["groups"], f["group_stride"] * ratio),
        (rows, f["row_stride"] * ratio), (f["k_tiles"] * ratio, 1)), write=False)
    state.results.append((f["heads"], f["groups"], rows, f["beats"]))
    return weights, tile


def _vector(state: _State, mnemonic: str, f: dict[str, int], rows: tuple[int, ...]) -> None:
    config = state.plan.config
    ratio = config.lanes // config.vector_lanes
    loops = (f["heads"], f["groups"], rows, f["beats"])
    if mnemonic in TAKES_STREAM:
        state.require(state.results[:1] == [loops], f"takes rows {loops}, the array delivers {state.results[:1]}")
        state.results.pop(0)
    src, dst = f["imm"] & 0xFFFF, f["imm"] >> 16 & 0xFFFF
    beats = f["beats"] // 2 if mnemonic == "vswiglu" else f["beats"]
    offsets = _offsets((f["heads"], f["head_stride"]), (f["groups"], f["group_stride"]), (rows, f["row_stride"]),
                       (beats, 1))
    if mnemonic in ("vnorm", "vadd"):
        state.require(f["heads"] == f["groups"] == 1, "heads and groups must be 1: a row has one sum of squares")
        state.touch("abuf", f["table"] + _offsets((beats, 1)), write=False)
        if f["route"]:
            state.touch("routers", f["x"] + _offsets((beats, 1)), write=False)
            state.scored.update(rows)
    if mnemonic == "vrope" and f["wrap"]:
        state.touch("abuf", f["table"] + _offsets((rows, f["table_stride"]), (2 * f["wrap"], 1)), write=False)
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
        states = (f["heads"] * f["groups"] - 1) * config.tokens + rows[-1] + 1
        state.require(states <= config.state_rows, f"{states} softmax states of {config.state_rows}")
    if mnemonic == "vlogits":
        state.require(0 < f["imm"] <= beats * config.vector_lanes, "logits that count must lie inside the row")
        state.logits = f["rows"] * beats * config.vector_lanes * 4


def _store(state: _State, mnemonic: str, f: dict[str, int], rows: tuple[int, ...]) -> None:
    config = state.plan.config
    if mnemonic == "storel":
        size = f["rows"] * f["count"] * config.superbeat_bytes
        state.require(state.logits == size, f"stores {size} bytes, VLOGITS sends {state.logits}")
        state.logits = None
        state.memory(f["imm"], f["rows"] * f["count"], ("logits",), write=True)
        return
    _record(state, f)
    size = config.record_beats(f["heads"], f["head_beats"]) * config.beat_elements // config.vector_lanes
    records = _offsets((rows, size), (size, 1))
    state.touch("kvout", records, write=False)
    state.written["kvout"][records] = False  # stored once
    if f["reuse"]:
        state.require(f["x"] + rows[-1] < config.history_tokens and f["layer"] < config.history_layers,
                      f"position {f['x'] + rows[-1]} in layer {f['layer']} has no pointer")
        state.memory(f["imm"], f["places"] * f["record"], ("kv",), write=True)
        return
    first, last = (position // config.ports for position in (f["x"] + rows[0], f["x"] + rows[-1]))
    state.memory(f["imm"] + first * f["record"], (last - first + 1) * f["record"], ("kv",), write=True)
