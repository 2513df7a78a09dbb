"""What the driver uses of pyxrt, strict about what real cards are strict about, with the functional device behind it.

A buffer has two copies, the host's and the card's, and only ``sync`` moves bytes between them. The kernel sees the
card's memory, under the addresses of its banks: PORT_BASE and PROGRAM must point into the right ones.
"""

import enum
from types import SimpleNamespace

import numpy as np
from skipopu.golden.device import FunctionalDevice
from skipopu.hw.registers import RESET_KEY, Access, Control, address, registers

__all__ = ["make_pyxrt"]

OFFSET = 0x10000  # of a buffer in its bank: an address that nobody set is wrong
BANK_BYTES = 256 << 20


class Sync(enum.Enum):
    XCL_BO_SYNC_BO_TO_DEVICE = 0
    XCL_BO_SYNC_BO_FROM_DEVICE = 1


class Card:
    """State of the fake card: its kernel, its buffers by bank, and what was synced."""

    def __init__(self, config, memory_bytes, banks):
        self.config, self.banks = config, banks
        self.kernel = FunctionalDevice(config, memory_bytes)
        self.buffers, self.syncs, self.xclbins = {}, [], []
        self.registers = {}

    def base(self, port):
        return BANK_BYTES * port + OFFSET


def make_pyxrt(config, memory_bytes, *, banks=None, with_ip=True, cards=1):
    """A module in place of pyxrt, and its Card. banks : tags of memories that are connected, by index."""
    banks = [f"HBM[{port}]" for port in range(config.ports)] if banks is None else banks
    state = Card(config, memory_bytes, banks)

    class device:
        def __init__(self, index):
            if index >= cards:
                raise RuntimeError(f"Could not open device with index '{index}'")

        def load_xclbin(self, path):
            with open(path, "rb") as file:
                if file.read(7) != b"xclbin2":
                    raise RuntimeError("No valid xclbin")
            state.xclbins.append(path)
            return "uuid"

        def get_info(self, key):
            assert key == "name"
            return "fake_u280"

    class bo:
        flags = SimpleNamespace(normal=0)

        def __init__(self, owner, size, flags, group):
            assert isinstance(owner, device) and flags == 0
            if size % 4096 or not 0 < size <= BANK_BYTES:
                raise RuntimeError(f"bad buffer size {size}")
            if not 0 <= group < len(state.banks):
                raise RuntimeError(f"no memory bank {group}")
            self.group, self.host = group, bytearray(np.random.default_rng(group).bytes(size))
            state.buffers[group] = self

        def address(self):
            return state.base(self.group)

        def map(self):
            return memoryview(self.host)

        def sync(self, direction, size, offset):
            if size % 64 or offset % 64 or size <= 0 or offset + size > len(self.host):
                raise RuntimeError(f"bad sync of {size} at {offset}")
            state.syncs.append((self.group, direction, size, offset))
            card = state.kernel.memory(self.group)
            if direction is Sync.XCL_BO_SYNC_BO_TO_DEVICE:
                card[offset:offset + size] = np.frombuffer(self.host, np.uint8)[offset:offset + size]
            else:
                self.host[offset:offset + size] = card[offset:offset + size].tobytes()

    class ip:
        def __init__(self, owner, uuid, name):
            if name != "skipopu":
                raise RuntimeError(f"no kernel {name}")

        def read_register(self, offset):
            return _register(state, offset)

        def write_register(self, offset, value):
            _write_register(state, offset, value)

    class xclbin:
        def __init__(self, path):
            assert path == state.xclbins[-1]

        def get_mems(self):
            return [SimpleNamespace(get_tag=lambda tag=tag: tag, get_used=lambda: True, get_index=lambda i=i: i,
                                    get_size_kb=lambda: BANK_BYTES >> 10) for i, tag in enumerate(state.banks)]

    module = SimpleNamespace(device=device, bo=bo, xclbin=xclbin, xclBOSyncDirection=Sync,
                             xrt_info_device=SimpleNamespace(name="name"), enumerate_devices=lambda: cards)
    if with_ip:
        module.ip = ip
    else:
        module.binding = SimpleNamespace(ip=lambda index, path, name: ip(device(index), path, name))
    return module, state


def _register(state, offset):
    assert offset % 4 == 0
    return state.registers.get(offset, state.kernel.csr_read(offset))


def _write_register(state, offset, value):
    assert offset % 4 == 0 and 0 <= value < 1 << 32
    kernel = state.kernel
    if offset == address("RESET"):
        if value == RESET_KEY:
            state.registers = {}
            kernel.reset()
        return
    if offset == address("CTRL") and value & Control.START:
        for port in range(state.config.ports):
            found = _word(state, "PORT_BASE", port)
            bank = state.banks.index(f"HBM[{port}]")
            assert found == state.buffers[bank].address(), f"PORT_BASE {port} is {found:#x}"
        program = _word(state, "PROGRAM") - state.base(0)
        assert 0 <= program < BANK_BYTES, "PROGRAM is not in the memory of port 0"
        kernel.csr_write(address("PROGRAM"), program)
        kernel.csr_write(address("PROGRAM") + 4, 0)
    elif address("PROGRAM") <= offset < address("PROGRAM") + 8 or any(
            item.address <= offset < item.end for item in (registers()["PORT_BASE"],)):
        state.registers[offset] = value  # the functional device has no base addresses
        return
    assert not any(item.access == Access.READ_ONLY and item.address <= offset < item.end
                   for item in registers().values()), f"write to read-only register {offset:#x}"
    kernel.csr_write(offset, value)


def _word(state, name, index=0):
    at = address(name, index)
    return state.registers.get(at, 0) | state.registers.get(at + 4, 0) << 32
