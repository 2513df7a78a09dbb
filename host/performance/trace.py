"""Recordings as a timeline that Perfetto and Chrome show: `trace.json` and Perfetto's own `trace.pftrace`.

A nanosecond of the timeline is one cycle. Tracks: every unit, every memory port, every token with its layers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from skipopu.hw.isa import Unit, decode, disassemble

from .record import Recording

__all__ = ["Slice", "slices", "write_json", "write_perfetto"]

GROUPS = ("units", "memory ports", "tokens")


@dataclass(frozen=True, slots=True)
class Slice:
    """Something that takes time on one track. Slices of a track do not overlap, unless one holds the other.

    order : place of the track in its group
    """

    group: str
    track: str
    order: int
    name: str
    begin: int
    end: int
    args: dict[str, Any] = field(default_factory=dict)


def slices(recordings: Sequence[Recording]) -> Iterator[Slice]:
    """All slices of all runs, which follow one another on the timeline."""
    base = 0
    for recording in recordings:
        yield from _units(recording, base)
        for port, stretches in enumerate(recording.ports):
            for begin, end in stretches:
                yield Slice("memory ports", f"port {port}", port, "data", base + begin, base + end + 1)
        yield from _tokens(recording, base)
        base += recording.cycles


def _units(recording: Recording, base: int) -> Iterator[Slice]:
    """Instructions. A load is shown from the moment when those before it are delivered: several are under way."""
    program, last = recording.program, dict.fromkeys(Unit, 0)
    for span in recording.spans:
        word, note = program.words[span.pc], program.notes[span.pc]
        begin = max(span.start, last[span.unit])
        end = max(span.done, begin) + (1 if span.unit == Unit.CONTROL else 0)
        last[span.unit] = end
        name = decode(word)[0].mnemonic
        yield Slice("units", span.unit.name, int(span.unit), f"{name} (dropped)" if span.dropped else name,
                    base + begin, base + end,
                    {"pc": span.pc, "for": str(note), "layer": note.layer, "module": note.module,
                     "instruction": disassemble(word), "dispatched": span.dispatch, "begun": span.start})


def _tokens(recording: Recording, base: int) -> Iterator[Slice]:
    """Each token of the run, in it the layers, in them the modules that it executes."""
    blocks, stats = recording.blocks(), recording.stats
    layers: dict[int, list[Any]] = {}
    for block in blocks:
        if block.layer >= 0:
            layers.setdefault(block.layer, []).append(block)
    for index in range(stats.tokens):
        position = stats.position + index
        track = f"token {position}"
        yield Slice("tokens", track, position, recording.name, base, base + recording.cycles,
                    {"label": recording.label, "cycles": recording.cycles})
        for layer, parts in layers.items():
            ran = {part.module: bool(recording.executed(layer, part.module)[index]) for part in parts}
            skipped = [module for module, executed in ran.items() if not executed]
            yield Slice("tokens", track, position, f"layer {layer}" + (f", {' and '.join(skipped)} skipped"
                                                                       if skipped else ""),
                        base + min(part.begin for part in parts), base + max(part.end for part in parts),
                        {"layer": layer, **{f"{module}_executed": executed for module, executed in ran.items()}})
            for part in parts:
                if ran[part.module] and part.cycles:
                    yield Slice("tokens", track, position, part.module, base + part.begin, base + part.end,
                                {"layer": layer, "executing": int(recording.executed(layer, part.module).sum())})


def _ordered(found: Sequence[Slice]) -> list[tuple[str, list[str]]]:
    """(group, its tracks in order)"""
    tracks: dict[str, dict[str, int]] = {group: {} for group in GROUPS}
    for item in found:
        tracks[item.group].setdefault(item.track, item.order)
    return [(group, sorted(names, key=lambda name: names[name])) for group, names in tracks.items() if names]


def write_json(path: str | Path, found: Sequence[Slice], label: str) -> None:
    """Chrome's trace format: complete events, processes for groups, threads for tracks. label : of the times"""
    events: list[dict[str, Any]] = []
    places = {}
    for pid, (group, tracks) in enumerate(_ordered(found), 1):
        events.append({"ph": "M", "pid": pid, "name": "process_name", "args": {"name": f"{group} ({label})"}})
        for tid, track in enumerate(tracks, 1):
            places[group, track] = pid, tid
            events.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": track}})
            events.append({"ph": "M", "pid": pid, "tid": tid, "name": "thread_sort_index", "args": {"sort_index": tid}})
    for item in found:
        pid, tid = places[item.group, item.track]
        events.append({"ph": "X", "pid": pid, "tid": tid, "name": item.name, "ts": item.begin / 1000,
                       "dur": (item.end - item.begin) / 1000, "args": _plain(item.args)})
    document = {"traceEvents": events, "displayTimeUnit": "ns",
                "otherData": {"unit": "1 ns is one cycle", "label": label}}
    Path(path).write_text(json.dumps(document))


def write_perfetto(path: str | Path, found: Sequence[Slice], label: str) -> None:
    """Perfetto's protobuf format. Raises ImportError without the package `perfetto`."""
    from perfetto.protos.perfetto.trace.perfetto_trace_pb2 import TrackEvent
    from perfetto.trace_builder.proto_builder import TraceProtoBuilder
    builder = TraceProtoBuilder()
    uuids: dict[tuple[str, str], int] = {}
    for number, (group, tracks) in enumerate(_ordered(found), 1):
        parent = number << 32
        descriptor = builder.add_packet().track_descriptor
        descriptor.uuid, descriptor.name = parent, f"{group} ({label})"
        for order, track in enumerate(tracks, 1):
            uuids[group, track] = parent + order
            descriptor = builder.add_packet().track_descriptor
            descriptor.uuid, descriptor.parent_uuid, descriptor.name = parent + order, parent, track
            descriptor.sibling_order_rank = order
    edges = []
    for index, item in enumerate(found):
        length = item.end - item.begin
        edges.append((item.begin, 1, -length, index, item))
        if length:
            edges.append((item.end, 0, length, -index, item))
    for time, begins, length, _, item in sorted(edges, key=lambda edge: edge[:4]):
        packet = builder.add_packet()
        packet.timestamp, packet.trusted_packet_sequence_id = time, 1
        event = packet.track_event
        event.track_uuid = uuids[item.group, item.track]
        event.type = (TrackEvent.TYPE_SLICE_END if not begins else
                      TrackEvent.TYPE_SLICE_BEGIN if length else TrackEvent.TYPE_INSTANT)
        if not begins:
            continue
        event.name = item.name
        event.categories.append(item.group)
        for key, value in _plain(item.args).items():
            note = event.debug_annotations.add()
            note.name = key
            if isinstance(value, bool):
                note.bool_value = value
            elif isinstance(value, int):
                note.int_value = value
            else:
                note.string_value = str(value)
    Path(path).write_bytes(builder.serialize())


def _plain(args: dict[str, Any]) -> dict[str, Any]:
    return {key: value.item() if isinstance(value, np.generic) else value for key, value in args.items()}
