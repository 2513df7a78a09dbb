"""The instruction set: declared once, everything else derives from it.

An instruction is one 256-bit little-endian word. Fields common to all instructions stand at fixed places (`HEADER`),
so that control resolves registers and hazards without knowing the opcode:

* ``imm + r[imm_reg]``, ``rows + r[rows_reg]``, ``x + r[x_reg]`` are formed for every instruction before it is sent to
  its unit; register 0 reads as zero.
* ``reads`` and ``writes`` are sets of `Resource`; an instruction starts when every earlier instruction (of another
  unit) that writes what it reads or writes, or reads what it writes, has completed. Units are in order in themselves.
* ``list`` (`RowList`) says for which rows of the chunk an instruction runs: a loop over t takes only the rows in the
  list, each at its own place. An instruction whose list is empty is dropped at dispatch, whatever it is, in one cycle:
  nothing is fetched or computed for it. ``route`` decides the lists.

Vector instructions walk the loops ``for h < heads: for n: for g < groups: for t < rows in list: for c`` with
``beat = n * columns / V + c < beats``; ``off = t * row_stride + g * group_stride + h * head_stride + beat``.
All of their addresses and strides count vector beats (V elements), in MBUF and KVOUT too: beat b of MBUF is row
b div (lanes / V), beat b of KVOUT is row b div (beat_elements / V). MATMUL counts rows of MBUF.
"""

from dataclasses import dataclass, field
from enum import IntEnum, IntFlag

__all__ = [
    "COMMON", "CONTROL", "Condition", "Destination", "Field", "HEADER", "INSTRUCTIONS", "ISA_VERSION", "Instruction",
    "IsaError", "KvFormat", "MAX_LAYERS", "MatmulMode", "OPCODES", "REGISTERS", "ROUTER_ROWS_AT", "Register",
    "Resource", "RowList", "RowScale", "Unit", "WORD_BITS", "assemble", "decode", "disassemble", "encode", "markdown",
]

ISA_VERSION = 4
WORD_BITS = 256
REGISTERS = 16
MAX_LAYERS = 64  #: layers that route tables distinguish, and the pointers of KV records at most
ROUTER_ROWS_AT = 0x8000  #: ABUF rows from here on are rows of the router buffer


class IsaError(ValueError):
    """A field out of range, an unknown mnemonic or an illegal word."""


class Unit(IntEnum):
    """Who executes an instruction. CONTROL executes at dispatch, the others from their queues."""

    LOAD = 0
    COMPUTE = 1
    VECTOR = 2
    STORE = 3
    CONTROL = 4


class Resource(IntFlag):
    """What hazards are tracked on: named by the compiler, not by the hardware."""

    KVMEM = 1 << 0  #: KV records in memory
    X = 1 << 1  #: residual stream (ABUF)
    SCORES = 1 << 2  #: attention scores (ABUF)
    OUT = 1 << 3  #: attention output accumulators (ABUF)
    GAIN0 = 1 << 4  #: norm gains (ABUF)
    GAIN1 = 1 << 5
    ROPE = 1 << 6  #: rotation tables (ABUF)
    MX = 1 << 7  #: aligned normalised input (MBUF)
    MQ = 1 << 8  #: aligned queries (MBUF)
    MP = 1 << 9  #: aligned probabilities (MBUF)
    MO = 1 << 10  #: aligned attention output (MBUF)
    MH = 1 << 11  #: aligned MLP hidden vector (MBUF)
    KVOUT = 1 << 12  #: new K and V waiting to be written
    LOGITS = 1 << 13  #: logits in memory
    KVTILE = 1 << 14  #: a KV tile in the KV buffer
    SPARE = 1 << 15


class Register(IntEnum):
    """Scalar registers by convention; those marked argument are preset from CSRs at start."""

    ZERO = 0
    POSITION = 1  #: argument: position of the chunk's first token
    TOKENS = 2  #: argument: tokens in the chunk
    HEAD_ROW = 3  #: argument: first row for which logits are computed
    HEAD_ROWS = 4  #: argument: rows for which logits are computed, 0 skips the head
    ARG4 = 5
    ARG5 = 6
    ARG6 = 7
    T0 = 8
    T1 = 9
    T2 = 10
    T3 = 11
    T4 = 12
    T5 = 13
    T6 = 14
    T7 = 15


class RowList(IntEnum):
    """For which rows of the chunk an instruction runs. Before the first ``route`` of a run every row executes."""

    ALL = 0
    ATTENTION = 1  #: tokens that execute the attention of the layer
    MLP = 2  #: tokens that execute the MLP of the layer
    MLP_ONLY = 3  #: tokens that execute the MLP but not the attention
    NOT_MLP = 4  #: tokens that skip the MLP
    NO_ATTENTION = 5  #: every row if no token executes the attention, otherwise none
    NO_MLP = 6  #: every row if no token executes the MLP, otherwise none


class Condition(IntEnum):
    """Branch conditions on signed 32-bit registers."""

    EQ = 0
    NE = 1
    LT = 2
    GE = 3


class MatmulMode(IntEnum):
    """What the tile operand is and how it is scaled."""

    W4 = 0  #: signed codes, FP16 scale per column and block
    W4M = 1  #: codes stored minus 8, FP16 scale and minimum: code * scale + minimum, code 0..15
    W8 = 2  #: two 4-bit planes of an int8 code (high, then low), one FP16 scale
    QK = 3  #: tile from the KV buffer, columns are tokens, lanes are dimensions
    PV = 4  #: tile from the KV buffer, lanes are tokens, columns are dimensions


class KvFormat(IntEnum):
    """How a KV record lies in memory. Narrow ones exist where the configuration has `kv_narrow`; with n = heads *
    head_beats and E FP16 elements to a port beat they are ceil(heads / E) beats of exponents (for each head a byte of
    its key and a byte of its value), n beats of high planes (8 bits of every element, all keys, then all values),
    and for B12 ceil(n / 2) beats of low planes (4 bits of every element)."""

    FP16 = 0  #: elements in FP16, all keys, then all values
    B12 = 1  #: sign and 11 bits, one exponent for each head's key and one for its value
    B8 = 2  #: sign and 7 bits, likewise


class RowScale(IntEnum):
    """Scalar that multiplies every value of a row before anything else."""

    ONE = 0
    RSQRT = 1  #: 1 / sqrt(sum of squares[t] * inv_n + eps)
    RECIPROCAL = 2  #: 1 / softmax sum[(beat div wrap) * tokens + t]


class Destination(IntEnum):
    """Where VROPE writes its rows."""

    MBUF = 0  #: aligned
    KVOUT = 1  #: FP16


@dataclass(frozen=True)
class Field:
    """One bit field; ``lo`` is set when the instruction is laid out."""

    name: str
    bits: int
    doc: str = ""
    signed: bool = False
    lo: int = -1

    @property
    def minimum(self):
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def maximum(self):
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1


def _place(fields, lo):
    placed = []
    for item in fields:
        placed.append(Field(item.name, item.bits, item.doc, item.signed, lo))
        lo += item.bits
    if lo > WORD_BITS - 3:
        raise IsaError(f"fields take {lo} bits, the word has {WORD_BITS - 3} and its list")
    return tuple(placed)


HEADER = _place(
    [
        Field("opcode", 8, "which instruction"),
        Field("reads", 16, "resources read"),
        Field("writes", 16, "resources written"),
        Field("imm", 32, "immediate", signed=True),
        Field("imm_reg", 4, "register added to imm"),
        Field("rows", 12, "row count"),
        Field("rows_reg", 4, "register added to rows"),
        Field("x", 16, "second immediate", signed=True),
        Field("x_reg", 4, "register added to x"),
    ],
    0,
)
BODY = HEADER[-1].lo + HEADER[-1].bits  #: first bit of an instruction's own fields
_LIST = Field("list", 3, "RowList", lo=WORD_BITS - 3)
HEADER = (*HEADER, _LIST)
COMMON = {item.name: item for item in HEADER}


@dataclass(frozen=True)
class Instruction:
    """One instruction: opcode, unit, the header fields it uses (with their meaning here) and its own fields."""

    mnemonic: str
    opcode: int
    unit: Unit
    doc: str
    effect: str
    uses: dict = field(default_factory=dict)  # header field -> meaning
    body: tuple = ()

    @property
    def fields(self):
        """All fields by name: header first, then the body."""
        return {item.name: item for item in (*HEADER, *self.body)}


CONTROL = Unit.CONTROL
_RD = Field("rd", 4, "destination register")
_VECTOR_BODY = [
    Field("heads", 8, "count of loop h"),
    Field("groups", 8, "count of loop g"),
    Field("beats", 16, "vector beats of one row, over all n"),
    Field("row_stride", 14, "beats per t"),
    Field("group_stride", 14, "beats per g"),
    Field("head_stride", 16, "beats per h"),
    Field("table", 16, "ABUF row of the table operand"),
    Field("table_stride", 10, "table rows per t"),
    Field("wrap", 12, "beats after which the table index (and the softmax state of RECIPROCAL) wraps"),
    Field("scale", 2, "RowScale"),
    Field("dest", 2, "Destination"),
    Field("vector", 16, "beats of one aligned vector (one maximum exponent each)"),
    Field("route", 1, "vnorm and vadd: score the rows for the routers, whose weights start at row x of their buffer"),
]
_VECTOR_USES = {"imm": "low half: ABUF base `src`, high half: destination base `dst`", "rows": "count of loop t"}


def _vector(mnemonic, opcode, doc, effect, **uses):
    return Instruction(mnemonic, opcode, Unit.VECTOR, doc, effect, {**_VECTOR_USES, **uses}, _place(_VECTOR_BODY, BODY))


INSTRUCTIONS = (
    Instruction("halt", 0x01, CONTROL, "Wait until every unit is idle, set done.", "stop"),
    Instruction("addi", 0x02, CONTROL, "Add an immediate.", "r[rd] = imm + r[imm_reg]", {"imm": "", "imm_reg": ""},
                _place([_RD], BODY)),
    Instruction("add", 0x03, CONTROL, "Add registers.", "r[rd] = r[imm_reg] + r[rows_reg]",
                {"imm_reg": "", "rows_reg": ""}, _place([_RD], BODY)),
    Instruction("sub", 0x04, CONTROL, "Subtract registers.", "r[rd] = r[imm_reg] - r[rows_reg]",
                {"imm_reg": "", "rows_reg": ""}, _place([_RD], BODY)),
    Instruction("shli", 0x05, CONTROL, "Shift left.", "r[rd] = r[imm_reg] << rows (rows 0..31)",
                {"imm_reg": "", "rows": "shift"}, _place([_RD], BODY)),
    Instruction("shri", 0x06, CONTROL, "Shift right, arithmetic.", "r[rd] = r[imm_reg] >> rows (rows 0..31)",
                {"imm_reg": "", "rows": "shift"}, _place([_RD], BODY)),
    Instruction("muli", 0x07, CONTROL, "Multiply by a signed 16-bit immediate.", "r[rd] = r[imm_reg] * x",
                {"imm_reg": "", "x": "factor"}, _place([_RD], BODY)),
    Instruction("min", 0x08, CONTROL, "Smaller of two registers (signed).", "r[rd] = min(r[imm_reg], r[rows_reg])",
                {"imm_reg": "", "rows_reg": ""}, _place([_RD], BODY)),
    Instruction("token", 0x09, CONTROL, "Read the token table.", "r[rd] = token_table[r[imm_reg]]",
                {"imm_reg": "index register"}, _place([_RD], BODY)),
    Instruction("branch", 0x0A, CONTROL, "Conditional branch.",
                "if r[rows_reg] <condition> r[x_reg]: pc = imm (instruction index)",
                {"imm": "target", "rows_reg": "left", "x_reg": "right"},
                _place([Field("condition", 2, "Condition")], BODY)),
    Instruction("route", 0x0B, CONTROL, "Take the routers' decisions as the row lists of a layer.",
                "wait until no vector instruction with `route` is outstanding; for both modules: routes[layer] = bits "
                "of the rows t < rows whose score is not negative, or what the host forces (ROUTE_FORCE)",
                {"rows": "rows of the chunk"}, _place([Field("layer", 6, "layer")], BODY)),

    Instruction("loadw", 0x10, Unit.LOAD, "Stream weights into the array.",
                "for i < count: weight_stream <- memory[imm + r[imm_reg] + i] (superbeats)",
                {"imm": "superbeat address"}, _place([Field("count", 24, "superbeats")], BODY)),
    Instruction("loada", 0x11, Unit.LOAD, "Load FP32 rows into the activation buffer.",
                "for r < rows: abuf[x + r*dst_stride + i] = row i of superbeats imm + r*count .. + count, i < beats; "
                "rows from 0x8000 on are those of the router buffer: per lane two FP16, attention in the low half",
                {"imm": "superbeat address", "rows": "rows", "x": "ABUF row"},
                _place([Field("count", 16, "superbeats per row"), Field("beats", 16, "ABUF rows written per row"),
                        Field("dst_stride", 16, "ABUF rows per row")], BODY)),
    Instruction("loadkv", 0x12, Unit.LOAD, "Load one KV tile into the next KV buffer slot.",
                "for i < min(rows, tile_tokens): slot[i] = record of position x + i, from port p = i mod P: superbeat "
                "imm + (i div P)*record; with reuse imm + pointer[x + i]*record, where pointer[q] is the place that "
                "storekv gave the record of the highest layer up to `layer` which wrote position q. The rest of the "
                "slot is undefined: vscore has to mask it. What the history buffer holds is not read from memory",
                {"imm": "superbeat address", "rows": "positions written from x on",
                 "x": "position of the tile's first token, a multiple of P"},
                _place([Field("heads", 8, "KV heads"), Field("head_beats", 8, "port beats of one head"),
                        Field("record", 16, "port beats of one record"), Field("reuse", 1, "follow the pointers"),
                        Field("layer", 6, "layer"), Field("final", 1, "no later layer: nothing is retained"),
                        Field("buffer", 16, "records per port that the history buffer may hold, 0 for none"),
                        Field("format", 2, "KvFormat")], BODY)),

    Instruction("matmul", 0x20, Unit.COMPUTE,
                "Multiply rows of MBUF by the tile stream, deliver rows to the vector unit.",
                "for h: for n: acc = 0; for k: for g: for t in list: acc[g,t] += tile(h,n,k) . mbuf[x + t*row_stride + "
                "g*group_stride + h*head_stride + k]; deliver acc[g,t] (first `beats` of all n)",
                {"rows": "count of loop t", "x": "MBUF row"},
                _place([Field("mode", 3, "MatmulMode"), Field("heads", 8, "count of loop h"),
                        Field("groups", 8, "count of loop g"), Field("n_tiles", 14, "count of loop n"),
                        Field("k_tiles", 12, "count of loop k"), Field("row_stride", 14, "MBUF rows per t"),
                        Field("group_stride", 14, "MBUF rows per g"), Field("head_stride", 14, "MBUF rows per h"),
                        Field("scale_exponent", 7, "largest exponent field among the scales (weights)", signed=True),
                        Field("beats", 16, "vector beats delivered per row, over all n"),
                        Field("group", 3, "log2 of the blocks that share a scale (weights)")], BODY)),

    Instruction("dropw", 0x21, Unit.COMPUTE, "Take superbeats from the weight stream and forget them.",
                "for i < count: weight_stream -> nothing", {}, _place([Field("count", 24, "superbeats")], BODY)),

    Instruction("vset", 0x30, Unit.VECTOR, "Set the constants of the norm.", "inv_n = float(imm); eps = float(eps)",
                {"imm": "FP32 bits of 1/n"}, _place([Field("eps", 32, "FP32 bits of epsilon")], BODY)),
    Instruction("vinit", 0x3A, Unit.VECTOR, "Forget all softmax states.", "for every state: m = -32768, l = 0"),
    Instruction("vbias", 0x3B, Unit.VECTOR, "Set the biases of the routers.", "bias = (imm, mlp) * 2^-24",
                {"imm": "of the attention, signed, units of 2^-24"},
                _place([Field("mlp", 32, "of the MLP, signed, units of 2^-24", signed=True)], BODY)),
    _vector("vnorm", 0x31, "Gain and align a row of the residual stream; sum its squares.",
            "v = abuf[src+off]; sumsq[t] += v*v; mbuf[dst+off] = align(v * table[beat]); "
            "with route: score[t] = bias + sum v * router[x + beat], for both modules", x="row of the router buffer"),
    _vector("vadd", 0x32, "Residual add fused with the next norm.",
            "v = stream*s + abuf[src+off]; abuf[src+off] = v; sumsq[t] += v*v; mbuf[dst+off] = align(v * table[beat]); "
            "with route: score[t] = bias + sum v * router[x + beat], for both modules", x="row of the router buffer"),
    _vector("vrope", 0x33, "Scale, rotate adjacent pairs, write queries or keys. wrap 0: no rotation (values).",
            "v = stream*s; v = v*C[t, beat mod wrap] + swap(v)*S[t, beat mod wrap]; dest[dst+off] = v"),
    _vector("vswiglu", 0x34, "SiLU(gate) * up; even beats are gate, odd beats up.",
            "g, u = stream beats 2i, 2i+1, scaled; mbuf[dst + off(i)] = align(g*u*sigmoid(g))"),
    _vector("vscore", 0x35, "Mask scores, update the running maximum.",
            "s = stream, or lowest if n*columns + column > x + t; abuf[src+off] = s; m' = max(m, ceil(max s)); "
            "alpha = m' - m; state index (h*groups + g)*tokens + t", x="last column allowed for t = 0"),
    _vector("vprob", 0x36, "Probabilities of one KV tile, running sum.",
            "p = exp2(abuf[src+off] - m); l = (l >> alpha) + sum p; mbuf[dst+off] = align(p * 2^(V exponent - 25))"),
    _vector("vmerge", 0x37, "Add P V to the running attention output.",
            "abuf[src+off] = stream + (alpha == 127 ? 0 : abuf[src+off] * 2^-alpha)"),
    _vector("vscale", 0x38, "Scale rows of the activation buffer and align them.",
            "mbuf[dst+off] = align(abuf[src+off]*s)"),
    _vector("vlogits", 0x39, "Scale, remember the largest, send to the store unit.",
            "v = stream*s; argmax over indices < imm in the last row (lowest index wins); store_stream <- v",
            imm="number of logits that count", x="first row of the row scale: row t takes the scale of row x + t"),

    Instruction("storekv", 0x40, Unit.STORE, "Write new KV records to memory.",
                "for t < rows in list: position = x + t; port = position mod P; place = position div P; with reuse "
                "place = the next free one of the port, noted as pointer[position] of the layer (position 0 in layer 0 "
                "begins anew: all places free); memory[port][imm + place*record ..] = kvout[t*size ..] in the format, "
                "size = record for FP16, otherwise 2*heads*head_beats",
                {"imm": "superbeat address", "rows": "tokens", "x": "position of the first token"},
                _place([Field("record", 16, "port beats of one record"), Field("layer", 6, "layer"),
                        Field("reuse", 1, "allocate"),
                        Field("places", 16, "records per port that memory holds (reuse)"),
                        Field("format", 2, "KvFormat"),
                        Field("heads", 8, "KV heads, for formats other than FP16"),
                        Field("head_beats", 8, "rows of KVOUT of one head, likewise")], BODY)),
    Instruction("storel", 0x41, Unit.STORE, "Write logits to memory.",
                "for i < rows*count: memory[imm + i] = superbeat of store_stream (rows of vlogits packed without gaps)",
                {"imm": "superbeat address", "rows": "rows"}, _place([Field("count", 24, "superbeats per row")], BODY)),
)

OPCODES = {item.opcode: item for item in INSTRUCTIONS}
_BY_NAME = {item.mnemonic: item for item in INSTRUCTIONS}

_ENUMS = {"mode": MatmulMode, "scale": RowScale, "dest": Destination, "list": RowList, "condition": Condition,
          "format": KvFormat, "reads": Resource, "writes": Resource, "imm_reg": Register, "rows_reg": Register,
          "x_reg": Register, "rd": Register}


def encode(mnemonic, **values):
    """The 256-bit word (int) of one instruction; IsaError names the field and its limits."""
    if mnemonic not in _BY_NAME:
        raise IsaError(f"unknown instruction {mnemonic!r}; known: {', '.join(_BY_NAME)}")
    item = _BY_NAME[mnemonic]
    word = item.opcode
    fields = item.fields
    for name, value in values.items():
        if name not in fields or name == "opcode":
            raise IsaError(f"{mnemonic} has no field {name!r}; it has: {', '.join(fields)}")
        place = fields[name]
        value = int(value)
        if not place.minimum <= value <= place.maximum:
            raise IsaError(f"{mnemonic}.{name} must be {place.minimum}..{place.maximum}, not {value}")
        word |= (value & ((1 << place.bits) - 1)) << place.lo
    return word


def decode(word):
    """(Instruction, {field: value}) of a 256-bit word; IsaError for an unknown opcode."""
    opcode = word & 0xFF
    if opcode not in OPCODES:
        raise IsaError(f"illegal opcode {opcode:#04x}")
    item = OPCODES[opcode]
    values = {}
    for name, place in item.fields.items():
        if name == "opcode":
            continue
        value = (word >> place.lo) & ((1 << place.bits) - 1)
        if place.signed and value >> (place.bits - 1):
            value -= 1 << place.bits
        values[name] = value
    return item, values


def _text(name, value):
    kind = _ENUMS.get(name)
    if kind is Resource:
        return "|".join(flag.name for flag in Resource if flag & value) or "-"
    if kind is Register:
        return f"r{value}"
    if kind is not None and value in kind._value2member_map_:
        return kind(value).name
    return str(value)


def disassemble(word):
    """One line of text: mnemonic and every field that is not zero; `assemble` reads it back."""
    try:
        item, values = decode(word)
    except IsaError:
        return f".word {word:#066x}"
    parts = [f"{name}={_text(name, value)}" for name, value in values.items() if value]
    return " ".join([item.mnemonic, *parts])


def assemble(line):
    """The word of one disassembled line (comments start with #); IsaError says what is wrong."""
    mnemonic, *parts = line.split("#")[0].split()
    if mnemonic == ".word":
        return int(parts[0], 0)
    values = {}
    for part in parts:
        name, _, text = part.partition("=")
        kind = _ENUMS.get(name)
        try:
            if kind is Resource:
                values[name] = 0 if text == "-" else sum(Resource[flag] for flag in text.split("|"))
            elif kind is Register:
                values[name] = int(text.removeprefix("r"))
            elif kind is not None and text in kind.__members__:
                values[name] = kind[text]
            else:
                values[name] = int(text, 0)
        except (KeyError, ValueError):
            raise IsaError(f"{mnemonic}.{name}: {text!r} is not a value of this field") from None
    return encode(mnemonic, **values)


def markdown():
    """The ISA page (docs/isa.md)."""
    lines = ["# Instruction set", "", "Generated from `hw/isa.py` by `make docs`; do not edit.", "",
             (__doc__ or "").strip(), "", f"Version {ISA_VERSION}, {WORD_BITS}-bit words.", "", "## Common fields", "",
             "| field | bits | range | meaning |", "|---|---|---|---|"]
    lines += [f"| {f.name} | {f.lo + f.bits - 1}:{f.lo} | {f.minimum}..{f.maximum} | {f.doc} |" for f in HEADER]
    for unit in Unit:
        lines += ["", f"## {unit.name} unit", ""]
        for item in (i for i in INSTRUCTIONS if i.unit == unit):
            lines += [f"### `{item.mnemonic}` (opcode {item.opcode:#04x})", "", item.doc, ""]
            lines += ["```", item.effect, "```", ""]
            rows = [(COMMON[name], text or COMMON[name].doc) for name, text in item.uses.items()]
            rows += [(f, f.doc) for f in item.body]
            if rows:
                lines += ["| field | bits | range | meaning |", "|---|---|---|---|"]
                lines += [f"| {f.name} | {f.lo + f.bits - 1}:{f.lo} | {f.minimum}..{f.maximum} | {doc} |"
                          for f, doc in rows]
                lines += [""]
    for kind in (Resource, Register, RowList, Condition, MatmulMode, KvFormat, RowScale, Destination):
        lines += ["", f"## {kind.__name__}", "", (kind.__doc__ or "").strip(), ""]
        lines += [f"- `{member.name}` = {int(member)}" for member in kind]
    return "\n".join(lines) + "\n"
