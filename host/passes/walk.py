"""Walk a program as control would: registers, branches and row lists, without a device."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from skipopu.hw.isa import Condition, Register, RowList, Unit, decode

from ..errors import CompileError
from ..program import Program

__all__ = ["Arguments", "CheckError", "rows_in", "walk"]

ARITHMETIC: dict[str, tuple[Callable[[int, int], int], str]] = {  # and the second operand: a field or rows_reg
    "addi": (operator.add, "imm"), "add": (operator.add, "rows_reg"), "sub": (operator.sub, "rows_reg"),
    "shli": (operator.lshift, "rows"), "shri": (operator.rshift, "rows"), "muli": (operator.mul, "x"),
    "min": (min, "rows_reg"),
}
Decide = Callable[[int], tuple[int, int]]  #: layer -> rows that execute attention and MLP, bit t for row t
_STEP_LIMIT = 10_000_000


class CheckError(CompileError):
    """The compiler produced a wrong program; the message names the instruction."""


@dataclass(frozen=True)
class Arguments:
    """Values of the argument registers of one run, and what its routers decide.

    routes : for each layer, in turn where there are fewer, the rows that execute attention and MLP, bit t for row t;
        () if all execute
    """

    position: int
    tokens: int
    head_row: int = 0
    head_rows: int = 0
    routes: tuple[tuple[int, int], ...] = ()

    def decide(self, layer: int) -> tuple[int, int]:
        """The decisions of a layer."""
        return self.routes[layer % len(self.routes)] if self.routes else (-1, -1)


@dataclass
class _Lists:
    """Rows that execute each module, and rows of the last ``route``; -1, every bit, before the first."""

    attention: int = -1
    mlp: int = -1
    present: int = -1

    def mask(self, kind: int) -> int:
        """Rows in a RowList."""
        return {RowList.ALL: -1, RowList.ATTENTION: self.attention, RowList.MLP: self.mlp,
                RowList.MLP_ONLY: self.mlp & ~self.attention, RowList.NOT_MLP: self.present & ~self.mlp,
                RowList.NO_ATTENTION: 0 if self.attention else -1, RowList.NO_MLP: 0 if self.mlp else -1,
                }[RowList(kind)]


def rows_in(fields: dict[str, int]) -> tuple[int, ...]:
    """The rows that an instruction from `walk` runs for, of those it counts."""
    return tuple(row for row in range(fields["rows"]) if fields["mask"] >> row & 1)


def walk(program: Program, arguments: Arguments, tokens: Sequence[int] = (),
         decide: Decide | None = None) -> Iterator[tuple[int, str, Unit, dict[str, int]]]:
    """Dispatched instructions of one run: (pc, mnemonic, unit, fields with registers already added).

    Of fields also ``mask``, the rows of its list (bit t for row t, whatever ``rows`` is); 0 if it is dropped.
    tokens : the token table, 0 where it is shorter; decide : takes the place of ``arguments.routes``
    Raises CheckError if the program leaves its words or does not end.
    """
    decide = decide or arguments.decide
    registers = [0] * 16
    registers[Register.POSITION], registers[Register.TOKENS] = arguments.position, arguments.tokens
    registers[Register.HEAD_ROW], registers[Register.HEAD_ROWS] = arguments.head_row, arguments.head_rows
    decoded = [decode(word) for word in program.words]
    lists, pc = _Lists(), 0
    for _ in range(_STEP_LIMIT):
        if not 0 <= pc < len(decoded):
            raise CheckError(f"the program runs to {pc}, outside its {len(decoded)} instructions")
        item, raw = decoded[pc]
        fields = dict(raw)
        fields["mask"] = lists.mask(raw["list"]) if raw["list"] else -1
        left, right = registers[raw["imm_reg"]], registers[raw["rows_reg"]]
        if item.unit != Unit.CONTROL or item.mnemonic == "route":
            for name in ("imm", "rows", "x"):
                fields[name] += registers[raw[f"{name}_reg"]]
        yield pc, item.mnemonic, item.unit, fields
        target = pc + 1
        match item.mnemonic if fields["mask"] else "":
            case "halt":
                return
            case "branch":
                other = registers[raw["x_reg"]]
                taken = {Condition.EQ: right == other, Condition.NE: right != other, Condition.LT: right < other,
                         Condition.GE: right >= other}[Condition(raw["condition"])]
                target = raw["imm"] if taken else target
            case "token":
                registers[raw["rd"]] = tokens[left] if left < len(tokens) else 0
            case "route":
                present = (1 << fields["rows"]) - 1
                attention, mlp = decide(raw["layer"])
                lists = _Lists(attention & present, mlp & present, present)
            case mnemonic if mnemonic in ARITHMETIC:
                operation, operand = ARITHMETIC[item.mnemonic]
                registers[raw["rd"]] = operation(left, right if operand == "rows_reg" else raw[operand])
        registers[Register.ZERO] = 0
        pc = target
    raise CheckError(f"the program does not end within {_STEP_LIMIT} instructions")
