"""Narrow KV records (`isa.KvFormat`): how long they are, and how FP16 ones become such.

A record is read from KVOUT twice, or with low planes three times: for the exponents, which stand first, and for each
plane. An element becomes a sign and a magnitude that is rounded half up and saturates (docs/numerics.md, KV records).
"""

import numpy as np
from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, enum, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..isa import KvFormat
from .kvintake import EXPONENT_BITS, KvLargest

__all__ = ["KvPacker", "record_beats", "unknown_format"]

_FURTHEST = 15  #: right shifts of twice a significand (12 bits) by so much or more are 0


def unknown_format(config, record_format):
    """The configuration has no such records."""
    return record_format == 3 if config.kv_narrow else record_format != KvFormat.FP16


def record_beats(config, shape, units):
    """Port beats of a record; ``shape`` has its format and heads, ``units`` is heads * head_beats."""
    if not config.kv_narrow:
        return 2 * units
    low = Mux(shape.format == KvFormat.B12, (units + 1) >> 1, 0)
    exponents = (shape.heads + config.beat_elements - 1) >> config.beat_elements.bit_length() - 1
    return Mux(shape.format == KvFormat.FP16, 2 * units, exponents + units + low)


class _Phase(enum.Enum, shape=2):
    EXPONENTS = 0
    HIGH = 1
    LOW = 2


#: Of a beat of KVOUT that is on its way: where it belongs, and what ends with it.
def _Place(config):
    return data.StructLayout({
        "phase": _Phase, "value": 1, "head": range(max(config.kvbuf_heads, 2)), "first": 1, "head_ends": 1, "ends": 1})


class KvPacker(wiring.Component):
    """Makes a narrow record of an FP16 one.

    A beat of KVOUT is taken in each cycle, except while the last exponents are found; the whole unit waits while a beat
    of the record does.

    Members
    -------
    start : In(1), begin a record of these ``heads``, In(8), ``head_beats``, In(8) and ``units``, In(16), their product,
        in a ``format``, In(KvFormat), none of which changes until the last beat
    at : Out(stream of 16 bits), which beat of the FP16 record to read next; i : In(stream of port beats), what was read
    o : Out(stream of port beats), the record
    """

    def __init__(self, *, config):
        self.config = config
        super().__init__({
            "start": In(1), "heads": In(8), "head_beats": In(8), "units": In(16), "format": In(KvFormat),
            "at": Out(stream.Signature(16)), "i": In(stream.Signature(config.port_bits)),
            "o": Out(stream.Signature(config.port_bits)),
        })

    @staticmethod
    def model(config, records, record_format):
        """uint16 [n, 2, heads, head_dim] (FP16 bits; K, V) -> uint8 [n, port beats, port bytes] in a narrow format."""
        count, _, heads, _ = records.shape
        bits = records.astype(np.int64)
        field = bits >> 10 & 31
        significand = (bits & 1023) + np.where(field > 0, 1024, 0)
        field = np.maximum(field, 1)
        shared = field.max(axis=-1)
        width = {KvFormat.B12: 11, KvFormat.B8: 7}[record_format]
        shift = np.minimum(shared[..., None] - field + 11 - width, 40)
        magnitude = np.minimum((2 * significand + (1 << shift)) >> shift + 1, (1 << width) - 1) << 11 - width
        high = magnitude >> 4 | bits >> 8 & 128
        low = (magnitude & 15).reshape(count, -1, 2)
        parts = [shared.transpose(0, 2, 1), high] + [low[..., 0] | low[..., 1] << 4] * (record_format == KvFormat.B12)
        beat = config.port_bits // 8
        beats = []
        for part in parts:
            flat = part.reshape(count, -1).astype(np.uint8)
            beats.append(np.pad(flat, ((0, 0), (0, -flat.shape[1] % beat))).reshape(count, -1, beat))
        return np.concatenate(beats, 1)

    def elaborate(self, platform):
        m = Module()
        config = self.config
        elements, port_bits = config.beat_elements, config.port_bits
        element_bits = elements.bit_length() - 1

        # ---- which beat is read next: keys and values of a head in turn for the exponents, then all keys, all values
        reading, next_place, head_beat = Signal(), Signal(_Place(config)), Signal(8)
        keys_at, values_at = Signal(16), Signal(16)
        last_head, settled = Signal(), Signal()
        taken = self.at.valid & self.at.ready
        scans = next_place.phase == _Phase.EXPONENTS
        m.d.comb += [
            self.at.valid.eq(reading & (scans | settled)),
            self.at.payload.eq(Mux(next_place.value, values_at, keys_at)),
            next_place.first.eq(head_beat == 0), next_place.head_ends.eq(head_beat == self.head_beats - 1),
            last_head.eq(next_place.head == self.heads - 1),
            next_place.ends.eq(next_place.head_ends & last_head & next_place.value),
        ]
        with m.If(taken):
            m.d.sync += head_beat.eq(Mux(next_place.head_ends, 0, head_beat + 1))
            with m.If(next_place.value):
                m.d.sync += values_at.eq(values_at + 1)
            with m.Else():
                m.d.sync += keys_at.eq(keys_at + 1)
            with m.If(next_place.head_ends):
                with m.If(scans):
                    m.d.sync += [next_place.value.eq(~next_place.value), next_place.head.eq(next_place.head
                                                                                          + next_place.value)]
                with m.Else():
                    m.d.sync += [next_place.value.eq(next_place.value ^ last_head),
                                 next_place.head.eq(Mux(last_head, 0, next_place.head + 1))]
        with m.If(self.start | (taken & next_place.ends)):
            m.d.sync += [next_place.value.eq(0), next_place.head.eq(0), keys_at.eq(0), values_at.eq(self.units)]
        with m.If(self.start):
            m.d.sync += [reading.eq(1), next_place.phase.eq(_Phase.EXPONENTS), head_beat.eq(0)]
        with m.Elif(taken & next_place.ends):
            with m.Switch(next_place.phase):
                with m.Case(_Phase.EXPONENTS):
                    m.d.sync += next_place.phase.eq(_Phase.HIGH)
                with m.Case(_Phase.HIGH):
                    m.d.sync += [next_place.phase.eq(_Phase.LOW), reading.eq(self.format == KvFormat.B12)]
                with m.Default():
                    m.d.sync += reading.eq(0)

        # ---- a beat that was read, with its head's exponent
        here = Signal(_Place(config))
        m.submodules.exponents = memory = Memory(shape=EXPONENT_BITS, depth=2 * config.kvbuf_heads, init=[])
        write, read = memory.write_port(), memory.read_port()
        with m.If(taken):
            m.d.sync += here.eq(next_place)
        m.d.comb += [read.en.eq(taken), read.addr.eq(Cat(next_place.value, next_place.head))]

        # ---- exponents: through the search for the largest, to the memory and into the record
        advance, accept = Signal(), Signal()
        m.d.comb += [advance.eq(~self.o.valid | self.o.ready), self.i.ready.eq(advance),
                     accept.eq(self.i.valid & advance)]
        m.submodules.largest = largest = KvLargest(elements=elements)
        at, valid, stages = here, Signal(), []
        m.d.comb += [valid.eq(accept & (here.phase == _Phase.EXPONENTS)), largest.beat.eq(self.i.payload)]
        enables = []
        for stage in range(largest.latency):
            enables.append(valid & advance)
            stage_valid, stage_at = Signal(name=f"valid{stage}"), Signal(_Place(config), name=f"at{stage}")
            with m.If(advance):
                m.d.sync += stage_valid.eq(valid)
                with m.If(valid):
                    m.d.sync += stage_at.eq(at)
            valid, at = stage_valid, stage_at
            stages.append(valid)
        running, exponent = Signal(EXPONENT_BITS), Signal(EXPONENT_BITS)
        before = Mux(at.first, 1, running)
        found = valid & advance & at.head_ends
        m.d.comb += [
            largest.en.eq(Cat(enables)), exponent.eq(Mux(largest.o > before, largest.o, before)),
            write.en.eq(found), write.addr.eq(Cat(at.value, at.head)), write.data.eq(exponent),
            settled.eq(~Cat(stages, self.i.valid & (here.phase == _Phase.EXPONENTS)).any()),
        ]
        with m.If(valid & advance):
            m.d.sync += running.eq(exponent)

        # ---- planes: significands and shifts, then magnitudes
        shifts, planes_valid, plane = Signal(), Signal(), Signal(_Place(config))
        m.d.comb += shifts.eq(accept & (here.phase != _Phase.EXPONENTS))
        with m.If(advance):
            m.d.sync += planes_valid.eq(shifts)
        with m.If(shifts):
            m.d.sync += plane.eq(here)
        short = self.format == KvFormat.B8
        high, low = [], []
        for index in range(elements):
            word = self.i.payload[16 * index:16 * index + 16]
            field, hidden = word[10:15], word[10:15].any()
            sign, significand = Signal(name=f"sign{index}"), Signal(11, name=f"significand{index}")
            shift, distance = Signal(4, name=f"shift{index}"), Signal(6, name=f"distance{index}")
            m.d.comb += distance.eq((read.data - Cat(field[0] | ~hidden, field[1:]))[:EXPONENT_BITS] + Mux(short, 4, 0))
            with m.If(shifts):
                m.d.sync += [sign.eq(word[15]), significand.eq(Cat(word[:10], hidden)),
                             shift.eq(Mux(distance > _FURTHEST, _FURTHEST, distance))]
            rounded = Signal(12, name=f"rounded{index}")
            m.d.comb += rounded.eq((Cat(Const(0, 1), significand) >> shift) + 1 >> 1)
            high.append(Cat(Mux(short, rounded[:7] | rounded[7].replicate(7), rounded[4:11]), sign))
            low.append(rounded[:4])

        # ---- the beat that is put together: exponents by the byte, high planes by half a beat, low ones by a quarter
        result, part = Signal(port_bits), Signal(2)
        give = Signal()
        m.d.comb += [self.o.payload.eq(result), give.eq(planes_valid | found)]
        with m.If(advance):
            m.d.sync += self.o.valid.eq(0)
        with m.If(found):
            index = Cat(at.value, at.head)[:element_bits + 1]
            with m.If(index == 0):
                m.d.sync += result.eq(exponent)
            with m.Else():
                m.d.sync += result.word_select(index, 8).eq(exponent)
            m.d.sync += self.o.valid.eq(index.all() | at.ends)
        with m.If(planes_valid & advance):
            is_low = plane.phase == _Phase.LOW
            m.d.sync += part.eq(part + 1)
            with m.If(part == 0):
                m.d.sync += result.eq(Mux(is_low, Cat(low), Cat(high)))
            with m.Elif(is_low):
                m.d.sync += result.word_select(part, port_bits // 4).eq(Cat(low))
            with m.Else():
                m.d.sync += result[port_bits // 2:].eq(Cat(high))
            with m.If(plane.ends | Mux(is_low, part == 3, part == 1)):
                m.d.sync += [self.o.valid.eq(1), part.eq(0)]
        return m
