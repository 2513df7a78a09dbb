"""Where the KV records lie that layers share: places handed out, for each position a pointer of every layer, and which
records the history buffer keeps.

A position belongs to the port that holds its records; row r of a bank stands for position r*P + port. The record that
a layer reads is that of the last layer which wrote the position: a mask says which layers did. Masks and pointers carry
a parity bit, so that a damaged one is reported instead of followed. One thing happens at a time; a request comes first.

The buffer of a port has slots of one record each, and a tag for each row says which record is in which slot. The masks
know the future: a record that the next layer reads again is kept as it comes from memory, and one that no layer will
read again gives its slot back. When less than a quarter of the slots is free only records that two more layers read are
taken in. Tags name places, which are written once in a sequence, so that a tag cannot be out of date; a new sequence or
another size of the records clears them, a row a cycle.

What happens in the buffer has an order: a copy is read after it was taken in, and a slot is filled again after it was
read. Records that come from memory and those that come from the buffer are counted for that (``KvRecord``).
"""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from ..isa import MAX_LAYERS
from ..registers import FaultCause
from .command import PLACE_BITS, PlaceAnswer, PlaceRequest
from .fp import normalise
from .kvintake import PENDING, count_bits

__all__ = ["Found", "History"]

_LAYER_BITS = exact_log2(MAX_LAYERS)


def Found(config):
    """Where one port finds a record: at a place in memory, from where it may be kept in a slot of the history buffer
    (``fill``), or in a slot (``hit``). ``bad``: it has no sound pointer to a record of the running sequence.
    ``wait``, ``after``: as in KvRecord."""
    return data.StructLayout({
        "place": PLACE_BITS, "bad": 1, "hit": 1, "fill": 1, "slot": range(config.history_tokens // config.ports),
        "wait": 1, "after": count_bits(config)})


class History(wiring.Component):
    """Gives records their places, and looks up those of KV tiles, a row of all ports at a time.

    Members
    -------
    request : In(stream of PlaceRequest), the next one only after the answer; answer : Out(PlaceAnswer), cycles later
    begin : In(1), look up ``rows`` rows from ``first`` on, when those before have all been found
    last : In(P), ports with a record in the last of the rows; layer : In, the highest layer that counts, below
        history_layers; final : In(1), no record is needed after this layer; buffer, record : In, slots of a port and
        beats of a slot; all of them stable while rows are looked up
    found : Out(1), ``row`` is that of the next row, until ``take``
    row : Out(Found) for each port, undefined where it has no record
    stirs : Out(1), something may change at the next edge (combinational)
    """

    def __init__(self, *, config):
        self.config = config
        rows = config.history_tokens // config.ports
        super().__init__({
            "request": In(stream.Signature(PlaceRequest)), "answer": Out(PlaceAnswer),
            "begin": In(1), "first": In(range(rows)), "rows": In(range(config.tile_tokens // config.ports + 1)),
            "last": In(config.ports), "layer": In(_LAYER_BITS), "final": In(1), "buffer": In(16), "record": In(16),
            "found": Out(1), "take": In(1), "row": Out(Found(config)).array(config.ports),
            "stirs": Out(1),
        })

    def table(self, m, name, shape, depth):
        """A memory of this name; a bench that damages one adds its ports here."""
        m.submodules[name] = memory = Memory(shape=shape, depth=depth, init=[])
        return memory

    def elaborate(self, platform):
        m = Module()
        config, request = self.config, self.request.payload
        bank_bits, layers = exact_log2(config.ports), config.history_layers
        layer_bits = exact_log2(layers)
        begun = Signal()  # a sequence runs
        following = [Signal(PLACE_BITS, name=f"following{p}") for p in range(config.ports)]

        # A new record: which row and port, whether a sequence begins, what there is to complain about.
        noted, free, cause = Signal(PlaceRequest), Signal(PLACE_BITS), Signal(FaultCause)
        anew, note, noted_row = Signal(), Signal(), Signal(range(config.history_tokens // config.ports))
        m.d.comb += [anew.eq((noted.position == 0) & (noted.layer == 0)), noted_row.eq(noted.position >> bank_bits)]
        with m.Switch(noted.position[:bank_bits]):
            for p in range(config.ports):
                with m.Case(p):
                    m.d.comb += free.eq(Mux(anew, 0, following[p]))
        with m.If(~begun & ~anew):
            m.d.comb += cause.eq(FaultCause.KV_POINTER)
        with m.Elif((noted.position >= config.history_tokens) | (noted.layer >= layers)):
            m.d.comb += cause.eq(FaultCause.BUFFER_RANGE)
        with m.Elif(free >= noted.places):
            m.d.comb += cause.eq(FaultCause.KV_FULL)
        m.d.sync += self.answer.valid.eq(0)

        row, left = Signal.like(self.first), Signal.like(self.rows)
        read_mask, read_pointer, masked, pointed, visited = Signal(), Signal(), Signal(), Signal(), Signal()
        clearing, cleared = Signal(init=1), Signal.like(row)
        size = Signal(32)  # of the buffer and its slots, in the lookup before
        exists = Signal(config.ports)
        m.d.comb += exists.eq(Mux(left == 1, self.last, ~0))
        with m.If(self.take):
            m.d.sync += self.found.eq(0)
        with m.FSM() as fsm:
            with m.State("IDLE"):
                m.d.comb += self.request.ready.eq(1)
                with m.If(self.request.valid):
                    m.d.comb += read_mask.eq(1)
                    m.d.sync += noted.eq(request)
                    m.next = "NOTE"
                with m.Elif((left != 0) & (~clearing | (self.buffer == 0))):
                    m.d.comb += read_mask.eq(1)
                    m.next = "LAST"
            with m.State("NOTE"):
                m.d.comb += note.eq(cause == FaultCause.NONE)
                m.d.sync += [self.answer.valid.eq(1), self.answer.cause.eq(cause), self.answer.place.eq(free)]
                m.next = "IDLE"
            with m.State("LAST"):
                m.d.comb += masked.eq(1)
                m.next = "POINTER"
            with m.State("POINTER"):
                m.d.comb += read_pointer.eq(1)
                m.next = "CHECK"
            with m.State("CHECK"):
                m.d.comb += pointed.eq(1)
                m.next = "VISIT"
            with m.State("VISIT"):
                with m.If(~self.found | self.take):
                    m.d.comb += visited.eq(1)
                    m.d.sync += [self.found.eq(1), row.eq(row + 1), left.eq(left - 1)]
                    m.next = "IDLE"
                    with m.If((left != 1) & ~self.request.valid):
                        m.d.comb += read_mask.eq(1)
                        m.next = "LAST"
        m.d.comb += self.stirs.eq(self.request.valid | self.answer.valid | self.begin | self.take | clearing
                                  | (left != 0) | ~fsm.ongoing("IDLE"))
        with m.If(self.begin):
            m.d.sync += [row.eq(self.first), left.eq(self.rows), size.eq(Cat(self.buffer, self.record))]
            with m.If(size != Cat(self.buffer, self.record)):
                m.d.sync += clearing.eq(1)
        with m.If(note & anew):
            m.d.sync += [begun.eq(1), clearing.eq(1), *(place.eq(0) for place in following)]
        with m.If(clearing):
            m.d.sync += [cleared.eq(cleared + 1), clearing.eq(~cleared.all())]

        seen = ((Const(2, layers + 1) << self.layer[:layer_bits]) - 1)[:layers]
        rows = config.history_tokens // config.ports
        for p in range(config.ports):
            masks = self.table(m, f"masks{p}", layers + 1, rows)
            pointers = self.table(m, f"pointers{p}", PLACE_BITS + 1, rows * layers)
            mask, mask_write, pointer, pointer_write = (
                masks.read_port(), masks.write_port(), pointers.read_port(), pointers.write_port())
            mine, mask_sound, bit = Signal(), Signal(), (Const(1, layers) << noted.layer[:layer_bits])[:layers]
            old, parity, last = mask.data[:layers], mask.data[layers], Signal(layer_bits, name=f"last{p}")
            m.d.comb += [
                mine.eq(note & (noted.position[:bank_bits] == p)),
                mask.en.eq(read_mask), mask.addr.eq(Mux(visited, row + 1, Mux(
                    self.request.valid, request.position >> bank_bits, row))),
                mask_write.en.eq(mine), mask_write.addr.eq(noted_row),
                # A damaged mask stays one.
                mask_write.data.eq(Mux(noted.layer == 0, 1, Cat(old | bit, parity ^ ~(old & bit).any()))),
                pointer.en.eq(read_pointer), pointer.addr.eq(Cat(last, row)),
                pointer_write.en.eq(mine), pointer_write.addr.eq(Cat(noted.layer[:layer_bits], noted_row)),
                pointer_write.data.eq(Cat(free, ~free.xor())),
            ]
            with m.If(mine):
                m.d.sync += following[p].eq(free + 1)
            width = 1 << layer_bits
            _, zeros = normalise(m, (old & seen)[:layers], [width >> step for step in range(1, layer_bits + 1)])
            with m.If(masked):
                m.d.sync += [last.eq(~zeros), mask_sound.eq(mask.data.xor() & (old & seen).any())]
            place, bad = Signal(PLACE_BITS, name=f"place{p}"), Signal(name=f"bad{p}")
            with m.If(pointed):
                m.d.sync += [
                    place.eq(pointer.data[:PLACE_BITS]),
                    bad.eq(~(begun & mask_sound & pointer.data.xor() & (pointer.data[:PLACE_BITS] < following[p]))),
                ]
            with m.If(visited):
                m.d.sync += [self.row[p].place.eq(place), self.row[p].bad.eq(bad)]
            if config.buffer_beats:
                again = [Signal(name=f"again{p}_{ahead}") for ahead in (1, 2)]  # which following layers read it again
                with m.If(masked):
                    m.d.sync += [is_read.eq(~Cat(old, Const(0, 2)).bit_select(self.layer + ahead, 1))
                                 for ahead, is_read in enumerate(again, 1)]
                self._buffer(m, p, pointed=pointed, visit=visited & exists[p], row=row, place=place,
                             keep=again[0] & ~self.final, beyond=again[1], found=pointer.data[:PLACE_BITS],
                             clearing=clearing, cleared=cleared, tag_en=read_pointer)
        return m

    def _buffer(self, m, p, *, tag_en, row, pointed, found, visit, place, keep, beyond, clearing, cleared):
        """The policy of the history buffer of port p, which sets the rest of its Found.

        tag_en : the tag of ``row`` is read; pointed : it is there, and ``found`` is the place; visit : a cycle or more
        later, the record at ``place`` is looked for and the tag follows
        """
        config = self.config
        rows = config.history_tokens // config.ports
        bits, slot_bits = count_bits(config), exact_log2(rows)
        tag_shape = data.StructLayout({"valid": 1, "place": PLACE_BITS, "slot": range(rows), "after": bits})
        m.submodules[f"tags{p}"] = tags = Memory(shape=tag_shape, depth=rows, init=[])
        m.submodules[f"free{p}"] = free = Memory(shape=slot_bits, depth=rows, init=[])
        tag, tag_write, oldest, give = tags.read_port(), tags.write_port(), free.read_port(), free.write_port()
        fresh, depth = Signal(slot_bits + 1, name=f"fresh{p}"), Signal(slot_bits + 1, name=f"depth{p}")
        head, tail = Signal(slot_bits, name=f"head{p}"), Signal(slot_bits, name=f"tail{p}")
        reads, hits = Signal(bits, name=f"reads{p}"), Signal(bits, name=f"hits{p}")
        valid, same = Signal(name=f"valid{p}"), Signal(name=f"same{p}")
        left = Signal(17, name=f"left{p}")
        fill, hit, freed, unused, pop = (
            Signal(name=f"{name}{p}") for name in ("fill", "hit", "freed", "unused", "pop"))
        slot = Signal(slot_bits, name=f"slot{p}")
        recent = Signal(bits, name=f"recent{p}")
        m.d.comb += [
            tag.en.eq(tag_en), tag.addr.eq(row), oldest.addr.eq(head),
            left.eq(self.buffer - fresh + depth), valid.eq(tag.data.valid & (self.buffer != 0)), hit.eq(valid & same),
            fill.eq(~hit & (self.buffer != 0) & keep & ((left >= self.buffer >> 2) | beyond) & (valid | (left != 0))),
            freed.eq(valid & ~fill & ~(hit & keep)), pop.eq(fill & ~valid & (depth != 0)),
            unused.eq(fill & ~valid & (depth == 0)),
            slot.eq(Mux(valid, tag.data.slot, Mux(depth == 0, fresh, oldest.data))),
            recent.eq(reads - tag.data.after),
            tag_write.addr.eq(Mux(clearing, cleared, row)), tag_write.en.eq(clearing | (visit & (fill | freed))),
            tag_write.data.valid.eq(fill & ~clearing), tag_write.data.place.eq(place), tag_write.data.slot.eq(slot),
            tag_write.data.after.eq(reads + 1),
            give.en.eq(visit & freed), give.addr.eq(tail), give.data.eq(tag.data.slot),
        ]
        with m.If(pointed):
            m.d.sync += same.eq(tag.data.place == found)
        with m.If(visit):
            m.d.sync += [
                self.row[p].hit.eq(hit), self.row[p].fill.eq(fill), self.row[p].slot.eq(slot),
                self.row[p].wait.eq(Mux(hit, recent < PENDING, fill)),  # a copy that was asked for long ago is there
                self.row[p].after.eq(Mux(hit, tag.data.after, hits)),
                reads.eq(reads + ~hit), hits.eq(hits + hit), fresh.eq(fresh + unused),
                depth.eq(depth + freed - pop), head.eq(head + pop), tail.eq(tail + freed),
            ]
        with m.If(clearing):
            m.d.sync += [fresh.eq(0), depth.eq(0), head.eq(0), tail.eq(0)]
