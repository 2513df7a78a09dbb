"""What a component costs on a device: synthesis by Yosys, counted per kind of resource.

Counts are Yosys's estimate after mapping, before placement: no timing, and no two small LUTs in one LUT6. Everything is
flattened but modules that occur several times in a design: those are synthesised once, with their ports as
they are, and counted as often as they occur.
"""

import hashlib
import json
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, fields
from fractions import Fraction
from importlib.metadata import version
from math import ceil
from pathlib import Path

from skipopu.hw.verilog import run_yosys, to_rtlil
from skipopu.sim.cache import cached_text

__all__ = ["TARGETS", "Resources", "SynthesisError", "Target", "cells_of", "resources", "share_modules", "synthesise",
           "target"]

_TOP = "synth_top"
_REPEATED = 4  # instances from which a module is synthesised once
_WORTH = 400  # lines of RTLIL from which a module is worth it; smaller ones are better optimised where they are used

# Yosys's library for UltraScale offers a cell of 65,536 rows, which nothing maps, to memories with one address for both
# ports and more than 256 rows. They get the cell that exists before that library is asked.
_ONE_ADDRESS = """ram distributed $__XILINX_LUTRAM_SP_ {
\tcost 16;
\twidthscale;
\toption "ABITS" 9 {
\t\tabits 9;
\t\twidths 1 global;
\t}
\tinit any;
\tport arsw "RW" {
\t\tclock posedge;
\t}
}
"""
_ONE_ADDRESS_SELECTED = "t:$mem_v2 r:RD_PORTS=1 %i r:WR_PORTS=1 %i r:RD_CLK_ENABLE=1'0 %i r:SIZE>256 %i"

_MODULE = re.compile(r"^((?:attribute [^\n]*\n)*)module (\\\S+)\n(.*?)^end\n", re.M | re.S)
_CELL = re.compile(r"^  cell (\\\S+) ", re.M)
_STATEMENT = re.compile(r"(?:^  attribute [^\n]*\n)*^  (?:(?:cell|process) .*?^  end\n|[^\n]*\n)", re.M | re.S)
_PORT = re.compile(r"^(  wire .*(?:input|output|inout)) \d+ ", re.M)
_NUMBERED = re.compile(r"\\port\$\d+\$\d+")  # what Amaranth calls an enable or a reset that enters from outside


class SynthesisError(ValueError):
    """A block or target that does not exist, or a netlist with cells that nobody counts."""


@dataclass(frozen=True)
class Resources:
    """Counts of one kind of device each."""

    luts: int = 0  #: LUT6 (LUT4 on ECP5) of logic, of distributed memory and of shift registers
    ffs: int = 0
    carries: int = 0  #: carry cells: CARRY4, or CARRY8 (CCU2C on ECP5, whose two LUTs count as such)
    dsps: int = 0  #: DSP48E2 (MULT18X18D on ECP5)
    lutram_luts: int = 0  #: of the LUTs, those that are distributed memory
    srl_luts: int = 0  #: of the LUTs, those that are shift registers
    bram36: int = 0
    bram18: int = 0  #: half a BRAM36 (EBR on ECP5)
    uram: int = 0

    def times(self, count):
        """This as often as ``count`` says; parts of a whole are rounded up."""
        return Resources(*(ceil(getattr(self, field.name) * Fraction(count)) for field in fields(self)))

    def __add__(self, other):
        return Resources(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


@dataclass(frozen=True)
class Target:
    """A device family: how Yosys maps to it, and what its cells count as."""

    name: str
    device: str  #: for people
    command: str  #: of Yosys
    stages: tuple[str, ...]  #: labels of that command; the last one is not run
    cells: dict[str, Resources]  #: of one cell
    part: str  #: the largest device that configurations are made for
    available: Resources  #: of that device; block memory in the larger kind
    library: str = ""  #: of memories that are mapped before the stage ``map_memory``

    @property
    def luts(self):
        """LUTs of the largest device."""
        return self.available.luts

    def commands(self, library):
        """The command in its stages; library : where the library's text lies."""
        out = []
        for begin, end in zip(self.stages, self.stages[1:]):
            if self.library and begin == "map_memory":
                out += [f"memory_libmap -lib {library} {_ONE_ADDRESS_SELECTED}",
                        "techmap -map +/xilinx/lutrams_xc5v_map.v"]
            out.append(f"{self.command} -top {_TOP} -run {begin}:{end}")
        return out


def _lutram(luts):
    return Resources(luts=luts, lutram_luts=luts)


_XCUP = {
    **{f"LUT{inputs}": Resources(luts=1) for inputs in range(1, 7)}, "INV": Resources(luts=1),
    **{name: Resources() for name in ("MUXF7", "MUXF8", "MUXF9", "GND", "VCC")},  # beside the LUTs, in the same slice
    **{name: Resources(ffs=1) for name in ("FDRE", "FDSE", "FDCE", "FDPE", "LDCE", "LDPE")},
    "CARRY4": Resources(carries=1), "CARRY8": Resources(carries=1), "DSP48E2": Resources(dsps=1),
    "RAMB36E2": Resources(bram36=1), "RAMB18E2": Resources(bram18=1), "URAM288": Resources(uram=1),
    "SRL16E": Resources(luts=1, srl_luts=1), "SRLC32E": Resources(luts=1, srl_luts=1),
    # A dual-port memory holds its contents once per port.
    "RAM32X1S": _lutram(1), "RAM64X1S": _lutram(1), "RAM128X1S": _lutram(2), "RAM256X1S": _lutram(4),
    "RAM512X1S": _lutram(8), "RAM32X1D": _lutram(2), "RAM64X1D": _lutram(2), "RAM128X1D": _lutram(4),
    "RAM256X1D": _lutram(8), "RAM32M": _lutram(4), "RAM64M": _lutram(4), "RAM32M16": _lutram(8), "RAM64M8": _lutram(8),
    "RAM32X16DR8": _lutram(8), "RAM64X8SW": _lutram(8),
}
_ECP5 = {
    "LUT4": Resources(luts=1), "CCU2C": Resources(luts=2, carries=1), "TRELLIS_FF": Resources(ffs=1),
    "PFUMX": Resources(), "L6MUX21": Resources(), "GND": Resources(), "VHI": Resources(), "VLO": Resources(),
    "MULT18X18D": Resources(dsps=1), "DP16KD": Resources(bram18=1), "PDPW16KD": Resources(bram18=1),
    "TRELLIS_DPR16X4": _lutram(6),  # four that store and a slice that writes
}

TARGETS = {item.name: item for item in [
    Target("xcup", "AMD UltraScale+", "synth_xilinx -family xcup -flatten -noiopad -noclkbuf -uram",
           ("begin", "prepare", "map_dsp", "coarse", "map_memory", "map_ffram", "fine", "map_cells", "map_ffs",
            "map_luts", "finalize", "check"), _XCUP, "XCU280",
           Resources(luts=1_303_680, ffs=2_607_360, dsps=9_024, bram36=2_016, uram=960), _ONE_ADDRESS),
    Target("ecp5", "Lattice ECP5", "synth_ecp5 -noiopad",
           ("begin", "coarse", "map_ram", "map_ffram", "map_gates", "map_ffs", "map_luts", "map_cells", "check"),
           _ECP5, "LFE5U-85F", Resources(luts=83_640, ffs=83_640, dsps=156, bram18=208)),
]}


def target(name):
    """The target of that name; SynthesisError lists the known ones."""
    try:
        return TARGETS[name]
    except KeyError:
        raise SynthesisError(f"unknown target {name!r}; known: {', '.join(TARGETS)}") from None


def share_modules(text):
    """RTLIL in which modules of equal content are one module, which stays a module if it is large and repeated.

    text : RTLIL as Amaranth writes it, the top module first: every instance has a module of its own
    """
    modules = _plain_ports({name: (attributes, body) for attributes, name, body in _MODULE.findall(text)})
    first, known, bodies, size, parts = {}, {}, {}, {}, {}

    def place(name):
        """The name of the first module with the content of ``name``."""
        if name not in modules:  # a primitive
            return name
        if name not in first:
            body = _CELL.sub(lambda cell: f"  cell {place(cell[1])} ", modules[name][1])
            first[name] = known.setdefault(_content(body), name)
            if first[name] == name:
                bodies[name] = body
                parts[name] = Counter(part for part in _CELL.findall(body) if part in modules)
                size[name] = body.count("\n") + sum(size[part] * count for part, count in parts[name].items())
        return first[name]

    top = next(iter(modules))
    place(top)
    instances = Counter({top: 1})
    for name in reversed(bodies):  # what has parts before its parts
        for part, count in parts[name].items():
            instances[part] += count * instances[name]
    out = []
    for name, body in reversed(bodies.items()):
        stays = instances[name] >= _REPEATED and size[name] >= _WORTH
        boundary = "attribute \\keep_hierarchy 1\n" if stays else ""
        out.append(f"{modules[name][0]}{boundary}module {name}\n{body}end\n")
    return text[:_MODULE.search(text).start()] + "".join(out)


def _plain_ports(modules):
    """The modules with ports whose names count from 0 in each, where Amaranth counts through the whole design."""
    names = {}
    for name, (_, body) in modules.items():
        found = dict.fromkeys(_NUMBERED.findall("\n".join(line for line in body.split("\n") if _PORT.match(line))))
        names[name] = {port: f"\\port${index}" for index, port in enumerate(found)}
    renamed = {}
    for name, (attributes, body) in modules.items():
        own, inner, out = names[name], {}, []
        for line in body.split("\n"):
            if line.startswith("  cell "):
                inner = names.get(line.split()[1], {})
            head = ""
            if inner and line.startswith("    connect "):
                _, port, line = line.split(maxsplit=2)
                head = f"    connect {inner.get(port, port)} "
            out.append(head + _renumbered(line, own))
        renamed[name] = attributes, "\n".join(out)
    return renamed


def _renumbered(line, names):
    return _NUMBERED.sub(lambda found: names.get(found[0], found[0]), line)


def _content(body):
    """What a module holds, whatever the order: Amaranth numbers ports and writes statements as they came up."""
    return "".join(sorted("\n".join(sorted(text.split("\n"))) if text.lstrip().startswith("cell") else text
                          for text in _STATEMENT.findall(_PORT.sub(r"\1 ", body))))


def resources(cells, on):
    """Resources of a Counter of cell types on a Target. Raises SynthesisError for a cell that it does not know."""
    unknown = sorted(name for name in cells if name not in on.cells)
    if unknown:
        raise SynthesisError(f"{on.name} has no cells {', '.join(unknown)}: the design is not mapped completely")
    return sum((on.cells[name].times(count) for name, count in cells.items()), Resources())


def synthesise(component, on, *, name="the design", log=None):
    """Cells of ``component``, a Counter of types, on a Target; from the cache if it was synthesised before.

    log : called with what is being done, when it begins
    Raises YosysError if Yosys refuses it.
    """
    say = log or (lambda stage: None)
    say(f"{name}: elaborating")
    text = share_modules(to_rtlil(component, name=_TOP, primitives=True))
    key = hashlib.sha256("\0".join([text, version("pyosys"), on.library, *on.commands("library")]).encode()).hexdigest()

    def make():
        with tempfile.TemporaryDirectory() as folder:
            source, library, result = (Path(folder, name) for name in ("design.il", "library.txt", "cells.json"))
            source.write_text(text)
            library.write_text(on.library)
            run_yosys([f"read_rtlil {source}", *on.commands(library), f"tee -q -o {result} stat -json -top {_TOP}"],
                      name=name, log=lambda command: say(f"{name}: {_stage(command)}"))
            return json.dumps(cells_of(json.loads(result.read_text())["modules"], _TOP), sort_keys=True)

    return Counter(json.loads(cached_text("synth", f"{key}.json", make)))


def _stage(command):
    return command.rpartition(":")[0].rpartition(" ")[2] if " -run " in command else command.split()[0]


def cells_of(modules, top):
    """Counter of the cells of a whole design, each module as often as it occurs; ``modules`` of Yosys's ``stat``."""
    found = {}

    def count(name):
        if name not in found:
            total = Counter()
            for cell, number in modules[f"\\{name}"]["num_cells_by_type"].items():
                if f"\\{cell}" in modules:
                    for inner, times in count(cell).items():
                        total[inner] += times * number
                elif not cell.startswith("$scopeinfo"):
                    total[cell] += number
            found[name] = total
        return found[name]

    return count(top)
