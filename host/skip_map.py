"""The skip map of a sequence: which tokens ran which module of which layer, for terminals and as a picture.

In a terminal a character stands for one layer and one token: its upper half for attention, its lower half for the MLP,
filled where the module ran.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from .errors import RequestError
from .routers import MODULES

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["FORMATS", "draw", "print_map", "rates"]

FORMATS = (".png", ".svg")
_CELLS = {(False, False): "·", (True, False): "▀", (False, True): "▄", (True, True): "█"}
_INKS = {"attention": "#3b6ea8", "mlp": "#c1783c"}
_PAPER = "#eeeeee"


def rates(decisions: np.ndarray) -> dict[str, Any]:
    """Shares of modules skipped: skip_attention, skip_mlp, and skip_by_layer [[attention, mlp], ...].

    decisions : bool [layers, 2, tokens], true where a module ran
    """
    skipped = 1 - decisions.mean((0, 2))
    return {f"skip_{module}": float(value) for module, value in zip(MODULES, skipped)} | {
        "skip_by_layer": (1 - decisions.mean(2)).tolist()}


def print_map(console: Console, decisions: np.ndarray, prompt: int) -> None:
    """Print the map, a line for each layer with its rates, in as many parts as the width of the console asks for.

    prompt : tokens of the prompt; a bar stands behind them
    """
    layers, _, tokens = decisions.shape
    skipped = 1 - decisions.mean(2)
    label, room = len(str(layers - 1)), max(8, console.width - len(str(layers - 1)) - 16)
    for first in range(0, tokens, room):
        part = range(first, min(first + room, tokens))
        console.print(f"tokens {first}..{part[-1]}; right: skipped attention, MLP",
                      highlight=False)
        for layer in range(layers):
            cells = [_CELLS[bool(attention), bool(mlp)] for attention, mlp in decisions[layer, :, first : part.stop].T]
            if prompt in part:
                cells.insert(prompt - first, "│")
            console.print(f"{layer:{label}} {''.join(cells)} {skipped[layer, 0]:4.0%} {skipped[layer, 1]:4.0%}",
                          highlight=False, overflow="ignore", no_wrap=True)


def draw(path: str | Path | BinaryIO, decisions: np.ndarray, prompt: int, title: str,
         kind: str | None = None) -> None:
    """Write the map as a picture: two panels, layer by token, with the rates of every layer beside them.

    path : a file's, or an open file; kind : ".png" or ".svg", by default the ending of ``path``
    Raises RequestError for another ending.
    """
    kind = kind or (Path(path).suffix if isinstance(path, (str, Path)) else "")
    if kind not in FORMATS:
        raise RequestError(f"a skip map is written as {' or '.join(FORMATS)}, not {str(path)!r}")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    layers, _, tokens = decisions.shape
    figure = Figure(figsize=(min(16, 4 + tokens / 10), 2.5 + layers / 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2, sharey=True, width_ratios=(max(4.0, tokens / 12), 1), squeeze=False)
    for module, name in enumerate(MODULES):
        cells, bars = axes[module]
        ran, skipped = decisions[:, module], 1 - decisions[:, module].mean(1)
        cells.imshow(ran, ListedColormap([_PAPER, _INKS[name]]), aspect="auto", vmin=0, vmax=1,
                     interpolation="nearest")
        cells.axvline(prompt - 0.5, color="black", linewidth=0.8)
        cells.set(title=f"{name}: {1 - ran.mean():.1%} skipped", ylabel="layer", xlabel="token")
        bars.barh(range(layers), skipped, color=_INKS[name])
        bars.set(xlim=(0, 1), xlabel="share skipped")
    figure.suptitle(title)
    figure.savefig(path, format=kind[1:], dpi=150, metadata={"Date": None} if kind == ".svg" else None)
