"""An overlay behind a serial line, as on the ULX3S: the Device interface in frames of `hw/link.py`.

One request is under way at a time. It is sent again until its answer comes, with the same sequence number, by which the
board knows what it has done already; an answer counts only if its CRC is right and it repeats the request's sequence
number, command and address. So noise costs time, and never changes what is read or written.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from typing import Any, Protocol

import numpy as np
from skipopu.hw.config import OverlayConfig
from skipopu.hw.link import (
    ANSWER,
    IDENTITY_FIELDS,
    LINK_IDENTITY,
    LINK_VERSION,
    MAX_WORDS,
    Command,
    Frame,
    FrameDecoder,
    LinkStatus,
    encode_frame,
)
from skipopu.hw.registers import COUNTERS, address

from .device import Device
from .errors import DeviceError

__all__ = ["Line", "SerialDevice", "find_port"]

_USB_IDS = {(0x0403, 0x6015)}  # FT231X of the ULX3S
_LONGEST = 4 * len(encode_frame(Frame(0, 0, payload=bytes([0xC0]) * 4 * MAX_WORDS)))  # bytes without an answer in them


class Line(Protocol):
    """A port as pyserial has it, or anything else with bytes in both directions.

    timeout : seconds after which ``read`` returns what it has; ``in_waiting``, where it exists: bytes that have come
    """

    timeout: float | None

    def read(self, size: int) -> bytes: ...

    def write(self, data: bytes) -> Any: ...

    def close(self) -> None: ...


class SerialDevice(Device):
    """The overlay at the other end of a serial line.

    port : name of the serial port, such as /dev/ttyUSB0; without one the only board that is plugged in
    line : an open line instead; its ``timeout`` is what a request waits for a sign of life before it is sent again
    retries : repetitions of a request; frame_words : most words of memory in one, fewer suit a noisy line
    clock_hz : the board's; repeated : requests that had to be sent again
    Raises DeviceError for a port that is absent or busy, a board that does not answer or holds another configuration,
    and if it has less than ``memory_bytes`` behind each port.
    """

    def __init__(self, config: OverlayConfig, memory_bytes: int, *, port: str | None = None, line: Line | None = None,
                 baud: int = 1_000_000, timeout: float = 0.25, retries: int = 8,
                 frame_words: int = MAX_WORDS) -> None:
        self.config, self.retries, self._frame_words = config, retries, frame_words
        self.repeated = 0
        self._name = port or (find_port() if line is None else "the line")
        self._line = line if line is not None else _open(self._name, baud, timeout)
        self._decoder = FrameDecoder()
        self._sequence = secrets.randbelow(256)
        try:
            self.clock_hz = self._identify(memory_bytes)
        except DeviceError:
            self.close()
            raise

    def _identify(self, memory_bytes: int) -> int:
        words = self._request(Command.IDENTIFY, answer_words=len(IDENTITY_FIELDS)).view("<u4")
        found = dict(zip(IDENTITY_FIELDS, map(int, words)))
        config = self.config
        for name, expected in (("LINK_IDENTITY", LINK_IDENTITY), ("LINK_VERSION", LINK_VERSION),
                               ("CONFIG_HASH", config.config_hash), ("PORTS", config.ports)):
            if found[name] != expected:
                raise DeviceError(f"{name} of the board at {self._name} must be {expected:#x} for configuration "
                                  f"{config.name}, not {found[name]:#x}; load the matching bitstream")
        self.memory_bytes = found["MEMORY_BYTES"]
        if self.memory_bytes < memory_bytes:
            raise DeviceError(f"the model needs {memory_bytes} bytes behind each port, the board at {self._name} has "
                              f"{self.memory_bytes}, {memory_bytes - self.memory_bytes} too few; use a smaller model "
                              f"or a shorter context")
        return found["CLOCK_HZ"]

    def csr_read(self, offset: int) -> int:
        return int(self._request(Command.READ_REGISTERS, address=offset, answer_words=1).view("<u4")[0])

    def csr_write(self, offset: int, value: int) -> None:
        self._request(Command.WRITE_REGISTERS, address=offset, payload=(value & 0xFFFFFFFF).to_bytes(4, "little"))

    def read_memory(self, port: int, address: int, size: int) -> np.ndarray:
        self._check(port, address, size)
        begin, end = address & ~3, (address + size + 3) & ~3
        out = np.empty(end - begin, np.uint8)
        for at in range(begin, end, 4 * self._frame_words):
            words = min(self._frame_words, (end - at) // 4)
            out[at - begin:at - begin + 4 * words] = self._request(Command.READ_MEMORY, port, at, answer_words=words)
        return out[address - begin:address - begin + size]

    def write_memory(self, port: int, address: int, data: np.ndarray) -> None:
        data = np.ascontiguousarray(data, np.uint8)
        self._check(port, address, len(data))
        head, tail = address & 3, -(address + len(data)) & 3
        if head:  # whole words only: what lies around is read first
            data = np.concatenate([self.read_memory(port, address - head, head), data])
        if tail:
            data = np.concatenate([data, self.read_memory(port, address - head + len(data), tail)])
        for at in range(0, len(data), 4 * self._frame_words):
            self._request(Command.WRITE_MEMORY, port, address - head + at,
                          payload=data[at:at + 4 * self._frame_words].tobytes())

    def _check(self, port: int, address: int, size: int) -> None:
        if not 0 <= port < self.config.ports or address < 0 or address + size > self.memory_bytes:
            raise DeviceError(f"memory of port 0..{self.config.ports - 1} has {self.memory_bytes} bytes, not "
                              f"{size} at {address:#x} of port {port}")

    def counters(self) -> dict[str, int]:
        # Whole groups of registers in one request each: a request costs more than its bytes.
        def group(name: str, count: int) -> list[int]:
            return self._request(Command.READ_REGISTERS, address=address(name),
                                 answer_words=2 * count).view("<u8").tolist()

        found = dict(zip((name.lower() for name, _ in COUNTERS), group(COUNTERS[0][0], len(COUNTERS))))
        beat = self.config.port_bits // 8
        for name, register in (("bytes_read", "BEATS_READ"), ("bytes_written", "BEATS_WRITTEN")):
            found[name] = beat * sum(group(register, self.config.ports))
        return found

    def reset(self) -> None:
        self._request(Command.RESET)

    def close(self) -> None:
        self._line.close()

    def _request(self, command: Command, port: int = 0, address: int = 0, payload: bytes = b"",
                 answer_words: int = 0) -> np.ndarray:
        """Words of the answer to one request, as uint8. Raises DeviceError if there is none, or it is a refusal."""
        self._sequence = (self._sequence + 1) % 256
        words = len(payload) // 4 or (answer_words if command != Command.IDENTIFY else 0)
        request = Frame(self._sequence, command, port, words, address, payload)
        before = self._decoder.damaged
        for attempt in range(self.retries + 1):
            self.repeated += attempt > 0
            answer = self._exchange(request)
            if answer is None:
                continue
            if answer.code != LinkStatus.OK:
                raise DeviceError(self._refusal(answer.code, command, port, address))
            if len(answer.payload) != 4 * answer_words:
                raise DeviceError(f"the board at {self._name} answered {command.name} with {len(answer.payload)} bytes "
                                  f"instead of {4 * answer_words}; load the matching bitstream")
            return np.frombuffer(answer.payload, np.uint8)
        damaged = self._decoder.damaged - before
        cause = (f"{damaged} damaged frames came instead: check the cable and the rate" if damaged else
                 "nothing came: check that the board has power and the bitstream, and the rate")
        raise DeviceError(f"no answer from {self._name} to {command.name} after {self.retries + 1} attempts; {cause}")

    def _exchange(self, request: Frame) -> Frame | None:
        """Send once and wait for the answer."""
        try:
            self._line.write(encode_frame(request))
            received, deadline = 0, time.monotonic() + 60.0
            while received < _LONGEST and time.monotonic() < deadline:
                data = self._line.read(max(1, getattr(self._line, "in_waiting", 0)))
                if not data:
                    return None
                received += len(data)
                for frame in self._decoder.feed(data):
                    if (frame.sequence == request.sequence and frame.command == request.command | ANSWER
                            and frame.address == request.address and len(frame.payload) == 4 * frame.words):
                        return frame
        except OSError as error:  # pyserial's errors are of this kind
            raise DeviceError(f"the connection to {self._name} broke ({error}); plug it in and open it again") from None
        return None

    def _refusal(self, code: int, command: Command, port: int, address: int) -> str:
        where = f"{command.name} at {address:#x} of port {port}"
        match code:
            case LinkStatus.NO_SESSION:
                return f"the board at {self._name} was restarted; open it again"
            case LinkStatus.BUS_ERROR:
                return f"the overlay did not answer {where}; reset it"
            case LinkStatus.UNKNOWN_COMMAND | LinkStatus.BAD_REQUEST:
                return f"the board at {self._name} refused {where} as {LinkStatus(code).name}; load its bitstream anew"
        return f"the board at {self._name} answered {where} with the unknown status {code}; load the matching bitstream"


def find_port() -> str:
    """What ``SKIPOPU_SERIAL_PORT`` names, or the serial port of the only board that is plugged in.

    Raises DeviceError for none or several.
    """
    if chosen := os.environ.get("SKIPOPU_SERIAL_PORT"):
        return chosen
    try:
        from serial.tools.list_ports import comports
    except ImportError:
        raise DeviceError(_NO_PYSERIAL) from None
    ports = comports()
    found = [item.device for item in ports if (item.vid, item.pid) in _USB_IDS]
    if len(found) == 1:
        return found[0]
    if found:
        raise DeviceError(f"several boards are plugged in; set SKIPOPU_SERIAL_PORT to one of: {', '.join(found)}")
    others = ", ".join(item.device for item in ports) or "none"
    raise DeviceError("no board was found on a serial port; plug it in, or set SKIPOPU_SERIAL_PORT to its port (there "
                      f"are: {others})")


_NO_PYSERIAL = "a serial port needs the package pyserial: pip install pyserial"


def _open(name: str, baud: int, timeout: float) -> Line:
    try:
        import serial
    except ImportError:
        raise DeviceError(_NO_PYSERIAL) from None
    try:
        line = serial.Serial(name, baud, timeout=timeout, exclusive=True)
    except ValueError as error:
        raise DeviceError(f"serial port {name} cannot be opened: {error}") from None
    except OSError as error:
        number = error.errno or getattr(error.__context__, "errno", None)
        if number == errno.ENOENT:
            raise DeviceError(f"serial port {name} does not exist; plug the board in") from None
        if number in (errno.EBUSY, errno.EAGAIN):
            raise DeviceError(f"serial port {name} is in use by another program; close it first") from None
        if number == errno.EACCES:
            raise DeviceError(f"serial port {name} may not be opened; on Linux join the group dialout") from None
        raise DeviceError(f"serial port {name} cannot be opened: {error}") from None
    try:
        line.set_low_latency_mode(True)  # the USB chip otherwise keeps short answers for 16 ms
    except (AttributeError, NotImplementedError, OSError, ValueError):
        pass
    return line
