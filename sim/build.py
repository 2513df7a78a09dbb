"""Compile a Verilog top and the C++ harness into one shared library, and keep the result in the user's cache.

An entry of the cache is a folder named by the SHA-256 of everything that went into it: the Verilog text, the harness
sources, the flags, the versions of Verilator and the compiler, and the processor (code is built for this machine).
Entries are built in a temporary folder and renamed, under a file lock, so that a second process waits and then loads.
Verilator's runtime is the same for every design; its objects are an entry of their own.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from skipopu.sim.toolchain import Toolchain, find_toolchain

__all__ = ["build_library", "cache_root", "sleepers"]

_HERE = Path(__file__).parent
_HARNESS = "harness.cpp"
_HEADERS = ("awake.h", "axi_port.h", "second_half.h", "memory_model.h", "hbm.h", "lz4.h")
_PREFIXES = ("Vtop", "Vsecond")  # classes of the top and, if it was cut (`hw.halves`), of its second half
_VERILATOR_FLAGS = ("--cc", "-O3", "--x-assign", "fast", "--x-initial", "fast", "--no-timing",
                    "--no-assert", "--output-split", "20000", "--output-split-cfuncs", "1000", "-Wno-fatal",
                    "-Wno-lint", "-Wno-style", "--quiet")
# The library exports only the harness's C functions; hidden, non-interposable symbols let the compiler inline across
# functions in spite of -fPIC.
_BASE_FLAGS = ("-std=c++20", "-march=native", "-fPIC", "-fvisibility=hidden", "-fno-semantic-interposition", "-fno-plt",
               "-fcf-protection=none", "-DVERILATOR=1", "-DVL_USER_FATAL", "-DVM_COVERAGE=0", "-DVM_SC=0", "-w")
_FAST_FLAGS = ("-O2",)
_SLOW_FLAGS = ("-O1",)  # construction, initial values, declarations of waveforms: runs once
_SHORT_BODY = 2  # lines that are not worth a jump
_UNIT_BYTES = 1 << 20   # sources compiled as one unit: fewer, and small enough to use every core

Log = Callable[[str], None]


def cache_root() -> Path:
    """Folder of cached builds: ``SKIPOPU_CACHE``, else ``skipopu`` under ``XDG_CACHE_HOME`` or ``~/.cache``."""
    if override := os.environ.get("SKIPOPU_CACHE"):
        return Path(override)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skipopu"


def sleepers(verilog: str) -> list[str]:
    """Parts of a top that have clocks of their own (`hw.top.Overlay`, ``sleeps``)."""
    first = verilog[:verilog.find("\nendmodule")]
    return re.findall(r"\n  input (\w+)_clock;", first)  # begins with what is fast to search for


def _modules(verilog: str, top: str) -> list[str]:
    """The top, and its second half if it was cut."""
    return [top, f"{top}_second"] if f"\nmodule {top}_second(" in verilog else [top]


def _exchanged(verilog: str, top: str) -> str:
    """C++ macros for the two halves' exchange: registers one reads of the other, clocks each needs of the sleepers'."""
    halves = [verilog[(begin := verilog.index(f"module {module}(")):verilog.index("\nendmodule", begin)]
              for module in _modules(verilog, top)]
    parts, macros = sleepers(verilog), {}
    for half, text in zip(("FIRST", "SECOND"), halves, strict=True):
        macros[f"{half}_CLOCKS"] = [f"SLEEPER({part})" for part in parts if f"posedge {part}_clock" in text]
        reads: dict[str, list[str]] = {"": [], **{f"_{part}": [] for part in parts}}
        for port, clock in re.findall(r"\n  input (?:\[\d+:0\] )?(half[01]_(\w+)_\d+);", text):
            reads.get(f"_{clock.removesuffix('_clock')}", reads[""]).append(f"F({port})")
        macros |= {f"{half}_READS{part}": ports for part, ports in reads.items()}
    return "".join(f"#define {name} {' '.join(items)}\n" for name, items in macros.items())


def build_library(verilog: str, *, top: str, ports: int, port_bits: int, trace: bool = False,
                  log: Log | None = None, harness: str = _HARNESS) -> Path:
    """Return the path of the shared library of ``top``, building it if the cache has no intact copy.

    verilog : text that holds module ``top`` with the overlay's ports; ports, port_bits : its AXI masters
    trace : build with FST waveforms; log : called with one line per step of a build, never on a cache hit
    harness : C++ source beside this file that drives the design and exports the functions
    Raises ToolError if a tool is missing or refuses the design.
    """
    say = log or (lambda line: None)
    tools = find_toolchain(need=("g++",))
    trace_flags = ("-DTRACE", "-DVM_TRACE=1", "-DVM_TRACE_FST=1") if trace else ("-DVM_TRACE=0",)
    flags = (*_BASE_FLAGS, *trace_flags)
    defines = (f"-DPORTS={ports}", f"-DPORT_BITS={port_bits}",
               "-DPORT_LIST=" + " ".join(f"PORT({port})" for port in range(ports)),
               *(["-DEVENTS"] if "event_dispatch" in verilog else []),
               *(["-DHALVES"] if len(_modules(verilog, top)) > 1 else []),
               "-DSLEEPERS=" + " ".join(f"SLEEPER({part})" for part in sleepers(verilog)))
    sources = [(_HERE / name).read_text() for name in (harness, *_HEADERS)]
    key = _digest(verilog, top, *sources, *_VERILATOR_FLAGS, *flags, *_FAST_FLAGS, *_SLOW_FLAGS, str(_UNIT_BYTES),
                  *defines, Path(__file__).read_text(), tools.identity)
    runtime_key = _digest("runtime", *sources[-1:], *flags, *_SLOW_FLAGS, Path(__file__).read_text(), tools.identity)

    def build(folder: Path) -> None:
        begin = time.monotonic()
        runtime = _entry(runtime_key, "runtime.o", lambda f: _build_runtime(f, tools, flags, trace, say))
        _build_design(folder, tools, verilog, top, harness, (*flags, *defines), trace, runtime, say)
        say(f"built {key[:12]} in {time.monotonic() - begin:.1f} s")

    return _entry(key, "sim.so", build)


def _digest(*texts: str) -> str:
    total = hashlib.sha256()
    for text in texts:
        total.update(hashlib.sha256(text.encode()).digest())
    return total.hexdigest()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _entry(key: str, product: str, build: Callable[[Path], None]) -> Path:
    """The file ``product`` of cache entry ``key``; ``build(folder)`` makes it when absent or damaged."""
    root = cache_root() / "verilated"
    root.mkdir(parents=True, exist_ok=True, mode=0o700)  # its files are loaded as code
    entry = root / key
    if _intact(entry, product):
        return entry / product
    with _locked(root / f"{key}.lock"):
        if _intact(entry, product):  # another process built it meanwhile
            return entry / product
        shutil.rmtree(entry, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix="building-", dir=root))
        try:
            build(temporary)
            content = (temporary / product).read_bytes()
            staged = temporary / "entry"
            staged.mkdir()
            (temporary / product).rename(staged / product)
            (staged / "manifest.json").write_text(json.dumps({"sha256": hashlib.sha256(content).hexdigest()}))
            staged.rename(entry)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return entry / product


def _intact(entry: Path, product: str) -> bool:
    # Loading a truncated library ends the process with a bus error, so the content is checked first.
    try:
        expected = json.loads((entry / "manifest.json").read_text())["sha256"]
        return hashlib.sha256((entry / product).read_bytes()).hexdigest() == expected
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _includes(tools: Toolchain) -> list[str]:
    include = tools.root / "include"
    return [f"-I{_HERE}", f"-I{include}", f"-I{include / 'vltstd'}"]


def _build_runtime(folder: Path, tools: Toolchain, flags: tuple[str, ...], trace: bool, say: Log) -> None:
    say("compiling Verilator's runtime (once for all designs)")
    names = ["verilated", "verilated_threads"] + (["verilated_fst_c"] if trace else [])
    _compile(folder, tools, [(tools.root / "include" / f"{name}.cpp", (*flags, *_SLOW_FLAGS)) for name in names])
    tools.run([tools.compiler, "-r", "-nostdlib", *(f"{name}.o" for name in names), "-o", "runtime.o"], cwd=folder)


def _build_design(folder: Path, tools: Toolchain, verilog: str, top: str, harness: str,
                  flags: tuple[str, ...], trace: bool, runtime: Path, say: Log) -> None:
    (folder / "top.v").write_text(verilog)
    say(f"translating {top} to C++")
    modules = _modules(verilog, top)
    if len(modules) > 1:
        (folder / "exchanged.h").write_text(_exchanged(verilog, top))

    def translate(module: str, prefix: str) -> None:
        tools.run([str(tools.verilator), *_VERILATOR_FLAGS, "--prefix", prefix, "--top-module", module, "--Mdir", ".",
                   *(["--trace-fst"] if trace else []), "top.v"], cwd=folder)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(translate, modules, _PREFIXES))
    units = []
    for prefix in _PREFIXES[:len(modules)]:
        sources = set(folder.glob(f"{prefix}*.cpp"))
        slow = {source for source in sources if source.stem.endswith("Slow")}
        for source in sources - slow:
            if "___024root" in source.name:  # not the code that writes waveforms
                source.write_text(_expect_idle(source.read_text()))
        for name, group, speed in (("fast", sources - slow, _FAST_FLAGS), ("slow", slow, _SLOW_FLAGS)):
            units += [(unit, (*flags, *speed)) for unit in _unite(folder, f"{prefix}_{name}", sorted(group))]
    units.append((_HERE / harness, (*flags, *_FAST_FLAGS)))
    say(f"compiling {len(units)} units")
    _compile(folder, tools, units)
    libraries = ["-lz"] if trace else []
    tools.run([tools.compiler, "-shared", *(f"{unit.stem}.o" for unit, _ in units), str(runtime), *libraries,
               "-pthread", "-Wl,-Bsymbolic", "-o", "sim.so"], cwd=folder)


def _expect_idle(text: str) -> str:
    """Mark long bodies under a clock enable as unlikely, so that the compiler moves them out of the way.

    A cycle touches the conditions of every register of the design, but few bodies; without the bodies in between they
    fit the instruction cache better (measured on the overlay at ``sim``, idle: 6.0 instead of 7.0 us a cycle).
    """
    lines, out, at = text.split("\n"), [], 0
    while at < len(lines):
        begin, at = at, at + 1
        if lines[begin].startswith("    if (") and "VL_" not in lines[begin][:10]:
            while not lines[at - 1].endswith(("{", ";")):
                at += 1
            head = "\n".join(lines[begin:at])
            end = next((i for i in range(at, len(lines)) if lines[i].startswith("    }")), at)
            if end - at > _SHORT_BODY and head.endswith(") {"):
                out.append(f"    if (__builtin_expect_with_probability(!!{head[7:-2]}, 0, 1.0)) {{")
                continue
        out += lines[begin:at]
    return "\n".join(out)


def _unite(folder: Path, name: str, sources: list[Path]) -> list[Path]:
    """Group sources into files that include them, each about ``_UNIT_BYTES``: headers are parsed once per unit."""
    groups: list[list[Path]] = []
    room = 0
    for source in sources:
        size = source.stat().st_size
        if not groups or size > room:
            groups.append([])
            room = _UNIT_BYTES
        groups[-1].append(source)
        room -= size
    units = []
    for index, group in enumerate(groups):
        unit = folder / f"{name}{index}.cpp"
        unit.write_text("".join(f'#include "{source.name}"\n' for source in group))
        units.append(unit)
    return units


def _compile(folder: Path, tools: Toolchain, units: list[tuple[Path, tuple[str, ...]]]) -> None:
    def one(unit: tuple[Path, tuple[str, ...]]) -> None:
        source, flags = unit
        tools.run([tools.compiler, *flags, "-I.", *_includes(tools), "-c", str(source), "-o", f"{source.stem}.o"],
                  cwd=folder)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(one, units))
