"""Open a design in PyVerilator, to set inputs and look at outputs from a Python prompt.

Meant for small blocks and for looking around; ``skipopu.sim.native`` is what runs programs.
"""

import contextlib
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

from skipopu.sim.toolchain import Toolchain, ToolError, find_toolchain

__all__ = ["open_interactive"]


@contextlib.contextmanager
def _on_path(tools: Toolchain) -> Iterator[None]:
    with mock.patch.dict(os.environ, tools.environment()):
        yield


def open_interactive(verilog: str, top: str, *, folder: str | Path | None = None) -> Any:
    """Compile ``verilog`` and return a ``pyverilator.PyVerilator`` of its module ``top``.

    verilog : text of the design; folder : keeps the build there (default: a temporary folder, removed when loaded)
    The object's ``io`` holds the ports (``sim.io.en = 1``, ``int(sim.io.count)``), ``sim.clock.tick()`` makes a cycle
    when an input is named clk or clock, ``start_vcd_trace(path)`` and ``stop_vcd_trace()`` write waveforms.
    Raises ValueError if the text has no module ``top``, ToolError if a tool or PyVerilator is missing.
    """
    if not re.search(rf"^\s*module\s+\\?{re.escape(top)}\b", verilog, re.M):
        raise ValueError(f"expected a module named {top}, the text has "
                         f"{re.findall(r'^ *module +([^ (;]+)', verilog, re.M) or 'no module'}")
    tools = find_toolchain(need=("g++", "make", "perl"))
    try:
        import pyverilator
    except ImportError as error:
        raise ToolError("pyverilator not found: install it (pip install pyverilator-mm)") from error
    with contextlib.ExitStack() as stack:
        stack.enter_context(_on_path(tools))
        build = Path(folder or stack.enter_context(tempfile.TemporaryDirectory(prefix="pyverilator-")))
        build.mkdir(parents=True, exist_ok=True)
        source = build / f"{top}.v"
        source.write_text(verilog)
        # Its version test calls a function that Verilator 5 no longer has; its own flag asks for C++11, which
        # Verilator 5 refuses; and one C++ file needs none of the precompiled headers its make call would miss.
        stack.enter_context(mock.patch("pyverilator.verilatorcpp.verilator_flushcall_ok", lambda: False))
        return pyverilator.PyVerilator.build(str(source), build_dir=str(build), cargs="-std=c++20", quiet=True,
                                             args=["--top-module", top, "--output-split", "0", "--quiet"])
