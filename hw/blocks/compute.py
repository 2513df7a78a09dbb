"""Compute unit: runs MATMUL on the PE array, and DROPW.

Three parts work at the same time: `TileFeed` turns the weight stream or KV tiles into tile registers and scales, the
sequencer walks the rows (h, n, k, g, t) and issues one MBUF row a cycle, the drain delivers finished accumulator rows
to the vector unit, `V` columns a cycle.

Up to four column tiles are on their way to the output, if their rows fill no more than half a bank of accumulators;
else two.

Timing of a tile: its rows are issued (S0: MBUF address), used one cycle later (S1: dot product). The next tile is
loaded meanwhile, into registers of its own, and is in use with its first row: rows follow each other in every cycle,
and superbeats do where a tile has fewer rows than superbeats.
"""

from amaranth import Array, Cat, Module, Mux, Signal, signed
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from .. import isa
from ..formats import ACC_BITS, CODE_BITS, KV_FRACTION
from ..isa import MatmulMode
from .array import PeArray, RowControl, Scale, at_once, tile_beats
from .command import Command, fields
from .half import half_parts
from .kvbuf import KvRequest, KvTile
from .mbuf import AlignedRow, MantissaBuffer
from .rows import lowest

__all__ = ["AccBeat", "ComputeUnit", "TileFeed"]

_MATMUL, _DROPW = isa.OPCODES[0x20], isa.OPCODES[0x21]


def AccBeat(config):
    """V accumulators on their way to the vector unit: value acc * 2^exponent each."""
    return data.StructLayout({
        "acc": data.ArrayLayout(signed(ACC_BITS), config.vector_lanes),
        "exponent": data.ArrayLayout(signed(10), config.vector_lanes),
    })


class TileFeed(wiring.Component):
    """Takes superbeats of the weight stream or of the KV buffer for the tile registers, and scales for itself.

    Members
    -------
    mode, k_tiles, group, scale_exponent : of the running MATMUL
    reset : the next superbeat starts a weight stream (a scale chunk)
    allow : the next tile may be written
    arrived : the last superbeat of a tile is written at this clock edge
    swap : the tile that has arrived is taken for use
    load_codes, load_keys, load_values : to the array
    use_first : the first row of the tile is in use; scale and minimum follow one cycle later; with passes those of the
        columns of scale_turn (combinational)
    """

    def __init__(self, *, config):
        self.config = config
        codes, keys, values = tile_beats(config)
        super().__init__({
            "weights": In(stream.Signature(8 * config.superbeat_bytes)),
            "kv": In(stream.Signature(KvTile(config))),
            "enable": In(1), "reset": In(1), "mode": In(MatmulMode), "k_tiles": In(12), "group": In(3),
            "scale_exponent": In(signed(7)),
            "allow": In(1), "arrived": Out(1), "swap": In(1), "use_first": In(1),
            "load_codes": Out(codes), "load_keys": Out(keys), "load_values": Out(values),
            "scale": Out(Scale()).array(at_once(config), config.blocks),
            "minimum": Out(Scale()).array(at_once(config), config.blocks),
        } | ({"scale_turn": In(range(config.passes))} if config.passes > 1 else {}))

    def elaborate(self, platform):
        m = Module()
        config = self.config
        columns, blocks = config.columns, config.blocks
        is_kv, is_w8, with_minimum = Signal(), Signal(), Signal()
        m.d.comb += [
            is_kv.eq((self.mode == MatmulMode.QK) | (self.mode == MatmulMode.PV)),
            is_w8.eq(self.mode == MatmulMode.W8), with_minimum.eq(self.mode == MatmulMode.W4M),
        ]

        # Chunks differ with minima, and with the group until a tile has one scale for each column. Their lines hold a
        # scale or a minimum of every column.
        whole = blocks.bit_length() - 1
        chunks = {(minimum, group): config.scale_chunk(minimum, group) for minimum in (False, True)
                  for group in range(1 << len(self.group))}
        most_beats, most_sets = (max(sizes) for sizes in zip(*chunks.values()))
        lines = most_beats * config.superbeat_bytes // (2 * columns)
        chunk_beats, chunk_sets = Signal(range(most_beats + 1)), Signal(range(most_sets + 1))
        tile_set = Signal(range(most_sets))
        scale_line, minimum_line = ([Signal(range(lines), name=f"{name}_line{b}") for b in range(blocks)]
                                    for name in ("scale", "minimum"))
        with m.Switch(Cat(with_minimum, self.group)):
            for (minimum, group), (beats, sets) in chunks.items():
                with m.Case(group << 1 | minimum):
                    m.d.comb += [chunk_beats.eq(beats), chunk_sets.eq(sets)]
                    of_tile = max(blocks >> group, 1)
                    for b in range(blocks):
                        first = tile_set * (of_tile * (2 if minimum else 1)) + (b >> group)
                        m.d.comb += [scale_line[b].eq(first), minimum_line[b].eq(first + of_tile)]

        # Where in the stream: scale chunk or codes, which beat, which set of the chunk, which tile, which plane.
        beat = Signal(range(max(*tile_beats(config), most_beats) + 1))
        in_chunk, plane = Signal(init=1), Signal()
        set_, k, set_ends = Signal(range(most_sets + 1)), Signal.like(self.k_tiles), Signal()
        next_set, next_plane, tile_plane = Signal.like(tile_set), Signal(), Signal()  # of the tile to come, in use
        m.d.comb += set_ends.eq((k == self.k_tiles - 1) | ((~k & (((1 << self.group) - 1) >> whole)) == 0))

        take = Signal()
        m.d.comb += [
            self.weights.ready.eq(self.enable & self.allow & ~is_kv & ~self.reset),
            self.kv.ready.eq(self.enable & self.allow & is_kv & ~self.reset),
            take.eq(self.weights.ready & self.weights.valid),
        ]
        codes_take = Signal()
        m.d.comb += [
            codes_take.eq(take & ~in_chunk),
            self.arrived.eq((codes_take & (beat == config.tile_beats - 1))
                            | (self.kv.ready & self.kv.valid & self.kv.payload.last)),
        ]
        chunk = [Signal(8 * config.superbeat_bytes, name=f"chunk{i}", reset_less=True) for i in range(most_beats)]
        # A chunk that follows the swap to a tile at once comes a cycle too early for the scales of that tile.
        early, early_at = Signal(8 * config.superbeat_bytes, reset_less=True), Signal(most_beats)
        m.d.sync += early_at.eq((take & in_chunk) << beat)
        with m.If(take & in_chunk):
            m.d.sync += early.eq(self.weights.payload)
        for part, arrives in zip(chunk, early_at):
            with m.If(arrives):
                m.d.sync += part.eq(early)
        with m.If(self.swap):
            m.d.sync += [tile_set.eq(next_set), tile_plane.eq(next_plane)]
        with m.If(self.reset):
            m.d.sync += [in_chunk.eq(1), beat.eq(0), plane.eq(0), k.eq(0)]
        with m.Elif(take & in_chunk):
            m.d.sync += beat.eq(beat + 1)
            with m.If(beat == chunk_beats - 1):
                m.d.sync += [beat.eq(0), in_chunk.eq(0), set_.eq(0)]
        with m.Elif(take):
            m.d.sync += beat.eq(beat + 1)
            with m.If(self.arrived):
                m.d.sync += [beat.eq(0), next_set.eq(set_), next_plane.eq(plane), plane.eq(is_w8 & ~plane)]
                with m.If(~is_w8 | plane):
                    m.d.sync += k.eq(Mux(k == self.k_tiles - 1, 0, k + 1))
                    with m.If(set_ends):
                        m.d.sync += [set_.eq(set_ + 1), in_chunk.eq(set_ == chunk_sets - 1)]
        with m.Elif(self.kv.ready & self.kv.valid):
            m.d.sync += beat.eq(Mux(self.kv.payload.last, 0, beat + 1))

        # Which superbeat of a tile this is; the registers of both tiles stand in the array.
        kv_take, is_pv = Signal(), Signal()
        m.d.comb += [kv_take.eq(self.kv.ready & self.kv.valid), is_pv.eq(self.mode == MatmulMode.PV)]
        for load, take_it in ((self.load_codes, codes_take), (self.load_keys, kv_take & ~is_pv),
                              (self.load_values, kv_take & is_pv)):
            m.d.comb += load.eq(Cat(take_it & (beat == j) for j in range(len(load))))

        # Scales of the tile in use.
        half_bits = 16
        flat, size = Cat(*chunk), half_bits * columns
        of_chunk = Array(flat[at:at + size] for at in range(0, lines * size, size))
        scales, minima = ([Signal(size, name=f"{name}{b}") for b in range(blocks)] for name in ("scales", "minima"))
        exponent, of_kv = Signal(signed(8)), Signal()
        m.d.comb += [exponent.eq(self.scale_exponent - Mux(is_w8 & ~tile_plane, CODE_BITS, 0)), of_kv.eq(is_kv)]
        for b in range(blocks):
            m.d.comb += [scales[b].eq(of_chunk[scale_line[b]]), minima[b].eq(of_chunk[minimum_line[b]])]
        in_use = [*scales, *minima, exponent, of_kv, self.scale_exponent]
        if config.passes > 1:
            # What the first row finds stays for all passes of all rows.
            kept = [Signal.like(value, name=f"in_use{i}", reset_less=True) for i, value in enumerate(in_use)]
            with m.If(self.use_first):
                m.d.sync += [register.eq(value) for register, value in zip(kept, in_use)]
            size //= config.passes
            in_use = [*(value.word_select(self.scale_turn, size) for value in kept[:-3]), *kept[-3:]]
        *of_blocks, exponent, of_kv, minimum_exponent = in_use
        for n in range(at_once(config)):
            for b in range(blocks):
                sig, es = half_parts(of_blocks[b].word_select(n, half_bits))
                sig_minimum, es_minimum = half_parts(of_blocks[blocks + b].word_select(n, half_bits))
                entered = [
                    self.scale[n][b].significand.eq(Mux(of_kv, 0, sig - (1 << KV_FRACTION))),
                    self.scale[n][b].shift.eq(Mux(of_kv, 0, exponent - es)),
                    self.minimum[n][b].significand.eq(sig_minimum),
                    self.minimum[n][b].shift.eq(minimum_exponent - es_minimum),
                ]
                if config.passes > 1:
                    m.d.comb += entered
                else:
                    with m.If(self.use_first):
                        m.d.sync += entered
        return m


class ComputeUnit(wiring.Component):
    """MATMUL: tiles from the weight stream or the KV buffer, rows from MBUF, results to the vector unit.

    Loop t takes the rows in the command's mask: those rows of MBUF, one accumulator row each, without gaps.
    DROPW takes a superbeat of the weight stream in every cycle in which there is one, and two cycles more.

    Members
    -------
    cmd : commands cleared of hazards; done pulses when the last MBUF row of one has been read,
        or the last superbeat dropped
    weights : superbeats of the weight stream
    kv_request, kv_tile, kv_release : the KV buffer's read side; release after PV
    exponent_slot, exponent_head, exponents : K exponents of one (slot, head), 5 bits per token, at once
    write_* : MBUF's write port
    out : AccBeat stream in the order h, n, g, t, c
    active, starved, drain_blocked : counters' events
    debug, debug_row, debug_data : MBUF row for inspection while idle, one cycle later
    """

    def __init__(self, *, config):
        self.config = config
        rows = range(config.mbuf_rows)
        super().__init__({
            "cmd": In(stream.Signature(Command(config))), "done": Out(1), "busy": Out(1),
            "weights": In(stream.Signature(8 * config.superbeat_bytes)),
            "kv_request": Out(stream.Signature(KvRequest(config))),
            "kv_tile": In(stream.Signature(KvTile(config))),
            "kv_release": Out(1),
            "exponent_slot": Out(1), "exponent_head": Out(8), "exponents": In(5 * config.tile_tokens),
            "write_en": In(1), "write_row": In(rows), "write_vector": In(rows), "write_first": In(1),
            "write_data": In(AlignedRow(config)),
            "out": Out(stream.Signature(AccBeat(config))),
            "active": Out(1), "starved": Out(1), "drain_blocked": Out(1),
            "debug": In(1), "debug_row": In(rows), "debug_data": Out(AlignedRow(config).size),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        vectors = config.columns // config.vector_lanes
        m.submodules.mbuf = mbuf = MantissaBuffer(config=config)
        m.submodules.feed = feed = TileFeed(config=config)
        m.submodules.array = array = PeArray(config=config)
        wiring.connect(m, feed.kv, wiring.flipped(self.kv_tile))
        m.d.comb += [
            mbuf.write_en.eq(self.write_en), mbuf.write_row.eq(self.write_row), mbuf.write_vector.eq(self.write_vector),
            mbuf.write_first.eq(self.write_first), mbuf.write_data.eq(self.write_data),
        ]

        # The running command. Superbeats that are dropped pass the feed by.
        running, dropping = Signal(), Signal()
        drop_left = Signal(fields(self.cmd.payload.body, _DROPW).count.shape())
        drop = dropping & (drop_left != 0)
        m.d.comb += [
            feed.weights.payload.eq(self.weights.payload), feed.weights.valid.eq(self.weights.valid),
            self.weights.ready.eq(feed.weights.ready | drop),
        ]
        mask = Signal(config.tokens)
        body = Signal(self.cmd.payload.body.shape(), reset_less=True)
        f = fields(body, _MATMUL)
        mode = Signal(MatmulMode)
        is_kv = Signal()
        m.d.comb += [mode.eq(f.mode), is_kv.eq((mode == MatmulMode.QK) | (mode == MatmulMode.PV))]
        slots = {MatmulMode.QK: Signal(name="slot_qk"), MatmulMode.PV: Signal(name="slot_pv")}
        slot = Mux(mode == MatmulMode.PV, slots[MatmulMode.PV], slots[MatmulMode.QK])

        # Sequencer (S0).
        # The tile after this one, so that registers know what a tile is the last of. Counted from 1, as groups are, so
        # that an end is found without a subtraction.
        h, n, tile, after_plane, fresh = Signal(8), Signal(14), Signal(12), Signal(), Signal()
        k, plane = Signal(12), Signal()
        g, left = Signal(8), Signal(config.tokens)  # left: rows of this g from the current one on
        vector, vector_g, vector_h = Signal(16), Signal(16), Signal(16)
        left_next, base_next, stride_next = Signal.like(left), Signal(16), Signal.like(f.row_stride)
        _, rest = lowest(m, left, "row")
        begin = Signal()  # of a MATMUL
        taken = fields(self.cmd.payload.body, _MATMUL)
        few = taken.groups * self.cmd.payload.rows <= config.acc_rows // 2  # rows fill no more than half a bank
        acc_row, bank, halves = Signal(range(config.acc_rows)), Signal(2), Signal()
        further = Signal(range(config.passes))  # not 0 in further passes of a row
        full, issue, tile_ready, banks_free = Signal(), Signal(), Signal(), Signal()  # full: the next tile is there

        def place(row, bank, halves):
            """Accumulator row of a bank: banks 2 and 3 of halves are the upper ones of 0 and 1."""
            return Cat(row[:-1], row[-1] | (bank[1] & halves), bank[0])

        swap, last_tile, fed = Signal(), Signal(), Signal()  # fed: nothing of the MATMUL is left to load
        last_t, last_g, last_k, last_n = Signal(), Signal(), Signal(), Signal()
        first_t, last_row, first_row, last_of_all = Signal(), Signal(), Signal(), Signal()
        last_plane, after_last_plane = (mode != MatmulMode.W8) | plane, (mode != MatmulMode.W8) | after_plane
        after_k, after_n = (tile == f.k_tiles) & after_last_plane, n == f.n_tiles
        started, drained = Signal(), Signal()
        in_flight, most_in_flight = Signal(3), Signal(3)
        m.d.comb += [
            last_t.eq(rest == 0), last_g.eq(g == f.groups),
            last_row.eq(last_t & last_g), first_row.eq(first_t & (g == 1)),
            last_of_all.eq(last_row & last_tile),
            tile_ready.eq(full | ~first_row), swap.eq(issue & first_row),
            banks_free.eq((in_flight < most_in_flight) | ~(first_row & (k == 0) & ~plane)),
            issue.eq(running & tile_ready & banks_free & ~further.any()),
            self.busy.eq(running | dropping | (in_flight != 0)),
        ]
        with m.If(issue | further.any()):
            m.d.sync += further.eq(further + 1)
        m.d.comb += started.eq(issue & first_row & (k == 0) & ~plane)
        m.d.sync += in_flight.eq(in_flight + started - drained)
        m.d.sync += full.eq(feed.arrived | (full & ~swap))
        m.d.comb += [
            feed.enable.eq(running & ~fed), feed.allow.eq(~full | (swap & ~last_tile)), feed.swap.eq(swap),
            array.swap.eq(swap), feed.mode.eq(mode), feed.k_tiles.eq(f.k_tiles), feed.group.eq(f.group),
            feed.scale_exponent.eq(f.scale_exponent),
        ]
        with m.If(swap & last_tile):
            m.d.sync += fed.eq(1)
        with m.If(issue):
            m.d.sync += [first_t.eq(last_t), acc_row.eq(acc_row + 1)]
            with m.If(last_t):
                m.d.sync += g.eq(g + 1)
            with m.If(last_row):
                m.d.sync += [g.eq(1), acc_row.eq(0), plane.eq(~last_plane)]
                with m.If(last_plane):
                    m.d.sync += k.eq(k + 1)
                with m.If(last_k):
                    m.d.sync += [k.eq(0), bank.eq(bank + 1)]
                    with m.If(last_n):
                        m.d.sync += vector_h.eq(vector_h + f.head_stride)
        m.d.sync += fresh.eq(begin)
        with m.If(fresh | (issue & last_row)):
            m.d.sync += [last_k.eq(after_k), last_n.eq(after_n), last_tile.eq(after_k & after_n & (h == f.heads)),
                         after_plane.eq(~after_last_plane)]
            with m.If(after_last_plane):
                m.d.sync += tile.eq(tile + 1)
            with m.If(after_k):
                m.d.sync += [tile.eq(1), n.eq(n + 1)]
                with m.If(after_n):
                    m.d.sync += [n.eq(1), h.eq(h + 1)]
        # Where the row after this one starts: its g and h, and as many row strides as its number.
        m.d.comb += [left_next.eq(Mux(last_t, mask, rest)), base_next.eq(vector_g), stride_next.eq(f.row_stride)]
        with m.If(last_t):
            m.d.comb += base_next.eq(vector_g + f.group_stride)
        with m.If(last_row):
            m.d.comb += base_next.eq(vector_h)
            with m.If(last_k & last_n):
                m.d.comb += base_next.eq(vector_h + f.head_stride)
        with m.If(begin):
            m.d.comb += [left_next.eq(self.cmd.payload.mask), base_next.eq(self.cmd.payload.x),
                         stride_next.eq(taken.row_stride)]
        t_next, _ = lowest(m, left_next, "next")
        with m.If(issue | begin):
            m.d.sync += [left.eq(left_next), vector_g.eq(base_next), vector.eq(base_next + t_next * stride_next)]

        # S1: the row is in use.
        used, used_first, used_last = Signal(), Signal(), Signal()
        control = Signal(RowControl(config))
        m.d.sync += [used.eq(issue), used_first.eq(issue & first_row), used_last.eq(issue & last_of_all)]
        m.d.comb += [
            mbuf.read_en.eq(issue | self.debug), mbuf.read_row.eq(Mux(self.debug, self.debug_row, vector + k)),
            self.debug_data.eq(mbuf.read_data.as_value()), mbuf.read_vector.eq(vector),
            feed.use_first.eq(used_first), self.active.eq(used),
            self.done.eq(used_last | (dropping & ~drop)),
        ]
        with m.If(issue):
            m.d.sync += [
                control.acc.eq(place(acc_row, bank, halves)), control.first.eq((k == 0) & ~plane),
                control.signed_codes.eq((mode == MatmulMode.W4) | ((mode == MatmulMode.W8) & ~plane)),
                control.minimum.eq(mode == MatmulMode.W4M),
                control.last.eq(last_row & last_k),
            ]
        m.d.comb += [array.row_en.eq(used), array.row.eq(mbuf.read_data), array.maximum.eq(mbuf.read_maximum),
                     array.control.eq(control)]
        numbers = self.kv_tile.payload.data
        beyond = len(array.mantissas) // len(numbers) - len(numbers[0])  # bits that the array's words are wider
        m.d.comb += [array.codes.eq(self.weights.payload),
                     array.mantissas.eq(Cat(Cat(number, number[-1].replicate(beyond)) for number in numbers)),
                     array.load_codes.eq(feed.load_codes), array.load_keys.eq(feed.load_keys),
                     array.load_values.eq(feed.load_values)]
        if config.passes > 1:
            m.d.comb += feed.scale_turn.eq(array.scale_turn)
        for n_ in range(at_once(config)):
            for b in range(config.blocks):
                m.d.comb += [array.scale[n_][b].eq(feed.scale[n_][b]), array.minimum[n_][b].eq(feed.minimum[n_][b])]

        # KV tile requests run ahead of the sequencer.
        request_h, request_n, request_k, requesting = Signal(8), Signal(14), Signal(12), Signal()
        request = self.kv_request
        m.d.comb += [
            request.valid.eq(requesting), request.payload.slot.eq(slot),
            request.payload.value.eq(mode == MatmulMode.PV), request.payload.head.eq(request_h),
            request.payload.n.eq(request_n), request.payload.k.eq(request_k),
        ]
        with m.If(requesting & request.ready):
            m.d.sync += request_k.eq(request_k + 1)
            with m.If(request_k == f.k_tiles - 1):
                m.d.sync += [request_k.eq(0), request_n.eq(request_n + 1)]
                with m.If(request_n == f.n_tiles - 1):
                    m.d.sync += [request_n.eq(0), request_h.eq(request_h + 1)]
                    with m.If(request_h == f.heads - 1):
                        m.d.sync += requesting.eq(0)

        # Accepting a command: its drain part goes to a two-deep queue.
        queue_space, accept, is_drop = Signal(), Signal(), Signal()
        m.d.comb += [
            is_drop.eq(self.cmd.payload.opcode == _DROPW.opcode),
            accept.eq(self.cmd.valid & ~running & ~dropping & ~used & (queue_space | is_drop)),
            self.cmd.ready.eq(accept), begin.eq(accept & ~is_drop), feed.reset.eq(begin),
        ]
        with m.If(drop & self.weights.valid):
            m.d.sync += drop_left.eq(drop_left - 1)
        with m.If(dropping & ~drop):
            m.d.sync += dropping.eq(0)
        with m.If(accept & is_drop):
            m.d.sync += [dropping.eq(1), drop_left.eq(fields(self.cmd.payload.body, _DROPW).count)]
        with m.If(begin):
            m.d.sync += [
                running.eq(1), fed.eq(0), body.eq(self.cmd.payload.body), mask.eq(self.cmd.payload.mask),
                halves.eq(few), h.eq(1), n.eq(1), tile.eq(1), after_plane.eq(0), k.eq(0), plane.eq(0), g.eq(1),
                first_t.eq(1), acc_row.eq(0), vector_h.eq(self.cmd.payload.x),
                request_h.eq(0), request_n.eq(0), request_k.eq(0),
                requesting.eq((taken.mode == MatmulMode.QK) | (taken.mode == MatmulMode.PV)),
            ]
        with m.If(issue & last_of_all):
            m.d.sync += running.eq(0)
            with m.If(mode == MatmulMode.PV):
                m.d.sync += slots[MatmulMode.PV].eq(~slots[MatmulMode.PV])
            with m.If(mode == MatmulMode.QK):
                m.d.sync += slots[MatmulMode.QK].eq(~slots[MatmulMode.QK])
        m.d.comb += self.kv_release.eq(issue & last_of_all & (mode == MatmulMode.PV))

        # Drain.
        info_layout = data.StructLayout({
            "mask": config.tokens, "groups": 8, "heads": 8, "n_tiles": 14, "beats": 16, "mode": 3,
            "scale_exponent": signed(7), "halves": 1})
        infos = [Signal(info_layout, name=f"info{i}") for i in range(2)]
        info_count = Signal(2)
        info_done = Signal()
        current = infos[0]
        incoming = Signal(info_layout)
        m.d.comb += [
            incoming.mask.eq(self.cmd.payload.mask), incoming.groups.eq(taken.groups), incoming.heads.eq(taken.heads),
            incoming.n_tiles.eq(taken.n_tiles), incoming.beats.eq(taken.beats), incoming.mode.eq(taken.mode),
            incoming.scale_exponent.eq(taken.scale_exponent), queue_space.eq(info_count < 2),
            incoming.halves.eq(few),
            # four, if all column tiles on their way are of commands with few rows
            most_in_flight.eq(Mux(Cat(info.halves | (info_count <= i) for i, info in enumerate(infos)).all(), 4, 2)),
        ]
        m.d.sync += info_count.eq(info_count + begin - info_done)
        with m.If(info_done):
            m.d.sync += infos[0].eq(infos[1])
        with m.If(begin):
            with m.If((info_count - info_done) == 0):
                m.d.sync += infos[0].eq(incoming)
            with m.Else():
                m.d.sync += infos[1].eq(incoming)

        m.submodules.maxima = maxima = Memory(shape=signed(9), depth=2 * config.acc_rows, init=[])
        keep, recall = maxima.write_port(), maxima.read_port(domain="comb")
        m.d.comb += [keep.en.eq(used & control.first), keep.addr.eq(control.acc), keep.data.eq(mbuf.read_maximum)]

        ready_tiles = Signal(3)
        dh, dn, dg, passed = Signal(8), Signal(14), Signal(8), Signal(config.tokens)  # passed: rows of this dg
        _, drain_rest = lowest(m, current.mask & ~passed, "drain")
        dc, beat = Signal(range(vectors)), Signal(16)
        inside = (at_once(config) // config.vector_lanes).bit_length() - 1  # bits of dc that count within a pass
        if config.passes > 1:
            m.d.comb += array.drain_turn.eq(dc[inside:])
        beat_base = Signal(16)
        drain_row, drain_bank = Signal(range(config.acc_rows)), Signal(2)
        drain_slot = Signal()
        draining, advance = Signal(), Signal()
        m.d.comb += [
            draining.eq(ready_tiles != 0),
            advance.eq(draining & ~array.drain_busy & (~self.out.valid | self.out.ready)),
            self.drain_blocked.eq(draining & self.out.valid & ~self.out.ready),
            array.drain_row.eq(place(drain_row, drain_bank, current.halves)), recall.addr.eq(array.drain_row),
            self.starved.eq(running & ~tile_ready), beat.eq(beat_base + dc),
            self.exponent_slot.eq(drain_slot), self.exponent_head.eq(dh),
        ]
        m.d.sync += ready_tiles.eq(ready_tiles + array.tile_done - drained)
        with m.If(self.out.ready):
            m.d.sync += self.out.valid.eq(0)
        last_c, last_dt, last_dg, last_dn = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            last_c.eq((dc == vectors - 1) | (beat + 1 == current.beats)), last_dt.eq(drain_rest == 0),
            last_dg.eq(dg == current.groups - 1), last_dn.eq(dn == current.n_tiles - 1),
            drained.eq(advance & last_c & last_dt & last_dg),
            info_done.eq(drained & last_dn & (dh == current.heads - 1)),
        ]
        is_qk = current.mode == MatmulMode.QK
        constant = Signal(signed(8))
        with m.Switch(current.mode):
            with m.Case(MatmulMode.QK):
                m.d.comb += constant.eq(-45)
            with m.Case(MatmulMode.PV):
                m.d.comb += constant.eq(-20)
            with m.Default():
                m.d.comb += constant.eq(current.scale_exponent - 39)
        base_exponent = Signal(signed(10))
        m.d.comb += base_exponent.eq(recall.data + constant)
        with m.If(advance):
            m.d.sync += self.out.valid.eq(1)
            for lane in range(config.vector_lanes):
                choices = array.drain[lane::config.vector_lanes]
                per_tile = config.tile_tokens // config.columns
                tokens = [self.exponents.word_select(q * config.columns + c * config.vector_lanes + lane, 5)
                          for q in range(per_tile) for c in range(vectors)]
                token_index = dc if per_tile == 1 else Cat(dc, dn[:(per_tile - 1).bit_length()])
                m.d.sync += [
                    self.out.payload.acc[lane].eq(Array(choices)[dc[:inside]]),
                    self.out.payload.exponent[lane].eq(base_exponent + Mux(is_qk, Array(tokens)[token_index], 0)),
                ]
            m.d.sync += dc.eq(dc + 1)
            with m.If(last_c):
                m.d.sync += [dc.eq(0), passed.eq(~drain_rest), drain_row.eq(drain_row + 1)]
                with m.If(last_dt):
                    m.d.sync += [passed.eq(0), dg.eq(dg + 1)]
            with m.If(drained):
                m.d.sync += [dg.eq(0), drain_row.eq(0), drain_bank.eq(drain_bank + 1), dn.eq(dn + 1),
                             beat_base.eq(beat_base + vectors)]
                with m.If(last_dn):
                    m.d.sync += [dn.eq(0), beat_base.eq(0), dh.eq(dh + 1)]
            with m.If(info_done):
                m.d.sync += dh.eq(0)
                with m.If(is_qk):
                    m.d.sync += drain_slot.eq(~drain_slot)
        return m
