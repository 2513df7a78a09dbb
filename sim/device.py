"""The RTL behind the Device interface: the Verilated overlay with its memories in one native loop."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

import numpy as np
from skipopu.host.device import Device, read_register, write_register
from skipopu.host.errors import DeviceError
from skipopu.hw.config import OverlayConfig
from skipopu.hw.registers import Control, Status

from .cache import cached_text, hardware_digest
from .hbm import HbmTiming
from .native import CsrError, MemoryTiming, NativeSim, ProtocolError, StopReason

__all__ = ["MEMORIES", "RtlDevice", "cached_verilog", "default_threads"]

#: Products of the array for which two threads are used unasked: `sim` and `sim16` gain, others were not measured.
_TWO_THREADS = range(512, 4096)
MEMORIES = {"ideal": MemoryTiming(), "hbm": MemoryTiming(hbm=HbmTiming())}


def cached_verilog(config: OverlayConfig, log: Callable[[str], None] | None = None, *, sleeps: bool = False,
                   halves: bool = False, sunk: bool = False) -> str:
    """Verilog of the overlay at ``config``, from the cache while the hardware's sources and tools are the same.

    log : called with one line when the Verilog has to be made; sleeps, halves, sunk : as in `hw.top.overlay_verilog`
    """
    def make() -> str:
        if log:
            log(f"elaborating the overlay at configuration {config.name}")
        from skipopu.hw.top import overlay_verilog
        return overlay_verilog(config, sleeps=sleeps, halves=halves, sunk=sunk)

    kind = "-sleeps" * sleeps + "-halves" * halves + "-sunk" * sunk
    return cached_text("verilog", f"{config.name}-{hardware_digest(config)}{kind}.v", make)


def default_threads(config: OverlayConfig) -> int:
    """How many threads simulate a configuration in the shortest time here."""
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 2 if config.lanes * config.columns in _TWO_THREADS and processors > 1 else 1


class RtlDevice(Device):
    """The overlay's RTL under Verilator. Counters of cycles are simulated cycles.

    sim : the simulation itself, for injected faults, waveforms and statistics of the memories
    timing : of every memory port; memory : in its place, "ideal" for the default timing or "hbm" for an HBM2
        pseudo-channel behind every port; trace : build with waveforms; log : called with the lines of a build
    threads : processors to simulate on, 1 or 2, which give the same result in every cycle; default: 2 if there are two
        and the configuration is of a size that gains by it, 1 for waveforms
    verilog : text to run instead of this configuration's own; memories : writable uint8 behind each port, of whole
        lines of the instruction cache (256 bytes), in place of empty ones of ``memory_bytes``
    Raises DeviceError for another kind of memory or number of threads.
    """

    def __init__(self, config: OverlayConfig, memory_bytes: int, *, timing: MemoryTiming | None = None,
                 memory: str = "ideal", trace: bool = False, log: Callable[[str], None] | None = None,
                 threads: int | None = None, verilog: str | None = None,
                 memories: Sequence[np.ndarray] | None = None) -> None:
        if memory not in MEMORIES:
            raise DeviceError(f"memory must be {' or '.join(MEMORIES)}, not {memory!r}")
        if threads not in (None, 1, 2) or trace and threads == 2:
            raise DeviceError(f"threads must be 1{' with waveforms' if trace else ' or 2'}, not {threads}")
        self.config = config
        unit = 256  # a line of the instruction cache: the last one is fetched whole
        self.memory_bytes = -(-memory_bytes // unit) * unit
        self.memories = ([np.zeros(self.memory_bytes, np.uint8) for _ in range(config.ports)] if memories is None
                         else list(memories))
        halves = not trace and (threads or default_threads(config)) == 2
        text = verilog or cached_verilog(config, log, sleeps=True, halves=halves, sunk=not trace)
        self.sim = NativeSim(text, config.ports, config.port_bits, memories=self.memories,
                             timing=timing or MEMORIES[memory], trace=trace, log=log)
        self.reset()

    def csr_read(self, offset: int) -> int:
        try:
            return self.sim.csr_read(offset)
        except (CsrError, ProtocolError) as error:
            raise DeviceError(str(error)) from None

    def csr_write(self, offset: int, value: int) -> None:
        try:
            self.sim.csr_write(offset, value)
        except (CsrError, ProtocolError) as error:
            raise DeviceError(str(error)) from None

    def memory(self, port: int) -> np.ndarray:
        return self.memories[port]

    def read_memory(self, port: int, address: int, size: int) -> np.ndarray:
        return self._window(port, address, size).copy()

    def write_memory(self, port: int, address: int, data: np.ndarray) -> None:
        self._window(port, address, len(data))[:] = data

    def _window(self, port: int, address: int, size: int) -> np.ndarray:
        if not 0 <= port < self.config.ports or address < 0 or address + size > self.memory_bytes:
            raise DeviceError(f"memory of port 0..{self.config.ports - 1} has {self.memory_bytes} bytes, not "
                              f"{size} at {address:#x} of port {port}")
        return self.memories[port][address:address + size]

    def reset(self) -> None:
        self.sim.reset()

    def start(self) -> None:
        write_register(self, "GIE", 1)
        write_register(self, "IER", 1)
        write_register(self, "CTRL", Control.START)

    def wait(self, timeout: float) -> None:
        """Clock the design until its interrupt. Raises DeviceError after ``timeout`` seconds of real time."""
        deadline = time.monotonic() + timeout
        try:
            while self.sim.run(100_000) is not StopReason.IRQ:
                if time.monotonic() > deadline:
                    raise self.timeout_error(timeout)
        except ProtocolError as error:
            raise DeviceError(str(error)) from None
        write_register(self, "ISR", 1)
        if read_register(self, "STATUS") & Status.RUNNING:
            raise DeviceError("the accelerator raised its interrupt while running")

    def close(self) -> None:
        self.sim.close()
