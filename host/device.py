"""What the runtime asks of an accelerator, whatever stands behind it: registers, memory of each port, completion."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
from skipopu.hw.config import OverlayConfig
from skipopu.hw.registers import (
    CAPABILITIES,
    COUNTERS,
    Control,
    DebugBuffer,
    FaultCause,
    Status,
    address,
    capabilities,
    debug_address,
    registers,
)

from .errors import DeviceError

__all__ = ["Device", "read_register", "write_register"]


class Device(ABC):
    """One overlay. Subclasses provide registers and memory; ``wait`` too, where the device does not run by itself.

    config : the configuration the device was built with; memory_bytes : memory behind each port
    """

    config: OverlayConfig
    memory_bytes: int

    @abstractmethod
    def csr_read(self, offset: int) -> int:
        """The 32-bit register at a byte offset. Raises DeviceError if the device does not answer."""

    @abstractmethod
    def csr_write(self, offset: int, value: int) -> None:
        """Set the 32-bit register at a byte offset. Raises DeviceError if the device does not answer."""

    @abstractmethod
    def read_memory(self, port: int, address: int, size: int) -> np.ndarray:
        """Copy of ``size`` bytes behind a port: uint8. Raises DeviceError outside ``memory_bytes``."""

    @abstractmethod
    def write_memory(self, port: int, address: int, data: np.ndarray) -> None:
        """Set bytes (uint8) behind a port. Raises DeviceError outside ``memory_bytes``."""

    def memory(self, port: int) -> np.ndarray | None:
        """The memory behind a port itself, writable uint8 [memory_bytes], where this machine can address it."""
        return None

    def port_base(self, port: int) -> int:
        """Byte address that the overlay has to use for address 0 of a port's memory."""
        return 0

    @abstractmethod
    def reset(self) -> None:
        """Back to the state after power-up: registers at their defaults, faults cleared, memory kept."""

    def start(self) -> None:
        """Run the program from its first instruction."""
        write_register(self, "CTRL", Control.START)

    def wait(self, timeout: float) -> None:
        """Return once the run has ended, also by a fault. Raises DeviceError after ``timeout`` seconds."""
        deadline = time.monotonic() + timeout
        while read_register(self, "STATUS") & Status.RUNNING:
            if time.monotonic() > deadline:
                raise self.timeout_error(timeout)
            time.sleep(50e-6)

    def timeout_error(self, timeout: float) -> DeviceError:
        """The error for a run that has not ended in time."""
        return DeviceError(f"the accelerator did not finish within {timeout:g} s; it is at instruction "
                           f"{read_register(self, 'PC')}: reset it, or allow more time")

    def counters(self) -> dict[str, int]:
        """Counters of the last run by name (lower case), with BYTES_READ and BYTES_WRITTEN over all ports."""
        found = {name.lower(): read_register(self, name) for name, _ in COUNTERS}
        beat = self.config.port_bits // 8
        for name, register in (("bytes_read", "BEATS_READ"), ("bytes_written", "BEATS_WRITTEN")):
            found[name] = beat * sum(read_register(self, register, port) for port in range(self.config.ports))
        return found

    def fault(self) -> tuple[FaultCause, int, int] | None:
        """(cause, instruction index, port) if the machine has stopped with a fault."""
        if not read_register(self, "STATUS") & Status.FAULT:
            return None
        return (FaultCause(read_register(self, "FAULT")), read_register(self, "FAULT_PC"),
                read_register(self, "FAULT_PORT"))

    def inspect(self, buffer: DebugBuffer, row: int) -> bytes:
        """One row of an on-chip buffer, through the debug window: only while the machine does not run.

        FP32 for ABUF, int16 mantissas for MBUF, FP16 for KVOUT; little endian.
        """
        bits = {DebugBuffer.ABUF: 32 * self.config.vector_lanes, DebugBuffer.MBUF: 16 * self.config.lanes,
                DebugBuffer.KVOUT: self.config.port_bits}[buffer]
        words = []
        for word in range(bits // 32):
            write_register(self, "DEBUG_ADDRESS", debug_address(buffer, row, word))
            words.append(read_register(self, "DEBUG_DATA"))
        return np.array(words, "<u4").tobytes()

    def identify(self) -> None:
        """Compare the capability registers with ``config``. Raises DeviceError that names the first difference."""
        expected, name = capabilities(self.config), "IDENTITY"
        if (value := read_register(self, name)) != expected[name]:
            raise DeviceError(f"this is no skipopu overlay: register {name} must read {expected[name]:#x}, not "
                              f"{value:#x}; load a bitstream of the overlay")
        for name in CAPABILITIES:
            if (value := read_register(self, name)) != expected[name]:
                remedy = ("use the release that it was built from, or build it anew" if name == "VERSION" else
                          "load the matching bitstream or configuration")
                raise DeviceError(f"register {name} must read {expected[name]:#x} for configuration "
                                  f"{self.config.name}, not {value:#x}; {remedy}")

    def close(self) -> None:  # noqa: B027 nothing to do for most devices
        """Release the device; it cannot be used afterwards."""

    def __enter__(self) -> Device:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def read_register(device: Device, name: str, index: int = 0) -> int:
    """A register by name; both words of a 64-bit one, low word first."""
    at = address(name, index)
    value = device.csr_read(at)
    return value | device.csr_read(at + 4) << 32 if registers()[name].words == 2 else value


def write_register(device: Device, name: str, value: int, index: int = 0) -> None:
    """Set a register by name; both words of a 64-bit one."""
    at = address(name, index)
    device.csr_write(at, value & 0xFFFFFFFF)
    if registers()[name].words == 2:
        device.csr_write(at + 4, value >> 32)
