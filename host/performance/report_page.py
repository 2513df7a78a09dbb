"""The report of a profile: one HTML page with its pictures inside, which needs nothing else to be read."""

from __future__ import annotations

import html
import io
from collections.abc import Callable, Sequence
from typing import Any

from skipopu.hw.config import OverlayConfig
from skipopu.hw.isa import Unit, decode

from .analysis import CAUSES, as_json
from .record import Recording

__all__ = ["page"]

_COLOURS = {"memory": "#2a6f97", "array": "#d1495b", "vector": "#edae49", "store": "#66a182", "waiting": "#b8b8b8"}
_SHOWN = 4000  # cycles of the timeline's picture
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1100px; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: 1rem 0 } td, th { padding: .15rem .7rem; text-align: right }
th { border-bottom: 1px solid #888 } td.text, th.text { text-align: left } code { font-size: 12px }
figure { margin: 1.5rem 0 } figcaption { color: #555 } svg { max-width: 100%; height: auto }
@media (prefers-color-scheme: dark) {
  body { background: #1c1c1c; color: #ddd } figure { background: #fff; color: #222 } }
"""


def page(title: str, config: OverlayConfig, recordings: Sequence[Recording], facts: dict[str, str]) -> str:
    """The whole page. facts : what stands at the top, name -> text"""
    found, label = as_json(config, recordings), recordings[-1].label
    cycles, layers = found["cycles"], [row for row in found["layers"] if row["cycles"]]
    parts = [
        f"<h1>{html.escape(title)}</h1>", _table(("", ""), [(name, text) for name, text in facts.items()], text=2),
        "<h2>Where the cycles go</h2>",
        _figure("breakdown", lambda axes: _bars(axes, found["breakdown"]), (9, 1.6),
                f"Every cycle once ({label}): data moved on a port; nothing moved and the array had a command; only "
                "the vector unit; only the store unit; everybody waited."),
        _table(("cause", "cycles", "share"), [(name, f"{count:,}", f"{count / cycles:.1%}")
                                              for name, count in found["breakdown"].items()], text=1),
        _figure("layers", lambda axes: _layers(axes, layers), (9, 1.5 + 0.22 * len(layers)),
                f"Cycles of every module of every layer by cause ({label})."),
        "<h2>Timeline</h2>",
        _figure("timeline", lambda axes: _timeline(axes, recordings[-1]), (11, 3),
                f"The first {_SHOWN:,} cycles of the last run ({label}): {html.escape(recordings[-1].name)}. All of it "
                "is in trace.pftrace and trace.json, which ui.perfetto.dev opens."),
        "<h2>Roofline</h2>",
        _figure("roofline", lambda axes: _roofline(axes, found), (8, 5),
                f"Products per cycle against products per byte of memory, by kind of matmul ({label})."),
        "<h2>The costliest instructions</h2>",
        _table(("cycles", "share", "times", "pc", "for", "instruction"),
               [(f"{item['cycles']:,}", f"{item['cycles'] / cycles:.1%}", item["count"], item["pc"], item["note"],
                 f"<code>{html.escape(item['text'])}</code>") for item in found["costliest"]], text=-2, raw=(5,)),
        "<h2>By class of instruction</h2>",
        _table(("instruction", "unit", "times", "cycles that count for it", "its unit busy with it", "waited in queue"),
               [(item["mnemonic"], item["unit"], *(f"{item[key]:,}" for key in ("count", "cycles", "busy", "waited")))
                for item in found["instructions"]], text=2),
        *_counters(recordings),
        "<h2>By layer</h2>",
        _table(("layer", "module", "cycles", "tokens", "skipped", *CAUSES),
               [("" if row["layer"] < 0 else row["layer"], row["module"], f"{row['cycles']:,}", row["tokens"],
                 row["skipped"], *(f"{row[cause]:,}" for cause in CAUSES)) for row in layers], text=2),
    ]
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f'<link rel="icon" href="data:,"><style>{_STYLE}</style></head>\n<body>\n' + "\n".join(parts)
            + "\n</body></html>\n")


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]], text: int = 0, raw: Sequence[int] = ()) -> str:
    """text : so many columns from the left (from the right if negative) hold text; raw : columns that are HTML"""
    def cell(index: int, value: Any, tag: str) -> str:
        left = index < text if text >= 0 else index >= len(head) + text
        content = str(value) if index in raw and tag == "td" else html.escape(str(value))
        return f'<{tag}{" class=text" if left else ""}>{content}</{tag}>'
    lines = ["".join(cell(i, value, tag) for i, value in enumerate(row))
             for tag, row in [("th", head), *(("td", row) for row in rows)]]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _counters(recordings: Sequence[Recording]) -> list[str]:
    """The device's own counters of all runs together, where it counts cycles."""
    counted = [recording.stats.counters for recording in recordings]
    total = {name: sum(counters.get(name, 0) for counters in counted) for name in counted[0]}
    if not total.get("cycles"):
        return []
    return ["<h2>Counters of the device</h2>",
            _table(("counter", "value", "of all cycles"),
                   [(name, f"{value:,}", f"{value / total['cycles']:.1%}" if value <= total["cycles"] else "")
                    for name, value in total.items()], text=1)]


def _figure(name: str, draw: Callable[[Any], None], size: tuple[float, float], caption: str) -> str:
    """A drawing as SVG inside the page."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasSVG(figure)
    draw(figure.subplots())
    out = io.StringIO()
    with rc_context({"svg.fonttype": "path", "svg.hashsalt": name}):
        figure.savefig(out, format="svg", metadata={"Date": None})
    svg = out.getvalue()
    return (f'<figure id="{name}">{svg[svg.index("<svg"):]}<figcaption>{caption}</figcaption></figure>')


def _bars(axes: Any, causes: dict[str, int]) -> None:
    left, total = 0, sum(causes.values())
    for name, count in causes.items():
        axes.barh([0], [count], left=left, color=_COLOURS[name], label=f"{name} {count / total:.1%}")
        left += count
    axes.set(yticks=[], xlabel="cycles", xlim=(0, max(left, 1)))
    axes.figure.legend(ncols=len(causes), loc="outside upper center", frameon=False, fontsize=8)


def _layers(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    names = [f"{row['layer']} {row['module']}" if row["layer"] >= 0 else row["module"] for row in rows]
    left = [0] * len(rows)
    for cause in CAUSES:
        axes.barh(range(len(rows)), [row[cause] for row in rows], left=left, color=_COLOURS[cause], label=cause)
        left = [before + row[cause] for before, row in zip(left, rows)]
    axes.set(yticks=range(len(rows)), xlabel="cycles", ylim=(-0.6, len(rows) - 0.4))
    axes.set_yticklabels(names, fontsize=7)
    axes.invert_yaxis()
    axes.figure.legend(ncols=len(CAUSES), loc="outside upper center", frameon=False, fontsize=8)


def _timeline(axes: Any, recording: Recording) -> None:
    units = [unit for unit in Unit if unit != Unit.CONTROL]
    names = ["memory", *(unit.name.lower() for unit in units)]
    moved = [(begin, end - begin + 1) for begin, end in recording.ports[0] if begin < _SHOWN]
    axes.broken_barh(moved, (-0.4, 0.8), color=_COLOURS["memory"])
    kinds: dict[str, int] = {}
    for row, unit in enumerate(units, 1):
        own = [span for span in recording.spans if span.unit == unit and span.start < _SHOWN]
        colours = [f"C{kinds.setdefault(decode(recording.program.words[span.pc])[0].mnemonic, len(kinds)) % 10}"
                   for span in own]
        axes.broken_barh([(span.start, max(span.done - span.start, 1)) for span in own], (row - 0.4, 0.8),
                         color=colours, edgecolor="white", linewidth=0.2)
    for name, index in kinds.items():
        axes.plot([], [], "s", color=f"C{index % 10}", label=name)
    axes.figure.legend(ncols=len(kinds) // 2 + 1, loc="outside upper center", frameon=False, fontsize=8)
    axes.set(yticks=range(len(names)), yticklabels=names, xlabel="cycle", xlim=(0, min(_SHOWN, recording.cycles)))
    axes.invert_yaxis()


def _roofline(axes: Any, found: dict[str, Any]) -> None:
    peak, memory = found["roofs"]["products_per_cycle"], found["roofs"]["bytes_per_cycle"]
    points = found["roofline"]
    span = [*(point["intensity"] for point in points), peak / memory]
    ends = [min(span) / 4, max(span) * 4]
    axes.plot([ends[0], peak / memory, ends[1]], [ends[0] * memory, peak, peak], color="black")
    axes.annotate(f"{memory} bytes per cycle", (ends[0] * 1.1, ends[0] * memory * 1.4), fontsize=8)
    axes.annotate(f"{peak} products per cycle", (peak / memory * 1.1, peak * 1.15), fontsize=8)
    for point in points:
        marker = "o" if point["name"].endswith("decode") else "s"
        axes.plot(point["intensity"], point["rate"], marker, markersize=6, label=point["name"])
    axes.figure.legend(loc="outside right upper", frameon=False, fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="products per byte of memory", ylabel="products per cycle")
