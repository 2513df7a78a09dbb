"""What `skipopu bench kv` shows: a table, cost by context, and shares of the memory's peak."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from skipopu.hw.config import OverlayConfig

from .kv_bench import KvRow

__all__ = ["draw_cost", "draw_shares", "table"]

_COLUMNS = ("pattern", "tokens", "buffer", "from memory", "from buffer", "hit rate", "storage saved", "cycles",
            "physical", "effective")
_COLOURS = ("#3b6ea8", "#c1783c", "#4d9455", "#8a5a9e", "#9a3b3b")


def _size(count: int) -> str:
    """Bytes for people."""
    value, unit = float(count), 0
    while value >= 1024 and unit < 3:
        value, unit = value / 1024, unit + 1
    return f"{value:.4g} {('B', 'KiB', 'MiB', 'GiB')[unit]}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def table(rows: Sequence[KvRow], markdown: bool = False) -> list[str]:
    """Lines of a table, every row one decoded token; all of it is simulated."""
    lines = [_COLUMNS, *((row.pattern, f"{row.tokens:,}", _size(row.buffer_bytes), _size(row.memory_bytes),
                          _size(row.buffer_bytes_served), _share(row.hit_rate), _share(row.storage_saved),
                          "-" if row.cycles is None else f"{row.cycles:,}", _share(row.physical_share),
                          _share(row.effective_share)) for row in rows)]
    if markdown:
        text = ["| " + " | ".join(line) + " |" for line in lines]
        return [text[0], "|---|" + "---:|" * (len(_COLUMNS) - 1), *text[1:], "", "All simulated."]
    widths = [max(map(len, column)) for column in zip(*lines)]
    text = ["  ".join(f"{cell:<{width}}" if index == 0 else f"{cell:>{width}}"
                      for index, (cell, width) in enumerate(zip(line, widths))) for line in lines]
    return [*text, "bytes, shares of the memory's peak and cycles of one decoded token, all simulated"]


def _series(rows: Sequence[KvRow]) -> list[tuple[str, list[KvRow]]]:
    """Rows of one pattern and buffer in the order of contexts, with a name."""
    found: dict[tuple[str, int], list[KvRow]] = {}
    for row in rows:
        found.setdefault((row.pattern, row.buffer_bytes), []).append(row)
    several = {pattern for pattern, size in found if size}
    return [(f"{pattern}, {f'{_size(size)} buffer' if size else 'no buffer'}" if pattern in several else pattern,
             sorted(items, key=lambda row: row.tokens)) for (pattern, size), items in found.items()]


def draw_cost(path: str | Path, rows: Sequence[KvRow], config: OverlayConfig) -> None:
    """Cost of a decoded token by context, as PNG: cycles where the device has a clock, else bytes from memory.

    Lines show the slope of the bytes moved from memory, at the peak of all ports.
    """
    figure, axes = _axes()
    for colour, (name, items) in zip(_COLOURS * len(rows), _series(rows)):
        tokens = [row.tokens for row in items]
        timed = all(row.cycles for row in items)
        cost = [row.cycles if timed else row.memory_bytes / config.superbeat_bytes for row in items]
        slope = items[-1].memory_bytes / config.superbeat_bytes / items[-1].tokens
        axes.plot(tokens, cost, "o", color=colour, label=name)
        axes.plot([0, tokens[-1]], [0, slope * tokens[-1]], color=colour, linewidth=0.8,
                  label=f"its bytes from memory at the peak: {slope:.1f} cycles a position")
    axes.set(title="Attention of one decoded token, all layers (simulated)", xlabel="context, positions",
             ylabel="cycles", xlim=(0, None), ylim=(0, None))
    axes.legend(fontsize=7)
    figure.savefig(path, format="png", dpi=150)


def draw_shares(path: str | Path, rows: Sequence[KvRow], config: OverlayConfig) -> None:
    """Effective and physical share of the peak by context, as PNG; without a clock, the hit rate."""
    figure, axes = _axes()
    timed = all(row.cycles for row in rows)
    for colour, (name, items) in zip(_COLOURS * len(rows), _series(rows)):
        tokens = [row.tokens for row in items]
        if timed:
            axes.plot(tokens, [100 * (row.effective_share or 0) for row in items], "o-", color=colour,
                      label=f"{name}: effective")
            axes.plot(tokens, [100 * (row.physical_share or 0) for row in items], "x--", color=colour, linewidth=0.8,
                      label=f"{name}: physical")
        else:
            axes.plot(tokens, [100 * row.hit_rate for row in items], "o-", color=colour, label=name)
    axes.set(title="Bandwidth of KV records (simulated)" if timed else "Hits of the history buffer (simulated)",
             xlabel="context, positions", ylabel="% of the memory's peak" if timed else "% of the records",
             xscale="log", ylim=(0, None))
    if timed:
        axes.axhline(100, color="black", linewidth=0.6)
    axes.legend(fontsize=7)
    figure.savefig(path, format="png", dpi=150)


def _axes():  # type: ignore[no-untyped-def]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots()
