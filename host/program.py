"""A program: instruction words, what each is for, and the builder that writes them."""

from __future__ import annotations

from dataclasses import dataclass, field

from skipopu.hw.isa import Resource, RowList, disassemble, encode

__all__ = ["Builder", "NO_RESOURCE", "Note", "Program", "WORD_BYTES", "vector_imm"]

WORD_BYTES = 32
NO_RESOURCE = Resource(0)


@dataclass(frozen=True)
class Note:
    """Where an instruction comes from; layer -1 stands outside the layers, tensor is "" where none is involved."""

    layer: int
    module: str
    tensor: str = ""

    def __str__(self) -> str:
        place = self.module if self.layer < 0 else f"layer {self.layer} {self.module}"
        return f"{place}, {self.tensor}" if self.tensor else place


@dataclass(frozen=True, eq=False)
class Program:
    """Instruction words (256-bit ints) and one Note for each."""

    words: list[int]
    notes: list[Note]

    def describe(self, pc: int) -> str:
        """One line: index, origin and disassembly of an instruction."""
        if not 0 <= pc < len(self.words):
            return f"instruction {pc}, outside the program of {len(self.words)}"
        return f"instruction {pc} ({self.notes[pc]}): {disassemble(self.words[pc])}"

    def listing(self) -> str:
        """The whole program as text; `isa.assemble` reads every line."""
        return "\n".join(f"{disassemble(word)}  # {pc}: {note}"
                         for pc, (word, note) in enumerate(zip(self.words, self.notes))) + "\n"

    def to_bytes(self) -> bytes:
        """Little-endian words of 32 bytes, as they lie in memory."""
        return b"".join(word.to_bytes(WORD_BYTES, "little") for word in self.words)

    @staticmethod
    def words_from_bytes(data: bytes) -> list[int]:
        """The words of ``to_bytes``."""
        return [int.from_bytes(data[at : at + WORD_BYTES], "little") for at in range(0, len(data), WORD_BYTES)]


def signed32(value: int) -> int:
    """The signed reading of 32 bits, which `imm` takes."""
    return (value & 0xFFFFFFFF) - ((value & 0x80000000) << 1)


@dataclass
class Builder:
    """Appends instructions; ``at`` says of those that follow what they are for, and for which rows they run."""

    words: list[int] = field(default_factory=list)
    notes: list[Note] = field(default_factory=list)
    note: Note = Note(-1, "start")
    rows: RowList = RowList.ALL

    def at(self, layer: int, module: str, tensor: str = "", rows: RowList = RowList.ALL) -> None:
        """The following instructions belong to this module and tensor, and run for these rows."""
        self.note, self.rows = Note(layer, module, tensor), rows

    def emit(self, mnemonic: str, *, reads: Resource = NO_RESOURCE, writes: Resource = NO_RESOURCE,
             imm: int = 0, **fields: int) -> int:
        """Append one instruction, return its index. ``imm`` takes unsigned 32-bit patterns too. Raises IsaError."""
        fields = {"list": self.rows} | fields
        self.words.append(encode(mnemonic, reads=reads, writes=writes, imm=signed32(imm), **fields))
        self.notes.append(self.note)
        return len(self.words) - 1

    def patch(self, index: int, mnemonic: str, **fields: int) -> None:
        """Replace an instruction, for forward branches."""
        self.words[index] = encode(mnemonic, **fields)

    def program(self) -> Program:
        """What was built."""
        return Program(list(self.words), list(self.notes))


def vector_imm(src: int, dst: int) -> int:
    """`imm` of a vector instruction: ABUF base in the low half, destination base in the high half (both beats)."""
    if not (0 <= src < 1 << 16 and 0 <= dst < 1 << 16):
        raise ValueError(f"src and dst must be 0..65535 beats, not {src} and {dst}")
    return dst << 16 | src


