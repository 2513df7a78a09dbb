"""Text that takes long to make, kept in the user's cache."""

import hashlib
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from skipopu.sim.build import cache_root

__all__ = ["cached_text", "hardware_digest"]


def cached_text(folder: str, name: str, make: Callable[[], str]) -> str:
    """The content of file ``name`` in ``folder`` of the cache; ``make`` makes it if it is not there.

    name : must change whenever the text could
    """
    target = cache_root() / folder / name
    if target.exists():
        return target.read_text()
    text = make()
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}")
    partial.write_text(text)
    partial.rename(target)  # a second process finds all of it or nothing
    return text


def hardware_digest(*parameters: Any) -> str:
    """A name for what the hardware's sources and tools make of ``parameters``, which are told apart by ``repr``."""
    sources = Path(__file__).resolve().parent.parent / "hw"
    digest = hashlib.sha256(repr((parameters, version("amaranth"), version("pyosys"))).encode())
    for path in sorted(sources.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:20]
