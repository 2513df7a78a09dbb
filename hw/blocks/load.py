"""Load unit: LOADW, LOADA and LOADKV. One reader per port, all at the same addresses, in lockstep at the receiving end.

Commands are checked against the memory limit and handed to the readers as soon as those have requested everything of
the command before; what each run of superbeats is for waits in a queue meanwhile. So memory is kept busy across
commands, and the first superbeat of the next one follows the last of the one before without a gap.

A LOADKV with ``reuse`` hands each reader the run of one record after the other, from the layer that the history names
for it; preparing a record takes four cycles.
"""

import numpy as np
from amaranth.hdl import Cat, Module, Mux, Signal, signed
from amaranth.lib import data, enum, fifo, stream, wiring
from amaranth.lib.wiring import In, Out

from ..isa import OPCODES, ROUTER_ROWS_AT
from ..registers import FaultCause
from .axi import AxiRead
from .axi_read import ADDRESS_BITS, COUNT_BITS, AxiReader
from .command import PC_BITS, Command, Fault, Written, fields
from .history import History
from .kvbuf import KvWrite

__all__ = ["AbufWrite", "LoadUnit"]

_LAYOUTS = {item.mnemonic: item for item in OPCODES.values()}
_AHEAD = 8  #: commands requested but not yet delivered


def AbufWrite(config):
    """One row for the activation buffer."""
    return data.StructLayout({"addr": 16, "data": 32 * config.vector_lanes})


class _Kind(enum.Enum, shape=2):
    WEIGHTS = 0
    ABUF = 1
    KV = 2


#: What a run of superbeats is for. ``row_count``: superbeats per row of a LOADA.
_Job = data.StructLayout({
    "kind": _Kind, "count": COUNT_BITS, "pc": PC_BITS, "row": 16, "row_count": 16, "beats": 16, "stride": 16,
    "heads": 8, "head_beats": 8, "record": 16,
})


class LoadUnit(wiring.Component):
    """Members
    -------
    cmd : In(stream of Command), cleared of hazards; done, busy : Out(1)
    base : In(64) per port, byte address of superbeat 0; limit : In(32), superbeats of memory
    axi : Out(AxiRead) per port
    weights : Out(stream of superbeats)
    abuf : Out(stream of AbufWrite), rows from ROUTER_ROWS_AT on for the router buffer; a LOADA is done one cycle after
        its last row was taken
    kv : Out(stream of KvWrite); kv_heads, kv_head_beats, kv_record : stable while a tile is written
    history : In(Written), notes of written records, of one position two cycles apart or more
    fault : Out(Fault), stays; the command that failed and those after it deliver nothing until reset, except records
        before the one that failed
    beats_read : Out(P), a beat has arrived on a port
    weights_read, kv_read : Out(1), a superbeat was taken from ``weights``, from ``kv``
    starved : Out(1), a receiver waits for memory; blocked : Out(1), a superbeat waits for its receiver
    """

    def __init__(self, *, config):
        self.config = config
        ports = config.ports
        super().__init__({
            "cmd": In(stream.Signature(Command(config))), "done": Out(1), "busy": Out(1),
            "base": In(64).array(ports), "limit": In(ADDRESS_BITS), "axi": Out(AxiRead(config.port_bits)).array(ports),
            "weights": Out(stream.Signature(8 * config.superbeat_bytes)),
            "abuf": Out(stream.Signature(AbufWrite(config))),
            "kv": Out(stream.Signature(KvWrite(config))),
            "kv_heads": Out(8), "kv_head_beats": Out(8), "kv_record": Out(16),
            "history": In(Written), "fault": Out(Fault), "beats_read": Out(ports), "weights_read": Out(1),
            "kv_read": Out(1), "starved": Out(1), "blocked": Out(1),
        })

    @staticmethod
    def model(config, memory, mnemonic, history=None, **f):
        """What one command delivers, in order; ``f`` holds its fields with the registers added.

        memory : uint8 [P, superbeats, port bytes]; history : the layers that wrote each position, as bits (for reuse)
        Returns uint8 [superbeats, W] (LOADW, LOADKV) or a list of (ABUF row, uint8 [4 V]) (LOADA).
        """
        count = {"loadw": lambda: f["count"], "loada": lambda: f["rows"] * f["count"],
                 "loadkv": lambda: config.tile_tokens // config.ports * f["record"]}[mnemonic]()
        if f.get("reuse"):
            seen = (2 << f["layer"]) - 1
            last = [max((history[f["x"] + token] & seen).bit_length() - 1, 0) for token in range(config.tile_tokens)]
            regions = f["imm"] + np.reshape(last, (-1, 1, config.ports)) * f["layer_stride"]  # [records, beats, ports]
            addresses = regions + np.arange(count).reshape(-1, f["record"], 1)
            return memory[np.arange(config.ports), addresses].reshape(count, config.superbeat_bytes)
        superbeats = memory[:, f["imm"]:f["imm"] + count].transpose(1, 0, 2).reshape(count, config.superbeat_bytes)
        if mnemonic != "loada":
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
        m.submodules.jobs = queue = fifo.SyncFIFOBuffered(width=_Job.size, depth=_AHEAD)
        requesting = self._request(m, readers, queue)
        delivering = self._deliver(m, readers, queue)
        m.d.comb += self.busy.eq(requesting | delivering)
        return m

    def _fail(self, m, cause, pc, port=0):
        with m.If(~self.fault.valid):
            m.d.sync += [self.fault.valid.eq(1), self.fault.cause.eq(cause), self.fault.pc.eq(pc),
                         self.fault.port.eq(port)]

    def _request(self, m, readers, queue):
        """Commands to jobs: sizes, checks, one run to every reader. Returns: a command is being prepared."""
        config = self.config
        command = self.cmd.payload
        loadw, loada, loadkv = (fields(command.body, _LAYOUTS[name]) for name in ("loadw", "loada", "loadkv"))
        is_a, is_kv = (command.opcode == _LAYOUTS[name].opcode for name in ("loada", "loadkv"))
        job = Signal(_Job)
        address = Signal(ADDRESS_BITS)
        product = Signal(28)  # superbeats of a LOADA, port beats of all K heads of a LOADKV
        overrun = Signal()
        waiting = Signal(config.ports)  # readers that have not taken the run
        follow, layer, layer_stride = Signal(), Signal.like(loadkv.layer), Signal.like(loadkv.layer_stride)
        records = config.tile_tokens // config.ports
        records_left = Signal(range(records + 1))
        idle = Signal()
        m.submodules.history = history = History(config=config)
        m.d.comb += [history.note.eq(self.history), history.position.eq(job.row), history.layer.eq(layer)]
        offsets = [Signal(len(layer) + len(layer_stride), name=f"offset{p}") for p in range(config.ports)]
        slack = Signal(signed(ADDRESS_BITS + 2))  # the largest offset inside memory
        beyond = Signal(config.ports)
        m.d.comb += beyond.eq(Cat(offset > slack for offset in offsets))

        with m.FSM(name="request"):
            with m.State("IDLE"):
                m.d.comb += [idle.eq(1), self.cmd.ready.eq(~self.fault.valid)]
                with m.If(self.cmd.valid & self.cmd.ready):
                    m.d.sync += [
                        job.kind.eq(Mux(is_a, _Kind.ABUF, Mux(is_kv, _Kind.KV, _Kind.WEIGHTS))),
                        job.count.eq(loadw.count), job.pc.eq(command.pc), job.row.eq(command.x),
                        job.row_count.eq(loada.count), job.beats.eq(loada.beats), job.stride.eq(loada.dst_stride),
                        job.heads.eq(loadkv.heads), job.head_beats.eq(loadkv.head_beats), job.record.eq(loadkv.record),
                        address.eq(command.imm), follow.eq(is_kv & loadkv.reuse), layer.eq(loadkv.layer),
                        layer_stride.eq(loadkv.layer_stride), records_left.eq(records),
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
                        job.count.eq(job.record * (config.tile_tokens // config.ports)),
                        overrun.eq((product == 0) | (product > capacity) | (job.heads > config.kvbuf_heads)
                                   | (2 * product > job.record)
                                   | (follow & (job.row + config.tile_tokens > config.history_tokens))),
                    ]
                m.next = "CHECK"
            with m.State("CHECK"):
                with m.If((job.kind == _Kind.KV) & overrun):
                    self._fail(m, FaultCause.BUFFER_RANGE, job.pc)
                    m.next = "STOP"
                with m.Elif(~follow & (address + job.count > self.limit)):
                    self._fail(m, FaultCause.MEMORY_RANGE, job.pc)
                    m.next = "STOP"
                with m.Elif(queue.w_rdy):
                    m.d.comb += queue.w_en.eq(1)
                    m.next = "IDLE"
                    with m.If(follow):
                        m.d.comb += history.begin.eq(1)
                        m.next = "RECORD"
                    with m.Elif(job.count != 0):
                        m.d.sync += [waiting.eq(~0), Cat(offsets).eq(0)]
                        m.next = "ISSUE"
            with m.State("RECORD"):
                with m.If(history.found):
                    m.d.comb += history.take.eq(1)
                    m.d.sync += [offset.eq(last * layer_stride) for offset, last in zip(offsets, history.last)]
                    m.d.sync += [slack.eq(self.limit - job.record - address), records_left.eq(records_left - 1)]
                    m.next = "RANGE"
            with m.State("RANGE"):
                with m.If(beyond.any()):
                    self._fail(m, FaultCause.MEMORY_RANGE, job.pc, _first(m, beyond))
                    m.next = "STOP"
                with m.Else():
                    m.d.sync += waiting.eq(~0)
                    m.next = "ISSUE"
            with m.State("ISSUE"):
                with m.If(waiting == 0):
                    m.next = "IDLE"
                    with m.If(follow & (records_left != 0)):
                        m.d.sync += address.eq(address + job.record)
                        m.next = "RECORD"
            with m.State("STOP"):
                pass
        m.d.comb += queue.w_data.eq(job)
        for p, reader in enumerate(readers):
            m.d.comb += [reader.runs.valid.eq(waiting[p] & ~self.fault.valid),
                         reader.runs.payload.address.eq(address + offsets[p]),
                         reader.runs.payload.count.eq(Mux(follow, job.record, job.count))]
            with m.If(reader.runs.valid & reader.runs.ready):
                m.d.sync += waiting[p].eq(0)
        return ~idle

    def _deliver(self, m, readers, queue):
        """Beats to superbeats, superbeats to the receiver of the job in front. Returns: a job waits or runs."""
        config = self.config
        job, active = Signal(_Job), Signal()
        left = Signal(COUNT_BITS)  # superbeats of the job, with the one on offer
        superbeat = Signal(8 * config.superbeat_bytes)
        valid, refused = Signal(), Signal(config.ports)
        take, give, finish, start = Signal(), Signal(), Signal(), Signal()
        wanted, offered = Signal(), Signal()

        m.d.comb += [
            take.eq(Cat(reader.beats.valid for reader in readers).all() & (~valid | give)),
            wanted.eq(active & (left != 0)),
            offered.eq(valid & wanted & ~refused.any()),
        ]
        for reader in readers:
            m.d.comb += reader.beats.ready.eq(take)
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
            self.kv.valid.eq(offered & (job.kind == _Kind.KV)),
            self.kv.payload.data.eq(superbeat), self.kv.payload.last.eq(left == 1),
            self.weights_read.eq(self.weights.valid & self.weights.ready),
            self.kv_read.eq(self.kv.valid & self.kv.ready),
            self.kv_heads.eq(job.heads), self.kv_head_beats.eq(job.head_beats), self.kv_record.eq(job.record),
        ]
        with m.Switch(part):
            for i, value in enumerate(rows):
                with m.Case(i):
                    m.d.comb += self.abuf.payload.data.eq(value)

        ready = Signal()
        with m.Switch(job.kind):
            with m.Case(_Kind.WEIGHTS):
                m.d.comb += [ready.eq(self.weights.ready), give.eq(offered & ready)]
            with m.Case(_Kind.KV):
                m.d.comb += [ready.eq(self.kv.ready), give.eq(offered & ready)]
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
        m.d.sync += self.done.eq(finish)
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
        return active | (queue.level != 0) | self.done


def _first(m, ports):
    """The lowest port whose bit is set."""
    port = Signal(range(max(len(ports), 2)))
    for p in reversed(range(len(ports))):
        with m.If(ports[p]):
            m.d.comb += port.eq(p)
    return port
