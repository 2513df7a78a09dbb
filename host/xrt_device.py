"""A card of AMD's with the overlay as an XRT kernel (`skipopu export`) behind the Device interface.

pyxrt is imported when a card is opened. Memory of port p is one buffer in pseudo-channel HBM[p]. What the host writes
goes to the card at once and what it reads comes from there, so that no stale copy is ever seen.
"""

from __future__ import annotations

import os
import time
from importlib import import_module
from typing import Any

import numpy as np
from skipopu.hw.config import OverlayConfig
from skipopu.hw.registers import RESET_KEY, Status

from .device import Device, read_register, write_register
from .errors import DeviceError

__all__ = ["BUFFER_ALIGNMENT", "KERNEL", "SYNC_ALIGNMENT", "XrtDevice", "list_cards"]

KERNEL = "skipopu"
BUFFER_ALIGNMENT = 4096  #: bytes; of a buffer's size and address
SYNC_ALIGNMENT = 64  #: bytes; of what moves between host and card
_XCLBIN, _CARD = "SKIPOPU_XCLBIN", "SKIPOPU_XRT_CARD"
_DRAIN_SECONDS = 1e-3  # by then every burst of a machine that has stopped is answered


def _pyxrt() -> Any:
    try:
        return import_module("pyxrt")
    except ImportError as error:
        raise DeviceError(f"Python cannot import pyxrt ({error}): install AMD's XRT and source its setup.sh in this "
                          f"shell") from None


def list_cards() -> list[str]:
    """Names of the cards that XRT sees, by index. Raises DeviceError without pyxrt."""
    xrt = _pyxrt()
    return [xrt.device(index).get_info(xrt.xrt_info_device.name) for index in range(xrt.enumerate_devices())]


class XrtDevice(Device):
    """The kernel `skipopu` of an xclbin.

    xclbin : file; by default what the environment names in SKIPOPU_XCLBIN
    card : index of the card; by default SKIPOPU_XRT_CARD, or 0
    Raises DeviceError if XRT, the card, the file, a memory bank or access to registers is missing.
    """

    def __init__(self, config: OverlayConfig, memory_bytes: int, *, xclbin: str | None = None,
                 card: int | None = None) -> None:
        self.config = config
        self.memory_bytes = -(-memory_bytes // BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT
        self._xrt = xrt = _pyxrt()
        path = xclbin or os.environ.get(_XCLBIN)
        if not path:
            raise DeviceError(f"device xrt needs a bitstream: set {_XCLBIN} to the skipopu.xclbin that `make` built in "
                              f"the folder of `skipopu export`")
        if not os.path.isfile(path):
            raise DeviceError(f"{path} is no file; {_XCLBIN} must name the skipopu.xclbin of this configuration")
        number = str(card if card is not None else os.environ.get(_CARD, "0"))
        if not number.isdecimal() or int(number) >= (present := xrt.enumerate_devices()):
            found = f"there are {present}" if number.isdecimal() else "it must be a number"
            raise DeviceError(f"XRT card {number} is not there ({found}); see `skipopu devices`, choose with {_CARD}")
        try:
            self._card = xrt.device(int(number))
            uuid = self._card.load_xclbin(path)
            self._buffers = self._allocate(xrt.xclbin(path))
            self._registers = self._open_registers(int(number), path, uuid)
        except RuntimeError as error:  # what pyxrt raises
            raise DeviceError(f"XRT refused {path} on card {number}: {error}") from None
        self._views = [np.frombuffer(buffer.map(), np.uint8) for buffer in self._buffers]

    def _allocate(self, image: Any) -> list[Any]:
        banks = {memory.get_tag(): memory for memory in image.get_mems() if memory.get_used()}
        buffers = []
        for port in range(self.config.ports):
            bank = banks.get(f"HBM[{port}]")
            if bank is None:
                raise DeviceError(f"the xclbin connects nothing to HBM[{port}], but configuration {self.config.name} "
                                  f"has {self.config.ports} ports; load the matching bitstream")
            if self.memory_bytes > bank.get_size_kb() << 10:
                raise DeviceError(f"the model needs {self.memory_bytes} bytes behind each port, HBM[{port}] has "
                                  f"{bank.get_size_kb() << 10}; compile with a shorter context")
            buffer = self._xrt.bo(self._card, self.memory_bytes, self._xrt.bo.flags.normal, bank.get_index())
            if buffer.address() % BUFFER_ALIGNMENT:
                raise DeviceError(f"XRT placed a buffer at {buffer.address():#x}, not at a multiple of "
                                  f"{BUFFER_ALIGNMENT}")
            buffers.append(buffer)
        return buffers

    def _open_registers(self, card: int, path: str, uuid: Any) -> Any:
        if hasattr(self._xrt, "ip"):
            return self._xrt.ip(self._card, uuid, KERNEL)
        try:
            return import_module("skipopu_xrt_ip").ip(card, path, KERNEL)
        except ImportError:
            raise DeviceError("this pyxrt cannot access registers: run `make binding` in the folder of `skipopu "
                              "export` and add that folder to PYTHONPATH") from None

    def csr_read(self, offset: int) -> int:
        try:
            return self._registers.read_register(offset)
        except RuntimeError as error:
            raise DeviceError(f"register {offset:#x} does not answer: {error}") from None

    def csr_write(self, offset: int, value: int) -> None:
        try:
            self._registers.write_register(offset, value & 0xFFFFFFFF)
        except RuntimeError as error:
            raise DeviceError(f"register {offset:#x} does not answer: {error}") from None

    def read_memory(self, port: int, address: int, size: int) -> np.ndarray:
        self._check(port, address, size)
        self._fetch(port, address, address + size)
        return self._views[port][address : address + size].copy()

    def write_memory(self, port: int, address: int, data: np.ndarray) -> None:
        end = address + len(data)
        self._check(port, address, len(data))
        for edge in {address, end}:  # neighbours of what is written travel with it: as the card has them
            if edge % SYNC_ALIGNMENT:
                self._fetch(port, edge, edge)
        self._views[port][address:end] = data
        self._sync(port, address, end, self._xrt.xclBOSyncDirection.XCL_BO_SYNC_BO_TO_DEVICE)

    def port_base(self, port: int) -> int:
        return self._buffers[port].address()

    def reset(self) -> None:
        """Reset the kernel by its RESET register; memory is kept. Raises DeviceError if it stays as it was."""
        time.sleep(_DRAIN_SECONDS)
        write_register(self, "RESET", RESET_KEY)
        if (status := read_register(self, "STATUS")) != Status.IDLE:
            raise DeviceError(f"the kernel did not reset (STATUS {status:#x}); load the bitstream again with "
                              f"`xbutil reset`")

    def close(self) -> None:
        self._views, self._buffers, self._registers, self._card = [], [], None, None

    def _fetch(self, port: int, begin: int, end: int) -> None:
        self._sync(port, begin, end, self._xrt.xclBOSyncDirection.XCL_BO_SYNC_BO_FROM_DEVICE)

    def _sync(self, port: int, begin: int, end: int, direction: Any) -> None:
        """Move the aligned blocks that hold bytes ``begin``..``end``, or the one at ``begin`` if these are equal."""
        first = begin - begin % SYNC_ALIGNMENT
        size = -(-max(end - first, 1) // SYNC_ALIGNMENT) * SYNC_ALIGNMENT
        try:
            self._buffers[port].sync(direction, size, first)
        except RuntimeError as error:
            raise DeviceError(f"XRT could not move {size} bytes of HBM[{port}]: {error}") from None

    def _check(self, port: int, address: int, size: int) -> None:
        if not (0 <= port < self.config.ports and 0 <= address and address + size <= self.memory_bytes):
            raise DeviceError(f"bytes {address}..{address + size - 1} of port {port} are outside the "
                              f"{self.memory_bytes} bytes behind each of {self.config.ports} ports")
