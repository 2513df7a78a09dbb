"""Cut a flat design into two by its registers, for a simulation by two threads.

Each half has its own registers and memories, and the logic in front of them. What that logic reads of the other half's
registers are inputs, named alike on both sides; logic that both need is in both. So the halves are evaluated side by
side and exchange registers once a cycle, as in RepCut (Wang and Beamer, ASPLOS 2023).

Works on the RTLIL text of one module after Yosys's ``flatten``, ``proc`` and ``memory_collect``. A net's part of the
hierarchy is told by its name; registers of no part (a delayed reset) are in both halves.
"""

import itertools
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

__all__ = ["EXCHANGED", "HalvesError", "cut"]

#: Ports that the halves exchange: the half that has the register, its clock ("any" if it is not one input), a number.
EXCHANGED = re.compile(r"half([01])_(\w+)_(\d+)")
_ATOM = re.compile(r"""[\\$]\S+(?:\ \[\d+(?::\d+)?\])?  # a wire or bits of it
                       |\d+'[01xzm-]*|[{}]""", re.X)
_SLICE = re.compile(r"(\S+)(?: \[(\d+)(?::(\d+))?\])?")
_WIRE = re.compile(r"  wire (?:width (\d+) )?.*?([\\$]\S+)$")
_OUTPUT_PINS = ("\\Y", "\\Q", "\\RD_DATA")
_AFTER_PORTS = 1_000_000  # ports are numbered; these come after the design's own
_FLIP_FLOPS = ("$dff", "$dffe", "$sdff", "$sdffe", "$sdffce", "$adff", "$adffe")


class HalvesError(RuntimeError):
    """An output, or a memory read without a clock, needs registers of both halves; the message names it."""


@dataclass
class _Cell:
    kind: str
    lines: list[str]

    def value(self, pin):
        return next(line[13 + len(pin):] for line in self.lines if line.startswith(f"    connect {pin} "))

    def parameter(self, name):
        pattern = re.compile(rf"    parameter (?:signed )?\\{name} (.*)")
        return next(found[1] for line in self.lines if (found := pattern.match(line)))

    def connected(self, pin, value):
        """The same with another value at a pin."""
        begin = f"    connect {pin} "
        return _Cell(self.kind, [begin + value if line.startswith(begin) else line for line in self.lines])

    @property
    def held(self):
        """Does it keep something from one cycle to the next?"""
        return self.kind in _FLIP_FLOPS or self.kind == "$mem_v2" and self.parameter("WR_PORTS") != "0"

    @property
    def name_of_state(self):
        """RTLIL's name of what it keeps."""
        if self.kind == "$mem_v2":
            return self.parameter("MEMID").strip('"').replace("\\\\", "\\")
        return next((atom for atom in _ATOM.findall(self.value("\\Q")) if atom[0] in "\\$"), "")

    def outputs(self):
        """Pin, and (width, clock) of each value read from it: one for a register, one per port for a memory."""
        width = int(self.parameter("WIDTH"))
        if self.kind != "$mem_v2":
            return "\\Q", [(width, _clock(self.value("\\CLK")))]
        clocks = [atom for atom in reversed(_ATOM.findall(self.value("\\RD_CLK"))) if atom not in "{}"]
        clocked = [bit == "1" for bit in reversed(self.parameter("RD_CLK_ENABLE").split("'")[-1])]
        plain = len(clocks) == len(clocked)
        return "\\RD_DATA", [(width, _clock(clocks[port]) if used and plain else "any")
                             for port, used in enumerate(clocked)]


@dataclass
class _Design:
    """A module's text by kind of line."""

    name: str
    wires: list[str] = field(default_factory=list)
    connects: list[str] = field(default_factory=list)
    cells: list[_Cell] = field(default_factory=list)
    inits: dict[str, str] = field(default_factory=dict)  # wire: lines of its initial value

    @classmethod
    def parse(cls, text):
        lines = iter(text.split("\n"))
        design, init = None, ""
        for line in lines:
            if line.startswith("module "):
                design = cls(line.split()[1])
            elif line.startswith("  wire "):
                design.wires.append(line)
                if init:
                    design.inits[line.split()[-1]], init = init, ""
            elif line.startswith("  attribute \\init "):
                init = line
            elif line.startswith("  connect "):
                design.connects.append(line)
            elif line.startswith("  cell "):
                body = [line]
                while (line := next(lines)) != "  end":
                    body.append(line)
                kind = body[0].split()[1]
                if kind != "$scopeinfo":
                    design.cells.append(_Cell(kind, [*body, "  end"]))
        return design

    def rename(self, old, new):
        """Call a wire ``new`` wherever it occurs."""
        pattern = re.compile(rf"{re.escape(old)}(?!\S)")

        def changed(lines):
            return [pattern.sub(lambda _: new, line) if old in line else line for line in lines]

        self.wires, self.connects = changed(self.wires), changed(self.connects)
        self.inits = {new if wire == old else wire: init for wire, init in self.inits.items()}
        self.cells = [_Cell(cell.kind, changed(cell.lines)) if any(old in line for line in cell.lines) else cell
                      for cell in self.cells]

    def text(self):
        wires = (f"{self.inits[name]}\n{line}" if (name := line.split()[-1]) in self.inits else line
                 for line in self.wires)
        body = (line for cell in self.cells for line in cell.lines)
        return "\n".join([f"module {self.name}", *wires, *body, *self.connects, "end", ""])


def _path(name):
    """A name of RTLIL as names of submodules with dots, or "" for one that tells nothing."""
    if name.startswith("$flatten"):
        return name[len("$flatten"):].replace("\\", "")
    return name[1:] if name.startswith("\\") else ""


def _clock(text):
    return text[1:] if re.fullmatch(r"\\\w+", text) else "any"


def _is_exchanged(name):
    return EXCHANGED.fullmatch(name, 1) is not None


def _ports(cells, owners):
    """For each cell (port, width) of what the other half may read of it; none if both halves have it."""
    number = itertools.count()
    return [[] if owner is None else [(f"\\half{owner}_{clock}_{next(number)}", width)
                                      for width, clock in cell.outputs()[1]]
            for cell, owner in zip(cells, owners, strict=True)]


def _half(design, half, owners, ports):
    """All of the design, with the other half's registers as inputs and its own as outputs."""
    out = _Design(design.name, list(design.wires), list(design.connects), inits=dict(design.inits))
    number = itertools.count(_AFTER_PORTS)
    for cell, owner, values in zip(design.cells, owners, ports, strict=True):
        if owner is None:
            out.cells.append(cell)
            continue
        pin, _ = cell.outputs()
        value, joined = cell.value(pin), "{ " + " ".join(port for port, _ in reversed(values)) + " }"
        kind = "output" if owner == half else "input"
        out.wires += [f"  wire width {width} {kind} {next(number)} {port}" for port, width in values]
        if owner == half:
            whole = f"{values[0][0]}_all"
            out.wires.append(f"  wire width {sum(width for _, width in values)} {whole}")
            out.connects += [f"  connect {value} {whole}", f"  connect {joined} {whole}"]
            out.cells.append(cell.connected(pin, whole))
        else:
            out.connects.append(f"  connect {value} {joined}")
            for atom in _ATOM.findall(value):
                out.inits.pop(atom.split()[0], None)
    return out


def _inputs_used(design, half):
    """The other half's ports that something reads."""
    pattern = re.compile(rf"\\half{1 - half}_\w+")
    lines = (line for cell in design.cells for line in cell.lines)
    return {name for line in (*lines, *design.connects) for name in pattern.findall(line)}


class _Cones:
    """Which inputs does a net depend on without a register between?"""

    def __init__(self, design):
        self.cells = design.cells
        self.widths = {found[2]: int(found[1] or 1) for line in design.wires if (found := _WIRE.match(line))}
        self.drivers = {}  # wire: (low, high, what drives it: a cell's index, or (atoms, position of low in them))
        for index, cell in enumerate(self.cells):
            for line in cell.lines:
                if line.startswith("    connect ") and line.split(" ", 6)[5] in _OUTPUT_PINS:
                    for wire, low, high, _ in self.atoms(line.split(" ", 6)[6]):
                        self.drivers.setdefault(wire, []).append((low, high, index))
        for line in design.connects:
            left, right = self.sides(line[len("  connect "):])
            for wire, low, high, at in self.atoms(left):
                self.drivers.setdefault(wire, []).append((low, high, (right, at)))

    @staticmethod
    def sides(text):
        depth = end = 0
        for found in _ATOM.finditer(text):
            depth += (found[0] == "{") - (found[0] == "}")
            if not depth:
                end = found.end()
                break
        return text[:end], text[end + 1:]

    def atoms(self, text):
        """(wire, lowest bit, highest bit, position in ``text`` from its lowest bit); constants are left out."""
        position = 0
        for atom in reversed(_ATOM.findall(text)):
            if atom in "{}":
                continue
            if atom[0] not in "\\$":
                position += int(atom.split("'")[0])
                continue
            wire, high, low = _SLICE.match(atom).groups()
            low, high = (0, self.widths[wire] - 1) if high is None else (int(low or high), int(high))
            yield wire, low, high, position
            position += high - low + 1

    def foreign(self, wire, low, high):
        """Do bits ``low`` to ``high`` of ``wire`` depend on a register of the other half?"""
        return any(map(_is_exchanged, self._inputs(wire, low, high)))

    def _inputs(self, wire, low, high):
        """Names of wires without a driver, behind the bits."""
        found, known, todo = set(), set(), [(wire, low, high)]
        while todo:
            wire, low, high = item = todo.pop()
            if item in known:
                continue
            known.add(item)
            drivers = self.drivers.get(wire)
            if drivers is None:
                found.add(wire)
            for first, last, driver in drivers or ():
                if last < low or first > high:
                    continue
                if isinstance(driver, int):
                    if driver not in known:
                        known.add(driver)
                        todo += [atom[:3] for pin in self.read(self.cells[driver]) for atom in self.atoms(pin)]
                    continue
                text, at = driver
                begin, end = at + max(low, first) - first, at + min(high, last) - first
                for name, bottom, top, position in self.atoms(text):
                    if position <= end and position + top - bottom >= begin:
                        todo.append((name, bottom + max(begin - position, 0), min(top, bottom + end - position)))
        return found

    @staticmethod
    def read(cell):
        """Values that its outputs follow within the cycle."""
        if cell.kind in _FLIP_FLOPS:
            return []
        if cell.kind == "$mem_v2":
            clocked = cell.parameter("RD_CLK_ENABLE").split("'")[-1]
            return [cell.value("\\RD_ADDR")] if "0" in clocked else []
        return [line.split(" ", 6)[6] for line in cell.lines
                if line.startswith("    connect ") and line.split(" ", 6)[5] not in _OUTPUT_PINS]


def _outputs(design):
    """(wire, width) of the top's own outputs."""
    return [(found[2], int(found[1] or 1)) for line in design.wires
            if " output " in line and (found := _WIRE.match(line)) and not _is_exchanged(found[2])]


def _own_outputs(design, cones):
    """Dict of output to the bits of it that no register of the other half has a part in."""
    return {wire: [bit for bit in range(width) if not cones.foreign(wire, bit, bit)]
            if cones.foreign(wire, 0, width - 1) else list(range(width)) for wire, width in _outputs(design)}


def cut(text, second, run):
    """RTLIL of the two halves of a flat module, which keep its name.

    text : RTLIL; second : beginnings of the names (paths with dots) of what goes to the second half, all else goes to
        the first
    run : (passes, RTLIL) to RTLIL, Yosys
    In each half, bits of outputs that need registers of the other are 0; every bit is right in one of them.
    Raises HalvesError if an output's bit needs registers of both, or a memory that is read without a clock.
    """
    design = _Design.parse(text)

    def owner(cell):
        path = _path(cell.name_of_state) if cell.held else ""
        return int(path.startswith(tuple(second))) if "." in path else None

    owners = [owner(cell) for cell in design.cells]
    ports = _ports(design.cells, owners)
    texts = [_half(design, half, owners, ports).text() for half in (0, 1)]
    with ThreadPoolExecutor() as pool:  # `run` waits for another process
        halves = [_Design.parse(text) for text in pool.map(lambda text: run(["opt_clean -purge"], text), texts)]
    wanted = [_inputs_used(design, half) for half, design in enumerate(halves)]
    cones = [_Cones(design) for design in halves]
    for cell, values in zip(design.cells, ports, strict=True):
        for port, width in values:
            if "_any_" in port and any(port in names and cone.foreign(port, 0, width - 1)
                                       for names, cone in zip(wanted, reversed(cones), strict=True)):
                raise HalvesError(f"expected an address from its own half's registers for what is read without a clock "
                                  f"of memory {_path(cell.name_of_state)}: move it to the other half")
    own = [_own_outputs(design, cone) for design, cone in zip(halves, cones)]
    for wire, width in _outputs(design):
        for bit in range(width):
            if not any(bit in bits[wire] for bits in own):
                raise HalvesError(f"expected output {wire[1:]}[{bit}] to depend on one half's registers, not on both: "
                                  f"move one of them, or give each half a bit of its own")
    return [_trimmed(design, wanted[0] | wanted[1], bits).text() for design, bits in zip(halves, own)]


def _trimmed(design, exchanged, own):
    """The half without ports that nobody needs, and zeros for ``own`` outputs' bits that only the other half knows."""
    out = _Design(design.name, [], list(design.connects), design.cells, design.inits)
    for line in design.wires:
        name = line.split()[-1]
        if _is_exchanged(name) and name not in exchanged:
            line = re.sub(r" (in|out)put \d+", "", line)
        out.wires.append(line)
    for name, width in _outputs(design):
        if len(own[name]) < width:
            out.rename(name, f"{name}_of_both")
            port = next(line for line in design.wires if line.split()[-1] == name)
            out.wires = [re.sub(r" output \d+", "", line) if line.endswith("_of_both") else line for line in out.wires]
            out.wires.append(port)
            bits = (f"{name}_of_both [{bit}]" if bit in own[name] else "1'0" for bit in reversed(range(width)))
            out.connects.append(f"  connect {name} {{ {' '.join(bits)} }}")
    return out
