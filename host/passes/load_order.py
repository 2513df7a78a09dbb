"""No command may wait for a load that stands behind weights which it keeps from being taken.

Memory data arrives in program order. Weights leave the memory stream only as their MATMUL (or DROPW) takes them, and it
goes on taking them only while the vector instruction behind it takes its results. So whatever those two wait for must
be loaded before the first of these weights; else neither the load nor the matmul ever ends.

Every instruction gets the number of the last load it waits for: through its unit, which is in order, through hazards,
through streams, and through ``route``, behind which control sends nothing before the vector unit is empty.
"""

from __future__ import annotations

from collections import defaultdict

from skipopu.hw.isa import Unit

from .walk import CheckError

__all__ = ["LoadOrder"]


class LoadOrder:
    """Follows one run, instruction by instruction. depth : instructions that wait in the queue of a unit.

    loads : number of loads so far, which is the number of the last one
    """

    def __init__(self, depth: int) -> None:
        self.depth, self.loads = depth, 0
        self._units = dict.fromkeys(Unit, 0)
        self._read: dict[int, int] = defaultdict(int)  # resource bit -> last load that its readers wait for
        self._written: dict[int, int] = defaultdict(int)
        self._streams: list[tuple[int, int]] = []  # of each matmul: first load of its weights, last load it waits for

    def step(self, unit: Unit, fields: dict[str, int], weights: tuple[int, ...] = (), tile: int = 0,
             gives: bool = False, takes: bool = False) -> None:
        """One instruction that is not dropped.

        weights : numbers of the loads of the weights it takes; tile : of the KV tile it uses, 0 if none
        gives, takes : whether it delivers results of the array, or takes them
        Raises CheckError if it could wait for ever.
        """
        if unit == Unit.CONTROL:  # of these only `route` waits; what it waits for, everything behind it does
            if "layer" in fields:
                self._units = {each: max(last, self._units[Unit.VECTOR]) for each, last in self._units.items()}
            return
        reads, writes = fields["reads"], fields["writes"]
        waits = max([self._units[unit], *(self._written[bit] for bit in _bits(reads | writes)),
                     *(self._read[bit] for bit in _bits(writes))])
        if unit == Unit.LOAD:
            self.loads += 1
            waits = self.loads
        if unit == Unit.STORE:  # logits come straight from the vector unit
            waits = max(waits, self._units[Unit.VECTOR])
        if weights:
            _require(waits < weights[0], "it waits for a load that stands behind its weights")
            behind = self.loads - weights[0]
            _require(behind < self.depth, f"{behind} loads stand behind its weights, a queue holds {self.depth}")
        waits = max(waits, tile)
        if takes:
            first, last = self._streams.pop(0)
            _require(waits < first or waits <= last and not first,
                     "it waits for a load that stands behind the weights of the matmul whose results it takes")
            waits = max(waits, last)
        waits = max(waits, *weights, 0)
        if gives:
            self._streams.append((weights[0] if weights else 0, waits))
            _require(len(self._streams) <= self.depth, f"{len(self._streams)} matmuls stand before what takes their "
                                                       f"results, more than wait in a queue of {self.depth}")
        self._units[unit] = waits
        for marks, resources in ((self._read, reads), (self._written, writes)):
            for bit in _bits(resources):
                marks[bit] = max(marks[bit], waits)


def _bits(value: int) -> list[int]:
    """The single bits of a set of resources."""
    found = []
    while value:
        found.append(value & -value)
        value &= value - 1
    return found


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise CheckError(message)
