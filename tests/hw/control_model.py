"""What control does with a program, one instruction at a time: the reference of the control benches."""

from dataclasses import dataclass, field

from skipopu.hw.isa import (
    COMMON,
    CONTROL,
    INSTRUCTIONS,
    MAX_LAYERS,
    REGISTERS,
    Condition,
    IsaError,
    RowList,
    Unit,
    decode,
    encode,
)
from skipopu.hw.registers import FaultCause

__all__ = ["Sent", "Trace", "conflicts", "random_program", "releasable", "run"]


@dataclass
class Sent:
    """A command as a unit receives it."""

    unit: Unit
    pc: int
    reads: int
    writes: int
    opcode: int
    imm: int
    rows: int
    x: int
    mask: int
    body: int


@dataclass
class Trace:
    """Everything observable: the commands in program order, how it ended, the last pc, instructions completed and how
    many of them dropped, (layer, attention, mlp) of each route."""

    commands: list = field(default_factory=list)
    fault: FaultCause = FaultCause.NONE
    fault_pc: int = 0
    pc: int = 0
    count: int = 0
    dropped: int = 0
    routes: list = field(default_factory=list)
    halted: bool = False


def _signed(value, bits=32):
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


def row_lists(attention, mlp, present, width):
    """The rows of each RowList, from the sets of those that execute a module and of the rows of the last route."""
    every = set(range(width))
    return {
        RowList.ALL: every, RowList.ATTENTION: attention, RowList.MLP: mlp,
        RowList.MLP_ONLY: {t for t in mlp if t not in attention}, RowList.NOT_MLP: {t for t in present if t not in mlp},
        RowList.NO_ATTENTION: set() if attention else every, RowList.NO_MLP: set() if mlp else every,
    }


def run(program, arguments, tokens, limit=0, most=20_000, *, width=4, decisions=((0, 0),), forced=None):
    """Trace of ``program`` (words) with r1.. = ``arguments`` and the token table ``tokens``; AssertionError if it takes
    more than ``most`` instructions.

    width : rows of a chunk; decisions : (attention, mlp) that the vector unit says once it has done i commands, in turn
    forced : (attention, mlp) of each layer, in place of the decisions
    """
    trace, pc = Trace(), 0
    every = set(range(width))
    lists = row_lists(every, every, every, width)
    r = [0, *arguments, *[0] * (REGISTERS - 1 - len(arguments))]
    compare = {Condition.EQ: int.__eq__, Condition.NE: int.__ne__, Condition.LT: int.__lt__, Condition.GE: int.__ge__}
    scalar = {
        "addi": lambda v, a, b: v["imm"] + a, "add": lambda v, a, b: a + b, "sub": lambda v, a, b: a - b,
        "shli": lambda v, a, b: a << (v["rows"] & 31), "shri": lambda v, a, b: a >> (v["rows"] & 31),
        "muli": lambda v, a, b: a * v["x"], "min": lambda v, a, b: min(a, b),
    }

    def fail(cause):
        trace.fault, trace.fault_pc = cause, pc
        return trace

    while not limit or trace.count < limit:
        assert trace.count < most, "the program does not end"
        if not 0 <= pc < len(program):
            return fail(FaultCause.FETCH_RANGE)
        place = COMMON["list"]
        choice = program[pc] >> place.lo & place.maximum
        if choice not in lists:
            return fail(FaultCause.ILLEGAL_OPCODE)
        if not lists[choice]:
            trace.pc, trace.count, trace.dropped = pc, trace.count + 1, trace.dropped + 1
            pc += 1
            continue
        try:
            item, v = decode(program[pc])
        except IsaError:
            return fail(FaultCause.ILLEGAL_OPCODE)
        a, b, c = (_signed(r[v[name]]) for name in ("imm_reg", "rows_reg", "x_reg"))
        target, result = pc + 1, None
        rows = (v["rows"] + b) & 0xFFF
        if item.unit != CONTROL:
            trace.commands.append(Sent(item.unit, pc, v["reads"], v["writes"], item.opcode, _signed(v["imm"] + a), rows,
                                       _signed(v["x"] + c, 16), sum(1 << t for t in lists[choice] if t < rows),
                                       program[pc] >> 112))
        elif item.mnemonic == "route":
            vectors = sum(sent.unit == Unit.VECTOR for sent in trace.commands)
            bits = forced[v["layer"]] if forced else decisions[vectors % len(decisions)]
            attention, mlp, present = ({t for t in every if t < rows and word >> t & 1} for word in (*bits, ~0))
            lists = row_lists(attention, mlp, present, width)
            trace.routes.append((v["layer"], *(sum(1 << t for t in part) for part in (attention, mlp))))
        elif item.mnemonic == "branch":
            if compare[Condition(v["condition"])](b, c):
                if not 0 <= v["imm"] < len(program):
                    return fail(FaultCause.FETCH_RANGE)
                target = v["imm"]
        elif item.mnemonic == "token":
            if not 0 <= a < len(tokens):
                return fail(FaultCause.TOKEN_RANGE)
            result = tokens[a]
        elif item.mnemonic != "halt":
            result = scalar[item.mnemonic](v, a, b)
        if result is not None and v["rd"]:
            r[v["rd"]] = result & 0xFFFFFFFF
        trace.pc, trace.count = pc, trace.count + 1
        if item.mnemonic == "halt":
            trace.halted = True
            return trace
        pc = target
    return trace


def conflicts(later, earlier):
    """Must ``later`` wait for ``earlier``, which stands before it in program order?"""
    return later.unit != earlier.unit and bool(earlier.writes & (later.reads | later.writes)
                                               | earlier.reads & later.writes)


def releasable(commands, held):
    """Indices of the commands that start while the unit ``held`` completes nothing (queues without limit)."""
    started, done = set(), set()
    for index, command in enumerate(commands):
        if all(other in done for other, earlier in enumerate(commands[:index]) if conflicts(command, earlier)) and \
                all(other in started for other, earlier in enumerate(commands[:index]) if earlier.unit == command.unit):
            started.add(index)
            if command.unit != held:
                done.add(index)
    return started


def random_masks(generator, resources=4):
    """Reads and writes with a few bits out of ``resources``."""
    reads, writes = (sum(1 << bit for bit in range(resources) if generator.random() < 0.2) for _ in range(2))
    return {"reads": reads, "writes": writes}


def random_command(generator, **fixed):
    """Word of a random instruction of a unit, every field random but those given."""
    item = generator.choice([item for item in INSTRUCTIONS if item.unit != CONTROL])
    values = {name: generator.choice([place.minimum, place.maximum, generator.randint(place.minimum, place.maximum)])
              for name, place in item.fields.items() if name != "opcode"}
    values["list"] = generator.choice([RowList.ALL, *RowList])
    return encode(item.mnemonic, **{**values, **random_masks(generator), **fixed})


def random_program(generator, size, tokens):
    """Words that end in a halt: scalar instructions, forward branches, counted loops, token reads, routes, commands.

    Row lists stand on all but what counts loops. Every register shows up in the commands. r14
    indexes the token table, r15 counts loops.
    """
    words = []
    while len(words) < size:
        kind = generator.choice(["scalar", "scalar", "command", "command", "skip", "loop", "token", "route"])
        listed = {"list": generator.choice([RowList.ALL, *RowList])}
        rd, a, b = generator.randrange(14), generator.randrange(14), generator.randrange(14)
        if kind == "scalar":
            name = generator.choice(["addi", "add", "sub", "shli", "shri", "muli", "min"])
            extra = {"addi": {"imm": generator.choice([-(1 << 31), (1 << 31) - 1, 1, generator.randrange(-999, 999)])},
                     "muli": {"x": generator.randint(-(1 << 15), (1 << 15) - 1)},
                     "shli": {"rows": generator.randrange(32)}, "shri": {"rows": generator.randrange(32)}}.get(name)
            extra = {"rows_reg": b} if extra is None else extra
            words.append(encode(name, rd=rd, imm_reg=a, **extra, **listed))
        elif kind == "command":
            words.append(random_command(generator))
        elif kind == "skip":
            words.append(encode("branch", condition=generator.choice(list(Condition)), rows_reg=a, x_reg=b,
                                imm=len(words) + generator.randint(1, 3), **listed))
            words += [random_command(generator), random_command(generator)]
        elif kind == "loop":
            words.append(encode("addi", rd=15, imm=generator.randint(1, 4)))
            start = len(words)
            words += [random_command(generator) for _ in range(generator.randint(0, 3))]
            words.append(encode("add", rd=rd, imm_reg=a, rows_reg=15, **listed))
            words.append(encode("addi", rd=15, imm_reg=15, imm=-1))
            words.append(encode("branch", condition=Condition.NE, rows_reg=15, imm=start))
        elif kind == "route":
            words.append(encode("route", rows=generator.choice([0, 1, tokens - 1, tokens, tokens, 4095]), **listed,
                                rows_reg=generator.choice([0, 0, b]), layer=generator.randrange(MAX_LAYERS)))
        else:
            words.append(encode("addi", rd=14, imm=generator.randrange(tokens), **listed))
            words.append(encode("token", rd=rd, imm_reg=14, **listed))
    return [*words, encode("halt")]
