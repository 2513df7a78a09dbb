"""Load unit: LOADW, LOADA and LOADKV. One reader per port.

Commands are checked against the memory limit and handed to the readers as soon as those have requested everything of
the command before. So memory is kept busy across commands, and the first superbeat of the next one follows the last of
the one before without a gap.

Weights and rows of the activation buffer leave all readers at the same addresses in superbeats, in lockstep; what each
run of superbeats is for waits in a queue. The records of a KV tile go from each port to the KV buffer on their own, and
the ports may be at different tiles. Each reader has a queue of runs, and each port one that says which records follow.
A LOADKV with ``reuse`` fills them row by row, as the history finds the places of the records.
"""

import numpy as np
from amaranth.hdl import Array, Cat, DomainRenamer, Module, Mux, Signal, signed
from amaranth.lib import data, enum, fifo, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from ..isa import OPCODES, ROUTER_ROWS_AT
from ..registers import FaultCause
from .axi import AxiRead
from .axi_read import ADDRESS_BITS, COUNT_BITS, AxiReader, ReadRun
from .command import PC_BITS, PLACE_BITS, Command, Fault, PlaceAnswer, PlaceRequest, fields
from .history import Found, History
from .kvintake import TILE_NUMBERS, KvRecord, KvShape
from .kvpack import record_beats, unknown_format
from .rows import ones
from .trees import tree_sum

__all__ = ["AbufWrite", "LoadUnit"]

_LAYOUTS = {item.mnemonic: item for item in OPCODES.values()}
_AHEAD = 8  #: commands of a kind requested but not yet delivered
_RUNS_AHEAD = 16  #: runs a reader has before it, and records the KV buffer


def AbufWrite(config):
    """One row for the activation buffer."""
    return data.StructLayout({"data": 32 * config.vector_lanes, "addr": 16})


class _Kind(enum.Enum, shape=2):
    WEIGHTS = 0
    ABUF = 1
    KV = 2


#: What a run of superbeats is for. ``row_count``: superbeats per row of a LOADA.
_Job = data.StructLayout({
    "kind": _Kind, "count": COUNT_BITS, "pc": PC_BITS, "row": 16, "row_count": 16, "beats": 16, "stride": 16,
})


class LoadUnit(wiring.Component):
    """Members
    -------
    cmd : In(stream of Command), cleared of hazards; done, busy : Out(1)
    base : In(64) per port, byte address of superbeat 0; limit : In(32), superbeats of memory
    axi : Out(AxiRead) per port
    weights : Out(stream of superbeats)
    abuf : Out(stream of AbufWrite), rows from ROUTER_ROWS_AT on for the router buffer
    tile : Out(stream of KvShape), the tile of each LOADKV
    records, kv : per port, Out(stream of KvRecord) and Out(stream of port beats): which records follow, and their
        beats; what is offered of ``records`` has to be taken with the last beat of theirs
    hits : per port, Out(stream of KvRecord), what comes from the history buffer
    tile_done : In(1), the oldest tile that was not done is complete
    places : In(stream of PlaceRequest), place : Out(PlaceAnswer), for the store unit
    fault : Out(Fault), stays; the command that failed and those after it deliver nothing until reset, except records
        before the one that failed
    beats_read : Out(P), a beat has arrived on a port
    weights_read : Out(1), a superbeat was taken from ``weights``; kv_read : Out, how many port beats from ``kv``
    history_stirs : Out(1), as `stirs` of History, which is in the domain ``history_domain``
    starved : Out(1), a receiver of superbeats waits for memory; blocked : Out(1), a superbeat or a beat of a record
        waits for its receiver
    """

    def __init__(self, *, config, history_domain="sync"):
        self.config, self._history_domain = config, history_domain
        ports = config.ports
        super().__init__({
            "cmd": In(stream.Signature(Command(config))), "done": Out(1), "busy": Out(1), "history_stirs": Out(1),
            "base": In(64).array(ports), "limit": In(ADDRESS_BITS), "axi": Out(AxiRead(config.port_bits)).array(ports),
            "weights": Out(stream.Signature(8 * config.superbeat_bytes)),
            "abuf": Out(stream.Signature(AbufWrite(config))),
            "tile": Out(stream.Signature(KvShape(config))), "tile_done": In(1),
            "records": Out(stream.Signature(KvRecord(config))).array(ports),
            "kv": Out(stream.Signature(config.port_bits)).array(ports),
            "hits": Out(stream.Signature(KvRecord(config))).array(ports),
            "places": In(stream.Signature(PlaceRequest)), "place": Out(PlaceAnswer),
            "fault": Out(Fault), "beats_read": Out(ports), "weights_read": Out(1),
            "kv_read": Out(range(ports + 1)), "starved": Out(1), "blocked": Out(1),
        })

    def history(self):
        """The block that finds records; a bench that damages it returns another one."""
        return History(config=self.config)

    @staticmethod
    def model(config, memory, mnemonic, place=None, **f):
        """What one command delivers, in order; ``f`` holds its fields with the registers added.

        memory : uint8 [P, superbeats, port bytes]; place : of the record of a position (for reuse)
        Returns uint8 [superbeats, W] (LOADW), a list of (ABUF row, uint8 [4 V]) (LOADA), or of each port's records,
        uint8 [records, port beats, port bytes] (LOADKV).
        """
        if mnemonic == "loadkv":
            count = min(f["rows"], config.tile_tokens)
            rows = -(-count // config.ports)
            if not f.get("reuse"):
                return [port[f["imm"]:f["imm"] + rows * f["record"]].reshape(rows, f["record"], -1) for port in memory]
            starts = [[f["imm"] + place(f["x"] + i) * f["record"] for i in range(p, count, config.ports)]
                      for p in range(config.ports)]
            return [np.array([port[start:start + f["record"]] for start in of_port]).reshape(-1, f["record"],
                                                                                              memory.shape[2])
                    for port, of_port in zip(memory, starts)]
        count = f["count"] if mnemonic == "loadw" else f["rows"] * f["count"]
        superbeats = memory[:, f["imm"]:f["imm"] + count].transpose(1, 0, 2).reshape(count, config.superbeat_bytes)
        if mnemonic == "loadw":
            return superbeats
        lines = superbeats.reshape(-1, 4 * config.vector_lanes)
        step = len(lines) // max(f["rows"], 1)
        return [((f["x"] & 0xFFFF) + r * f["dst_stride"] + i, lines[r * step + i])
                for r in range(f["rows"]) for i in range(f["beats"])]

    def elaborate(self, platform):
        m = Module()
        config = self.config
        readers = []
        for p in range(config.ports):
            m.submodules[f"port{p}"] = reader = AxiReader(config=config)
            wiring.connect(m, reader.axi, wiring.flipped(self.axi[p]))
            m.d.comb += [reader.base.eq(self.base[p]), self.beats_read[p].eq(reader.beat)]
            readers.append(reader)
        m.submodules.jobs = jobs = fifo.SyncFIFOBuffered(width=_Job.size, depth=_AHEAD)
        m.submodules.tiles = tiles = fifo.SyncFIFOBuffered(width=KvShape(config).size, depth=_AHEAD)
        m.submodules.order = order = fifo.SyncFIFOBuffered(width=1, depth=2 * _AHEAD)
        history = self.history()
        m.submodules.history = DomainRenamer(self._history_domain)(history)
        wiring.connect(m, history.request, wiring.flipped(self.places))
        m.d.comb += [
            self.history_stirs.eq(history.stirs),
            self.place.eq(history.answer),
            self.tile.valid.eq(tiles.r_rdy), self.tile.payload.eq(tiles.r_data), tiles.r_en.eq(self.tile.ready),
        ]
        pcs = Memory(shape=PC_BITS, depth=TILE_NUMBERS, init=[])  # of the commands of tiles
        m.submodules.pcs = pcs
        requesting = self._request(m, readers, history, jobs, tiles, order, pcs)
        finish = self._deliver(m, readers, jobs)
        self._deliver_records(m, readers, pcs)

        # Commands are done in order, whoever is ready first.
        finished, complete = Signal(range(2 * _AHEAD + 1)), Signal(range(2 * _AHEAD + 1))
        is_kv, pop = order.r_data, order.r_en
        m.d.comb += pop.eq(order.r_rdy & Mux(is_kv, complete != 0, finished != 0))
        m.d.sync += [
            self.done.eq(pop), finished.eq(finished + finish - (pop & ~is_kv)),
            complete.eq(complete + self.tile_done - (pop & is_kv)),
        ]
        m.d.comb += self.busy.eq(requesting | (order.level != 0) | self.done)
        return m

    def _fail(self, m, cause, pc, port=0):
        with m.If(~self.fault.valid):
            m.d.sync += [self.fault.valid.eq(1), self.fault.cause.eq(cause), self.fault.pc.eq(pc),
                         self.fault.port.eq(port)]

    def _request(self, m, readers, history, jobs, tiles, order, pcs):
        """Commands to jobs and tiles: sizes, checks, runs to the readers. Returns: a command is being prepared."""
        config, command = self.config, self.cmd.payload
        loadw, loada, loadkv = (fields(command.body, _LAYOUTS[name]) for name in ("loadw", "loada", "loadkv"))
        is_a, is_kv = (command.opcode == _LAYOUTS[name].opcode for name in ("loada", "loadkv"))
        job, shape = Signal(_Job, reset_less=True), Signal(KvShape(config), reset_less=True)
        address = Signal(ADDRESS_BITS, reset_less=True)
        product = Signal(28, reset_less=True)  # superbeats of a LOADA, port beats of all K heads of a LOADKV
        overrun, unknown = Signal(), Signal()  # unknown: a format that the configuration does not have
        least = Signal(len(product) + 1)  # beats of a record at least
        final, buffer, capacity_used = Signal(), Signal.like(loadkv.buffer), Signal(32)
        follow, layer, number = Signal(), Signal.like(loadkv.layer), Signal(range(TILE_NUMBERS))
        port_shift, tokens = config.ports.bit_length() - 1, Signal(range(config.tile_tokens + 1))
        rows = Signal.like(shape.rows)
        row, lasting, exists = Signal.like(shape.rows), Signal(), Signal(config.ports)
        idle, issue, room = Signal(), Signal(), Signal()
        offsets = [Signal(PLACE_BITS + 16, name=f"offset{p}") for p in range(config.ports)]
        found = [Signal(Found(config), name=f"found{p}") for p in range(config.ports)]
        copies = [Signal(range(max(config.buffer_beats, 2)), name=f"copy{p}") for p in range(config.ports)]
        slack = Signal(signed(ADDRESS_BITS + 2))  # the largest offset inside memory
        lost, beyond = Signal(config.ports), Signal(config.ports)
        m.d.comb += [
            rows.eq((tokens + config.ports - 1) >> port_shift), lasting.eq(row == shape.rows - 1),
            exists.eq(Mux(follow & lasting, shape.last, ~0)),
            least.eq(record_beats(config, shape, product[:16])),
            beyond.eq(Cat(offset > slack for offset in offsets) & exists),
            history.first.eq(job.row >> port_shift), history.rows.eq(shape.rows), history.last.eq(shape.last),
            history.layer.eq(layer), history.final.eq(final), history.buffer.eq(buffer),
            history.record.eq(shape.record),
        ]

        with m.FSM(name="request"):
            with m.State("IDLE"):
                m.d.comb += [idle.eq(1), self.cmd.ready.eq(~self.fault.valid)]
                with m.If(self.cmd.valid & self.cmd.ready):
                    m.d.sync += [
                        job.kind.eq(Mux(is_a, _Kind.ABUF, Mux(is_kv, _Kind.KV, _Kind.WEIGHTS))),
                        job.count.eq(loadw.count), job.pc.eq(command.pc), job.row.eq(command.x),
                        job.row_count.eq(loada.count), job.beats.eq(loada.beats), job.stride.eq(loada.dst_stride),
                        shape.heads.eq(loadkv.heads), shape.head_beats.eq(loadkv.head_beats),
                        shape.record.eq(loadkv.record), shape.format.eq(loadkv.format),
                        tokens.eq(Mux(command.rows > config.tile_tokens, config.tile_tokens, command.rows)),
                        address.eq(command.imm), follow.eq(is_kv & loadkv.reuse), layer.eq(loadkv.layer), row.eq(0),
                        final.eq(loadkv.final), buffer.eq(loadkv.buffer),
                        capacity_used.eq(loadkv.buffer * loadkv.record),
                        product.eq(Mux(is_a, command.rows, loadkv.heads)
                                   * Mux(is_a, loada.count, loadkv.head_beats)),
                    ]
                    m.next = "SIZE"
            with m.State("SIZE"):
                capacity = config.kvbuf_heads * config.lanes // config.beat_elements
                with m.If(job.kind == _Kind.ABUF):
                    m.d.sync += job.count.eq(product)
                with m.Elif(job.kind == _Kind.KV):
                    m.d.sync += [
                        job.count.eq(shape.record * rows), shape.rows.eq(rows),
                        shape.last.eq(ones(Mux(tokens[:port_shift] == 0, config.ports, tokens[:port_shift]),
                                           config.ports)),
                        unknown.eq(unknown_format(config, shape.format)),
                        overrun.eq((product == 0) | (product > capacity) | (shape.heads > config.kvbuf_heads)
                                   | (least > shape.record)
                                   | (follow & ((job.row + tokens > config.history_tokens)
                                                | (layer >= config.history_layers)
                                                | (capacity_used > config.buffer_beats)
                                                | (buffer > config.history_tokens // config.ports)))),
                    ]
                    with m.If(~follow):
                        m.d.sync += shape.last.eq(~0)
                m.next = "CHECK"
            with m.State("CHECK"):
                with m.If((job.kind == _Kind.KV) & unknown):
                    self._fail(m, FaultCause.KV_FORMAT, job.pc)
                    m.next = "STOP"
                with m.Elif((job.kind == _Kind.KV) & overrun):
                    self._fail(m, FaultCause.BUFFER_RANGE, job.pc)
                    m.next = "STOP"
                with m.Elif(~follow & (address + job.count > self.limit)):
                    self._fail(m, FaultCause.MEMORY_RANGE, job.pc)
                    m.next = "STOP"
                with m.Elif(order.w_rdy & Mux(job.kind == _Kind.KV, tiles.w_rdy, jobs.w_rdy)):
                    m.d.comb += [order.w_en.eq(1), tiles.w_en.eq(job.kind == _Kind.KV), jobs.w_en.eq(~tiles.w_en)]
                    m.d.sync += Cat(offsets).eq(0)
                    m.next = "IDLE"
                    with m.If(follow):
                        m.d.comb += history.begin.eq(1)
                        m.next = "RECORD"
                    with m.Elif(job.count != 0):
                        m.next = "ISSUE"
            with m.State("RECORD"):
                with m.If(history.found):
                    m.d.comb += [history.take.eq(1), lost.eq(Cat(port.bad for port in history.row) & exists)]
                    for port, kept, offset, copy in zip(history.row, found, offsets, copies):
                        m.d.sync += [kept.eq(port), offset.eq(port.place * shape.record)]
                        if config.buffer_beats:
                            m.d.sync += copy.eq(port.slot * shape.record)
                    m.d.sync += slack.eq(self.limit - shape.record - address)
                    m.next = "RANGE"
                    with m.If(lost.any()):
                        self._fail(m, FaultCause.KV_POINTER, job.pc, _first(m, lost))
                        m.next = "STOP"
            with m.State("RANGE"):
                with m.If(beyond.any()):
                    self._fail(m, FaultCause.MEMORY_RANGE, job.pc, _first(m, beyond))
                    m.next = "STOP"
                with m.Else():
                    m.next = "ISSUE"
            with m.State("ISSUE"):
                m.d.comb += issue.eq(room & ~self.fault.valid)
                with m.If(issue):
                    m.d.sync += row.eq(row + 1)
                    m.next = "IDLE"
                    with m.If(follow & ~lasting):
                        m.next = "RECORD"
                    with m.Elif(job.kind == _Kind.KV):
                        m.d.sync += number.eq(number + 1)
            with m.State("STOP"):
                pass

        keep_pc = pcs.write_port()
        m.d.comb += [
            jobs.w_data.eq(job), tiles.w_data.eq(shape), order.w_data.eq(job.kind == _Kind.KV),
            keep_pc.en.eq(tiles.w_en), keep_pc.addr.eq(number), keep_pc.data.eq(job.pc),
        ]
        rooms = []
        for p, reader in enumerate(readers):
            m.submodules[f"runs{p}"] = runs = fifo.SyncFIFOBuffered(width=ReadRun.size, depth=_RUNS_AHEAD)
            m.submodules[f"records{p}"] = records = fifo.SyncFIFOBuffered(width=KvRecord(config).size,
                                                                          depth=_RUNS_AHEAD)
            run, record = Signal(ReadRun, name=f"run{p}"), Signal(KvRecord(config), name=f"record{p}")
            hit = follow & found[p].hit
            rooms += [runs.w_rdy, records.w_rdy]
            if config.buffer_beats:
                m.submodules[f"hits{p}"] = hits = fifo.SyncFIFOBuffered(width=KvRecord(config).size, depth=_RUNS_AHEAD)
                rooms.append(hits.w_rdy)
                m.d.comb += [
                    hits.w_data.eq(record), hits.w_en.eq(issue & exists[p] & hit), self.hits[p].valid.eq(hits.r_rdy),
                    self.hits[p].payload.eq(hits.r_data), hits.r_en.eq(self.hits[p].ready),
                ]
            m.d.comb += [
                run.address.eq(address + offsets[p]), run.count.eq(Mux(follow, shape.record, job.count)),
                run.kv.eq(job.kind == _Kind.KV), runs.w_data.eq(run), runs.w_en.eq(issue & exists[p] & ~hit),
                record.tile.eq(number), record.row.eq(row), record.rows.eq(Mux(follow, 1, shape.rows)),
                record.fill.eq(follow & found[p].fill), record.at.eq(copies[p]), record.counts.eq(follow),
                record.wait.eq(follow & found[p].wait), record.after.eq(found[p].after),
                records.w_data.eq(record), records.w_en.eq(runs.w_en & run.kv),
                reader.runs.valid.eq(runs.r_rdy), reader.runs.payload.eq(runs.r_data),
                runs.r_en.eq(reader.runs.ready),
                self.records[p].valid.eq(records.r_rdy), self.records[p].payload.eq(records.r_data),
                records.r_en.eq(self.records[p].ready),
            ]
        m.d.comb += room.eq(Cat(rooms).all())
        return ~idle

    def _deliver_records(self, m, readers, pcs):
        """Beats of records to the KV buffer, each port by itself. One with an error is never offered."""
        taken, waits, failed = [], [], Signal(len(readers))
        for p, (reader, kv) in enumerate(zip(readers, self.kv)):
            beat = reader.beats
            m.d.comb += [kv.valid.eq(beat.valid & beat.payload.kv & ~beat.payload.error),
                         kv.payload.eq(beat.payload.data),
                         failed[p].eq(beat.valid & beat.payload.kv & beat.payload.error)]
            taken.append(kv.valid & kv.ready)
            waits.append(kv.valid & ~kv.ready)
        m.d.comb += self.kv_read.eq(tree_sum(taken))
        with m.If(Cat(waits).any()):
            m.d.comb += self.blocked.eq(1)
        port = _first(m, failed)
        which = pcs.read_port(domain="comb")
        m.d.comb += which.addr.eq(Array(records.payload.tile for records in self.records)[port])
        with m.If(failed.any()):
            self._fail(m, FaultCause.READ_ERROR, which.data, port)

    def _deliver(self, m, readers, queue):
        """Beats to superbeats, superbeats to the receiver of the job in front. Returns: a job is finished."""
        config = self.config
        job, active = Signal(_Job, reset_less=True), Signal()
        left = Signal(COUNT_BITS)  # superbeats of the job, with the one on offer
        superbeat = Signal(8 * config.superbeat_bytes, reset_less=True)
        valid, refused = Signal(), Signal(config.ports)
        take, give, finish, start = Signal(), Signal(), Signal(), Signal()
        wanted, offered = Signal(), Signal()

        m.d.comb += [
            take.eq(Cat(reader.beats.valid & ~reader.beats.payload.kv for reader in readers).all() & (~valid | give)),
            wanted.eq(active & (left != 0)),
            offered.eq(valid & wanted & ~refused.any()),
        ]
        for reader, kv in zip(readers, self.kv):
            m.d.comb += reader.beats.ready.eq(Mux(reader.beats.payload.kv, kv.valid & kv.ready, take))
        with m.If(take):
            m.d.sync += [superbeat.eq(Cat(reader.beats.payload.data for reader in readers)),
                         refused.eq(Cat(reader.beats.payload.error for reader in readers))]
        with m.If(take | give):
            m.d.sync += valid.eq(take)

        # A superbeat of a LOADA is several rows of the activation buffer, taken one after the other.
        parts = config.superbeat_bytes // (4 * config.vector_lanes)
        part = Signal(range(max(parts, 2)))
        row_base, row, beats_left, row_left = Signal(18), Signal(18), Signal(16), Signal(16)
        rows = [superbeat[i * 32 * config.vector_lanes:(i + 1) * 32 * config.vector_lanes] for i in range(parts)]
        writes, outside = Signal(), Signal()
        m.d.comb += [
            writes.eq(beats_left != 0),
            outside.eq(row >= Mux(row < ROUTER_ROWS_AT, config.abuf_rows, ROUTER_ROWS_AT + config.router_rows)),
            self.abuf.valid.eq(offered & (job.kind == _Kind.ABUF) & writes & ~outside),
            self.abuf.payload.addr.eq(row),
            self.weights.valid.eq(offered & (job.kind == _Kind.WEIGHTS)), self.weights.payload.eq(superbeat),
            self.weights_read.eq(self.weights.valid & self.weights.ready),
        ]
        with m.Switch(part):
            for i, value in enumerate(rows):
                with m.Case(i):
                    m.d.comb += self.abuf.payload.data.eq(value)

        ready = Signal()
        with m.Switch(job.kind):
            with m.Case(_Kind.WEIGHTS):
                m.d.comb += [ready.eq(self.weights.ready), give.eq(offered & ready)]
            with m.Case(_Kind.ABUF):
                # The row's last superbeats may hold fewer rows than fit, or none.
                m.d.comb += [ready.eq(self.abuf.ready),
                             give.eq(offered & (~writes | (self.abuf.valid & ready & (part == parts - 1))))]
        with m.If(self.abuf.valid & self.abuf.ready):
            m.d.sync += [part.eq(part + 1), row.eq(row + 1), beats_left.eq(beats_left - 1)]
        with m.If(give & (job.kind == _Kind.ABUF)):
            m.d.sync += [part.eq(0), row_left.eq(row_left - 1)]
            with m.If(row_left == 1):
                m.d.sync += [row_base.eq(row_base + job.stride), row.eq(row_base + job.stride),
                             row_left.eq(job.row_count), beats_left.eq(job.beats)]
        with m.If(give):
            m.d.sync += left.eq(left - 1)

        following = data.View(_Job, queue.r_data)
        m.d.comb += [
            finish.eq(active & ((left == 0) | ((left == 1) & give))),
            start.eq(queue.r_rdy & (~active | finish)), queue.r_en.eq(start),
            self.starved.eq(wanted & ~valid & ready),
            self.blocked.eq(offered & ~ready),
        ]
        with m.If(start):
            m.d.sync += [job.eq(following), active.eq(1), left.eq(following.count), row_base.eq(following.row),
                         row.eq(following.row), row_left.eq(following.row_count), beats_left.eq(following.beats),
                         part.eq(0)]
        with m.Elif(finish):
            m.d.sync += active.eq(0)
        # What is faulty here is never offered, and so stops everything behind it; a fault found while a command is
        # prepared lets the jobs before it finish.
        with m.If(valid & wanted):
            with m.If(refused.any()):
                self._fail(m, FaultCause.READ_ERROR, job.pc, _first(m, refused))
            with m.Elif((job.kind == _Kind.ABUF) & writes & outside):
                self._fail(m, FaultCause.BUFFER_RANGE, job.pc)
        return finish


def _first(m, ports):
    """The lowest port whose bit is set."""
    port = Signal(range(max(len(ports), 2)))
    for p in reversed(range(len(ports))):
        with m.If(ports[p]):
            m.d.comb += port.eq(p)
    return port
