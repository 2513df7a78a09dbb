"""Recorded events become spans and blocks."""

import numpy as np
import pytest
from skipopu.host.program import Builder
from skipopu.host.timeline import Block, blocks, covered, exposed, spans
from skipopu.hw.isa import Unit
from skipopu.sim.native import EVENT


def events(*rows):
    """rows : (cycle, dict of fields)"""
    out = np.zeros(len(rows), EVENT)
    for record, (cycle, fields) in zip(out, rows):
        record["cycle"] = cycle
        for name, value in fields.items():
            record[name] = value
    return out


@pytest.fixture
def program():
    build = Builder()
    build.at(0, "attention", "k")
    build.emit("loadw", count=4)
    build.emit("matmul", heads=1, groups=1, rows=1, n_tiles=1, k_tiles=1, beats=1)
    build.at(0, "mlp", "down")
    build.emit("matmul", heads=1, groups=1, rows=1, n_tiles=1, k_tiles=1, beats=1)
    build.emit("addi", rd=8)
    build.at(-1, "head", "head")
    build.emit("halt")
    return build.program()


RUN = [(10, {"dispatch": 1, "pc": 0}), (11, {"dispatch": 1, "pc": 1, "start": 1 << Unit.LOAD}),
       (12, {"dispatch": 1, "pc": 2}), (13, {"start": 1 << Unit.COMPUTE}),
       (14, {"dispatch": 1, "pc": 3}), (20, {"done": 1 << Unit.LOAD}), (25, {"done": 1 << Unit.COMPUTE}),
       (26, {"start": 1 << Unit.COMPUTE}), (40, {"done": 1 << Unit.COMPUTE}), (41, {"dispatch": 1, "pc": 4})]


def test_spans_follow_the_order_of_each_unit(program):
    found = spans(program, events(*RUN))
    assert [(s.pc, s.unit, s.dispatch, s.start, s.done) for s in found] == [
        (0, Unit.LOAD, 10, 11, 20), (1, Unit.COMPUTE, 11, 13, 25), (2, Unit.COMPUTE, 12, 26, 40),
        (3, Unit.CONTROL, 14, 14, 14), (4, Unit.CONTROL, 41, 41, 41)]


def test_blocks_cut_the_run_without_gaps(program):
    found = blocks(program, spans(program, events(*RUN)))
    assert found == [Block(0, "attention", 10, 25), Block(0, "mlp", 25, 40), Block(-1, "head", 40, 41)]
    assert sum(block.cycles for block in found) == 41 - 10


def test_a_dropped_instruction_takes_no_command(program):
    rows = [(1, {"dispatch": 1, "pc": 1, "dropped": 1}), (2, {"dispatch": 1, "pc": 2}),
            (3, {"start": 1 << Unit.COMPUTE}), (9, {"done": 1 << Unit.COMPUTE})]
    first, second = spans(program, events(*rows))
    assert (first.unit, first.dropped, first.done) == (Unit.CONTROL, True, 1)
    assert (second.pc, second.start, second.done) == (2, 3, 9)


def test_a_dropped_load_ends_no_block():
    """It is in the program ahead of the block that it is dropped in."""
    build = Builder()
    build.at(-1, "gain")
    build.emit("loada", rows=1, count=1, beats=1)
    build.at(0, "mlp")
    build.emit("vnorm", heads=1, groups=1, rows=1, beats=1)
    build.at(-1, "gain")
    build.emit("loada", rows=1, count=1, beats=1)
    program, load, vector = build.program(), 1 << Unit.LOAD, 1 << Unit.VECTOR
    run = spans(program, events((0, {"dispatch": 1, "pc": 0}), (1, {"dispatch": 1, "pc": 1}), (2, {"start": load}),
                                (3, {"done": load}), (4, {"start": vector}), (9, {"done": vector}),
                                (20, {"dispatch": 1, "pc": 2, "dropped": 1})))
    assert blocks(program, run) == [Block(-1, "gain", 0, 0), Block(0, "mlp", 0, 9)]


def test_an_unfinished_run_is_refused(program):
    with pytest.raises(ValueError, match="instruction 2 has no end in 9 events: record whole runs"):
        spans(program, events(*RUN[:8], RUN[9]))


def test_an_empty_run_has_no_blocks(program):
    assert blocks(program, spans(program, events())) == []


def test_exposed_cycles_are_those_without_memory_and_compute():
    build = Builder()
    build.emit("vnorm", heads=1, groups=1, rows=1, beats=1)
    build.emit("matmul", heads=1, groups=1, rows=1, n_tiles=1, k_tiles=1, beats=1)
    build.emit("halt")
    vector, compute = 1 << Unit.VECTOR, 1 << Unit.COMPUTE
    rows = [(0, {"dispatch": 1, "pc": 0}), (1, {"dispatch": 1, "pc": 1, "memory": 1}), (2, {"start": vector}),
            (6, {"start": compute}), (10, {"done": compute}), (12, {"done": vector}),
            (20, {"dispatch": 1, "pc": 2})]
    found = events(*rows)
    # memory moves in cycle 1; vector alone in 2..5 and 10..11; nobody in 0 and 12..19
    assert exposed(build.program(), spans(build.program(), found), found) == {"vnorm": 6, "": 9}


@pytest.mark.parametrize("intervals, expected", [([], [0, 0, 0, 0]), ([(11, 13), (12, 13)], [0, 1, 1, 0]),
                                                 ([(0, 11), (13, 99)], [1, 0, 0, 1]), ([(12, 12)], [0, 0, 0, 0])])
def test_covered_cycles(intervals, expected):
    assert covered(intervals, 10, 14).tolist() == [bool(value) for value in expected]
