"""What the benchmarks share: a table of measured values beside their targets, and what this machine is.

Every value says how it was found: measured (by this machine's clock, or counted), simulated (what the modelled hardware
did) or predicted (computed from a model of cost).
"""

from __future__ import annotations

import os
import platform
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Row", "at_least", "at_most", "machine", "peak_memory", "show"]

Target = tuple[str, Callable[[float], bool]]


@dataclass(frozen=True)
class Row:
    """One line of a table. ``form``: format string of the value; ``how`` it was found; ``target``: if it has one."""

    name: str
    value: float | None  # None: not found in this run
    how: str = "measured"
    form: str = "{:,.0f}"
    target: Target | None = None

    def cells(self) -> tuple[str, ...]:
        """name, value, target, verdict, how."""
        value = "-" if self.value is None else self.form.format(self.value)
        if self.target is None:
            return self.name, value, "", "", self.how
        text, holds = self.target
        verdict = "" if self.value is None else "met" if holds(self.value) else "MISSED"
        return self.name, value, text, verdict, self.how


def at_least(limit: float, form: str = "{:g}") -> Target:
    """A target from below."""
    return f">= {form.format(limit)}", lambda value: value >= limit


def at_most(limit: float, form: str = "{:g}") -> Target:
    """A target from above."""
    return f"<= {form.format(limit)}", lambda value: value <= limit


def show(title: str, rows: Sequence[Row]) -> None:
    """Print the rows as one table on stdout."""
    table = [("", "measured", "target", "", ""), *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in table) for column in range(5)]
    print(f"\n{title}")
    for name, value, target, verdict, how in table:
        line = (f"{name:<{widths[0]}}  {value:>{widths[1]}} | {target:<{widths[2]}}  {verdict:<{widths[3]}}  {how}")
        print("  " + line.rstrip())
    sys.stdout.flush()


def machine() -> str:
    """The machine in words."""
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"


def peak_memory(children: bool = False) -> int:
    """Largest resident memory so far, bytes: of this process, or of the largest it has started and waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN if children else resource.RUSAGE_SELF)
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
