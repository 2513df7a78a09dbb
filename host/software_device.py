"""A device whose registers and memory live in this process; what runs a program is left to subclasses."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from skipopu.hw.config import OverlayConfig
from skipopu.hw.registers import (
    Access,
    Control,
    DebugBuffer,
    FaultCause,
    Status,
    address,
    capabilities,
    registers,
)

from .device import Device
from .errors import DeviceError

__all__ = ["Outcome", "Run", "SoftwareDevice"]

_ARGUMENTS = tuple(name for name in registers() if name[:3] == "ARG" and name[3:].isdigit())


@dataclass(frozen=True, kw_only=True)
class Run:
    """What the registers ask for at start."""

    program: int  # byte address on port 0
    length: int  # instructions
    arguments: tuple[int, ...]
    tokens: tuple[int, ...]
    memory_limit: int  # superbeats, 0 if never set
    instruction_limit: int  # 0: none
    forced: tuple[int, ...] | None = None  # ROUTES_FORCED where ROUTE_FORCE asks for it


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run leaves in the registers.

    registers : name -> value; routes : layer -> words of ROUTES, of the layers that were routed
    beats_read, beats_written : of all ports together, spread evenly over their counters
    fault : (cause, instruction, port)
    """

    registers: dict[str, int]
    routes: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    beats_read: int = 0
    beats_written: int = 0
    fault: tuple[FaultCause, int, int] | None = None


class SoftwareDevice(Device):
    """Register file and memories; a start runs the program to its end within the register write.

    memories : writable uint8 [memory_bytes] behind each port, in place of empty ones
    """

    def __init__(self, config: OverlayConfig, memory_bytes: int, memories: Sequence[np.ndarray] | None = None) -> None:
        self.config, self.memory_bytes = config, memory_bytes
        self.memories = ([np.zeros(memory_bytes, np.uint8) for _ in range(config.ports)] if memories is None
                         else list(memories))
        self._registers: dict[int, int] = {}
        self._writable = {at for item in registers().values() if item.access == Access.READ_WRITE
                          for at in range(item.address, item.end, 4)}
        self._power_up()

    @abstractmethod
    def execute(self, run: Run) -> Outcome:
        """Run a program on ``memories``."""

    def debug_row(self, buffer: DebugBuffer, row: int) -> np.ndarray:
        """A row of an on-chip buffer as it reads through DEBUG_DATA. Raises IndexError beyond its rows."""
        raise DeviceError(f"this device has no view into {buffer.name}")

    def reset(self) -> None:
        self._power_up()

    def _power_up(self) -> None:
        self._registers = {address(name): value for name, value in capabilities(self.config).items()}
        self._set("STATUS", Status.IDLE)

    def csr_read(self, offset: int) -> int:
        if offset == address("CTRL"):
            status = self._get("STATUS")
            return Control.IDLE | (Control.DONE | Control.READY if status & Status.DONE else 0)
        if offset == address("DEBUG_DATA"):
            return self._debug_word(self._get("DEBUG_ADDRESS"))
        return self._registers.get(offset, 0)

    def csr_write(self, offset: int, value: int) -> None:
        if offset == address("CTRL"):
            if value & Control.START and not self._get("STATUS") & Status.FAULT:
                self._run()
        elif offset in self._writable:
            self._registers[offset] = int(value) & 0xFFFFFFFF

    def read_memory(self, port: int, address: int, size: int) -> np.ndarray:
        self._check(port, address, size)
        return self.memories[port][address : address + size].copy()

    def write_memory(self, port: int, address: int, data: np.ndarray) -> None:
        self._check(port, address, len(data))
        self.memories[port][address : address + len(data)] = data

    def memory(self, port: int) -> np.ndarray | None:
        return self.memories[port]

    def _debug_word(self, where: int) -> int:
        row, word = where >> 8 & 0xFFFFF, where & 0xFF
        try:
            buffer = DebugBuffer(where >> 28)
            return int(np.ascontiguousarray(self.debug_row(buffer, row)).view(np.uint32)[word])
        except (IndexError, ValueError) as error:
            if isinstance(error, DeviceError):
                raise
            raise DeviceError(f"DEBUG_ADDRESS {where:#010x} is no word of a buffer ({error})") from None

    def _check(self, port: int, address: int, size: int) -> None:
        if not (0 <= port < self.config.ports and 0 <= address and address + size <= self.memory_bytes):
            raise DeviceError(f"bytes {address}..{address + size - 1} of port {port} are outside the "
                              f"{self.memory_bytes} bytes behind each of {self.config.ports} ports")

    def _get(self, name: str, index: int = 0) -> int:
        at = address(name, index)
        value = self._registers.get(at, 0)
        return value | self._registers.get(at + 4, 0) << 32 if registers()[name].words == 2 else value

    def _set(self, name: str, value: int, index: int = 0) -> None:
        at = address(name, index)
        self._registers[at] = int(value) & 0xFFFFFFFF
        if registers()[name].words == 2:
            self._registers[at + 4] = int(value) >> 32

    def _forced(self) -> tuple[int, ...] | None:
        if not self._get("ROUTE_FORCE") & 1:
            return None
        return tuple(self._get("ROUTES_FORCED", index) for index in range(registers()["ROUTES_FORCED"].count))

    def _run(self) -> None:
        tokens = tuple(self._get("TOKEN_TABLE", index) for index in range(self.config.tokens))
        outcome = self.execute(Run(
            program=self._get("PROGRAM"), length=self._get("PROGRAM_LENGTH"),
            arguments=tuple(self._get(name) for name in _ARGUMENTS), tokens=tokens,
            memory_limit=self._get("MEMORY_LIMIT"), instruction_limit=self._get("INSTRUCTION_LIMIT"),
            forced=self._forced()))
        for name, value in outcome.registers.items():
            self._set(name, value)
        for layer, words in outcome.routes.items():
            for module, word in enumerate(words):
                self._set("ROUTES", word, 2 * layer + module)
        for name, beats in (("BEATS_READ", outcome.beats_read), ("BEATS_WRITTEN", outcome.beats_written)):
            for port in range(self.config.ports):
                self._set(name, beats // self.config.ports + (port < beats % self.config.ports), port)
        self._set("STATUS", Status.DONE | Status.IDLE)
        if outcome.fault is not None:
            cause, pc, port = outcome.fault
            for name, value in (("FAULT", cause), ("FAULT_PC", pc), ("FAULT_PORT", port),
                                ("FAULT_STICKY", 1 << cause), ("STATUS", Status.DONE | Status.IDLE | Status.FAULT)):
                self._set(name, value)
