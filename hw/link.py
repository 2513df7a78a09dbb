"""The serial link's frames, declared once: the board's bridge (`hw/blocks/serial_bridge.py`) and the driver read this.

Plain Python. `docs/serial.md` draws the frames. On the line a frame lies between two `END` bytes, with `END` and
`ESC` inside it escaped as in SLIP (RFC 1055): after noise of any kind the next `END` starts afresh. Inside: a header
of eight bytes, up to `MAX_WORDS` words, and the CRC-32 of Ethernet over both; every number little endian.
"""

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

__all__ = [
    "ANSWER", "CRC_BYTES", "Command", "END", "ESC", "ESC_END", "ESC_ESC", "Frame", "FrameDecoder", "HEADER_BYTES",
    "IDENTITY_FIELDS", "LINK_IDENTITY", "LINK_VERSION", "LinkStatus", "MAX_WORDS", "encode_frame", "identity",
]

END, ESC, ESC_END, ESC_ESC = 0xC0, 0xDB, 0xDC, 0xDD
HEADER_BYTES, CRC_BYTES = 8, 4
MAX_WORDS = 255  #: 32-bit words of one frame
ANSWER = 0x80  #: set in the command of an answer
LINK_IDENTITY = 0x4B4C4B53  #: "SKLK" read as bytes
LINK_VERSION = 1

#: Words that `Command.IDENTIFY` answers.
IDENTITY_FIELDS = ("LINK_IDENTITY", "LINK_VERSION", "CONFIG_HASH", "PORTS", "MEMORY_BYTES", "CLOCK_HZ")

_HEADER = struct.Struct("<BBBBI")
_ESCAPES = {END: bytes([ESC, ESC_END]), ESC: bytes([ESC, ESC_ESC])}


class Command(IntEnum):
    """What a request asks for. A request with words carries exactly as many as its header says."""

    IDENTIFY = 1  #: begins a session; answers IDENTITY_FIELDS
    RESET = 2  #: the overlay back to its state after power-up; memory is kept
    READ_REGISTERS = 3  #: words from a byte address of the register map on
    WRITE_REGISTERS = 4
    READ_MEMORY = 5  #: words from a byte address of the memory behind a port on
    WRITE_MEMORY = 6


class LinkStatus(IntEnum):
    """How a request ended; only OK carries words back."""

    OK = 0
    UNKNOWN_COMMAND = 1
    BAD_REQUEST = 2  #: its words do not match its length, or it leaves the memory or the register map
    NO_SESSION = 3  #: nothing but IDENTIFY is served after power-up
    BUS_ERROR = 4  #: the registers answered with an error, or not in time


@dataclass(frozen=True)
class Frame:
    """A request or an answer.

    code : the port of a memory access in a request, the LinkStatus of an answer
    words : carried by writes and answers to reads, asked for by reads; address : bytes, a multiple of 4
    """

    sequence: int
    command: int
    code: int = 0
    words: int = 0
    address: int = 0
    payload: bytes = b""


def encode_frame(frame: Frame) -> bytes:
    """The bytes on the line, with an ``END`` on both sides."""
    body = _HEADER.pack(frame.sequence, frame.command, frame.code, frame.words, frame.address) + frame.payload
    body += zlib.crc32(body).to_bytes(CRC_BYTES, "little")
    return bytes([END]) + b"".join(_ESCAPES.get(byte, bytes([byte])) for byte in body) + bytes([END])


def identity(config_hash: int, ports: int, memory_bytes: int, clock_hz: int) -> dict[str, int]:
    """Values of IDENTITY_FIELDS of one board."""
    return dict(zip(IDENTITY_FIELDS, (LINK_IDENTITY, LINK_VERSION, config_hash, ports, memory_bytes, clock_hz)))


class FrameDecoder:
    """Bytes from the line to frames; what is damaged is dropped and counted.

    damaged : pieces between two ``END`` that were no frame
    """

    def __init__(self) -> None:
        self.damaged = 0
        self._body = bytearray()
        self._escaped = self._bad = False

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that end within ``data``."""
        for byte in data:
            if byte == END:
                if (frame := self._finish()) is not None:
                    yield frame
            elif self._escaped:
                self._escaped = False
                self._bad |= byte not in (ESC_END, ESC_ESC)
                self._body.append(END if byte == ESC_END else ESC)
            elif byte == ESC:
                self._escaped = True
            else:
                self._body.append(byte)

    def _finish(self) -> Frame | None:
        body, sound = bytes(self._body), not (self._bad or self._escaped)
        self._body.clear()
        self._escaped = self._bad = False
        if not body and sound:
            return None
        at = len(body) - CRC_BYTES
        if not sound or at < HEADER_BYTES or zlib.crc32(body[:at]).to_bytes(CRC_BYTES, "little") != body[at:]:
            self.damaged += 1
            return None
        sequence, command, code, words, address = _HEADER.unpack(body[:HEADER_BYTES])
        return Frame(sequence, command, code, words, address, body[HEADER_BYTES:at])
