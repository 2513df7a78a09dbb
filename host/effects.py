"""What the instructions of one run change, and where a run can be cut: the ground of comparing two devices.

The program is walked as control would (`passes.walk`) with the routes that a device has taken, so no device is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from skipopu.hw.config import OverlayConfig
from skipopu.hw.isa import ROUTER_ROWS_AT, Destination, MatmulMode
from skipopu.hw.registers import DebugBuffer

from .layout import weight_superbeats
from .passes.check import TAKES_STREAM, WRITES_ABUF, WRITES_MBUF
from .passes.walk import Arguments, rows_in, walk
from .program import Program

__all__ = ["Effect", "Span", "run_effects"]

_WEIGHTS = (MatmulMode.W4, MatmulMode.W4M, MatmulMode.W8)


@dataclass(frozen=True)
class Span:
    """Bytes of device memory that an instruction writes: ``superbeats`` beats of one port (all for None)."""

    port: int | None
    address: int  # superbeat
    superbeats: int


@dataclass(frozen=True, eq=False)
class Effect:
    """One dispatched instruction: what it writes (nothing if it is dropped), and whether the run may be cut behind it.

    rows : on-chip rows, sorted int64 for each buffer; spans : of memory; route : layer whose routes it takes
    cut : no stream between two units is open, so INSTRUCTION_LIMIT may stop here
    """

    pc: int
    mnemonic: str
    rows: dict[DebugBuffer, np.ndarray]
    spans: tuple[Span, ...]
    cut: bool
    route: int | None = None


def run_effects(config: OverlayConfig, program: Program, arguments: Arguments, tokens: Sequence[int],
                places: list[int] | None = None) -> list[Effect]:
    """The effects of one run in the order of dispatch; entry i stands for INSTRUCTION_LIMIT i + 1.

    places : KV records with reuse behind each port so far, by default none; those of the run are added
    """
    places = [0] * config.ports if places is None else places
    found, weights, results, logits = [], 0, 0, 0
    for pc, mnemonic, _, fields in walk(program, arguments, tokens):
        runs = fields["mask"] != 0
        match mnemonic if runs else "":
            case "loadw":
                weights += fields["count"]
            case "matmul":
                if fields["mode"] in _WEIGHTS:
                    weights -= weight_superbeats(config, MatmulMode(fields["mode"]),
                                                 fields["heads"] * fields["n_tiles"], fields["k_tiles"],
                                                 fields["group"])
                results += 1
            case "dropw":
                weights -= fields["count"]
            case "vlogits":
                logits += 1
            case "storel":
                logits -= 1
        results -= runs and mnemonic in TAKES_STREAM
        found.append(Effect(
            pc, mnemonic, _rows(config, mnemonic, fields) if runs else {},
            _spans(config, mnemonic, fields, places) if runs else (), cut=not (weights or results or logits),
            route=fields["layer"] if runs and mnemonic == "route" else None))
    return found


def _offsets(*loops: tuple[int | tuple[int, ...], int]) -> np.ndarray:
    total = np.zeros(1, np.int64)
    for values, stride in loops:
        index = np.arange(values) if isinstance(values, int) else np.array(values)
        total = (total[:, None] + index * stride).reshape(-1)
    return total


def _rows(config: OverlayConfig, mnemonic: str, f: dict[str, int]) -> dict[DebugBuffer, np.ndarray]:
    """Rows of on-chip buffers that one instruction writes, from its fields with registers already added."""
    if mnemonic == "loada":
        if f["x"] & ROUTER_ROWS_AT:  # the router buffer cannot be inspected
            return {}
        return {DebugBuffer.ABUF: np.unique(f["x"] + _offsets((f["rows"], f["dst_stride"]), (f["beats"], 1)))}
    if mnemonic not in (*WRITES_ABUF, *WRITES_MBUF, "vrope"):
        return {}
    beats = f["beats"] // 2 if mnemonic == "vswiglu" else f["beats"]
    offsets = _offsets((f["heads"], f["head_stride"]), (f["groups"], f["group_stride"]), (rows_in(f), f["row_stride"]),
                       (beats, 1))
    source, target = f["imm"] & 0xFFFF, f["imm"] >> 16 & 0xFFFF
    rows = {}
    if mnemonic in WRITES_ABUF:
        rows[DebugBuffer.ABUF] = np.unique(source + offsets)
    if mnemonic == "vrope" and f["dest"] == Destination.KVOUT:
        rows[DebugBuffer.KVOUT] = np.unique((target + offsets) // (config.beat_elements // config.vector_lanes))
    elif mnemonic in (*WRITES_MBUF, "vrope"):
        rows[DebugBuffer.MBUF] = np.unique((target + offsets) // (config.lanes // config.vector_lanes))
    return rows


def _spans(config: OverlayConfig, mnemonic: str, f: dict[str, int], places: list[int]) -> tuple[Span, ...]:
    if mnemonic == "storel":
        return (Span(None, f["imm"], f["rows"] * f["count"]),)
    if mnemonic == "storekv":
        spans = []
        for position in (f["x"] + row for row in rows_in(f)):
            place, port = divmod(position, config.ports)
            if f["reuse"]:
                if position == 0 and f["layer"] == 0:  # a sequence begins
                    places[:] = [0] * config.ports
                place = places[port]
                places[port] += 1
            spans.append(Span(port, f["imm"] + place * f["record"], f["record"]))
        return tuple(spans)
    return ()
