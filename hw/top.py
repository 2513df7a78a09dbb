"""The overlay: control, load, compute, vector and store units, wired together.

`overlay_verilog` writes it with the port names a board or simulator expects: `clk`, `rst`, `irq`, `s_axil_*`,
`m0_axi_*` ... `m{P-1}_axi_*`, `mi_axi_*`.
"""

from amaranth import Cat, ClockDomain, ClockSignal, DomainRenamer, Module, Mux, ResetSignal, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from .blocks.axi import Axi4, AxiLite, AxiRead, axi_ports, connect_axi
from .blocks.command import PC_BITS
from .blocks.compute import ComputeUnit
from .blocks.control import Control
from .blocks.csr import Csr
from .blocks.fetch import Fetch
from .blocks.kvbuf import KvBuffer
from .blocks.load import LoadUnit
from .blocks.store import StoreUnit
from .blocks.vector import VectorUnit
from .isa import Unit
from .registers import ADDRESS_BITS, DebugBuffer
from .verilog import to_verilog

__all__ = ["SLEEPERS", "Happened", "Overlay", "overlay_verilog"]

#: An instruction (``pc``) left control, or was ``dropped`` there; bit per unit that began or finished a command.
Happened = wiring.Signature({
    "dispatch": Out(1), "dropped": Out(1), "pc": Out(PC_BITS), "start": Out(4), "done": Out(4)})


SLEEPERS = ("kvbuf", "vector", "store", "history")  #: parts that have clocks of their own in simulations
_SLEEPING = {f"{part}_awake": Out(3) for part in SLEEPERS} | {f"{part}_clock": In(1) for part in SLEEPERS}
#: Beginnings of the names of registers that are the second half in a simulation by two threads: half of the work, and
#: exponents of keys and values are where they are looked up.
SECOND_HALF = ("overlay.compute.", "overlay.vector.", "overlay.kvbuf.k_exponents", "overlay.kvbuf.v_exponents")
_LINGER = 16  # cycles in which what was stirred comes to rest


class Overlay(wiring.Component):
    """The whole machine.

    sleeps : for simulation only: each of the SLEEPERS has a clock of its own, which a simulator leaves out while
        nothing happens there; then it need not evaluate what depends on that part alone

    Members
    -------
    s_axil : registers (`hw.registers`); irq : interrupt
    m_axi : P memory ports; mi_axi : instruction fetch, reads the memory of port 0
    running : a program runs; fault : it stopped with a fault, until reset
    events : what happened in the cycle before, for simulators and on-chip analysers
    kvbuf_awake, kvbuf_clock, vector_... : only with ``sleeps``: not 0 if the next edge of the clock may change anything
        in that part, from registers alone, bit 1 from those of `SECOND_HALF` alone, the others without them; its clock
    """

    def __init__(self, *, config, sleeps=False):
        self.config, self.sleeps = config, sleeps
        super().__init__((_SLEEPING if sleeps else {}) | {
            "s_axil": In(AxiLite(ADDRESS_BITS)), "irq": Out(1),
            "m_axi": Out(Axi4(config.port_bits)).array(config.ports), "mi_axi": Out(AxiRead(256)),
            "running": Out(1), "fault": Out(1), "events": Out(Happened),
        })

    def elaborate(self, platform):
        m = Module()
        config = self.config
        m.submodules.csr = csr = Csr(config=config)
        m.submodules.fetch = fetch = Fetch(config=config)
        m.submodules.control = control = Control(config=config, fault_sources=2)
        m.submodules.load = load = LoadUnit(config=config, history_domain="history" if self.sleeps else "sync")
        m.submodules.compute = compute = ComputeUnit(config=config)
        kvbuf, vector, store = KvBuffer(config=config), VectorUnit(config=config), StoreUnit(config=config)
        for part, block in zip(SLEEPERS, (kvbuf, vector, store)):
            m.submodules[part] = DomainRenamer(part)(block) if self.sleeps else block
        if self.sleeps:
            streams = [kvbuf.shape, kvbuf.tile, *kvbuf.records, *kvbuf.beats, *kvbuf.hits]
            self._sleep(m, "kvbuf", [each.valid for each in streams], [kvbuf.release, kvbuf.request.valid])
            self._sleep(m, "vector", [vector.load.valid, store.busy, ~csr.control.running], [vector.stirs])
            self._sleep(m, "store", [store.busy, store.cmd.valid, store.places.valid], [store.logits.valid])
            self._sleep(m, "history", [load.history_stirs], [])

        # Control.
        wiring.connect(m, csr.control, control.csr)
        wiring.connect(m, control.fetch, fetch.control)
        wiring.connect(m, fetch.axi, wiring.flipped(self.mi_axi))
        wiring.connect(m, csr.axil, wiring.flipped(self.s_axil))
        units = {Unit.LOAD: load, Unit.COMPUTE: compute, Unit.VECTOR: vector, Unit.STORE: store}
        for unit, block in units.items():
            wiring.connect(m, control.commands[unit], block.cmd)
            m.d.comb += [control.done[unit].eq(block.done), control.busy[unit].eq(block.busy)]
        m.d.comb += [control.faults[0].eq(load.fault), control.faults[1].eq(store.fault),
                     control.progress.eq(Cat(load.beats_read, store.beats_written, compute.active).any()),
                     control.decided_attention.eq(vector.decided_attention), control.decided_mlp.eq(vector.decided_mlp),
                     self.irq.eq(csr.irq)]

        m.d.comb += self.events.pc.eq(csr.control.pc)
        m.d.sync += [
            self.events.dispatch.eq(csr.control.dispatched), self.events.dropped.eq(control.dropped),
            self.events.done.eq(control.done),
            self.events.start.eq(Cat(command.valid & command.ready for command in control.commands)),
        ]

        # Memory.
        for p in range(config.ports):
            connect_axi(m, self.m_axi[p], load.axi[p])
            connect_axi(m, self.m_axi[p], store.axi[p])
            m.d.comb += [load.base[p].eq(csr.port_base[p]), store.base[p].eq(csr.port_base[p])]
        m.d.comb += [load.limit.eq(csr.memory_limit), store.limit.eq(csr.memory_limit)]

        # Data.
        wiring.connect(m, load.weights, compute.weights)
        wiring.connect(m, load.abuf, vector.load)
        wiring.connect(m, load.tile, kvbuf.shape)
        for p in range(config.ports):
            wiring.connect(m, load.records[p], kvbuf.records[p])
            wiring.connect(m, load.kv[p], kvbuf.beats[p])
            wiring.connect(m, load.hits[p], kvbuf.hits[p])
        wiring.connect(m, store.places, load.places)
        wiring.connect(m, compute.kv_request, kvbuf.request)
        wiring.connect(m, kvbuf.tile, compute.kv_tile)
        wiring.connect(m, compute.out, vector.acc)
        wiring.connect(m, vector.logits, store.logits)
        m.d.comb += [
            load.tile_done.eq(kvbuf.done), kvbuf.release.eq(compute.kv_release), store.place.eq(load.place),
            kvbuf.k_slot.eq(compute.exponent_slot), kvbuf.k_head.eq(compute.exponent_head),
            compute.exponents.eq(kvbuf.k_exponents),
            kvbuf.v_slot.eq(vector.exponent_slot), kvbuf.v_head.eq(vector.exponent_head),
            vector.exponents.eq(kvbuf.v_exponents),
            *(getattr(compute, name).eq(getattr(vector, name))
              for name in ("write_en", "write_row", "write_vector", "write_first", "write_data")),
            store.kvout_data.eq(vector.kvout_data),
        ]

        # Counters and inspection.
        m.d.comb += [self.running.eq(csr.control.running), self.fault.eq(csr.control.fault.valid)]
        events = csr.events
        m.d.comb += [
            events.busy.eq(control.busy), events.hazard_wait.eq(control.waiting),
            events.array_active.eq(compute.active), events.weight_starved.eq(compute.starved),
            events.memory_blocked.eq(load.blocked), events.drain_blocked.eq(compute.drain_blocked),
            events.stream_wait.eq(vector.waiting), events.saturations.eq(vector.saturated),
            events.dropped.eq(control.dropped), events.weights_read.eq(load.weights_read),
            events.kv_read.eq(load.kv_read), events.kv_written.eq(store.kv_written),
            events.kv_buffered.eq(kvbuf.buffered),
            csr.beats_read.eq(load.beats_read), csr.beats_written.eq(store.beats_written),
            csr.argmax_index.eq(vector.argmax), csr.argmax_value.eq(vector.argmax_value),
        ]
        word, row, buffer = csr.debug_address[:8], csr.debug_address[8:28], csr.debug_address[28:]
        idle = ~csr.control.running
        m.d.comb += [
            vector.debug_row.eq(row), compute.debug_row.eq(row), compute.debug.eq(idle),
            vector.kvout_row.eq(Mux(idle, row, store.kvout_row)),
        ]
        choice = Signal(32)
        with m.Switch(buffer):
            with m.Case(DebugBuffer.ABUF):
                m.d.comb += choice.eq(vector.debug_data.word_select(word, 32))
            with m.Case(DebugBuffer.MBUF):
                m.d.comb += choice.eq(compute.debug_data.word_select(word, 32))
            with m.Default():
                m.d.comb += choice.eq(vector.kvout_data.word_select(word, 32))
        with m.If(idle):
            m.d.sync += csr.debug_data.eq(choice)
        return m

    def _sleep(self, m, part, first, second):
        """A part's clock and whether it is needed: nothing changes there but with or soon after one of the signs."""
        m.domains += ClockDomain(part, local=True, async_reset=True)
        stirred, linger = Signal(name=f"{part}_stirred"), Signal(range(_LINGER + 1), name=f"{part}_linger")
        signs = Cat(Cat(first).any(), Cat(second).any())
        m.d.comb += [
            stirred.eq(signs.any()), getattr(self, f"{part}_awake").eq(Cat(signs, linger != 0)),
            ClockSignal(part).eq(getattr(self, f"{part}_clock")), ResetSignal(part).eq(ResetSignal()),
        ]
        with m.If(stirred):
            m.d.sync += linger.eq(_LINGER)
        with m.Elif(linger != 0):
            m.d.sync += linger.eq(linger - 1)


class _Top(wiring.Component):
    """The overlay with its clock and reset as ports.

    In a simulation that sleeps the reset comes a cycle later, from a register: a simulator evaluates what depends on
    inputs twice, and nearly every register depends on the reset. It is asynchronous, so that no logic depends on it.
    """

    def __init__(self, overlay):
        self.overlay = overlay
        super().__init__({"clk": In(1), "rst": In(1)})

    def elaborate(self, platform):
        m = Module()
        m.domains.sync = ClockDomain(async_reset=self.overlay.sleeps)
        m.d.comb += ClockSignal().eq(self.clk)
        if self.overlay.sleeps:
            m.domains.input = ClockDomain(reset_less=True)
            delayed = Signal()
            m.d.comb += ClockSignal("input").eq(self.clk)
            m.d.input += delayed.eq(self.rst)
            m.d.comb += ResetSignal().eq(delayed)
        else:
            m.d.comb += ResetSignal().eq(self.rst)
        m.submodules.overlay = self.overlay
        return m


def overlay_verilog(config, *, flatten=True, sleeps=False, halves=False, sunk=False):
    """Verilog of the overlay, top module `skipopu_top`.

    sleeps : as in `Overlay`; halves : the units of `SECOND_HALF` in a module `skipopu_top_second`, see `hw.halves`;
    sunk : see `hw.sink`
    """
    overlay = Overlay(config=config, sleeps=sleeps)
    top = _Top(overlay)
    ports = {"clk": (top.clk, None), "rst": (top.rst, None), "irq": (overlay.irq, None)}
    ports |= axi_ports("s_axil", overlay.s_axil) | axi_ports("mi_axi", overlay.mi_axi)
    for p in range(config.ports):
        ports |= axi_ports(f"m{p}_axi", overlay.m_axi[p])
    if sleeps:
        ports |= {name: (getattr(overlay, name), None) for name in _SLEEPING}
    ports |= {f"event_{name}": (getattr(overlay.events, name), None) for name in Happened.members}
    return to_verilog(top, name="skipopu_top", ports=ports, flatten=flatten, async_reset=sleeps,
                      second=SECOND_HALF if halves else (), sunk=sunk)
