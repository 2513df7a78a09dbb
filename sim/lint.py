"""Verilator's opinion of generated Verilog."""

from pathlib import Path

from .toolchain import find_toolchain

__all__ = ["lint"]

_WAIVED = (  # all from the way Yosys writes Verilog, none about the design
    "DECLFILENAME",  # several modules in one file
    "UNUSEDSIGNAL",  # whole signals are declared where some bits are used; resets that nothing needs
    "WIDTHEXPAND",  # operands get the width of the result by the language's own rule
    "PROCASSINIT",  # registers have initial values
    "UNOPTFLAT",  # bits that repeat a sign are assigned from another bit of their signal: no loop, only slower
)


def lint(folder: Path, text: str, top: str) -> None:
    """Lint module ``top`` of a text, with a file in ``folder``. Raises ToolError with the first complaint."""
    tools = find_toolchain(need=())
    (folder / "lint.v").write_text(text)
    tools.run([str(tools.verilator), "--lint-only", "-Wall", *(f"-Wno-{name}" for name in _WAIVED), "--top-module", top,
               "lint.v"], cwd=folder)
