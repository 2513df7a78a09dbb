"""A simulated board behind a serial line: what the serial driver opens in place of a port.

`SimulatedBoard` is the Verilated board design with its UART in a native loop; time passes only while somebody reads.
`NoisyLine` drops and corrupts bytes on their way over any line.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
from skipopu.host.errors import DeviceError
from skipopu.host.serial_device import Line
from skipopu.hw.config import OverlayConfig

from .build import build_library
from .cache import cached_text, hardware_digest

__all__ = ["DIVISOR", "NoisyLine", "SimulatedBoard"]

DIVISOR = 4  #: clocks per bit; the fewest that the UART takes, so that a simulation waits as little as possible
_POINTER, _SIZE, _LONG = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint64
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "new": (_POINTER, [ctypes.c_uint]), "delete": (None, [_POINTER]), "power_up": (None, [_POINTER]),
    "send": (None, [_POINTER, ctypes.c_char_p, _SIZE]), "run": (ctypes.c_int, [_POINTER, _LONG, _SIZE]),
    "take": (_SIZE, [_POINTER, ctypes.c_char_p, _SIZE]), "waiting": (_SIZE, [_POINTER]),
    "cycle": (_LONG, [_POINTER]), "lights": (ctypes.c_uint, [_POINTER]),
}


class SimulatedBoard:
    """A line to the RTL of `skipopu.hw.serial_top` under Verilator.

    memory_bytes : behind each port; timeout : seconds of the board's clock that ``read`` waits for a byte
    log : called with the lines of a build; verilog : text of another top `skipopu_serial` with the same ports
    """

    def __init__(self, config: OverlayConfig, memory_bytes: int, *, clock_hz: int = 25_000_000, timeout: float = 4e-3,
                 log: Callable[[str], None] | None = None, verilog: str | None = None) -> None:
        self.clock_hz, self.timeout = clock_hz, timeout

        def make() -> str:
            if log:
                log(f"elaborating the board at configuration {config.name}")
            from skipopu.hw.serial_top import serial_verilog
            return serial_verilog(config, memory_bytes=memory_bytes, divisor=DIVISOR, clock_hz=clock_hz)

        name = f"serial-{config.name}-{hardware_digest(config, memory_bytes, DIVISOR, clock_hz)}.v"
        text = verilog or cached_text("verilog", name, make)
        path = build_library(text, top="skipopu_serial", ports=config.ports, port_bits=config.port_bits, log=log,
                             harness="serial_harness.cpp")
        library = ctypes.CDLL(str(path))
        self._call = {}
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(library, f"board_{name}")
            function.restype, function.argtypes = result, arguments
            self._call[name] = function
        self._board = self._call["new"](DIVISOR)

    def write(self, data: bytes) -> int:
        self._call["send"](self._board, bytes(data), len(data))
        return len(data)

    def read(self, size: int) -> bytes:
        """Up to ``size`` bytes; fewer when none has come for ``timeout``."""
        while self.in_waiting < size:
            before = self.in_waiting
            if not self._call["run"](self._board, int(self.timeout * self.clock_hz), before + 1):
                raise DeviceError("the simulated design has stopped itself; see its message above")
            if self.in_waiting == before:
                break
        buffer = ctypes.create_string_buffer(size)
        count = self._call["take"](self._board, buffer, size)
        return buffer.raw[:count]

    @property
    def in_waiting(self) -> int:
        """Bytes that have come and were not read."""
        return self._call["waiting"](self._board)

    @property
    def cycle(self) -> int:
        """Clock cycles since construction."""
        return self._call["cycle"](self._board)

    @property
    def lights(self) -> tuple[bool, bool, bool]:
        """Running, fault, and link active."""
        bits = self._call["lights"](self._board)
        return bool(bits & 1), bool(bits & 2), bool(bits & 4)

    def power_up(self) -> None:
        """What a loss of power does to registers; memory keeps its contents here."""
        self._call["power_up"](self._board)

    def close(self) -> None:
        if self._board:
            self._call["delete"](self._board)
            self._board = None


class NoisyLine:
    """A line that loses and changes bytes, in both directions.

    drop, corrupt : probability per byte; seed : of the noise; lost, changed : bytes so far
    """

    def __init__(self, line: Line, *, drop: float = 0.0, corrupt: float = 0.0, seed: int = 1) -> None:
        self.line, self.drop, self.corrupt = line, drop, corrupt
        self.lost = self.changed = 0
        self._random = np.random.default_rng(seed)

    @property
    def timeout(self) -> float | None:
        """Of the line."""
        return self.line.timeout

    @property
    def in_waiting(self) -> int:
        """Of the line."""
        return getattr(self.line, "in_waiting", 0)

    def write(self, data: bytes) -> int:
        self.line.write(self._disturb(data))
        return len(data)

    def read(self, size: int) -> bytes:
        while data := self.line.read(size):
            if left := self._disturb(data):  # nothing left is not the end: time has not run out
                return left
        return b""

    def close(self) -> None:
        self.line.close()

    def _disturb(self, data: bytes) -> bytes:
        values = np.frombuffer(data, np.uint8)
        keep = self._random.random(len(values)) >= self.drop
        flip = self._random.random(len(values)) < self.corrupt
        self.lost += int((~keep).sum())
        self.changed += int(flip[keep].sum())
        mask = self._random.integers(1, 256, len(values), dtype=np.uint8) * flip
        return (values ^ mask)[keep].tobytes()
