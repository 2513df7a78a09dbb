"""Open a device by name. Implementations are imported when asked for, so that none is needed to use another."""

from __future__ import annotations

from difflib import get_close_matches
from importlib import import_module
from typing import Any

from skipopu.hw.config import OverlayConfig

from .device import Device
from .errors import DeviceError

__all__ = ["DEVICES", "open_device", "register_device"]

DEVICES = {  # name -> module:class
    "functional": "skipopu.golden.device:FunctionalDevice",
    "rtl": "skipopu.sim.device:RtlDevice",
    "xrt": "skipopu.host.xrt_device:XrtDevice",
    "serial": "skipopu.host.serial_device:SerialDevice",
}


def register_device(name: str, location: str) -> None:
    """Add an implementation, ``module:class``; the class takes (config, memory_bytes, **options)."""
    DEVICES[name] = location


def open_device(name: str, config: OverlayConfig, memory_bytes: int, **options: Any) -> Device:
    """The named device with ``memory_bytes`` behind each port.

    Raises DeviceError for an unknown name, and if the implementation is not installed.
    """
    if name not in DEVICES:
        near = get_close_matches(name, DEVICES, 1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise DeviceError(f"unknown device {name!r}{hint}; known: {', '.join(DEVICES)}")
    module, _, kind = DEVICES[name].partition(":")
    try:
        implementation = getattr(import_module(module), kind)
    except ImportError as error:
        raise DeviceError(f"device {name!r} is not installed ({error})") from None
    return implementation(config, memory_bytes, **options)
