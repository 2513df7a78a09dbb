"""Control: runs the scalar instructions, resolves the others and sends them to the units, and stops the machine.

Two stages. R takes an instruction from fetch and reads the registers; E executes it or forms the command. A scalar
instruction leaves E before the next one is read, so its result is there (two cycles each); commands follow one another
every cycle. A fault stops the machine until reset: the units may hold half a command.

Row lists: `route` sets which rows execute attention and MLP; an instruction whose list is empty leaves E in one cycle
without effect. `route` takes two cycles (three to the next instruction, like `token`), and waits before for the vector
unit.
"""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from .. import isa
from ..config import OverlayConfig
from ..isa import RowList
from ..registers import FaultCause
from .command import Command, Fault, fields
from .csr import CsrSignature
from .fetch import Fetched, FetchSignature
from .fp import wire
from .hazard import HazardWindow
from .issue import IssueQueue
from .rows import ones

__all__ = ["Control"]

_UNITS = 4
_NO_LIST = len(RowList)  #: what a list field holds that names none
_BY_NAME = {item.mnemonic: item for item in isa.INSTRUCTIONS}


def _header(word):
    """The header fields of an instruction word by name."""
    parts = {name: word[item.lo:item.lo + item.bits] for name, item in isa.COMMON.items()}
    return {name: part.as_signed() if isa.COMMON[name].signed else part for name, part in parts.items()}


class Control(wiring.Component):
    """Instruction control with the issue queues of the four units.

    Members
    -------
    csr : In(CsrSignature); start, arguments, limits, fault and completion
    fetch : Out(FetchSignature)
    commands : per unit, Out(stream of Command), cleared of hazards
    done : per unit, a pulse when its oldest command is complete
    busy : per unit; the machine is not idle while one is high
    waiting : per unit, its next command waits for another unit
    faults : In(Fault) per source; the first one stops the machine (the lower index, if in the same cycle)
    progress : a memory beat moved (for the watchdog)
    decided_attention, decided_mlp : bit t: row t executes the module; those of a command from the cycle after its done
    dropped : an instruction is dropped
    """

    def __init__(self, *, config: OverlayConfig, fault_sources: int = 2, window: int = 16):
        self.config = config
        self.window = window
        super().__init__({
            "csr": In(CsrSignature()), "fetch": Out(FetchSignature()),
            "commands": Out(stream.Signature(Command(config))).array(_UNITS),
            "done": In(_UNITS), "busy": In(_UNITS), "waiting": Out(_UNITS),
            "faults": In(Fault).array(fault_sources), "progress": In(1),
            "decided_attention": In(config.tokens), "decided_mlp": In(config.tokens), "dropped": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        csr, instruction, tokens = self.csr, self.fetch.instruction, self.config.tokens
        running, finish = Signal(), Signal()
        fault, own_fault = Signal(Fault), Signal(Fault)

        # Stage R: take an instruction, read its registers.
        # With `compact` in a memory, which is filled before the first instruction.
        compact = self.config.compact
        filling = Signal()
        if compact:
            m.submodules.registers = registers = Memory(shape=32, depth=isa.REGISTERS, init=[])
            fill, register_write = Signal(range(isa.REGISTERS)), registers.write_port()
            with m.If(filling):
                m.d.sync += [fill.eq(fill + 1), filling.eq(~fill.all())]

            def register(number):
                port = registers.read_port(domain="comb")
                m.d.comb += port.addr.eq(number)
                return port.data
        else:
            registers = Array([Const(0, 32), *(Signal(32, name=f"r{i}") for i in range(1, isa.REGISTERS))])
            register = registers.__getitem__
        valid, entry = Signal(), Signal(Fetched, reset_less=True)
        unit = Signal(_UNITS)  # one-hot; none for what control executes itself
        a, b, c = (Signal(32, name=name, reset_less=True) for name in "abc")
        taken, limited, take, advance = Signal(32), Signal(), Signal(), Signal()
        fields_r = _header(instruction.payload.word)
        m.d.comb += [
            limited.eq((csr.instruction_limit != 0) & (taken == csr.instruction_limit)),
            instruction.ready.eq(running & ~limited & ~filling & (~valid | (advance & (unit.any() | self.dropped)))),
            take.eq(instruction.valid & instruction.ready),
        ]
        with m.If(advance):
            m.d.sync += valid.eq(0)
        with m.If(take):
            m.d.sync += [
                valid.eq(1), entry.eq(instruction.payload), taken.eq(taken + 1), unit.eq(0),
                a.eq(register(fields_r["imm_reg"])), b.eq(register(fields_r["rows_reg"])),
                c.eq(register(fields_r["x_reg"])),
            ]
            with m.If(~instruction.payload.error & ~instruction.payload.outside & (fields_r["list"] != _NO_LIST)):
                with m.Switch(fields_r["opcode"]):
                    for number in range(_UNITS):
                        with m.Case(*(item.opcode for item in isa.INSTRUCTIONS if item.unit == number)):
                            m.d.sync += unit.eq(1 << number)

        # Row lists. `present` holds the rows of the last route. Which lists are empty is known a cycle after a change,
        # in time for the next instruction.
        header = _header(entry.word)
        attention, mlp, present = (Signal(tokens, name=name) for name in ("attention", "mlp", "present"))
        empty, rows = Signal(1 << len(header["list"])), Signal(12)
        every = Const((1 << tokens) - 1, tokens)
        lists = {
            RowList.ALL: every, RowList.ATTENTION: attention, RowList.MLP: mlp, RowList.MLP_ONLY: mlp & ~attention,
            RowList.NOT_MLP: present & ~mlp, RowList.NO_ATTENTION: Mux(attention.any(), 0, every),
            RowList.NO_MLP: Mux(mlp.any(), 0, every),
        }
        m.d.sync += empty.eq(Cat(~mask.any() for mask in lists.values()))
        m.d.comb += [
            rows.eq(header["rows"] + b),
            self.dropped.eq(valid & running & ~entry.error & ~entry.outside & empty.bit_select(header["list"], 1)),
        ]

        # Stage E, commands: resolve, look for conflicts, hand to the queue through one register.
        slot, slot_unit = Signal(Command(self.config), reset_less=True), Signal(_UNITS)
        slot_free, push = Signal(), Signal(_UNITS)
        sizes = [self.config.unit_queue(unit) for unit in range(_UNITS)]
        queues = [IssueQueue(config=self.config, depth=depth) for depth, _ in sizes]
        windows = [HazardWindow(size=min(self.window, most)) for _, most in sizes]
        full = Cat(window.full for window in windows)
        m.d.comb += [
            slot_free.eq(~slot_unit.any() | (slot_unit & Cat(queue.i.ready for queue in queues)).any()),
            push.eq(Mux(valid & running & ~self.dropped & slot_free & ~(unit & full).any(), unit, 0)),
        ]
        slot_mask = wire(m, slot.mask & ones(slot.rows, tokens), "slot_mask")
        for number, (queue, window) in enumerate(zip(queues, windows)):
            name = isa.Unit(number).name.lower()
            m.submodules[f"queue_{name}"], m.submodules[f"window_{name}"] = queue, window
            wiring.connect(m, queue.o, wiring.flipped(self.commands[number]))
            m.d.comb += [
                window.reads.eq(header["reads"]), window.writes.eq(header["writes"]), window.pc.eq(entry.pc),
                window.push.eq(push[number]), window.done.eq(self.done[number]),
                queue.i.valid.eq(slot_unit[number]), queue.i.payload.eq(slot),
                queue.i.payload.mask.eq(slot_mask), queue.enable.eq(~fault.valid),
                self.waiting[number].eq(queue.waiting),
            ]
            m.d.comb += [queue.done_counts[other].eq(windows[other].done_count) for other in range(_UNITS)]
        with m.If(slot_free):
            m.d.sync += slot_unit.eq(push)
        with m.If(push.any()):
            m.d.sync += [
                slot.opcode.eq(header["opcode"]), slot.imm.eq(header["imm"] + a), slot.rows.eq(rows),
                slot.mask.eq(Array(lists.values())[header["list"]]), slot.x.eq(header["x"] + c),
                slot.body.eq(entry.word[isa.BODY:]), slot.pc.eq(entry.pc),
            ]
            # A unit is in order in itself: it never needs its own commands.
            m.d.sync += [slot.needs[number].eq(Mux(unit[number], window.done_count, window.need))
                         for number, window in enumerate(windows)]
        idle = Signal()
        m.d.comb += idle.eq(Cat(window.empty for window in windows).all() & ~self.busy.any())

        # Stage E, scalar instructions.
        scalar, waited = Signal(), Signal()  # waited: the table that is read has answered
        result, write, taken_branch = Signal(32), Signal(), Signal()
        signed_a, signed_b, signed_c = a.as_signed(), b.as_signed(), c.as_signed()
        body = entry.word[isa.BODY:]
        rd = fields(body, _BY_NAME["add"]).rd
        condition = fields(body, _BY_NAME["branch"]).condition

        def fail(cause):
            return [own_fault.valid.eq(1), own_fault.cause.eq(cause), own_fault.pc.eq(entry.pc)]

        m.d.comb += [
            scalar.eq(valid & running & ~unit.any() & ~self.dropped), csr.token_index.eq(a),
            taken_branch.eq(Array([b == c, b != c, signed_b < signed_c, signed_b >= signed_c])[condition]),
            advance.eq(push.any() | self.dropped),
            csr.route_layer.eq(fields(body, _BY_NAME["route"]).layer),
        ]
        values = {
            "addi": header["imm"] + a, "add": a + b, "sub": a - b, "shli": a << header["rows"][:5],
            "shri": signed_a >> header["rows"][:5], "muli": signed_a * header["x"],
            "min": Mux(signed_a < signed_b, a, b), "token": csr.token_value,
        }
        here = wire(m, ones(rows, tokens), "here")
        routes = [Mux(csr.route_force, forced, decided) & here
                  for forced, decided in zip(csr.routes_forced, (self.decided_attention, self.decided_mlp))]
        m.d.comb += [shown.eq(route) for shown, route in zip(csr.routes, routes)]
        with m.If(scalar & entry.outside):
            m.d.comb += fail(FaultCause.FETCH_RANGE)
        with m.Elif(scalar & entry.error):
            m.d.comb += fail(FaultCause.FETCH_ERROR)
        with m.Elif(scalar & (header["list"] == _NO_LIST)):
            m.d.comb += fail(FaultCause.ILLEGAL_OPCODE)
        with m.Elif(scalar):
            with m.Switch(header["opcode"]):
                for name, value in values.items():
                    with m.Case(_BY_NAME[name].opcode):
                        m.d.comb += result.eq(value)
                        if name != "token":
                            m.d.comb += [write.eq(1), advance.eq(1)]
                        else:
                            with m.If(a >= self.config.tokens):
                                m.d.comb += fail(FaultCause.TOKEN_RANGE)
                            m.d.comb += [write.eq(waited), advance.eq(waited)]
                            m.d.sync += waited.eq(~waited)
                with m.Case(_BY_NAME["branch"].opcode):
                    m.d.comb += advance.eq(1)
                    with m.If(taken_branch):
                        with m.If(header["imm"].as_unsigned() >= csr.program_length):
                            m.d.comb += fail(FaultCause.FETCH_RANGE)
                        with m.Else():
                            m.d.comb += self.fetch.redirect.eq(1)
                with m.Case(_BY_NAME["route"].opcode):
                    m.d.sync += waited.eq(~advance)
                    with m.If(waited & windows[isa.Unit.VECTOR].empty):
                        m.d.comb += [advance.eq(1), csr.route_write.eq(1)]
                        m.d.sync += [attention.eq(csr.routes[0]), mlp.eq(csr.routes[1]), present.eq(here)]
                with m.Case(_BY_NAME["halt"].opcode):
                    m.d.comb += [advance.eq(idle), finish.eq(idle)]
                with m.Default():
                    m.d.comb += fail(FaultCause.ILLEGAL_OPCODE)
        if compact:
            initial = Array([Const(0, 32), *csr.arguments, *[Const(0, 32)] * (isa.REGISTERS - 1 - len(csr.arguments))])
            m.d.comb += [
                register_write.en.eq(filling | (write & (rd != 0))), register_write.addr.eq(Mux(filling, fill, rd)),
                register_write.data.eq(Mux(filling, initial[fill], result)),
            ]
        else:
            with m.If(write), m.Switch(rd):
                for number in range(1, isa.REGISTERS):
                    with m.Case(number):
                        m.d.sync += registers[number].eq(result)
        with m.If(limited & ~valid & idle & running):
            m.d.comb += finish.eq(1)

        # Watchdog.
        silent = Signal(32)
        expired = Signal()
        oldest, found = entry.pc, Const(0)  # if nothing is outstanding, control itself is stuck
        for window in windows:
            oldest = Mux(~window.empty & (~found | (window.oldest_pc < oldest)), window.oldest_pc, oldest)
            found = found | ~window.empty
        m.d.comb += expired.eq(running & (csr.watchdog != 0) & (silent == csr.watchdog))
        with m.If(~running | self.progress | self.done.any() | advance):
            m.d.sync += silent.eq(0)
        with m.Else():
            m.d.sync += silent.eq(silent + 1)
        watchdog_fault = Signal(Fault)
        m.d.comb += [watchdog_fault.valid.eq(expired), watchdog_fault.cause.eq(FaultCause.WATCHDOG),
                     watchdog_fault.pc.eq(oldest)]

        # Start and stop. The first fault is kept.
        m.d.comb += [
            self.fetch.enable.eq(running), self.fetch.program.eq(csr.program), self.fetch.length.eq(csr.program_length),
            self.fetch.target.eq(header["imm"]), csr.running.eq(running), csr.fault.eq(fault),
            csr.dispatched.eq(advance),
        ]
        m.d.sync += csr.finished.eq(finish)
        with m.If(finish):
            m.d.sync += running.eq(0)
        with m.If(advance):
            m.d.sync += csr.pc.eq(entry.pc)
        with m.If(csr.start & ~running & ~fault.valid):
            m.d.comb += [self.fetch.redirect.eq(1), self.fetch.target.eq(0)]
            m.d.sync += [running.eq(1), valid.eq(0), taken.eq(0), waited.eq(0), csr.pc.eq(0), entry.pc.eq(0)]
            m.d.sync += [rows_in.eq(every) for rows_in in (attention, mlp, present)]
            if compact:
                m.d.sync += [filling.eq(1), fill.eq(0)]
            else:
                m.d.sync += [register.eq(0) for register in registers[8:]]
                m.d.sync += [register.eq(value) for register, value in zip(registers[1:8], csr.arguments)]
        for source in reversed([*self.faults, own_fault, watchdog_fault]):
            with m.If(source.valid):
                m.d.sync += csr.fault_seen.bit_select(source.cause, 1).eq(1)
                with m.If(~fault.valid):
                    m.d.sync += [fault.eq(source), running.eq(0), valid.eq(0), csr.finished.eq(running)]
        return m
