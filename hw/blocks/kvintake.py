"""How the records of one port get into the KV buffer: from memory, or from the history buffer.

Each port takes its own records at its own pace, up to two tiles ahead of the array, those from memory and those from
the history buffer side by side: each kind in its order. A record from memory may be copied to the history buffer while
it passes. What the two do to one slot of it has an order, so that either can wait until the other has gone far enough.
While an FP16 record passes, the largest exponent of each of its heads is found; a narrow one has them in its first
beats (`isa.KvFormat`). Those are kept, and written with the first beats of the high planes, a head's two with each:
there are as many of these beats as heads, or more.
"""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..isa import KvFormat

__all__ = [
    "EXPONENT_BITS", "KvExponent", "KvIntake", "KvLargest", "KvPort", "KvRecord", "KvShape", "KvWrite", "PENDING",
    "TILE_NUMBERS", "count_bits",
]

EXPONENT_BITS = 5  #: of FP16
TILE_NUMBERS = 16  #: tiles are numbered modulo this: more than can be under way
PENDING = 32  #: more than the records of a port that were asked for and are not in the buffer


def count_bits(config):
    """Bits of the numbers of records: twice what either source of a port can be ahead of the other, two tiles."""
    return (PENDING + 4 * (config.tile_tokens // config.ports)).bit_length() + 1


def KvShape(config):
    """A KV tile: KV heads, FP16 port beats of a head, port beats of a record, rows of records; ports with a record in
    the last row; format of the records."""
    return data.StructLayout({
        "heads": 8, "head_beats": 8, "record": 16, "format": KvFormat,
        "rows": range(config.tile_tokens // config.ports + 1), "last": config.ports})


def KvRecord(config):
    """``rows`` records of one port, of a tile's row ``row`` and those that follow.

    at : first beat in the history buffer, of a record that comes from there, or that is copied there (``fill``)
    counts : it is one of the records that are numbered; those from the history buffer all are
    wait : not before ``after`` records (modulo) have come from the other source
    """
    rows = config.tile_tokens // config.ports
    return data.StructLayout({
        "tile": range(TILE_NUMBERS), "row": range(rows), "rows": range(rows + 1), "fill": 1,
        "at": range(max(config.buffer_beats, 2)), "counts": 1, "wait": 1, "after": count_bits(config)})


def KvWrite(config):
    """Where a beat goes, while ``en``: it is beat ``beat`` of the record in ``row`` of a slot. Beats of high planes
    count from 0, those of low planes from where the second part of a memory begins."""
    rows = config.tile_tokens // config.ports
    return data.StructLayout({"en": 1, "slot": 1, "row": range(rows), "beat": range(config.kv_beats)})


def KvExponent(config):
    """Exponents of a head: bit 0 of ``en`` is for that of the key, bit 1 for that of the value."""
    rows = config.tile_tokens // config.ports
    return data.StructLayout({"en": 2, "slot": 1, "row": range(rows), "head": range(max(config.kvbuf_heads, 2)),
                              "exponents": data.ArrayLayout(EXPONENT_BITS, 2)})


class KvLargest(wiring.Component):
    """Largest exponent field of the FP16 elements of a port beat, bit by bit from the highest one: a bit of the result
    is set if it is set in any element that has all bits of the result so far.

    Members
    -------
    beat : In(16 per element); en : In(latency), register enables; o : Out(5), ``latency`` cycles later
    """

    def __init__(self, *, elements):
        self._elements = elements
        super().__init__({"beat": In(16 * elements), "en": In(self.latency), "o": Out(EXPONENT_BITS)})

    @property
    def latency(self):
        """Stages, one for each factor of four elements. Of several the first finds one bit, the others the rest."""
        return (self._elements.bit_length() - 1 + 1) // 2

    def elaborate(self, platform):
        m = Module()
        # The highest bits are named by their places, all are gathered once: a simulator does either only when enabled.
        highest = sum(1 << at for at in range(14, 16 * self._elements, 16))
        bits = [Cat(self.beat[at + bit] for at in range(10, 16 * self._elements, 16)) for bit in range(EXPONENT_BITS)]
        result, still, top = (self.beat & highest).any(), None, bits.pop()

        def passed():
            """Elements that were still in and have the last bit of the result, or none has it."""
            reached = top | ~result[0].replicate(self._elements)
            return reached if still is None else still & reached

        for stage, enable in enumerate(self.en):
            ahead = (EXPONENT_BITS - 1) * (self.latency - 1 - stage) // max(self.latency - 1, 1)
            while len(bits) > ahead:
                found = Signal(name=f"found{len(bits) - 1}")
                if top is not None:
                    still = passed()
                top = bits.pop()
                m.d.comb += found.eq((top & still).any())
                result = Cat(found, result)
            if stage:
                still, top = passed(), None
            registers = []
            for name, value in (("result", result), ("still", still), ("top", top), *enumerate(bits)):
                register = value if value is None else Signal(len(value), name=f"stage{stage}_{name}")
                registers.append(register)
                if value is not None:
                    with m.If(enable):
                        m.d.sync += register.eq(value)
            result, still, top, *bits = registers
        m.d.comb += self.o.eq(result)
        return m


class KvIntake(wiring.Component):
    """Takes records in order, a beat a cycle, and says when each is in the buffer.

    Members
    -------
    records : In(stream of KvRecord), taken with the last beat; beats : In(stream of port beats)
    hold : In(1), no beat is taken in this cycle; taken : Out(1), one is
    tiles : In(4), how many tiles have been given a slot, modulo 16: the last two of them are being written
    shape : In(KvShape) per slot, of the tile in it; values : In per slot, its heads * head_beats
    write : Out(KvWrite), in the cycle of the beat; exponent : Out(KvExponent), ``latency`` cycles after the beat that
        ends a head of FP16, or with which a head's exponents are written
    finished : Out(2), per slot, a record and its exponents are in the buffer from the next cycle on
    """

    def __init__(self, *, config):
        self.config = config
        super().__init__({
            "records": In(stream.Signature(KvRecord(config))), "beats": In(stream.Signature(config.port_bits)),
            "hold": In(1), "taken": Out(1), "tiles": In(range(TILE_NUMBERS)), "shape": In(KvShape(config)).array(2),
            "values": In(16).array(2), "write": Out(KvWrite(config)), "exponent": Out(KvExponent(config)),
            "finished": Out(2),
        })

    def elaborate(self, platform):
        m = Module()
        config, record = self.config, self.records.payload
        m.submodules.largest = largest = KvLargest(elements=config.beat_elements)
        age = Signal(range(TILE_NUMBERS))  # 0: of the tile that got its slot last
        slot, shape = record.tile[0], Signal(KvShape(config))
        accept, record_ends, rows_end = Signal(), Signal(), Signal()
        passed, beat = Signal.like(record.rows), Signal(16)
        # part: 0 keys, 1 values, 2 padding of the record; of a narrow one 0 high planes, 1 low planes
        head_beat, head, part = Signal(8), Signal(8), Signal(2)
        head_ends, part_ends = Signal(), Signal()
        narrow, leading, position, pair = Signal(), Signal(), Signal(16), Signal(2 * EXPONENT_BITS)
        m.d.comb += [
            age.eq(self.tiles - 1 - record.tile), shape.eq(Mux(slot, self.shape[1], self.shape[0])),
            self.beats.ready.eq(self.records.valid & (age < 2) & ~self.hold), self.taken.eq(accept),
            accept.eq(self.beats.valid & self.beats.ready),
            record_ends.eq(beat + 1 == shape.record), rows_end.eq(passed + 1 == record.rows),
            self.records.ready.eq(accept & record_ends & rows_end),
            head_ends.eq(head_beat + 1 == shape.head_beats), part_ends.eq(head_ends & (head + 1 == shape.heads)),
            self.write.en.eq(accept & ~part[1] & ~leading), self.write.slot.eq(slot),
            self.write.row.eq(record.row + passed),
            self.write.beat.eq(Mux(narrow, Cat(position[:len(self.write.beat) - 1], part[0]), beat)),
        ]
        with m.If(accept):
            m.d.sync += [beat.eq(beat + 1), head_beat.eq(head_beat + 1)]
            with m.If(head_ends):
                m.d.sync += [head_beat.eq(0), head.eq(head + 1)]
            with m.If(part_ends & ~part[1] & ~narrow):
                m.d.sync += [head.eq(0), part.eq(part + 1)]
        if config.kv_narrow:
            self._narrow(m, shape, slot, accept, beat, part, narrow, leading, position, pair)
        with m.If(accept):
            with m.If(record_ends):
                m.d.sync += [beat.eq(0), head_beat.eq(0), head.eq(0), part.eq(0),
                             passed.eq(Mux(rows_end, 0, passed + 1))]

        # Where a beat belongs follows it through the search.
        place = data.StructLayout({"slot": 1, "row": self.write.row.shape(), "head": 8, "en": 2, "first": 1, "last": 1,
                                   "pair": 2 * EXPONENT_BITS if config.kv_narrow else 0})
        at, valid, enables = Signal(place), accept, []
        m.d.comb += [
            at.slot.eq(slot), at.row.eq(self.write.row), at.head.eq(head), at.first.eq(head_beat == 0),
            at.en.eq(Mux(head_ends & ~part[1], Cat(~part[0], part[0]), 0)), at.last.eq(record_ends),
            largest.beat.eq(self.beats.payload), at.pair.eq(pair),
        ]
        with m.If(narrow):
            m.d.comb += [at.head.eq(position),
                         at.en.eq((~leading & (part == 0) & (position < shape.heads)).replicate(2))]
        for stage in range(largest.latency):
            enables.append(valid)
            stage_valid, stage_at = Signal(name=f"valid{stage}"), Signal(place, name=f"at{stage}")
            m.d.sync += stage_valid.eq(valid)
            with m.If(valid):
                m.d.sync += stage_at.eq(at)
            valid, at = stage_valid, stage_at
        m.d.comb += largest.en.eq(Cat(enables))
        running, found = Signal(EXPONENT_BITS), Signal(EXPONENT_BITS)
        both = at.en.all() if config.kv_narrow else 0
        m.d.comb += [
            found.eq(_larger(largest.o, Mux(at.first, 1, running))),
            self.exponent.exponents.as_value().eq(Mux(both, at.pair, found.replicate(2))),
            self.exponent.slot.eq(at.slot), self.exponent.row.eq(at.row), self.exponent.head.eq(at.head),
            self.exponent.en.eq(Mux(valid, at.en, 0)), self.finished.eq((valid & at.last) << at.slot),
        ]
        with m.If(valid):
            m.d.sync += running.eq(found)
        return m

    def _narrow(self, m, shape, slot, accept, beat, part, narrow, leading, position, pair):
        """Parts of a ``narrow`` record: ``leading`` beats of exponents, high planes, low planes; ``position`` counts
        the beats of one. ``pair`` : exponents of the head with the number of the position."""
        elements = self.config.beat_elements
        behind, ends, values = Signal(), Signal(), Signal(16)  # behind the exponents
        kept = [Signal(2 * EXPONENT_BITS * elements, name=f"kept{i}")
                for i in range(-(-self.config.kvbuf_heads // elements))]
        element_bits = elements.bit_length() - 1
        m.d.comb += [
            narrow.eq(shape.format != KvFormat.FP16), leading.eq(narrow & ~behind),
            values.eq(Mux(slot, self.values[1], self.values[0])),
            ends.eq(position == ((values - 1) >> part[0])[:16]),
            pair.eq(Cat(kept).word_select(position[:(elements * len(kept) - 1).bit_length()], 2 * EXPONENT_BITS)),
        ]
        for index, exponents in enumerate(kept):
            with m.If(accept & leading & (beat == index)):
                m.d.sync += exponents.eq(
                    Cat(self.beats.payload[at:at + EXPONENT_BITS] for at in range(0, 16 * elements, 8)))
        with m.If(accept & narrow):
            m.d.sync += position.eq(position + 1)
            with m.If(leading):
                m.d.sync += [position.eq(0), behind.eq(beat == (shape.heads - 1) >> element_bits)]
            with m.Elif(ends & ~part[1]):
                m.d.sync += [position.eq(0), part.eq(Mux((shape.format == KvFormat.B12) & ~part[0], 1, 2))]
            with m.If(beat + 1 == shape.record):
                m.d.sync += [position.eq(0), behind.eq(0)]


class KvPort(wiring.Component):
    """Both sources of one port, and its history buffer.

    Members
    -------
    records, beats : In(stream of KvRecord) and In(stream of port beats), from memory
    hits : In(stream of KvRecord), from the history buffer
    tiles, shape, values : as in KvIntake
    write, written : Out(KvWrite) and Out(port beat) for even and for odd rows
    exponent : Out(KvExponent) for even and for odd rows
    finished : Out per slot, how many records and their exponents are in the buffer from the next cycle on
    buffered : Out(1), a beat came from the history buffer
    """

    def __init__(self, *, config):
        self.config = config
        super().__init__({
            "records": In(stream.Signature(KvRecord(config))), "beats": In(stream.Signature(config.port_bits)),
            "hits": In(stream.Signature(KvRecord(config))),
            "tiles": In(range(TILE_NUMBERS)), "shape": In(KvShape(config)).array(2), "values": In(16).array(2),
            "write": Out(KvWrite(config)).array(2), "written": Out(config.port_bits).array(2),
            "exponent": Out(KvExponent(config)).array(2),
            "finished": Out(2).array(2), "buffered": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        m.submodules.memory = memory = KvIntake(config=config)
        wiring.connect(m, wiring.flipped(self.records), memory.records)
        wiring.connect(m, wiring.flipped(self.beats), memory.beats)
        sources = [memory]
        if config.buffer_beats:
            m.submodules.buffer = buffer = Memory(shape=config.port_bits, depth=config.buffer_beats, init=[])
            m.submodules.history = history = KvIntake(config=config)
            sources.append(history)
            self._buffer(m, memory, history, buffer)
        for source in sources:
            m.d.comb += [source.tiles.eq(self.tiles),
                         *(port.eq(shape) for port, shape in zip(source.shape, self.shape)),
                         *(port.eq(count) for port, count in zip(source.values, self.values))]
        for i in range(2):
            m.d.comb += self.finished[i].eq(sum(source.finished[i] for source in sources))
        one, other = sources[0], sources[-1]  # never write to the same rows at once
        for parity in range(2):
            for name in ("write", "exponent"):
                first, second, here = getattr(one, name), getattr(other, name), getattr(self, name)[parity]
                mine = [there.en.any() & (there.row[0] == parity) for there in (first, second)]
                m.d.comb += [here.as_value().eq(Mux(mine[0], first.as_value(), second.as_value())),
                             here.en.eq(Mux(mine[0], first.en, Mux(mine[1], second.en, 0)))]
            m.d.comb += self.written[parity].eq(Mux(
                one.write.en & (one.write.row[0] == parity), one.beats.payload, other.beats.payload))
        return m

    def _buffer(self, m, memory, history, buffer):
        """Copies of what comes from memory, and records that come from the copies."""
        fill, read = buffer.write_port(), buffer.read_port()
        record, hit = self.records.payload, self.hits.payload
        # Beats of the record, and how many records are through, from memory and from the history buffer.
        copied, fetched, read_count, hit_count = (Signal(name=name, shape=shape) for name, shape in (
            ("copied", 16), ("fetched", 16), ("read_count", count_bits(self.config)),
            ("hit_count", count_bits(self.config))))

        def early(entry, count):
            return entry.wait & (count - entry.after)[:len(count)][-1]

        m.d.comb += [
            memory.hold.eq(early(record, hit_count)),
            fill.en.eq(memory.taken & record.fill), fill.addr.eq(record.at + copied), fill.data.eq(self.beats.payload),
        ]
        with m.If(memory.taken & record.counts):
            m.d.sync += copied.eq(copied + 1)
        with m.If(self.records.valid & self.records.ready):
            m.d.sync += [copied.eq(0), read_count.eq(read_count + record.counts)]

        # A beat is read while the one before is handed on; `entry` is the record that the latter belongs to.
        entry, length, held = Signal(KvRecord(self.config)), Signal(16), Signal()
        fetch, last = Signal(), Signal()
        collides = memory.write.en & (memory.write.row[0] == history.write.row[0])
        m.d.comb += [
            length.eq(Mux(hit.tile[0], self.shape[1].record, self.shape[0].record)),
            fetch.eq(self.hits.valid & ((self.tiles - 1 - hit.tile)[:4] < 2) & ~early(hit, read_count)
                     & (~held | history.taken)),
            last.eq(fetched + 1 == length), self.hits.ready.eq(fetch & last),
            read.en.eq(fetch), read.addr.eq(hit.at + fetched),
            history.beats.valid.eq(held), history.beats.payload.eq(read.data),
            history.records.valid.eq(held), history.records.payload.eq(entry), history.hold.eq(collides),
            self.buffered.eq(history.taken),
        ]
        with m.If(fetch | history.taken):
            m.d.sync += held.eq(fetch)
        with m.If(fetch):
            m.d.sync += [fetched.eq(Mux(last, 0, fetched + 1)), entry.eq(hit)]
        with m.If(history.taken & history.records.ready):
            m.d.sync += hit_count.eq(hit_count + 1)


def _larger(a, b):
    return Mux(a > b, a, b)
