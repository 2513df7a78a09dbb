"""Cycle-accurate simulation of an overlay top: the Verilated design with its memories in one native loop.

``NativeSim`` builds (or loads from the cache) a shared library with the design, one AXI4 memory per port, the
instruction fetch port on memory 0, and an AXI4-Lite master; numpy arrays are the memories, without a copy.
Watchers check every port in every cycle; a violation stops the run with its cycle and port.
"""

import ctypes
import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
from skipopu.sim.build import build_library, sleepers

from .hbm import HbmConfig, HbmTiming

__all__ = ["CsrError", "EVENT", "MemoryTiming", "NativeSim", "PortStats", "ProtocolError", "StopReason"]

_NEVER = 2**64 - 1
_SLICE_CYCLES = 20_000  # cycles per native call, so that an interrupt from the keyboard is seen soon
_CHANNELS = ("ar", "r", "aw", "w", "b")
_CODES = {"slverr": 2, "decerr": 3}


class ProtocolError(RuntimeError):
    """The design broke a rule of AXI, or stopped itself; the message names cycle and port."""


class CsrError(RuntimeError):
    """A register access was answered with an error code, or not at all."""


class StopReason(enum.Enum):
    """Why ``NativeSim.run`` returned."""

    LIMIT = 0  # the given number of cycles has passed
    IRQ = 1    # the interrupt output is high


@dataclass(frozen=True, kw_only=True)
class MemoryTiming:
    """Timing of the memory behind one port.

    read_latency : cycles from accepting a read burst to its first beat, >= 1
    write_latency : cycles from the last beat of a write burst to its response, >= 1
    bandwidth : beats per cycle and direction, in (0, 1]
    max_outstanding : bursts accepted but not finished, per direction, >= 1
    stall_ar, stall_r, stall_aw, stall_w, stall_b : probability in [0, 1) that the memory holds back that channel for a
        cycle; seed : of the stalls, port p uses seed + p
    hbm : timing of an HBM2 pseudo-channel in place of latencies and bandwidth
    """

    read_latency: int = 32
    write_latency: int = 8
    bandwidth: float = 1.0
    max_outstanding: int = 64
    stall_ar: float = 0.0
    stall_r: float = 0.0
    stall_aw: float = 0.0
    stall_w: float = 0.0
    stall_b: float = 0.0
    seed: int = 1
    hbm: HbmTiming | None = None

    def __post_init__(self) -> None:
        for name in ("read_latency", "write_latency", "max_outstanding"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.bandwidth <= 1:
            raise ValueError(f"bandwidth must be in (0, 1] beats per cycle, not {self.bandwidth}")
        for channel in _CHANNELS:
            if not 0 <= (stall := getattr(self, f"stall_{channel}")) < 1:
                raise ValueError(f"stall_{channel} must be a probability in [0, 1), not {stall}")


@dataclass(frozen=True, kw_only=True)
class PortStats:
    """Counters of one port since construction or ``clear``.

    bytes_read, bytes_written : on the data channels (written: strobed and stored); read_bursts, write_bursts : accepted
    busy_cycles : with a burst in flight; read_wait_cycles : data offered, design not ready;
    write_wait_cycles : data offered by the design, memory not ready
    """

    bytes_read: int
    bytes_written: int
    read_bursts: int
    write_bursts: int
    busy_cycles: int
    read_wait_cycles: int
    write_wait_cycles: int


_COUNTERS = [field.name for field in fields(PortStats)]


class _Config(ctypes.Structure):  # PortConfig of axi_port.h
    _fields_ = [
        *((name, ctypes.c_uint64) for name in ("read_latency", "write_latency", "rate", "max_outstanding", "seed")),
        ("stall", ctypes.c_uint64 * len(_CHANNELS)), ("hbm", HbmConfig)]


class _Stats(ctypes.Structure):  # PortStats of axi_port.h
    _fields_ = [(name, ctypes.c_uint64) for name in _COUNTERS]


#: One cycle in which something happened: ``dispatch``, an instruction (``pc``) left control, ``dropped``, with an empty
#: row list; ``start`` and ``done``, bit per unit that began or finished a command; ``memory``, bit per port on which
#: data moved (a record stands wherever this changes).
EVENT = np.dtype([("cycle", "u8"), ("pc", "u4"), ("memory", "u4"), ("dispatch", "u1"), ("dropped", "u1"),
                  ("start", "u1"), ("done", "u1")], align=True)

_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "new": (ctypes.c_void_p, [ctypes.c_void_p] * 4),
    "delete": (None, [ctypes.c_void_p]),
    "reset": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_uint64]),
    "run": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_uint64, ctypes.c_int]),
    "write": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_uint64]),
    "read": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint64]),
    "cycle": (ctypes.c_uint64, [ctypes.c_void_p]),
    "irq": (ctypes.c_int, [ctypes.c_void_p]),
    "error": (None, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]),
    "trace": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64, ctypes.c_uint64]),
    "stop_trace": (None, [ctypes.c_void_p]),
    "record": (ctypes.c_int, [ctypes.c_void_p, ctypes.c_int]),
    "sleepless": (None, [ctypes.c_void_p, ctypes.c_int]),
    "clocks": (ctypes.c_size_t, [ctypes.c_void_p, ctypes.c_void_p]),
    "events": (ctypes.c_size_t, [ctypes.c_void_p]),
    "take_events": (ctypes.c_size_t, [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]),
    "stats": (None, [ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p, ctypes.c_int]),
    "inject_error": (None, [ctypes.c_void_p, ctypes.c_uint, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64,
                            ctypes.c_uint64, ctypes.c_int]),
    "inject_hang": (None, [ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint64]),
    "clear_rules": (None, [ctypes.c_void_p, ctypes.c_uint]),
}


class NativeSim:
    """One simulated top with its memories. Use as a context manager, or call ``close``.

    verilog : text holding module ``top`` with the overlay's ports (``clk``, ``rst``, ``irq``, ``s_axil_*``,
        ``m0_axi_*`` ..., ``mi_axi_*``)
    ports : number of AXI4 masters; port_bits : their data width, 32..512, a power of two
    memories : one writable, contiguous uint8 array per port, used in place; sizes are whole beats, memory 0 also a
        multiple of the fetch port's 32 bytes. The fetch port reads memory 0.
    bases : byte address of each memory on its port, beat aligned, default 0; other addresses answer DECERR and zeros
    timing : one MemoryTiming for every port, or one per port followed by the fetch port's
    trace : build with waveforms, see ``trace_to``; log : called with the lines of a build
    Raises ValueError for a bad parameter and ToolError if the library cannot be built.

    The fetch port has index ``ports`` in ``stats``, ``inject_error`` and ``inject_hang``.
    """

    def __init__(self, verilog: str, ports: int, port_bits: int, *, memories: Sequence[np.ndarray],
                 bases: Sequence[int] | None = None, timing: MemoryTiming | Sequence[MemoryTiming] = MemoryTiming(),
                 trace: bool = False, top: str = "skipopu_top", log: Callable[[str], None] | None = None) -> None:
        self._handle: int | None = None
        if ports < 1 or port_bits not in (32, 64, 128, 256, 512):
            raise ValueError(f"expected at least 1 port of 32, 64, 128, 256 or 512 bits, not {ports} of {port_bits}")
        bases = [0] * ports if bases is None else list(bases)
        timings = [timing] * (ports + 1) if isinstance(timing, MemoryTiming) else list(timing)
        for name, items, count in (("memories", memories, ports), ("bases", bases, ports),
                                   ("timings", timings, ports + 1)):
            if len(items) != count:
                raise ValueError(f"expected {count} {name} for {ports} ports, not {len(items)}")
        for port, (memory, base) in enumerate(zip(memories, bases, strict=True)):
            unit = max(port_bits // 8, 32) if port == 0 else port_bits // 8
            flags = memory.flags
            if memory.dtype != np.uint8 or memory.ndim != 1 or not flags.c_contiguous or not flags.writeable:
                raise ValueError(f"memory {port} must be a writable contiguous uint8 vector, not {memory.dtype} "
                                 f"{list(memory.shape)}")
            if len(memory) == 0 or len(memory) % unit or base % unit:
                raise ValueError(f"memory {port} must have a size and base that are multiples of {unit} bytes, not "
                                 f"{len(memory)} at {base:#x}")
        self.ports = ports
        self.memories = list(memories)
        self._sleepers = sleepers(verilog)
        self._library = ctypes.CDLL(str(build_library(verilog, top=top, ports=ports, port_bits=port_bits, trace=trace,
                                                      log=log)))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self._library, f"sim_{name}")
            function.restype, function.argtypes = result, arguments
        configs = (_Config * (ports + 1))()
        for port, item in enumerate(timings):
            configs[port] = _Config(item.read_latency, item.write_latency, max(1, round(item.bandwidth * 2**32)),
                                    item.max_outstanding, item.seed + port,
                                    tuple(round(getattr(item, f"stall_{channel}") * 2**32) for channel in _CHANNELS),
                                    item.hbm.native(port) if item.hbm else HbmConfig())
        self._handle = self._library.sim_new((ctypes.c_void_p * ports)(*(m.ctypes.data for m in memories)),
                                             (ctypes.c_uint64 * ports)(*(len(m) for m in memories)),
                                             (ctypes.c_uint64 * ports)(*bases), configs)
        if not self._handle:
            raise ProtocolError("the design stopped itself while it was initialised, its message is on stderr")

    def __enter__(self) -> "NativeSim":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def close(self) -> None:
        """Free the design and finish its waveform file; may be called twice."""
        if self._handle:
            self._library.sim_delete(self._handle)
            self._handle = None

    @property
    def cycle(self) -> int:
        """Clock cycles since construction."""
        return self._library.sim_cycle(self._live())

    @property
    def irq(self) -> bool:
        """Level of the interrupt output."""
        return bool(self._library.sim_irq(self._live()))

    def reset(self, cycles: int = 2) -> None:
        """Hold ``rst`` for ``cycles``; drops transfers in flight, keeps memories, statistics and injected faults."""
        self._library.sim_reset(self._live(), cycles)
        self._check()

    def step(self, cycles: int = 1) -> None:
        """Run ``cycles`` clock cycles whatever the interrupt does. Raises ProtocolError."""
        self._run(cycles, False)

    def run(self, max_cycles: int) -> StopReason:
        """Run until the interrupt output is high or ``max_cycles`` have passed. Raises ProtocolError."""
        return self._run(max_cycles, True)

    def csr_read(self, address: int, *, limit: int = 1000) -> int:
        """Read a 32-bit register, clocking the design. Raises CsrError on an error code or after ``limit`` cycles."""
        value = ctypes.c_uint32()
        self._answer(self._library.sim_read(self._live(), address, ctypes.byref(value), limit), "read", address, limit)
        return value.value

    def csr_write(self, address: int, value: int, *, limit: int = 1000) -> None:
        """Write a 32-bit register, clocking the design. Raises CsrError on an error code or after ``limit`` cycles."""
        self._answer(self._library.sim_write(self._live(), address, value, limit), "write", address, limit)

    def stats(self, port: int, *, clear: bool = False) -> PortStats:
        """Counters of ``port``; ``clear`` starts them again from zero."""
        out = _Stats()
        self._library.sim_stats(self._live(), self._port(port), ctypes.byref(out), clear)
        return PortStats(**{name: getattr(out, name) for name in _COUNTERS})

    def inject_error(self, port: int, direction: str, *, burst: int | None = None,
                     addresses: tuple[int, int] | None = None, code: str = "slverr") -> None:
        """Answer accesses of ``port`` with an error; faulty reads give zeros, faulty writes store nothing.

        direction : "read" or "write"; code : "slverr" or "decerr"
        burst : the n-th burst from now, 0 the next one; or addresses : beats touching bytes [low, high)
        """
        if direction not in ("read", "write") or code not in _CODES or (burst is None) == (addresses is None):
            raise ValueError("expected direction 'read' or 'write', code 'slverr' or 'decerr', and either burst or "
                             f"addresses, not {direction!r}, {code!r}, {burst}, {addresses}")
        low, high = addresses or (0, 0)
        self._library.sim_inject_error(self._live(), self._port(port), direction == "write",
                                       _NEVER if burst is None else burst, low, high, _CODES[code])

    def inject_hang(self, port: int, *, after_beats: int = 0) -> None:
        """``port`` stops answering for good once ``after_beats`` more beats have moved."""
        self._library.sim_inject_hang(self._live(), self._port(port), after_beats)

    def clear_faults(self) -> None:
        """Remove every injected error and hang."""
        for port in range(self.ports + 1):
            self._library.sim_clear_rules(self._live(), port)
            self._library.sim_inject_hang(self._live(), port, _NEVER)

    def trace_to(self, path: str | Path, *, first_cycle: int = 0, last_cycle: int = _NEVER) -> None:
        """Write cycles first..last, both included, to the FST file ``path``; time 2n is the rising edge of cycle n.

        Raises ValueError if the simulation was built without ``trace=True``.
        """
        if not self._library.sim_trace(self._live(), str(path).encode(), first_cycle, last_cycle):
            raise ValueError("waveforms need a simulation built with trace=True")

    def record(self, on: bool = True) -> None:
        """Keep what the units do from now on, see ``events``. Raises ValueError for a top without event outputs."""
        if not self._library.sim_record(self._live(), on):
            raise ValueError("this top has no event outputs")

    def sleepless(self, on: bool = True) -> None:
        """Clock also what sleeps while nothing happens in it (`hw.top.Overlay`, ``sleeps``): slower, and the same."""
        self._library.sim_sleepless(self._live(), on)

    def clocks(self) -> dict[str, int]:
        """Clocks that each part with a clock of its own has had since construction; {} for a top without such parts."""
        counts = (ctypes.c_uint64 * len(self._sleepers))()
        self._library.sim_clocks(self._live(), counts)
        return dict(zip(self._sleepers, counts, strict=True))

    def events(self) -> np.ndarray:
        """What happened since ``record`` or the last call, as EVENT records in the order of time."""
        out = np.zeros(self._library.sim_events(self._live()), EVENT)
        self._library.sim_take_events(self._live(), out.ctypes.data, len(out))
        return out

    def stop_trace(self) -> None:
        """Finish the waveform file."""
        self._library.sim_stop_trace(self._live())

    def _live(self) -> int:
        if not self._handle:
            raise ValueError("the simulation is closed")
        return self._handle

    def _port(self, port: int) -> int:
        if not 0 <= port <= self.ports:
            raise ValueError(f"port must be 0..{self.ports} (the last is the fetch port), not {port}")
        return port

    def _run(self, cycles: int, stop_on_irq: bool) -> StopReason:
        code = 0
        while cycles > 0 and code == 0:
            count = min(cycles, _SLICE_CYCLES)
            code = self._library.sim_run(self._live(), count, stop_on_irq)
            cycles -= count
        self._check()
        return StopReason(code)

    def _check(self) -> None:
        text = ctypes.create_string_buffer(512)
        self._library.sim_error(self._live(), text, len(text))
        if text.value:
            raise ProtocolError(text.value.decode(errors="replace"))

    def _answer(self, code: int, kind: str, address: int, limit: int) -> None:
        self._check()
        if code < 0:
            raise CsrError(f"register {kind} at {address:#x} was not answered within {limit} cycles")
        if code:
            raise CsrError(f"register {kind} at {address:#x} was answered with AXI code {code}, expected 0 (OKAY)")
