"""Text that takes long to make, kept in the user's cache."""

import os
from collections.abc import Callable

from skipopu.sim.build import cache_root

__all__ = ["cached_text"]


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
