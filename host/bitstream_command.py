"""The command ``bitstream``: an image for a board whose tools are open."""

from __future__ import annotations

from typing import Annotated

import typer

from .console import print_json, progress

__all__ = ["bitstream"]

_BOARDS = {"ulx3s-85f": ("skipopu.bitstream.ulx3s", "ulx3s")}  # name -> module, configuration


def bitstream(board: Annotated[str, typer.Option("--board", help=f"Board: {', '.join(_BOARDS)}.")],
              output: Annotated[str, typer.Option("-o", "--output", help="Folder to write.")],
              config: Annotated[str | None, typer.Option("--config", help="Default: the board's.")] = None,
              seed: Annotated[int, typer.Option("--seed", min=0, help="Of the placement.")] = 1,
              as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False) -> None:
    """Build the overlay for a board with open tools: bitstream, and a report of resources and timing."""
    from difflib import get_close_matches
    from importlib import import_module

    from skipopu.hw.config import preset

    from .errors import RequestError
    if board not in _BOARDS:
        near = get_close_matches(board, _BOARDS, 1)
        raise RequestError(f"unknown board {board!r}{f', did you mean {near[0]!r}?' if near else ''}; known for "
                           f"bitstream: {', '.join(_BOARDS)}")
    module, its_config = _BOARDS[board]
    chosen = preset(config or its_config)
    with progress(f"building {board}") as update:
        report = import_module(module).build(chosen, output, seed=seed,
                                             log=lambda line: update(None, f"building {board}: {line}"))
    if as_json:
        print_json(report)
        return
    for line in import_module("skipopu.bitstream.ecp5").lines(report):
        print(line)
    print(f"{output}/{report['bitstream']}: configuration {chosen.name} ({chosen.config_hash:#010x})")
