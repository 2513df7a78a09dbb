"""Profile a generation: timeline, analysis and report in one folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from skipopu.hw.config import OverlayConfig

from ..compiled import Compiled
from ..console import whole_file
from ..devices import open_device
from ..routes import Force
from ..session import device_options
from . import analysis
from .memory import memory_model
from .record import Profiled, Recording
from .report_page import page
from .trace import slices, write_json, write_perfetto

__all__ = ["FILES", "open_profiled", "write_profile"]

FILES = ("report.html", "profile.json", "trace.json", "trace.pftrace")


def open_profiled(device: str, compiled: Compiled, log: Callable[[str], None], force: Force | None = None,
                  memory: str = "ideal") -> Profiled:
    """``compiled`` on a newly opened device, recording. memory : simulated or predicted, one of `memory.MODELS`"""
    memory_model(memory, compiled.config)
    options = device_options(device, log, memory if device == "rtl" else None)
    size = compiled.map.memory * compiled.config.port_bits // 8
    return Profiled(open_device(device, compiled.config, size, **options), compiled, force=force, memory=memory)


def write_profile(folder: str | Path, title: str, config: OverlayConfig, recordings: Sequence[Recording],
                  facts: dict[str, str], log: Callable[[str], None] = lambda line: None) -> dict[str, Any]:
    """Write FILES to a folder, which is made; returns what stands in profile.json.

    facts : name -> text, for the top of the report; log : is told which file is written
    """
    target, label = Path(folder), recordings[-1].label
    target.mkdir(parents=True, exist_ok=True)
    found = analysis.as_json(config, recordings)
    found |= {"title": title, "config": config.name, "facts": facts, "labels": dict.fromkeys(found, label)}
    timeline = list(slices(recordings))
    writers: dict[str, Callable[[Path], object]] = {
        "profile.json": lambda path: path.write_text(json.dumps(found, indent=1)),
        "trace.json": lambda path: write_json(path, timeline, label),
        "trace.pftrace": lambda path: write_perfetto(path, timeline, label),
        "report.html": lambda path: path.write_text(page(title, config, recordings, facts), encoding="utf-8"),
    }
    for name in FILES:
        log(name)
        with whole_file(target / name) as partial:
            writers[name](partial)
    return found
