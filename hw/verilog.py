"""Amaranth component to Verilog text.

Yosys infers clock enables and trims operator widths before the Verilog is written: Verilator then skips the logic in
front of registers that do not change (measured on a 32 x 64 array: five times faster, compiled in a fifth of the time).
"""

import contextlib
import gc
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from amaranth import ClockDomain
from amaranth.back import rtlil

from .emission import Emission
from .halves import cut
from .sink import sink

__all__ = ["YosysError", "run_yosys", "to_rtlil", "to_verilog"]

_PASSES = ("hierarchy -top {top}; proc; flatten; opt_expr; opt_clean; opt_dff -nosdff; wreduce; opt_clean; "
           "memory_collect")
_RUNNER = """
import sys
from pyosys import libyosys as ys
design = ys.Design()
for command in sys.argv[1:]:
    print("\\x01" + command, flush=True)
    ys.run_pass(command, design)
"""

_REPEATED = re.compile(r"((?:\\\S+ |\b[A-Za-z_]\w*)(?:\[\d+\])?)((?:, \1){2,})(?=[,} ])")


class _ModuleEmitter(rtlil.ModuleEmitter):
    """Leaves memories of zeros without initial contents: Amaranth writes each bit, hundreds of millions at `u280`."""

    def emit_memory(self, cell_idx, cell):
        if any(cell.init):
            super().emit_memory(cell_idx, cell)


@contextlib.contextmanager
def _empty_memories():
    original, rtlil.ModuleEmitter = rtlil.ModuleEmitter, _ModuleEmitter
    try:
        yield
    finally:
        rtlil.ModuleEmitter = original


@contextlib.contextmanager
def _rare_collections():
    """Elaboration makes millions of objects that stay: looking through them for garbage took a quarter of its time."""
    before = gc.get_threshold()
    gc.set_threshold(100_000, 50, 1000)
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _collapse(text):
    """Write ``{ a [3], a [3], a [3] }`` (a sign extension) as ``{ {3{a [3]}} }``: one operation for a simulator."""
    return _REPEATED.sub(lambda found: f"{{{1 + len(found[2]) // (2 + len(found[1]))}{{{found[1]}}}}}", text)


class YosysError(RuntimeError):
    """Yosys refused a design; the message is one line with its reason."""


def run_yosys(commands, *, name="the design", log=None):
    """Run commands on one design, in a process of its own (its memory is given back, its faults are not ours).

    name : of the design in messages; log : called with each command when it starts
    Raises YosysError.
    """
    with subprocess.Popen([sys.executable, "-c", _RUNNER, *commands], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace") as process:
        reason = "no output"
        for line in process.stdout:
            if line.startswith("\x01"):
                if log:
                    log(line[1:].rstrip())
            elif line.strip() and not reason.startswith("ERROR: "):
                reason = line.strip()
    if process.returncode:
        raise YosysError(f"yosys failed on {name}: {reason.removeprefix('ERROR: ')}")


def to_rtlil(component, *, name, ports=None, primitives=False, async_reset=False):
    """RTLIL text of ``component`` with top module ``name``, the same on every run; parameters as in `to_verilog`."""
    emission = Emission(primitives=primitives)

    def convert(component, name, **options):
        return rtlil.convert(component, name=name, emit_src=False, platform=emission, **options,
                             missing_domain=lambda domain: ClockDomain(domain, async_reset=async_reset))

    with _empty_memories(), _rare_collections():
        texts, written = [convert(component, name, ports=ports)], set()
        while missing := emission.modules.keys() - written:
            module = min(missing)
            texts.append(convert(emission.modules[module], module))
            written.add(module)
    return "\n".join(texts)


def to_verilog(component, *, name, ports=None, flatten=True, primitives=False, async_reset=False,
               second=(), sunk=False):
    """Verilog text of ``component`` with top module ``name``.

    ports : dict of port name to (value, direction) for renamed ports, or None for the component's own signature
    flatten : one module (fast simulation) instead of the hierarchy (readable)
    primitives : a device's own slices, for synthesis, instead of their behaviour
    async_reset : of the domains that a component takes from where it is placed
    second : beginnings of the names of what goes to a module ``name``_second, see `hw.halves`; needs ``flatten``
    sunk : for fast simulation, without all names, see `hw.sink`; needs ``flatten``
    The text is the same on every run. Raises YosysError when a pass fails, HalvesError when the design cannot be cut.
    """
    passes = _PASSES.format(top=name)
    if not flatten:
        passes = passes.replace("flatten; ", "") + "; opt_clean -purge"
    text = to_rtlil(component, name=name, ports=ports, primitives=primitives, async_reset=async_reset)
    write = "write_verilog -noattr -norename"

    def run(passes, text, write="write_rtlil"):
        return _through_yosys(passes, text, name=name, write=write)

    if second:
        finish = [["opt_clean -purge"], ["opt_clean -purge", f"rename {name} {name}_second"]]
        halves = cut(run(passes.split("; "), text), second, run)
        with ThreadPoolExecutor() as pool:
            verilog = "".join(pool.map(lambda last, half: run(last, half, write), finish, halves))
    else:
        verilog = run(passes.split("; "), text, write)
    return sink(_collapse(verilog)) if sunk else _collapse(verilog)


def _through_yosys(passes, text, *, name, write):
    """RTLIL ``text`` after ``passes``, as ``write`` (a command without its file) writes it."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "in.il"), Path(folder, "out")
        source.write_text(text)
        run_yosys([f"read_rtlil {source}", *passes, f"{write} {target}"], name=name)
        return target.read_text()
