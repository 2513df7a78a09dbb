"""What commands print: text on stdout, progress and timings on stderr, files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["note", "print_json", "progress", "whole_file"]


def note(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, ensure_ascii=False), flush=True)


def _ignore(done: int | None, label: str | None) -> None:
    """Progress that nobody sees."""


@contextmanager
def progress(label: str, total: int | None = None) -> Iterator[Callable[[int | None, str | None], None]]:
    """A progress bar on stderr while something runs, if that is a terminal; it disappears at the end.

    total : steps, None if unknown (the bar then moves, and the time counts)
    Gives a function ``update(done, label)``; None leaves a value as it is.
    """
    if not sys.stderr.isatty():
        yield _ignore
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    columns = [TextColumn("{task.description}"), BarColumn(), *([MofNCompleteColumn()] if total else []),
               TimeElapsedColumn()]
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=total)

        def update(done: int | None, label: str | None) -> None:
            bar.update(task, completed=done, description=label)

        yield update


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A temporary file beside ``path`` that becomes it when the block ends well, and vanishes otherwise.

    Raises OSError if the folder cannot be written.
    """
    target = Path(path)
    if target.is_dir():
        raise IsADirectoryError(21, "Is a directory", str(path))
    try:
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    except OSError as error:
        raise type(error)(error.errno, error.strerror, str(path)) from None
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o666 & ~_umask())
        partial.replace(target)
    finally:
        partial.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
