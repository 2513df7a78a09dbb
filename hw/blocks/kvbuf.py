"""KV buffer: two tiles of keys and values, aligned to one exponent per (token, head) on their way to the array.

Memory holds FP16; the array multiplies integers of KV_BITS. While a tile is written the largest exponent of each head
of each token is found; while it is read every element is shifted to that exponent (docs/numerics.md, Keys and values).
Narrow records (`isa.KvFormat`) bring their exponents, and mantissas that only have to be put together.

Each port writes its own records, when they arrive, into memories of its own: one for even, one for odd rows of records.
A tile is read from both in a cycle: beat b of the records of tokens r*P .. r*P + 2P-1, r even, at address {b, slot, r}.
So the array can take tiles at twice the pace of the memory ports, which is what they supply with the history buffer.
Slots and rows are powers of two, so an address is joined fields, of any number of beats; which beat is one addition.
Where there are narrow records such a memory is two: beats of FP16 fill one and then the other, high planes lie in the
first, low planes in the second, so that both planes of E elements are read in a cycle.
"""

import numpy as np
from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..emission import place
from ..formats import KV_BITS
from ..isa import KvFormat
from .dot import word_bits
from .dsp import W_C, XY_M, Dsp48e2
from .kvexponents import KvExponents
from .kvintake import EXPONENT_BITS, TILE_NUMBERS, KvPort, KvRecord, KvShape
from .trees import tree_sum

__all__ = ["KvBuffer", "KvRequest", "KvShift", "KvTile"]

_SIGNIFICAND = 11  #: bits of an FP16 significand with its hidden bit
#: For each distance of exponents four bits, inverted: how far to shift. Beyond 15 nothing is left, as at 15.
_FURTHER = Const(sum((15 - distance) << 4 * distance for distance in range(16)), 64)
_VECTOR_BITS = 1 << 16  #: of the longest vector
_BELOW = KV_BITS - 1 - _SIGNIFICAND  #: places of a mantissa below the significand of the largest exponent


def KvRequest(config):
    """Which array tile (n, k) to deliver, of the keys (value 0) or the values (value 1) of a head."""
    return data.StructLayout({"slot": 1, "value": 1, "head": 8, "n": 14, "k": 12})


def KvTile(config):
    """Mantissas of `kv_step` tokens, index i*E + e: element e of the beat of token i; ``last`` ends the array tile.

    They are as wide as the words of the array's dot products, or a little less where the longest vector that Verilog
    promises would not hold them.
    """
    elements = config.kv_step * config.beat_elements
    return data.StructLayout({"data": data.ArrayLayout(signed(_tile_bits(config)), elements), "last": 1})


def _tile_bits(config):
    return min(word_bits(config.dsp), (_VECTOR_BITS - 1) // (config.kv_step * config.beat_elements))


class KvShift(wiring.Component):
    """FP16 elements of a port beat as mantissas of one exponent (docs/numerics.md, Keys and values).

    Narrow elements have them already: sign and magnitude, 8 bits in the high and 4 in the low plane. They are treated
    as numbers of the smallest exponent, to be shifted to that. So is what is beyond the head's end, but shifted out.
    A DSP48E2 slice shifts by multiplying with a power of two, adds the half and brings the registers.

    Members
    -------
    beats : In(16 per element), the beat that was read, or both with ``narrow``
    own : In(1), the elements have exponents; shared : In(5), the one to shift to: 1 for narrow elements, 31 for none
    en : In(2), register enables; o : Out(signed(bits)) per element, KV_BITS of them in use, 2 cycles later
    part : In(1), which of the beats is that of FP16; pick : In(2), which half of the first has the high planes, and
        which quarter of the second the low ones
    high : In(1), the elements are narrow; blank : In(1), they have no low plane
    """

    def __init__(self, *, elements, narrow, bits=KV_BITS, dsp="generic"):
        self._elements, self._narrow, self._bits, self._dsp = elements, narrow, bits, dsp
        super().__init__({
            "beats": In(16 * elements).array(1 + narrow), "own": In(1), "shared": In(EXPONENT_BITS), "en": In(2),
            "o": Out(signed(self._bits)).array(elements),
            **({"pick": In(2), "part": In(1), "high": In(1), "blank": In(1)} if narrow else {})})

    def elaborate(self, platform):
        m = Module()
        words = Signal(16 * self._elements)  # of FP16, for the exponents: chosen at once, which simulates faster
        m.d.comb += words.eq(Mux(self.own, Mux(self.part, self.beats[1], self.beats[0]) if self._narrow
                                 else self.beats[0], 0))
        for index in range(self._elements):
            field = words[16 * index + 10:16 * index + 15]
            distance = Signal(EXPONENT_BITS, name=f"distance{index}")
            m.d.comb += distance.eq(self.shared - Cat(field[0] | ~field[1:].any(), field[1:]))
            fraction, top, sign = self._parts(index)
            significand = Cat(fraction, field.any() | top)
            if self._dsp == "dsp48e2":
                m.submodules[f"slice{index}"] = self._slice(m, significand, sign, distance, self.o[index])
                continue
            number, shift = Signal(_SIGNIFICAND + 1, name=f"number{index}"), Signal(4, name=f"shift{index}")
            with m.If(self.en[0]):
                m.d.sync += [number.eq(Cat(significand, sign)), shift.eq(~(_FURTHER >> (distance << 2)))]
            mantissa = Signal(signed(self._bits), name=f"mantissa{index}")
            m.d.comb += self.o[index].eq(mantissa)
            # Rounding and sign in one addition: with x + 1 = -~x the mantissa is (x + 1) >> 1 or (~x + 1) >> 1. It is
            # made at the upper end of a word: shifting it down extends the sign without a second use of the sum.
            below = max(self._bits - KV_BITS - 1, 0)
            magnitude = Cat((number[:-1] << _BELOW + 1)[:KV_BITS] >> shift, Const(0, 1))
            word = Cat(Const(0, below), magnitude ^ number[-1].replicate(KV_BITS + 1))
            with m.If(self.en[1]):
                m.d.sync += mantissa.eq((word + (1 << below))[:len(word)].as_signed() >> below + 1)
        return m

    def _slice(self, m, significand, sign, distance, o):
        """Times 2^(last - distance), or less than zero if the sign is set, and half of what is cut off, less a unit for
        a negative number: halves are rounded away from zero."""
        last = KV_BITS - 1  # furthest shift that leaves something
        cut = last - _BELOW
        product = Dsp48e2(opmode=XY_M | W_C, registers={"b": 1, "ad": 0, "m": 0}, enabled=True)
        near = distance <= last
        power = [Mux(sign, (distance >= last - bit) & near, distance == last - bit) for bit in range(last)]
        power.append(Mux(sign, near, distance == 0))
        m.d.comb += [
            product.a.eq(significand), product.b.eq(Cat(*power, sign & near).as_signed()),
            product.c.eq(Cat(sign.replicate(cut - 1), ~sign)), product.en.eq(self.en), o.eq(product.p >> cut),
        ]
        return product

    def _parts(self, index):
        """Fraction of an element, what stands in front of the fraction of a narrow one, and the sign."""
        place = 16 * index
        if not self._narrow:
            return self.beats[0][place:place + 10], 0, self.beats[0][place + 15]
        first, second = self.beats
        count = self._elements

        def either(plane, word):
            """Bits of the high plane, or of FP16."""
            return _select([Mux(self.high, first[8 * (index + half * count):][plane], beat[place:][word])
                            for half, beat in enumerate(self.beats)], self.pick[:1])

        low = _select([second[4 * (index + count * part):][:4] for part in (0, 2, 1, 3)], self.pick[::-1])
        word = _select([beat[place:place + 4] for beat in self.beats], self.part)
        top = _select([first[8 * (index + count * half) + 6] for half in range(2)], self.pick[:1])
        fraction = Cat(Mux(self.blank, 0, Mux(self.high, low, word)), either(slice(0, 6), slice(4, 10)))
        return fraction, self.high & top, either(slice(7, 8), slice(15, 16))


def _select(values, index):
    """One of a power of two of values, bit by bit of ``index``."""
    for bit in index:
        values = [Mux(bit, second, first) for first, second in zip(values[::2], values[1::2])]
    return values[0]


class KvBuffer(wiring.Component):
    """Two slots, filled and released in turn; a request waits until its slot is full.

    What no record was written for is undefined; a port without a record in the last row writes nothing there.

    Keys: tokens n*N .. n*N + N-1 (outer, `kv_step` at a time), dimensions k*K .. k*K + K-1 (inner, E at a time).
    Values: tokens k*K .. (outer), dimensions n*N .. (inner); dimensions beyond the head are 0.
    One step per cycle, also across requests; ``latency`` cycles after a request was taken by an idle buffer.

    Members
    -------
    shape : In(stream of KvShape), the tiles in order; each waits for a slot
    records, beats : per port, In(stream of KvRecord) and In(stream of port beats), what comes from memory
    hits : per port, In(stream of KvRecord), what comes from the history buffer; buffered : Out, how many beats of them
    done : Out(1), the oldest tile that was not full is full
    release : In(1), pulse: the older tile is no longer needed
    full : Out(2), per slot: a whole tile with its exponents is there
    request, tile : In(stream of KvRequest), Out(stream of KvTile)
    k_slot, k_head, k_exponents and v_... : exponents of one head, 5 bits per token, ``exponent_latency`` cycles later
    """

    latency = 6
    exponent_latency = 0

    def __init__(self, *, config):
        self.config = config
        exponents = {"slot": In(1), "head": In(8), "exponents": Out(EXPONENT_BITS * config.tile_tokens)}
        super().__init__({
            "shape": In(stream.Signature(KvShape(config))), "done": Out(1),
            "records": In(stream.Signature(KvRecord(config))).array(config.ports),
            "beats": In(stream.Signature(config.port_bits)).array(config.ports),
            "hits": In(stream.Signature(KvRecord(config))).array(config.ports),
            "buffered": Out(range(config.ports + 1)),
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

    @staticmethod
    def narrow_model(config, beats, record_format, heads, head_beats):
        """The same of narrow records, uint8 [tokens, port beats, port bytes] -> (exponents, mantissas)."""
        tokens, units = len(beats), heads * head_beats
        flat = beats.astype(np.int64).reshape(tokens, -1)
        high_at, width = -(-heads // config.beat_elements) * beats.shape[2], units * beats.shape[2]
        exponents = flat[:, :2 * heads].reshape(tokens, heads, 2).transpose(0, 2, 1) & 31
        high, low = flat[:, high_at:high_at + width], np.zeros((tokens, width), np.int64)
        if record_format == KvFormat.B12:
            packed = flat[:, high_at + width:high_at + width + width // 2]
            low = np.stack((packed & 15, packed >> 4), -1).reshape(tokens, width)
        magnitude = ((high & 127) << 4 | low) << _BELOW
        return exponents, np.where(high >> 7, -magnitude, magnitude).reshape(tokens, 2, heads, -1)

    def elaborate(self, platform):
        m = Module()
        config = self.config
        rows = config.tile_tokens // config.ports
        beat_bits = (config.kv_beats - 1).bit_length()

        # ---- slots: given in turn, full when every port has written its records -------------------------------
        taken, write_slot, release_slot, full_slot = Signal(2), Signal(), Signal(), Signal()
        tiles = Signal(range(TILE_NUMBERS))
        shapes = [Signal(KvShape(config), name=f"shape{i}") for i in range(2)]
        values_start = Array([Signal(beat_bits, name=f"values_start{i}") for i in range(2)])
        head_beats = Array([shape.head_beats for shape in shapes])
        left = [[Signal(range(rows + 1), name=f"left{i}_{p}") for p in range(config.ports)] for i in range(2)]
        m.d.comb += self.shape.ready.eq(~taken.bit_select(write_slot, 1))
        for i in range(2):
            with m.If(self.shape.valid & self.shape.ready & (write_slot == i)):
                incoming = self.shape.payload
                m.d.sync += [
                    taken[i].eq(1), write_slot.eq(~write_slot), tiles.eq(tiles + 1), shapes[i].eq(incoming),
                    values_start[i].eq(incoming.heads * incoming.head_beats),
                    *(count.eq(incoming.rows - ~incoming.last[p]) for p, count in enumerate(left[i])),
                ]
            complete = Signal(name=f"complete{i}")
            m.d.comb += complete.eq(taken[i] & ~self.full[i] & (full_slot == i) & ~Cat(left[i]).any())
            with m.If(complete):
                m.d.comb += self.done.eq(1)
                m.d.sync += [self.full[i].eq(1), full_slot.eq(~full_slot)]
        with m.If(self.release):
            m.d.sync += [taken.bit_select(release_slot, 1).eq(0), self.full.bit_select(release_slot, 1).eq(0),
                         release_slot.eq(~release_slot)]

        # ---- write: memories of each port for even and odd rows of records, and of the exponents -----------------
        half = rows // 2  # rows of a memory
        parts = config.kv_parts  # of a memory
        banks, exponents, buffered = [], {"k": [], "v": []}, []  # [port][parity]
        for p in range(config.ports):
            m.submodules[f"port{p}"] = source = KvPort(config=config)
            for name in ("records", "beats", "hits"):
                wiring.connect(m, wiring.flipped(getattr(self, name)[p]), getattr(source, name))
            m.d.comb += [source.tiles.eq(tiles), *(port.eq(shape) for port, shape in zip(source.shape, shapes)),
                         *(port.eq(count) for port, count in zip(source.values, values_start))]
            buffered.append(source.buffered)
            for i in range(2):
                with m.If(source.finished[i].any()):
                    m.d.sync += left[i][p].eq(left[i][p] - source.finished[i])
            of_port = []
            for parity, (write, written) in enumerate(zip(source.write, source.written)):
                of_bank = []
                for part, beats in enumerate(parts):
                    bank = Memory(shape=config.port_bits, depth=2 * half * beats, init=[])
                    m.submodules[f"bank{p}_{parity}" + "ab"[part] * (len(parts) - 1)] = bank
                    port, within = bank.write_port(), beat_bits - len(parts) + 1
                    m.d.comb += [port.en.eq(write.en & (write.beat >> within == part)), port.data.eq(written),
                                 port.addr.eq(Cat(write.row[1:], write.slot, write.beat[:within]))]
                    of_bank.append(bank.read_port())
                of_port.append(of_bank)
            banks.append(of_port)
            for number, (side, memories) in enumerate(exponents.items()):
                of_port = []
                for parity, exponent in enumerate(source.exponent):
                    memory = KvExponents(heads=config.kvbuf_heads, rows=half)
                    m.submodules[f"{side}_exponents{p}_{parity}"] = memory
                    m.d.comb += [
                        memory.en.eq(exponent.en[number] << exponent.row[1:]), memory.slot.eq(exponent.slot),
                        memory.head.eq(exponent.head), memory.exponent.eq(exponent.exponents[number]),
                        memory.now_slot.eq(getattr(self, f"{side}_slot")),
                        memory.now_head.eq(getattr(self, f"{side}_head")),
                    ]
                    of_port.append(memory)
                memories.append(of_port)
        m.d.comb += self.buffered.eq(tree_sum(buffered))
        for side, memories in exponents.items():
            m.d.comb += getattr(self, f"{side}_exponents").eq(Cat(
                memories[p][r % 2].now[r // 2] for r in range(rows) for p in range(config.ports)))

        # ---- read: request, first beat of the head, address, memory, shift amounts, shifts ------------------------
        request, waiting, prepared = Signal(KvRequest(config)), Signal(), Signal()
        tile, active = Signal(KvRequest(config)), Signal()
        head_start, start = Signal(beat_bits), Signal(beat_bits)
        total = config.lanes * config.columns // (config.kv_step * config.beat_elements)
        pairs = config.kv_step > config.ports  # two rows of records a step, or one
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
        offset, position = Signal(max(len(keys_offset), len(values_offset))), Signal(beat_bits)
        # row: of the first of the records
        side = data.StructLayout({"zero": 1, "row": range(rows), "value": 1, "last": 1, "format": KvFormat, "pick": 2})
        a_side, b_side, c_last = Signal(side), Signal(side), Signal()
        b_valid, c_valid = Signal(), Signal()
        m.d.comb += [
            offset.eq(Mux(tile.value, values_offset, keys_offset)),
            a_side.zero.eq(offset >= head_beats[tile.slot]),  # a head may be shorter than the array is wide
            a_side.row.eq(Mux(tile.value, values_row, keys_row) << int(pairs)),
            a_side.value.eq(tile.value), a_side.last.eq(ends), position.eq(start + offset),
        ]
        within = [position]  # address in each part of a memory
        if config.kv_narrow:
            narrow = Signal()
            within = [Signal(beat_bits - 1, name=f"within{part}") for part in range(2)]
            m.d.comb += [
                a_side.format.eq(Array(shape.format for shape in shapes)[tile.slot]),
                narrow.eq(a_side.format != KvFormat.FP16), a_side.pick.eq(Mux(narrow, position[:2], position[-1])),
                *(at.eq(Mux(narrow, position >> part + 1, position)) for part, at in enumerate(within)),
            ]
        lines = [([], []), ([], [])]  # of even and of odd rows: beats and their exponents, of each port
        for p in range(config.ports):
            for parity in range(2):
                wanted = issue if pairs else issue & (a_side.row[0] == parity)
                for bank, at in zip(banks[p][parity], within):
                    m.d.comb += [bank.en.eq(wanted & ~a_side.zero),
                                 bank.addr.eq(Cat(a_side.row[1:], tile.slot, at))]
                found = []
                for number, memories in enumerate(exponents.values()):
                    memory = memories[p][parity]
                    m.d.comb += [memory.ahead_en.eq(wanted & (tile.value == number)),
                                 memory.ahead_slot.eq(tile.slot), memory.ahead_head.eq(tile.head)]
                    found.append(memory.ahead[b_side.row[1:]])
                lines[parity][0].append(Cat(bank.data for bank in banks[p][parity]))
                lines[parity][1].append(Mux(b_side.value, found[1], found[0]))
        if pairs:
            beat_data, token_exponents = (even + odd for even, odd in zip(*lines))
        else:
            beat_data, token_exponents = ([Mux(b_side.row[0], second, first) for first, second in zip(even, odd)]
                                          for even, odd in zip(*lines))
        with m.If(advance):
            m.d.sync += [b_valid.eq(issue), c_valid.eq(b_valid), self.tile.valid.eq(c_valid)]
            with m.If(issue):
                m.d.sync += b_side.eq(a_side)
            with m.If(b_valid):
                m.d.sync += c_last.eq(b_side.last)
            with m.If(c_valid):
                m.d.sync += self.tile.payload.last.eq(c_last)
        mantissas = []
        for i, (beat, exponent) in enumerate(zip(beat_data, token_exponents)):
            shift = place(m, platform, f"shift{i}", lambda: KvShift(
                elements=config.beat_elements, narrow=config.kv_narrow, bits=_tile_bits(config), dsp=config.dsp),
                module="kv_shift")
            for part, read in enumerate(shift.beats):
                m.d.comb += read.eq(beat.word_select(part, config.port_bits))
            own = ~b_side.zero
            if config.kv_narrow:
                is_narrow = b_side.format != KvFormat.FP16
                own, exponent = own & ~is_narrow, Mux(is_narrow, 1, exponent)
                m.d.comb += [shift.part.eq(b_side.pick[0]), shift.pick.eq(b_side.pick), shift.high.eq(is_narrow),
                             shift.blank.eq(b_side.format == KvFormat.B8)]
            m.d.comb += [shift.own.eq(own), shift.shared.eq(Mux(b_side.zero, ~0, exponent)),
                         shift.en.eq(Cat(advance & b_valid, advance & c_valid))]
            mantissas += shift.o
        m.d.comb += self.tile.payload.data.as_value().eq(Cat(*mantissas))
        return m
