"""The register map: declared once; hardware (`hw/blocks/csr.py`), drivers and `docs/registers.md` derive from it.

Plain Python. Registers are 32 bits at byte addresses in 4 KiB. A register of 64 bits is two words, low word first;
reading the low word of a counter keeps its high word until it is read, so that the pair belongs together.
The first four words follow the control block that XRT expects of a kernel (ap_ctrl_hs).
"""

from dataclasses import dataclass
from enum import IntEnum, IntFlag

from skipopu.hw.config import OverlayConfig
from skipopu.hw.isa import ISA_VERSION, MAX_LAYERS, Unit

__all__ = [
    "ADDRESS_BITS", "Access", "CAPABILITIES", "COUNTERS", "Control", "DESIGN_VERSION", "DebugBuffer", "FaultCause",
    "IDENTITY", "Interrupt", "MAP", "MAX_PORTS", "MAX_TOKENS", "RESET_KEY", "Register", "RegisterError", "Status",
    "address", "capabilities", "debug_address", "markdown", "registers",
]

ADDRESS_BITS = 12
IDENTITY = 0x504F4B53  #: "SKOP" read as bytes
DESIGN_VERSION = 1
MAX_PORTS = 32
MAX_TOKENS = 128
RESET_KEY = 0x54535253  #: "SRST" read as bytes
UNITS = tuple(unit for unit in Unit if unit != Unit.CONTROL)


class RegisterError(ValueError):
    """A register name, index or field that the map does not have."""


class FaultCause(IntEnum):
    """Why the machine stopped; only a reset leaves a fault."""

    NONE = 0
    ILLEGAL_OPCODE = 1
    FETCH_RANGE = 2  #: the program counter left the program
    FETCH_ERROR = 3  #: memory answered an instruction fetch with an error
    READ_ERROR = 4  #: memory answered a read with an error
    WRITE_ERROR = 5  #: memory answered a write with an error
    MEMORY_RANGE = 6  #: an address at or beyond MEMORY_LIMIT
    WATCHDOG = 7  #: no progress for WATCHDOG cycles
    BUFFER_RANGE = 8  #: a row beyond an on-chip buffer
    TOKEN_RANGE = 9  #: a token table index at or beyond TOKENS
    KV_POINTER = 10  #: the pointer of a KV record is damaged, or names none of the running sequence
    KV_FULL = 11  #: no place is left for a KV record behind a port
    KV_FORMAT = 12  #: a format of KV records that the configuration does not have


class Control(IntFlag):
    """Bits of CTRL. Writing START while the machine is faulted runs nothing and sets DONE at once."""

    START = 1 << 0  #: write 1 to start; reads 1 while running
    DONE = 1 << 1  #: finished or faulted since the last start; cleared by reading
    IDLE = 1 << 2  #: not running
    READY = 1 << 3  #: a start was taken in and is over; cleared by reading
    AUTO_RESTART = 1 << 7  #: ignored, reads 0


class Status(IntFlag):
    """Bits of STATUS, which reading does not change."""

    RUNNING = 1 << 0
    DONE = 1 << 1  #: until the next start
    IDLE = 1 << 2
    FAULT = 1 << 3  #: until reset
    BUSY_LOAD = 1 << 8
    BUSY_COMPUTE = 1 << 9
    BUSY_VECTOR = 1 << 10
    BUSY_STORE = 1 << 11


class Interrupt(IntFlag):
    """Bits of IER and ISR; a fault ends the run, so it is DONE as well."""

    DONE = 1 << 0
    READY = 1 << 1


class DebugBuffer(IntEnum):
    """Buffers behind DEBUG_ADDRESS."""

    ABUF = 0
    MBUF = 1
    KVOUT = 2


class Access(IntEnum):
    """What the host may do; a write to a read-only register is accepted and changes nothing."""

    READ_WRITE = 0
    READ_ONLY = 1
    WRITE_ONLY = 2  #: reads 0


@dataclass(frozen=True)
class Register:
    """One register, or ``count`` of them in a row."""

    name: str
    address: int
    doc: str
    access: Access = Access.READ_WRITE
    words: int = 1  #: 2 for 64 bits
    count: int = 1

    @property
    def end(self):
        """First byte address behind it."""
        return self.address + 4 * self.words * self.count


COUNTERS = (
    ("CYCLES", "cycles while running"),
    ("INSTRUCTIONS", "instructions dispatched"),
    *((f"BUSY_{unit.name}", f"cycles in which the {unit.name} unit was busy") for unit in UNITS),
    *((f"HAZARD_WAIT_{unit.name}", f"cycles in which the next {unit.name} command waited for another unit")
      for unit in UNITS),
    ("ARRAY_ACTIVE", "cycles in which the array multiplied"),
    ("WEIGHT_STARVED", "cycles in which the array waited for weights"),
    ("MEMORY_BLOCKED", "cycles in which memory had a superbeat that nobody took"),
    ("DRAIN_BLOCKED", "cycles in which the array waited for the vector unit to take results"),
    ("STREAM_WAIT", "cycles in which the vector unit waited for results of the array"),
    ("SATURATIONS", "keys and values clamped to FP16, results of the array at the largest FP32 number"),
    ("DROPPED", "instructions dropped because their row list was empty"),
    ("WEIGHTS_READ", "superbeats of weights delivered to the array"),
    ("KV_READ", "port beats of KV records delivered from memory"),
    ("KV_WRITTEN", "port beats of KV records written"),
    ("KV_BUFFERED", "port beats of KV records delivered from the history buffer"),
)  #: 64-bit counters of events, cleared at start

CAPABILITIES = (
    "IDENTITY", "VERSION", "CONFIG_HASH", "LANES", "COLUMNS", "PORTS", "PORT_BITS", "VECTOR_LANES", "TOKENS",
)


def capabilities(config: OverlayConfig) -> dict[str, int]:
    """Values of the capability registers of one configuration."""
    values = (IDENTITY, ISA_VERSION << 16 | DESIGN_VERSION, config.config_hash, config.lanes, config.columns,
              config.ports, config.port_bits, config.vector_lanes, config.tokens)
    return dict(zip(CAPABILITIES, values))


_RO = Access.READ_ONLY
_CAPABILITY_DOCS = (
    '"SKOP" as bytes: check this first', "ISA version (31:16), design version (15:0)",
    "`config_hash` of the configuration", "K", "N", "P", "data bits of a port", "V", "rows of one chunk",
)

MAP = (
    Register("CTRL", 0x000, "start and completion, see Control"),
    Register("GIE", 0x004, "bit 0: interrupts enabled"),
    Register("IER", 0x008, "which causes set ISR, see Interrupt"),
    Register("ISR", 0x00C, "causes seen; writing 1 clears a bit"),
    Register("PROGRAM", 0x010, "byte address of the program on port 0, a multiple of 32", words=2),
    Register("PROGRAM_LENGTH", 0x018, "instructions in the program, below 2^24"),
    *(Register(f"ARG{i}", 0x01C + 4 * i, f"value of r{i + 1} at start") for i in range(7)),
    Register("MEMORY_LIMIT", 0x038, "superbeats of memory; an access at or beyond faults"),
    Register("WATCHDOG", 0x03C, "cycles without progress that fault; 0 is off"),
    Register("INSTRUCTION_LIMIT", 0x040, "stop with done after this many instructions and idle units; 0 is off. "
             "A cut between instructions that feed each other waits until the watchdog ends it"),
    Register("DEBUG_ADDRESS", 0x044, "buffer (31:28, DebugBuffer), row (27:8), 32-bit word of the row (7:0)"),
    Register("DEBUG_DATA", 0x048, "the selected word; only while the machine does not run", _RO),
    Register("STATUS", 0x04C, "state of the machine, see Status", _RO),
    Register("FAULT", 0x050, "the first fault, see FaultCause", _RO),
    Register("FAULT_PORT", 0x054, "memory port of the fault, where there is one", _RO),
    Register("FAULT_PC", 0x058, "instruction index of the fault; WATCHDOG: the oldest instruction not completed", _RO),
    Register("FAULT_STICKY", 0x05C, "one bit per FaultCause seen since reset", _RO),
    Register("PC", 0x060, "instruction index dispatched last", _RO),
    Register("ARGMAX_INDEX", 0x064, "index of the largest logit", _RO),
    Register("ARGMAX_VALUE", 0x068, "FP32 bits of the largest logit", _RO),
    Register("ROUTE_FORCE", 0x06C, "bit 0: `route` takes ROUTES_FORCED in place of the routers' decisions"),
    Register("RESET", 0x070, f"kernels of XRT: {RESET_KEY:#x} resets all but the memory; otherwise ignored. Not while "
             "the machine moves data: wait 1 ms after a fault", Access.WRITE_ONLY),
    *(Register(name, 0x080 + 4 * i, doc, _RO) for i, (name, doc) in enumerate(zip(CAPABILITIES, _CAPABILITY_DOCS))),
    Register("PORT_BASE", 0x100, "byte address of superbeat 0 on a port", words=2, count=MAX_PORTS),
    *(Register(name, 0x200 + 8 * i, doc, _RO, words=2) for i, (name, doc) in enumerate(COUNTERS)),
    Register("TOKEN_TABLE", 0x400, "what the token instruction reads; TOKENS entries exist", count=MAX_TOKENS),
    Register("ROUTES_FORCED", 0x800, "rows that execute, bit t for row t: attention, then MLP of each layer",
             count=2 * MAX_LAYERS),
    Register("ROUTES", 0xA00, "what `route` took last: attention, then MLP of each layer", _RO, count=2 * MAX_LAYERS),
    Register("BEATS_READ", 0x600, "data beats read on a port, cleared at start", _RO, words=2, count=MAX_PORTS),
    Register("BEATS_WRITTEN", 0x700, "data beats written on a port, cleared at start", _RO, words=2, count=MAX_PORTS),
)

_BY_NAME = {item.name: item for item in MAP}


def registers() -> dict[str, Register]:
    """All registers by name."""
    return dict(_BY_NAME)


def address(name: str, index: int = 0) -> int:
    """Byte address of a register (its low word); RegisterError for an unknown name or an index it does not have."""
    if name not in _BY_NAME:
        raise RegisterError(f"unknown register {name!r}; known: {', '.join(_BY_NAME)}")
    item = _BY_NAME[name]
    if not 0 <= index < item.count:
        raise RegisterError(f"{name} index must be 0..{item.count - 1}, not {index}")
    return item.address + 4 * item.words * index


def debug_address(buffer: DebugBuffer, row: int, word: int) -> int:
    """Value of DEBUG_ADDRESS; RegisterError if a part does not fit."""
    if not (0 <= row < 1 << 20 and 0 <= word < 1 << 8):
        raise RegisterError(f"debug row must be 0..{(1 << 20) - 1} and word 0..255, not {row} and {word}")
    return buffer << 28 | row << 8 | word


def markdown() -> str:
    """The register page (docs/registers.md)."""
    lines = ["# Registers", "", "Generated from `hw/registers.py` by `make docs`; do not edit.", "",
             (__doc__ or "").strip(), "", "| address | name | bits | access | meaning |", "|---|---|---|---|---|"]
    for item in MAP:
        name = item.name if item.count == 1 else f"{item.name}[0..{item.count - 1}]"
        where = f"{item.address:#05x}" if item.end - item.address == 4 else f"{item.address:#05x}..{item.end - 4:#05x}"
        access = {Access.READ_WRITE: "RW", Access.READ_ONLY: "R", Access.WRITE_ONLY: "W"}[item.access]
        lines.append(f"| {where} | `{name}` | {32 * item.words} | {access} | {item.doc} |")
    for kind in (Control, Status, Interrupt, FaultCause, DebugBuffer):
        lines += ["", f"## {kind.__name__}", "", (kind.__doc__ or "").strip(), ""]
        prefix = "bit " if issubclass(kind, IntFlag) else ""
        lines += [f"- {prefix}{member.bit_length() - 1 if prefix else int(member)}: `{member.name}`" for member in kind]
    return "\n".join(lines) + "\n"
