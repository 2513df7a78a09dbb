"""The commands around boards: ``export``, ``devices``, ``selftest``."""

from __future__ import annotations

from typing import Annotated

import typer
from skipopu.hw.config import PRESETS, preset

from .console import print_json, progress

__all__ = ["devices", "export", "selftest"]

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]


def export(board: Annotated[str, typer.Option("--board", help="Card to write for: u280 or u55c.")],
           output: Annotated[str, typer.Option("-o", "--output", help="Folder to write.")],
           config: Annotated[str | None, typer.Option("--config", help=f"Overlay configuration: {', '.join(PRESETS)}. "
                                                                       "Default: the card's.")] = None,
           as_json: JsonOption = False) -> None:
    """Write all that AMD's tools need to build the overlay for an Alveo card."""
    from importlib import import_module
    card = import_module("skipopu.bitstream.boards").alveo_board(board)
    chosen = preset(config or card.config)
    with progress(f"elaborating {chosen.name} for {card.title}"):
        names = import_module("skipopu.bitstream.alveo").export(card, chosen, output)
    if as_json:
        print_json({"board": board, "config": chosen.name, "config_hash": chosen.config_hash, "folder": output,
                    "files": names})
        return
    print(f"{output}: {len(names)} files for {card.title}, configuration {chosen.name} ({chosen.config_hash:#010x}); "
          f"its README.md says how to go on")


def devices(as_json: JsonOption = False) -> None:
    """List what a model can run on here, and what is missing for the rest."""
    from .inventory import inventory
    found = inventory()
    if as_json:
        print_json({"devices": [item.as_json() for item in found]})
        return
    for item in found:
        print(f"{item.name:10} {'' if item.present else 'not here: '}{item.detail}")


def selftest(device: Annotated[str, typer.Option("--device", help="Device to test: a name of `skipopu devices`.")],
             config: Annotated[str, typer.Option("--config", help=f"Its configuration: {', '.join(PRESETS)}.")]
             = "tiny", as_json: JsonOption = False) -> None:
    """Check a device part by part against the bit-exact model; exit with 1 if something is broken."""
    from .selftest import Selftest
    from .session import device_options
    results = []
    with progress(f"opening {device}") as update:
        test = Selftest(device, preset(config),
                        **device_options(device, lambda line: update(None, f"opening {device}: {line[:80]}")))
    with test.device:
        for check in test.run():
            results.append(check)
            if not as_json:
                print(check, flush=True)
    passed = all(check.passed for check in results)
    if as_json:
        print_json({"device": device, "config": config, "passed": passed,
                    "checks": [check.as_json() for check in results]})
    if not passed:
        raise typer.Exit(1)
