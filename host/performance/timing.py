"""How many cycles each step of the hardware takes: the one table that the cycle model is made from.

Numbers follow the blocks in ``hw/blocks``; `tests/host/test_cycles.py` compares what comes of them with the RTL.
"""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Cycles"]


@dataclass(frozen=True)
class Cycles:
    """Delays in cycles, by unit."""

    # control and fetch
    start: int = 1  #: added to the last cycle for the counter CYCLES
    wait: int = 1  #: token and route, beyond other scalar instructions
    halt: int = 2  #: last unit done to the end
    fetch: int = 1  #: last word of a line arrives to its first hit
    line_words: int = 8
    prefetch: int = 4  #: lines
    window: int = 16  #: commands of a unit that are not done
    unblock: int = 2  #: a unit is done to the pop of a command that waited for it
    # load unit
    fifo: int = 2  #: a beat arrives to when it can be taken
    runs: int = 16  #: that wait for the readers of a port
    record: int = 4  #: of each row of records with reuse
    hit: int = 3  #: a record of the history buffer is asked for to its first beat
    loaded: int = 4  #: last superbeat taken to done
    exponents: int = 1  #: more for a KV tile
    ahead: int = 8  #: loads requested and not delivered
    # compute unit
    shadow: bool = True  #: a tile is loaded while the one before is in use
    array: int = 16  #: last row of a column tile issued to its first result
    kv: int = 7  #: begin, or last superbeat of a KV tile, to its first superbeat at the array
    pace: int = 4  #: of beats in the vector unit, if compact
    # vector unit: last beat issued to done, and to when the next instruction may begin
    done: dict[str, int] = field(default_factory=lambda: {
        "vlogits": 9, "vmerge": 12, "vscore": 12, "vrope to KVOUT": 14, "vscale": 14, "vrope": 19, "vadd": 21,
        "vnorm": 21, "vprob": 25, "vswiglu": 30})
    scalars: dict[str, int] = field(default_factory=lambda: {"vnorm": 31, "vadd": 31, "vprob": 35})
    # store unit
    store: int = 4  #: command taken to the first beat handed over
    place: int = 4  #: the place of a record with reuse
    record_end: int = 3  #: last beat of a record to the one before the first of the next
    pack: int = 3  #: more for a record in a narrow format, beside its passes
    logits: int = 9  #: last beat of logits issued to the last superbeat handed over
    write: int = 3  #: last beat handed over to the first of its burst at the port
    settle: int = 2  #: last response to done
