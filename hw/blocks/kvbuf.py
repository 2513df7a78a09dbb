"""KV buffer: two tiles of keys and values, aligned to one exponent per (token, head) on their way to the array.

Memory holds FP16; the array multiplies integers of KV_BITS. While a tile is written the largest exponent of each head
of each token is found; while it is read every element is shifted to that exponent (docs/numerics.md, Keys and values).

A word of the buffer is one superbeat: beat b of the records of tokens r*P .. r*P + P-1, at address {slot, r, b}. All
sizes are powers of two, so a tile's addresses are joined fields and one addition.
"""

import numpy as np
from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..formats import KV_BITS
from .trees import tree

__all__ = ["KvBuffer", "KvLargest", "KvRequest", "KvShift", "KvTile", "KvWrite"]

_SIGNIFICAND = 11  #: bits of an FP16 significand with its hidden bit
_BELOW = KV_BITS - 1 - _SIGNIFICAND  #: places of a mantissa below the significand of the largest exponent
_ES = 5  #: bits of an exponent


def KvWrite(config):
    """One superbeat of a KV tile; ``last`` ends the tile."""
    return data.StructLayout({"data": 8 * config.superbeat_bytes, "last": 1})


def KvRequest(config):
    """Which array tile (n, k) to deliver, of the keys (value 0) or the values (value 1) of a head."""
    return data.StructLayout({"slot": 1, "value": 1, "head": 8, "n": 14, "k": 12})


def KvTile(config):
    """One superbeat of mantissas, index p*E + e: element e of the beat of port p; ``last`` ends the array tile."""
    elements = config.ports * config.beat_elements
    return data.StructLayout({"data": data.ArrayLayout(signed(KV_BITS), elements), "last": 1})


class KvLargest(wiring.Component):
    """Largest exponent field of the FP16 elements of a port beat.

    Members
    -------
    beat : In(16 per element); en : In(latency), register enables; o : Out(5), ``latency`` cycles later
    """

    def __init__(self, *, elements):
        self._elements = elements
        super().__init__({"beat": In(16 * elements), "en": In(self.latency), "o": Out(_ES)})

    @property
    def latency(self):
        """Stages of two comparisons each."""
        return (self._elements.bit_length() - 1 + 1) // 2

    def elaborate(self, platform):
        m = Module()
        level = [self.beat[at:at + _ES] for at in range(10, 16 * self._elements, 16)]
        for enable in self.en:
            groups = [level[i:i + 4] for i in range(0, len(level), 4)]
            level = [Signal(_ES, name=f"largest{len(groups)}_{i}") for i in range(len(groups))]
            with m.If(enable):
                m.d.sync += [out.eq(tree(group, _larger)) for group, out in zip(groups, level)]
        m.d.comb += self.o.eq(level[0])
        return m


class KvShift(wiring.Component):
    """The FP16 elements of a port beat as mantissas of one exponent (docs/numerics.md, Keys and values).

    Members
    -------
    beat : In(16 per element); shared : In(5), the exponent; zero : In(1), the beat is beyond the head's end
    en : In(2), register enables; o : Out(signed(KV_BITS)) per element, 2 cycles later
    """

    def __init__(self, *, elements):
        self._elements = elements
        super().__init__({"beat": In(16 * elements), "shared": In(_ES), "zero": In(1), "en": In(2),
                          "o": Out(signed(KV_BITS)).array(elements)})

    def elaborate(self, platform):
        m = Module()
        for index in range(self._elements):
            word = self.beat[16 * index:16 * index + 16]
            field, hidden = word[10:15], word[10:15].any()
            sign, significand = Signal(name=f"sign{index}"), Signal(_SIGNIFICAND, name=f"significand{index}")
            shift = Signal(range(KV_BITS + 1), name=f"shift{index}")
            # Written out twice below: a simulator then evaluates it only when the register is enabled.
            distance = (self.shared - Cat(field[0] | ~hidden, field[1:]))[:_ES]
            with m.If(self.en[0]):
                m.d.sync += [
                    sign.eq(word[15]), significand.eq(Mux(self.zero, 0, Cat(word[:10], hidden))),
                    shift.eq(Mux(distance > KV_BITS, KV_BITS, distance)),  # further is 0 as well
                ]
            mantissa = Signal(signed(KV_BITS), name=f"mantissa{index}")
            m.d.comb += self.o[index].eq(mantissa)
            # Rounding and sign in one addition: with x + 1 = -~x the mantissa is (x + 1) >> 1 or (~x + 1) >> 1.
            shifted = Cat((significand << _BELOW + 1) >> shift, Const(0, 1)) ^ sign.replicate(KV_BITS + 1)
            with m.If(self.en[1]):
                m.d.sync += mantissa.eq((shifted.as_signed() + 1) >> 1)
        return m


class KvBuffer(wiring.Component):
    """Two slots, filled and released in turn; a request waits until its slot is full.

    Keys: tokens n*N .. n*N + N-1 (outer, P at a time), dimensions k*K .. k*K + K-1 (inner, E at a time).
    Values: tokens k*K .. (outer), dimensions n*N .. (inner); dimensions beyond the head are 0.
    One superbeat per cycle, also across requests; ``latency`` cycles after a request was taken by an idle buffer.

    Members
    -------
    write : In(stream of KvWrite), superbeat r*record + b of a tile; waits while both slots are taken
    heads, head_beats, record : KV heads, port beats of a head and of a record; stable while the tile is written
    release : In(1), pulse: the older tile is no longer needed
    full : Out(2), per slot: a whole tile with its exponents is there
    request, tile : In(stream of KvRequest), Out(stream of KvTile)
    k_slot, k_head, k_exponents and v_... : exponents of one head, 5 bits per token, ``exponent_latency`` cycles later
    """

    latency = 6
    exponent_latency = 0

    def __init__(self, *, config):
        self.config = config
        exponents = {"slot": In(1), "head": In(8), "exponents": Out(_ES * config.tile_tokens)}
        super().__init__({
            "write": In(stream.Signature(KvWrite(config))), "heads": In(8), "head_beats": In(8), "record": In(16),
            "release": In(1), "full": Out(2),
            "request": In(stream.Signature(KvRequest(config))), "tile": Out(stream.Signature(KvTile(config))),
            **{f"{side}_{name}": flow for side in "kv" for name, flow in exponents.items()},
        })

    @staticmethod
    def model(records):
        """What the buffer computes: records uint16 [tokens, 2, heads, head_dim] (FP16 bits; K, V)
        -> (exponents int [tokens, 2, heads], mantissas int with the shape of records)."""
        bits = records.astype(np.int64)
        field = bits >> 10 & 31
        significand = (bits & 1023) + np.where(field > 0, 1024, 0)
        exponent = np.maximum(field, 1)
        shared = exponent.max(axis=-1)
        # floor(x / 2^s + 1/2) = (x * 2 + 2^s) >> (s + 1)
        shift = shared[..., None] - exponent
        magnitude = ((significand << _BELOW + 1) + (1 << shift)) >> (shift + 1)
        return shared, np.where(bits >> 15 & 1, -magnitude, magnitude)

    def elaborate(self, platform):
        m = Module()
        config = self.config
        rows = config.tile_tokens // config.ports
        beats = 2 * config.kvbuf_heads * config.lanes // config.beat_elements  # of a record, at most
        beat_bits, row_bits = beats.bit_length() - 1, rows.bit_length() - 1

        m.submodules.tiles = tiles = Memory(shape=8 * config.superbeat_bytes, depth=2 * rows * beats, init=[])
        tile_write, tile_read = tiles.write_port(), tiles.read_port()
        layout = data.ArrayLayout(_ES * config.ports, rows)
        m.submodules.k_exponents = k_memory = Memory(shape=layout, depth=2 * config.kvbuf_heads, init=[])
        m.submodules.v_exponents = v_memory = Memory(shape=layout, depth=2 * config.kvbuf_heads, init=[])
        head_bits = config.kvbuf_heads.bit_length() - 1
        for side, memory in (("k", k_memory), ("v", v_memory)):
            port = memory.read_port(domain="comb")
            m.d.comb += [port.addr.eq(Cat(getattr(self, f"{side}_head")[:head_bits], getattr(self, f"{side}_slot"))),
                         getattr(self, f"{side}_exponents").eq(port.data)]

        # ---- slots ---------------------------------------------------------------------------------------------
        taken = Signal(2)  # written completely, or further; `full` follows when the last exponents are stored
        write_slot, release_slot = Signal(), Signal()
        head_beats = Array([Signal(8, name=f"head_beats{i}") for i in range(2)])
        values_start = Array([Signal(beat_bits, name=f"values_start{i}") for i in range(2)])
        with m.If(self.release):
            m.d.sync += [taken.bit_select(release_slot, 1).eq(0), self.full.bit_select(release_slot, 1).eq(0),
                         release_slot.eq(~release_slot)]

        # ---- write: data at once, exponents through a tree of maxima ------------------------------------------
        accept = Signal()
        row, beat = Signal(max(row_bits, 1)), Signal(16)
        head_beat, head, part = Signal(8), Signal(8), Signal(2)  # part: 0 keys, 1 values, 2 padding of the record
        head_ends, part_ends = Signal(), Signal()
        m.d.comb += [
            self.write.ready.eq(~taken.bit_select(write_slot, 1)),
            accept.eq(self.write.valid & self.write.ready),
            head_ends.eq(head_beat == self.head_beats - 1), part_ends.eq(head_ends & (head == self.heads - 1)),
            tile_write.en.eq(accept & ~part[1]), tile_write.data.eq(self.write.payload.data),
            tile_write.addr.eq(Cat(beat[:beat_bits], row[:row_bits], write_slot)),
        ]
        with m.If(accept):
            m.d.sync += [beat.eq(beat + 1), head_beat.eq(head_beat + 1)]
            with m.If(head_ends):
                m.d.sync += [head_beat.eq(0), head.eq(head + 1)]
            with m.If(part_ends & ~part[1]):
                m.d.sync += [head.eq(0), part.eq(part + 1)]
                with m.If(part == 0):
                    m.d.sync += [values_start[write_slot].eq(beat + 1), head_beats[write_slot].eq(self.head_beats)]
            with m.If(self.write.payload.last | (beat == self.record - 1)):
                m.d.sync += [beat.eq(0), row.eq(row + 1), head_beat.eq(0), head.eq(0), part.eq(0)]
            with m.If(self.write.payload.last):
                m.d.sync += [row.eq(0), write_slot.eq(~write_slot), taken.bit_select(write_slot, 1).eq(1)]

        place = data.StructLayout({"slot": 1, "row": row.shape(), "head": 8, "part": 2, "first": 1, "ends": 1,
                                   "last": 1})
        at = Signal(place)
        m.d.comb += [at.slot.eq(write_slot), at.row.eq(row), at.head.eq(head), at.part.eq(part),
                     at.first.eq(head_beat == 0), at.ends.eq(head_ends), at.last.eq(self.write.payload.last)]
        valid = accept
        levels = []
        for p in range(config.ports):
            m.submodules[f"largest{p}"] = largest = KvLargest(elements=config.beat_elements)
            m.d.comb += largest.beat.eq(self.write.payload.data[p * config.port_bits:][:config.port_bits])
            levels.append(largest)
        enables = []
        for _ in range(levels[0].latency):
            enables.append(valid)
            stage_valid, stage_at = Signal(), Signal(place)
            m.d.sync += stage_valid.eq(valid)
            with m.If(valid):
                m.d.sync += stage_at.eq(at)
            valid, at = stage_valid, stage_at
        m.d.comb += [largest.en.eq(Cat(*enables)) for largest in levels]
        running = [Signal(_ES, name=f"exponent{p}") for p in range(config.ports)]
        largest = [_larger(level.o, Mux(at.first, 1, before)) for level, before in zip(levels, running)]
        with m.If(valid):
            m.d.sync += [before.eq(value) for before, value in zip(running, largest)]
            with m.If(at.last):
                m.d.sync += self.full.bit_select(at.slot, 1).eq(1)
        for part_index, memory in enumerate((k_memory, v_memory)):
            port = memory.write_port(granularity=1)
            m.d.comb += [port.addr.eq(Cat(at.head[:head_bits], at.slot)),
                         port.en.eq((valid & at.ends & (at.part == part_index)) << at.row[:row_bits])]
            m.d.comb += [port.data[r].eq(Cat(*largest)) for r in range(rows)]

        # ---- read: request, first beat of the head, address, memory, shift amounts, shifts ------------------------
        request, waiting, prepared = Signal(KvRequest(config)), Signal(), Signal()
        tile, active = Signal(KvRequest(config)), Signal()
        head_start, start = Signal(beat_bits), Signal(beat_bits)
        total = config.lanes * config.columns // (config.ports * config.beat_elements)
        count = Signal(total.bit_length() - 1)
        take, issue, ends, advance = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            advance.eq(~self.tile.valid | self.tile.ready),
            self.request.ready.eq(~waiting),
            take.eq(prepared & (~active | (issue & ends))),
            issue.eq(active & advance),
            ends.eq(count == total - 1),
        ]
        with m.If(take):
            m.d.sync += [waiting.eq(0), prepared.eq(0), active.eq(1), tile.eq(request), count.eq(0),
                         start.eq(head_start + Mux(request.value, values_start[request.slot], 0))]
        with m.Else():
            # Only a full slot knows how long its heads are.
            m.d.sync += prepared.eq(waiting & self.full.bit_select(request.slot, 1))
            with m.If(issue):
                m.d.sync += [active.eq(~ends), count.eq(count + 1)]
        with m.If(waiting):
            m.d.sync += head_start.eq(request.head * head_beats[request.slot])
        with m.Elif(self.request.valid):
            m.d.sync += [waiting.eq(1), request.eq(self.request.payload)]

        keys_inner = (config.lanes // config.beat_elements).bit_length() - 1
        values_inner = (config.columns // config.beat_elements).bit_length() - 1
        keys_offset, values_offset = Cat(count[:keys_inner], tile.k), Cat(count[:values_inner], tile.n)
        keys_row, values_row = Cat(count[keys_inner:], tile.n), Cat(count[values_inner:], tile.k)
        offset = Signal(max(len(keys_offset), len(values_offset)))
        side = data.StructLayout({"zero": 1, "row": row.shape(), "value": 1, "last": 1})
        a_side, b_side, c_last = Signal(side), Signal(side), Signal()
        b_valid, c_valid = Signal(), Signal()
        m.d.comb += [
            offset.eq(Mux(tile.value, values_offset, keys_offset)),
            a_side.zero.eq(offset >= head_beats[tile.slot]),  # a head may be shorter than the array is wide
            a_side.row.eq(Mux(tile.value, values_row, keys_row)[:row_bits]),
            a_side.value.eq(tile.value), a_side.last.eq(ends),
            tile_read.en.eq(issue & ~a_side.zero),
            tile_read.addr.eq(Cat((start + offset)[:beat_bits], a_side.row[:row_bits], tile.slot)),
        ]
        reads = [memory.read_port() for memory in (k_memory, v_memory)]
        for index, port in enumerate(reads):
            m.d.comb += [port.en.eq(issue & (tile.value == index)), port.addr.eq(Cat(tile.head[:head_bits], tile.slot))]
        token_exponents = Signal(_ES * config.ports)
        m.d.comb += token_exponents.eq(Mux(b_side.value, reads[1].data[b_side.row[:row_bits]],
                                           reads[0].data[b_side.row[:row_bits]]))
        with m.If(advance):
            m.d.sync += [b_valid.eq(issue), c_valid.eq(b_valid), self.tile.valid.eq(c_valid)]
            with m.If(issue):
                m.d.sync += b_side.eq(a_side)
            with m.If(b_valid):
                m.d.sync += c_last.eq(b_side.last)
            with m.If(c_valid):
                m.d.sync += self.tile.payload.last.eq(c_last)
        mantissas = []
        for p in range(config.ports):
            m.submodules[f"shift{p}"] = shift = KvShift(elements=config.beat_elements)
            m.d.comb += [
                shift.beat.eq(tile_read.data[p * config.port_bits:][:config.port_bits]), shift.zero.eq(b_side.zero),
                shift.shared.eq(token_exponents.word_select(p, _ES)),
                shift.en.eq(Cat(advance & b_valid, advance & c_valid)),
            ]
            mantissas += shift.o
        m.d.comb += self.tile.payload.data.as_value().eq(Cat(*mantissas))
        return m


def _larger(a, b):
    return Mux(a > b, a, b)
