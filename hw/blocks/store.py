"""Store unit: STOREKV copies new KV records from KVOUT, each to its own port; STOREL stripes logits over all ports.

One command at a time, done when memory has answered its last burst. Inside a command the ports overlap: a record is
handed to its port's writer at one beat per cycle, and the next record goes to the next port. A row that is not in the
command's mask takes one cycle. With ``reuse`` a record goes to the place that the history gives it. A narrow record is
made on the way (`kvpack`), a beat of KVOUT each cycle too, but each is read two or three times.
"""

import numpy as np
from amaranth.hdl import Array, Cat, Module, Mux, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from ..isa import OPCODES, KvFormat
from ..registers import FaultCause
from .axi import AxiWrite
from .axi_read import ADDRESS_BITS
from .axi_write import AxiWriter
from .command import Command, Fault, PlaceAnswer, PlaceRequest, fields
from .kvpack import KvPacker, record_beats, unknown_format

__all__ = ["StoreUnit"]

_LAYOUTS = {item.mnemonic: item for item in OPCODES.values()}

_Shape = data.StructLayout({"heads": 8, "head_beats": 8, "format": KvFormat})  #: of the records of a STOREKV


class StoreUnit(wiring.Component):
    """Members
    -------
    cmd : In(stream of Command), cleared of hazards; done, busy : Out(1)
    base : In(64) per port, byte address of superbeat 0; limit : In(32), superbeats of memory
    axi : Out(AxiWrite) per port
    kvout_row, kvout_data : read port of KVOUT, data one cycle after the row
    logits : In(stream of V FP32), taken only during a STOREL
    fault : Out(Fault), stays; the unit then hands nothing more to memory until reset
    beats_written : Out(P), memory has taken a beat on a port
    kv_written : a beat of a record was handed to its writer
    places : Out(stream of PlaceRequest), for each record in turn; place : In(PlaceAnswer)
    """

    def __init__(self, *, config):
        self.config = config
        ports = config.ports
        super().__init__({
            "cmd": In(stream.Signature(Command(config))), "done": Out(1), "busy": Out(1),
            "base": In(64).array(ports), "limit": In(ADDRESS_BITS), "axi": Out(AxiWrite(config.port_bits)).array(ports),
            "kvout_row": Out(range(config.kvout_rows)), "kvout_data": In(config.port_bits),
            "logits": In(stream.Signature(32 * config.vector_lanes)),
            "fault": Out(Fault), "beats_written": Out(ports), "kv_written": Out(1),
            "places": Out(stream.Signature(PlaceRequest)), "place": In(PlaceAnswer),
        })

    @staticmethod
    def model(config, memory, source, mnemonic, place=lambda position: position, **f):
        """Write to memory, uint8 [P, superbeats, port bytes], what one command writes; ``f`` holds its fields with the
        registers added, and the mask if not all rows run. Returns the positions of the records written.
        source : uint8 KVOUT [kvout_rows, port bytes] (STOREKV) or logits [beats, 4 V] (STOREL); place : where the
        record of a position lies in its port (reuse)"""
        if mnemonic == "storel":
            count = f["rows"] * f["count"]
            striped = source.reshape(count, config.ports, config.port_bits // 8)
            memory[:, f["imm"]:f["imm"] + count] = striped.transpose(1, 0, 2)
            return []
        listed = [t for t in range(f["rows"]) if f.get("mask", -1) >> t & 1]
        for t in listed:
            position, record = f["x"] + t, f["record"]
            start = f["imm"] + (place(position) if f.get("reuse") else position // config.ports) * record
            if f.get("format"):
                size = 2 * f["heads"] * f["head_beats"]
                halves = source[t * size:(t + 1) * size].view(np.uint16).reshape(1, 2, f["heads"], -1)
                stored = KvPacker.model(config, halves, f["format"])[0]
            else:
                stored = source[t * record:(t + 1) * record]
            memory[position % config.ports, start:start + record] = stored
        return [f["x"] + t for t in listed]

    def elaborate(self, platform):
        m = Module()
        config = self.config
        port_shift = config.ports.bit_length() - 1
        row_bits = config.kvout_rows.bit_length() - 1
        writers = []
        for p in range(config.ports):
            m.submodules[f"port{p}"] = writer = AxiWriter(config=config)
            wiring.connect(m, writer.axi, wiring.flipped(self.axi[p]))
            m.d.comb += [writer.base.eq(self.base[p]), self.beats_written[p].eq(writer.beat)]
            writers.append(writer)

        command = self.cmd.payload
        storekv, storel = (fields(command.body, _LAYOUTS[name]) for name in ("storekv", "storel"))
        is_logits, pc = Signal(), Signal.like(command.pc)
        # Of the record or of all logits. Two bits more, so that an overrun shows, also one behind rows not in the list.
        address, base = Signal(ADDRESS_BITS + 2), Signal(ADDRESS_BITS)
        product = Signal(len(command.rows) + len(storel.count))
        length = Signal.like(product)  # beats of one run
        shape, units, size = Signal(_Shape), Signal(16), Signal(17)  # of records; size: beats of one in KVOUT
        narrow, unknown, unfit = Signal(), Signal(), Signal()
        left = Signal(config.tokens)  # rows from the current one (bit 0) on
        asked, reuse = self.places.payload, Signal()
        position = asked.position
        port = position[:port_shift]
        waiting = Signal(config.ports)  # writers that have not taken the run
        beats_left = Signal.like(length)  # beats (STOREKV) or superbeats (STOREL) of the run, not handed over
        row = Signal(len(size) + len(left).bit_length())  # of KVOUT, the first of the record
        record_end = Signal.like(row)
        run_end = Signal(len(length) + 2)
        m.d.comb += [run_end.eq(address + length), record_end.eq(row + size)]

        def fail(cause, at=0):
            with m.If(~self.fault.valid):
                m.d.sync += [self.fault.valid.eq(1), self.fault.cause.eq(cause), self.fault.pc.eq(pc),
                             self.fault.port.eq(at)]

        def next_record():
            m.d.sync += [left.eq(left >> 1), row.eq(record_end), position.eq(position + 1)]
            with m.If(port == config.ports - 1):
                m.d.sync += address.eq(run_end)

        # KVOUT answers one cycle later: `held` says that kvout_data is the next beat; its row stays until it is taken.
        next_row, fetch_left, held, handed = Signal(row_bits), Signal(16), Signal(), Signal()
        held_row = Signal(row_bits)
        fetch, offered, more, fetched_row = Signal(), Signal(), Signal(), Signal(row_bits)
        # What the writers get: beats of KVOUT, or what the packer makes of them.
        recorded, record_valid, record_data = Signal(), Signal(), Signal(config.port_bits)
        begin = Signal()
        data_ready = Array([writer.data.ready for writer in writers])
        m.d.comb += [
            record_valid.eq(offered), record_data.eq(self.kvout_data), handed.eq(recorded),
            more.eq(fetch_left != 0), fetched_row.eq(next_row),
        ]
        if config.kv_narrow:
            m.submodules.packer = packer = KvPacker(config=config)
            m.d.comb += [
                narrow.eq(shape.format != KvFormat.FP16), packer.start.eq(begin & narrow),
                packer.heads.eq(shape.heads), packer.head_beats.eq(shape.head_beats), packer.units.eq(units),
                packer.format.eq(shape.format), packer.at.ready.eq(narrow & (~held | handed)),
                packer.i.valid.eq(narrow & offered), packer.i.payload.eq(self.kvout_data),
                packer.o.ready.eq(recorded),
            ]
            with m.If(narrow):
                m.d.comb += [
                    record_valid.eq(packer.o.valid & ~self.fault.valid), record_data.eq(packer.o.payload),
                    handed.eq(offered & packer.i.ready), more.eq(packer.at.valid),
                    fetched_row.eq(row + packer.at.payload),
                ]

        # Logits are packed into superbeats, rows first.
        parts = config.superbeat_bytes // (4 * config.vector_lanes)
        part = Signal(range(max(parts, 2)))
        pieces = [Signal(32 * config.vector_lanes, name=f"piece{i}", reset_less=True) for i in range(parts)]
        packed, unpack = Signal(), Signal()
        packing = Signal()
        striped = Cat(*pieces)

        for p, writer in enumerate(writers):
            mine = striped[p * config.port_bits:(p + 1) * config.port_bits]
            m.d.comb += [
                writer.runs.valid.eq(waiting[p]), writer.runs.payload.address.eq(address),
                writer.runs.payload.count.eq(length),
                writer.data.payload.eq(Mux(is_logits, mine, record_data)),
                writer.data.valid.eq(Mux(is_logits, unpack, record_valid & (port == p))),
            ]
            with m.If(writer.runs.valid & writer.runs.ready):
                m.d.sync += waiting[p].eq(0)
        m.d.comb += [
            offered.eq(held & ~self.fault.valid),
            unpack.eq(packed & ~self.fault.valid & Cat(writer.data.ready for writer in writers).all()),
            recorded.eq(record_valid & data_ready[port]), self.kv_written.eq(recorded),
            fetch.eq(more & (~held | handed)),
            self.kvout_row.eq(Mux(held & ~handed, held_row, fetched_row)),
            self.logits.ready.eq(packing & (~packed | unpack)),
        ]
        with m.If(fetch):
            m.d.sync += [held_row.eq(fetched_row), next_row.eq(next_row + 1),
                         fetch_left.eq(fetch_left - (fetch_left != 0))]
        with m.If(fetch | handed):
            m.d.sync += held.eq(fetch)
        with m.If(self.logits.valid & self.logits.ready):
            m.d.sync += part.eq(Mux(part == parts - 1, 0, part + 1))
            with m.Switch(part):
                for i, piece in enumerate(pieces):
                    with m.Case(i):
                        m.d.sync += piece.eq(self.logits.payload)
        full = self.logits.valid & self.logits.ready & (part == parts - 1)
        with m.If(full | unpack):
            m.d.sync += packed.eq(full)

        m.d.comb += self.busy.eq(1)
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += [self.cmd.ready.eq(1), self.busy.eq(0)]
                with m.If(self.cmd.valid):
                    logits = command.opcode == _LAYOUTS["storel"].opcode
                    m.d.sync += [
                        is_logits.eq(logits), pc.eq(command.pc), address.eq(command.imm.as_unsigned()),
                        base.eq(command.imm), reuse.eq(storekv.reuse & ~logits), asked.places.eq(storekv.places),
                        left.eq(Mux(logits, 1, command.mask)), length.eq(storekv.record), row.eq(0),
                        position.eq(command.x), asked.layer.eq(storekv.layer),
                        shape.heads.eq(storekv.heads), shape.head_beats.eq(storekv.head_beats),
                        shape.format.eq(Mux(logits, KvFormat.FP16, storekv.format)),
                        units.eq(storekv.heads * storekv.head_beats),
                        product.eq(Mux(logits, command.rows, command.x.as_unsigned() >> port_shift)
                                   * Mux(logits, storel.count, storekv.record)),
                    ]
                    m.next = "SIZE"
            with m.State("SIZE"):
                m.d.sync += [
                    size.eq(Mux(narrow, units << 1, length)), unknown.eq(unknown_format(config, shape.format)),
                    unfit.eq(narrow & ((units == 0) | (shape.heads > config.kvbuf_heads)
                                       | (length != record_beats(config, shape, units)))),
                ]
                with m.If(is_logits):
                    m.d.sync += length.eq(product)
                with m.Else():
                    m.d.sync += address.eq(address + product)
                m.next = "CHECK"
            with m.State("CHECK"):
                with m.If(unknown | unfit):
                    fail(Mux(unknown, FaultCause.KV_FORMAT, FaultCause.BUFFER_RANGE))
                    m.next = "STOP"
                with m.Elif((left == 0) | (length == 0)):
                    m.next = "DRAIN"
                with m.Elif(~left[0]):
                    next_record()
                with m.Elif(reuse):
                    m.next = "ASK"
                with m.Else():
                    m.next = "RANGE"
            with m.State("ASK"):
                m.d.comb += self.places.valid.eq(1)
                with m.If(self.places.ready):
                    m.next = "PLACE"
            with m.State("PLACE"):
                m.d.sync += address.eq(base + self.place.place * length[:16])
                with m.If(self.place.valid):
                    m.next = "RANGE"
                    with m.If(self.place.cause != FaultCause.NONE):
                        fail(self.place.cause, Mux(self.place.cause == FaultCause.BUFFER_RANGE, 0, port))
                        m.next = "STOP"
            with m.State("RANGE"):
                with m.If(~is_logits & (record_end > config.kvout_rows)):
                    fail(FaultCause.BUFFER_RANGE)
                    m.next = "STOP"
                with m.Elif(run_end > self.limit):
                    fail(FaultCause.MEMORY_RANGE, Mux(is_logits, 0, port))
                    m.next = "STOP"
                with m.Else():
                    m.d.sync += [waiting.eq(Mux(is_logits, ~0, 1 << port)), beats_left.eq(length),
                                 next_row.eq(row), fetch_left.eq(Mux(is_logits | narrow, 0, length))]
                    m.d.comb += begin.eq(1)
                    m.next = "MOVE"
            with m.State("MOVE"):
                m.d.comb += packing.eq(is_logits & (beats_left > packed))
                with m.If(recorded | unpack):
                    m.d.sync += beats_left.eq(beats_left - 1)
                with m.If(beats_left == 0):
                    next_record()
                    m.next = "CHECK"
            with m.State("DRAIN"):
                with m.If(self.fault.valid):  # an error is reported before its writer turns idle
                    m.next = "STOP"
                with m.Elif(~Cat(writer.busy for writer in writers).any()):
                    m.d.comb += self.done.eq(1)
                    m.next = "IDLE"
            with m.State("STOP"):
                pass
        for p, writer in reversed(list(enumerate(writers))):
            with m.If(writer.error):
                fail(FaultCause.WRITE_ERROR, p)
        return m
