"""The register file of `hw/registers.py` behind an AXI4-Lite slave, with the event counters and the interrupt."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from ..config import OverlayConfig
from ..isa import MAX_LAYERS
from ..registers import (
    ADDRESS_BITS,
    COUNTERS,
    MAP,
    MAX_PORTS,
    MAX_TOKENS,
    Control,
    address,
    capabilities,
)
from .axi import AxiLite
from .command import PC_BITS, Fault

__all__ = ["COUNTER_BITS", "Csr", "CsrSignature", "Events"]

COUNTER_BITS = 48  #: of the 64 in the register map; the rest reads zero
_ALWAYS = ("CYCLES", "INSTRUCTIONS")  # these are counted in any configuration, without ``counters`` modulo 2^32
_ARGUMENTS = sum(item.name[:-1] == "ARG" for item in MAP)

#: What the counters count, in the order of ``COUNTERS`` behind CYCLES and INSTRUCTIONS: one bit per event and cycle,
#: ``saturations`` a number.
Events = data.StructLayout({
    "busy": 4, "hazard_wait": 4, "array_active": 1, "weight_starved": 1, "memory_blocked": 1, "drain_blocked": 1,
    "stream_wait": 1, "saturations": 8, "dropped": 1, "weights_read": 1, "kv_read": 6, "kv_written": 1,
    "kv_buffered": 6,
})


class CsrSignature(wiring.Signature):
    """Between the registers (Out) and control (In).

    start : pulse, never while running or faulted; arguments : r1.. at start
    token_value : entry ``token_index`` of the token table, one cycle later
    route_force : take ``routes_forced``, that of ``route_layer`` one cycle later: attention, MLP
    route_write : note ``routes`` as taken for ``route_layer``
    running : high from the cycle after ``start``; finished : pulse at its end; dispatched : pulse per instruction
    fault : the first fault, ``valid`` until reset; fault_seen : bit per FaultCause; pc : instruction dispatched last
    """

    def __init__(self):
        super().__init__({
            "start": Out(1), "program": Out(64), "program_length": Out(PC_BITS), "arguments": Out(32).array(_ARGUMENTS),
            "watchdog": Out(32), "instruction_limit": Out(32),
            "token_index": In(range(MAX_TOKENS)), "token_value": Out(32),
            "route_force": Out(1), "route_layer": In(range(MAX_LAYERS)), "routes_forced": Out(32).array(2),
            "route_write": In(1), "routes": In(32).array(2),
            "running": In(1), "finished": In(1), "dispatched": In(1),
            "fault": In(Fault), "fault_seen": In(1 << Fault["cause"].width), "pc": In(PC_BITS),
        })


class Csr(wiring.Component):
    """Registers, counters, the token table and the tables of routes.

    Members
    -------
    axil : In(AXI4-Lite); one access at a time, about four cycles each, always OKAY; outputs come from registers
    irq : level
    control : Out(CsrSignature)
    port_base : per port, byte address of superbeat 0; memory_limit : superbeats
    events : In(Events); beats_read, beats_written : bit per port, a beat moved in this cycle
    argmax_index, argmax_value : what ARGMAX_INDEX and ARGMAX_VALUE read
    debug_address : the register; debug_data : the answer, at most 3 cycles after a change
    """

    def __init__(self, *, config: OverlayConfig):
        if config.ports > MAX_PORTS or config.tokens > MAX_TOKENS:
            raise ValueError(f"the register map holds {MAX_PORTS} ports and {MAX_TOKENS} tokens, "
                             f"not {config.ports} and {config.tokens}")
        self.config = config
        super().__init__({
            "axil": In(AxiLite(ADDRESS_BITS)), "irq": Out(1), "control": Out(CsrSignature()),
            "port_base": Out(64).array(config.ports), "memory_limit": Out(32),
            "events": In(Events), "beats_read": In(config.ports), "beats_written": In(config.ports),
            "argmax_index": In(32), "argmax_value": In(32), "debug_address": Out(32), "debug_data": In(32),
        })

    def elaborate(self, platform):
        m = Module()
        axil, control = self.axil, self.control
        start = control.start
        active, done, ready_seen, status_done = Signal(), Signal(), Signal(), Signal()

        # Write channels: address and data are taken in any order, then the register changes and the answer goes out.
        aw_open, w_open, write = Signal(init=1), Signal(init=1), Signal()
        write_address, write_data, strobes = Signal(ADDRESS_BITS), Signal(32), Signal(4)
        m.d.comb += [axil.awready.eq(aw_open), axil.wready.eq(w_open), write.eq(~aw_open & ~w_open & ~axil.bvalid)]
        with m.If(axil.awvalid & aw_open):
            m.d.sync += [aw_open.eq(0), write_address.eq(axil.awaddr)]
        with m.If(axil.wvalid & w_open):
            m.d.sync += [w_open.eq(0), write_data.eq(axil.wdata), strobes.eq(axil.wstrb)]
        with m.If(write):
            m.d.sync += axil.bvalid.eq(1)
        with m.If(axil.bvalid & axil.bready):
            m.d.sync += [axil.bvalid.eq(0), aw_open.eq(1), w_open.eq(1)]

        # Read channel: address, token table, multiplexer, answer.
        ar_open, looking, reading, read_address = Signal(init=1), Signal(), Signal(), Signal(ADDRESS_BITS)
        m.d.comb += axil.arready.eq(ar_open)
        m.d.sync += [looking.eq(axil.arvalid & ar_open), reading.eq(looking)]
        with m.If(axil.arvalid & ar_open):
            m.d.sync += [ar_open.eq(0), read_address.eq(axil.araddr)]
        with m.If(reading):
            m.d.sync += axil.rvalid.eq(1)
        with m.If(axil.rvalid & axil.rready):
            m.d.sync += [axil.rvalid.eq(0), ar_open.eq(1)]

        # Where each word comes from: {address: 32 bits}.
        words, high_words = {}, {}

        def show(name, value, index=0):
            words[address(name, index)] = value[:32]
            if len(value) > 32:
                words[address(name, index) + 4] = value[32:]

        def store(name, target, index=0):
            """A register the host may write: ``target`` takes the bytes whose strobe is set."""
            show(name, target, index)
            for word in range((len(target) + 31) // 32):
                with m.If(write & (write_address[2:] == (address(name, index) >> 2) + word)):
                    for byte in range(4):
                        part = target[32 * word + 8 * byte:32 * word + 8 * byte + 8]
                        with m.If(strobes[byte]):
                            m.d.sync += part.eq(write_data[8 * byte:])

        gie, ier, isr = Signal(), Signal(2), Signal(2)
        store("GIE", gie)
        store("IER", ier)
        store("PROGRAM", control.program)
        store("PROGRAM_LENGTH", control.program_length)
        for index, argument in enumerate(control.arguments):
            store(f"ARG{index}", argument)
        store("MEMORY_LIMIT", self.memory_limit)
        store("WATCHDOG", control.watchdog)
        store("INSTRUCTION_LIMIT", control.instruction_limit)
        store("DEBUG_ADDRESS", self.debug_address)
        store("ROUTE_FORCE", control.route_force)
        for index, base in enumerate(self.port_base):
            store("PORT_BASE", base, index)

        show("CTRL", Cat(active, done, ~active, ready_seen))
        show("ISR", isr)
        show("STATUS", Cat(active, status_done, ~active, control.fault.valid, Const(0, 4), self.events.busy))
        show("FAULT", control.fault.cause)
        show("FAULT_PORT", control.fault.port)
        show("FAULT_PC", control.fault.pc)
        show("FAULT_STICKY", control.fault_seen)
        show("PC", control.pc)
        show("ARGMAX_INDEX", self.argmax_index)
        show("ARGMAX_VALUE", self.argmax_value)
        show("DEBUG_DATA", self.debug_data)
        for name, value in capabilities(self.config).items():
            show(name, Const(value, 32))

        # Counters, cleared at start.
        def count(name, event, index=0):
            if not self.config.counters and name not in _ALWAYS:
                show(name, Const(0, COUNTER_BITS), index)
                return
            counter = Signal(COUNTER_BITS if self.config.counters else 32, name=f"{name.lower()}_{index}")
            with m.If(start):
                m.d.sync += counter.eq(0)
            with m.Elif(event.any()):
                m.d.sync += counter.eq(counter + event)
            show(name, counter, index)
            if len(counter) > 32:
                high_words[address(name, index)] = counter[32:]

        event_bits = [control.running, control.dispatched, *self.events.busy, *self.events.hazard_wait]
        event_bits += [self.events[name] for name, _ in list(Events)[2:]]
        for (name, _), event in zip(COUNTERS, event_bits, strict=True):
            count(name, event)
        for index in range(self.config.ports):
            count("BEATS_READ", self.beats_read[index], index)
            count("BEATS_WRITTEN", self.beats_written[index], index)

        # Token table: written and read back by the host, read by control.
        table_word = address("TOKEN_TABLE") >> 2
        tokens = self.config.tokens
        m.submodules.tokens = memory = Memory(shape=32, depth=tokens, init=[])
        table_write, table_read, table_host = memory.write_port(granularity=8), memory.read_port(), memory.read_port()
        entries = range(table_word, table_word + tokens)
        in_table = [where[2:].matches(*entries) for where in (write_address, read_address)]
        m.d.comb += [
            table_write.addr.eq(write_address[2:] - table_word), table_write.data.eq(write_data),
            table_write.en.eq(Mux(write & in_table[0], strobes, 0)),
            table_read.addr.eq(control.token_index), control.token_value.eq(table_read.data),
            table_host.addr.eq(read_address[2:] - table_word), table_host.en.eq(looking),
        ]

        # Routes: a row holds both words of a layer. The host writes those that may be forced, control those it took.
        m.submodules.forced = forced = Memory(shape=64, depth=MAX_LAYERS, init=[])
        m.submodules.routes = routes = Memory(shape=64, depth=MAX_LAYERS, init=[])
        forced_write, forced_read = forced.write_port(granularity=8), forced.read_port()
        routes_write, route_hosts = routes.write_port(), (forced.read_port(), routes.read_port())

        def in_routes(where, name):
            return where[3 + exact_log2(MAX_LAYERS):] == address(name) >> 3 + exact_log2(MAX_LAYERS)

        m.d.comb += [
            forced_write.addr.eq(write_address[3:]), forced_write.data.eq(write_data.replicate(2)),
            forced_write.en.eq(Mux(write & in_routes(write_address, "ROUTES_FORCED"),
                                   Mux(write_address[2], Cat(Const(0, 4), strobes), strobes), 0)),
            forced_read.addr.eq(control.route_layer), Cat(*control.routes_forced).eq(forced_read.data),
            routes_write.addr.eq(control.route_layer), routes_write.data.eq(Cat(*control.routes)),
            routes_write.en.eq(control.route_write),
            *(port.addr.eq(read_address[3:]) for port in route_hosts), *(port.en.eq(looking) for port in route_hosts),
        ]

        # The multiplexer. The low word of a counter keeps the high word for the read that follows.
        high = Signal(32)
        with m.If(reading):
            m.d.sync += axil.rdata.eq(0)
            with m.Switch(read_address[2:]):
                for where, value in words.items():
                    with m.Case(where >> 2):
                        m.d.sync += axil.rdata.eq(high if where - 4 in high_words else value)
                        if where in high_words:
                            m.d.sync += high.eq(high_words[where])
            with m.If(in_table[1]):
                m.d.sync += axil.rdata.eq(table_host.data)
            for name, port in zip(("ROUTES_FORCED", "ROUTES"), route_hosts):
                with m.If(in_routes(read_address, name)):
                    m.d.sync += axil.rdata.eq(port.data.word_select(read_address[2], 32))

        # Start and completion. A start while faulted is over at once, so that a host that waits sees the fault.
        over, wanted = Signal(), Signal()
        m.d.comb += [
            wanted.eq(write & (write_address[2:] == address("CTRL") >> 2) & strobes[0]
                      & write_data[Control.START.bit_length() - 1] & ~active),
            over.eq((control.finished & active) | (wanted & control.fault.valid)),
        ]
        m.d.sync += start.eq(wanted & ~control.fault.valid)
        with m.If(reading & (read_address[2:] == address("CTRL") >> 2)):
            m.d.sync += [done.eq(0), ready_seen.eq(0)]
        with m.If(wanted):
            m.d.sync += [active.eq(~control.fault.valid), done.eq(0), status_done.eq(0)]
        with m.If(over):
            m.d.sync += [active.eq(0), done.eq(1), ready_seen.eq(1), status_done.eq(1)]

        # Interrupt: a cause sets ISR if IER has it, writing 1 clears; a new cause wins.
        clear = Mux(write & (write_address[2:] == address("ISR") >> 2) & strobes[0], write_data[:len(isr)], 0)
        m.d.sync += [
            isr.eq((isr & ~clear) | Mux(over, ier, 0)),
            self.irq.eq(gie & isr.any()),
        ]
        return m
