"""How the records of one port get into the KV buffer: which beat of which head arrives, and the heads' exponents.

Each port takes its own records at its own pace, up to two tiles ahead of the array. While a record passes, a tree of
maxima finds the largest exponent of each of its heads.
"""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from .trees import tree

__all__ = ["EXPONENT_BITS", "KvExponent", "KvIntake", "KvLargest", "KvRecord", "KvShape", "KvWrite", "TILE_NUMBERS"]

EXPONENT_BITS = 5  #: of FP16
TILE_NUMBERS = 16  #: tiles are numbered modulo this: more than can be under way


def KvShape(config):
    """A KV tile: KV heads, port beats of a head and of a record, rows of records; ports with a record in the last row.
    """
    return data.StructLayout({
        "heads": 8, "head_beats": 8, "record": 16, "rows": range(config.tile_tokens // config.ports + 1),
        "last": config.ports})


def KvRecord(config):
    """``rows`` records of one port, of a tile's row ``row`` and those that follow."""
    rows = config.tile_tokens // config.ports
    return data.StructLayout({"tile": range(TILE_NUMBERS), "row": range(rows), "rows": range(rows + 1)})


def KvWrite(config):
    """Beat ``beat`` of the record in ``row`` of a slot, while ``en``."""
    rows = config.tile_tokens // config.ports
    beats = 2 * config.kvbuf_heads * config.lanes // config.beat_elements
    return data.StructLayout({"en": 1, "slot": 1, "row": range(rows), "beat": range(beats), "data": config.port_bits})


def KvExponent(config):
    """The exponent of a head: ``en`` is 1 for keys, 2 for values."""
    rows = config.tile_tokens // config.ports
    return data.StructLayout({"en": 2, "slot": 1, "row": range(rows), "head": range(max(config.kvbuf_heads, 2)),
                              "exponent": EXPONENT_BITS})


class KvLargest(wiring.Component):
    """Largest exponent field of the FP16 elements of a port beat.

    Members
    -------
    beat : In(16 per element); en : In(latency), register enables; o : Out(5), ``latency`` cycles later
    """

    def __init__(self, *, elements):
        self._elements = elements
        super().__init__({"beat": In(16 * elements), "en": In(self.latency), "o": Out(EXPONENT_BITS)})

    @property
    def latency(self):
        """Stages of two comparisons each."""
        return (self._elements.bit_length() - 1 + 1) // 2

    def elaborate(self, platform):
        m = Module()
        level = [self.beat[at:at + EXPONENT_BITS] for at in range(10, 16 * self._elements, 16)]
        for enable in self.en:
            groups = [level[i:i + 4] for i in range(0, len(level), 4)]
            level = [Signal(EXPONENT_BITS, name=f"largest{len(groups)}_{i}") for i in range(len(groups))]
            with m.If(enable):
                m.d.sync += [out.eq(tree(group, _larger)) for group, out in zip(groups, level)]
        m.d.comb += self.o.eq(level[0])
        return m


class KvIntake(wiring.Component):
    """Takes records in order, a beat a cycle, and says when each is in the buffer.

    Members
    -------
    records : In(stream of KvRecord), taken with the last beat; beats : In(stream of port beats)
    tiles : In(4), how many tiles have been given a slot, modulo 16: the last two of them are being written
    shape : In(KvShape) per slot, of the tile in it
    write : Out(KvWrite), in the cycle of the beat; exponent : Out(KvExponent), ``latency`` cycles after a head's last
    finished : Out(2), per slot, a record and its exponents are in the buffer from the next cycle on
    """

    def __init__(self, *, config):
        self.config = config
        super().__init__({
            "records": In(stream.Signature(KvRecord(config))), "beats": In(stream.Signature(config.port_bits)),
            "tiles": In(range(TILE_NUMBERS)), "shape": In(KvShape(config)).array(2),
            "write": Out(KvWrite(config)), "exponent": Out(KvExponent(config)), "finished": Out(2),
        })

    def elaborate(self, platform):
        m = Module()
        config, record = self.config, self.records.payload
        m.submodules.largest = largest = KvLargest(elements=config.beat_elements)
        age = Signal(range(TILE_NUMBERS))  # 0: of the tile that got its slot last
        slot, shape = record.tile[0], Signal(KvShape(config))
        accept, record_ends, rows_end = Signal(), Signal(), Signal()
        passed, beat = Signal.like(record.rows), Signal(16)
        head_beat, head, part = Signal(8), Signal(8), Signal(2)  # part: 0 keys, 1 values, 2 padding of the record
        head_ends, part_ends = Signal(), Signal()
        m.d.comb += [
            age.eq(self.tiles - 1 - record.tile), shape.eq(Mux(slot, self.shape[1], self.shape[0])),
            self.beats.ready.eq(self.records.valid & (age < 2)), accept.eq(self.beats.valid & self.beats.ready),
            record_ends.eq(beat == shape.record - 1), rows_end.eq(passed == record.rows - 1),
            self.records.ready.eq(accept & record_ends & rows_end),
            head_ends.eq(head_beat == shape.head_beats - 1), part_ends.eq(head_ends & (head == shape.heads - 1)),
            self.write.en.eq(accept & ~part[1]), self.write.slot.eq(slot), self.write.row.eq(record.row + passed),
            self.write.beat.eq(beat), self.write.data.eq(self.beats.payload),
        ]
        with m.If(accept):
            m.d.sync += [beat.eq(beat + 1), head_beat.eq(head_beat + 1)]
            with m.If(head_ends):
                m.d.sync += [head_beat.eq(0), head.eq(head + 1)]
            with m.If(part_ends & ~part[1]):
                m.d.sync += [head.eq(0), part.eq(part + 1)]
            with m.If(record_ends):
                m.d.sync += [beat.eq(0), head_beat.eq(0), head.eq(0), part.eq(0),
                             passed.eq(Mux(rows_end, 0, passed + 1))]

        # Where a beat belongs follows it through the tree.
        place = data.StructLayout({"slot": 1, "row": self.write.row.shape(), "head": 8, "en": 2, "first": 1, "last": 1})
        at, valid, enables = Signal(place), accept, []
        m.d.comb += [
            at.slot.eq(slot), at.row.eq(self.write.row), at.head.eq(head), at.first.eq(head_beat == 0),
            at.en.eq(Mux(head_ends & ~part[1], Cat(~part[0], part[0]), 0)), at.last.eq(record_ends),
            largest.beat.eq(self.beats.payload),
        ]
        for stage in range(largest.latency):
            enables.append(valid)
            stage_valid, stage_at = Signal(name=f"valid{stage}"), Signal(place, name=f"at{stage}")
            m.d.sync += stage_valid.eq(valid)
            with m.If(valid):
                m.d.sync += stage_at.eq(at)
            valid, at = stage_valid, stage_at
        m.d.comb += largest.en.eq(Cat(enables))
        running = Signal(EXPONENT_BITS)
        m.d.comb += [
            self.exponent.exponent.eq(_larger(largest.o, Mux(at.first, 1, running))),
            self.exponent.slot.eq(at.slot), self.exponent.row.eq(at.row), self.exponent.head.eq(at.head),
            self.exponent.en.eq(Mux(valid, at.en, 0)), self.finished.eq((valid & at.last) << at.slot),
        ]
        with m.If(valid):
            m.d.sync += running.eq(self.exponent.exponent)
        return m


def _larger(a, b):
    return Mux(a > b, a, b)
