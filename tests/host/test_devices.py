"""Opening devices by name, and the register behaviour that software devices share with the hardware."""

import numpy as np
import pytest
from skipopu.golden.random_model import random_model
from skipopu.host import devices
from skipopu.host.compiler import compile_model
from skipopu.host.device import read_register, write_register
from skipopu.host.devices import open_device, register_device
from skipopu.host.errors import DeviceError
from skipopu.host.runtime import Accelerator
from skipopu.host.software_device import Outcome, SoftwareDevice
from skipopu.hw.config import preset
from skipopu.hw.registers import Control, DebugBuffer, FaultCause, Status, address

CONFIG = preset("tiny")


class Recorder(SoftwareDevice):
    """Remembers what it was asked to run; ``fault`` is what the next run ends with."""

    fault_next = None
    seen = None

    def execute(self, run):
        self.seen = run
        return Outcome(registers={"ARGMAX_INDEX": 7, "CYCLES": 5 << 32}, fault=self.fault_next, beats_read=5)


@pytest.fixture
def device():
    return Recorder(CONFIG, 4096)


def test_start_hands_over_the_registers_and_takes_the_outcome(device):
    write_register(device, "PROGRAM", 0x1_0000_0020)
    for name, value in (("PROGRAM_LENGTH", 9), ("ARG0", 3), ("ARG6", -1), ("MEMORY_LIMIT", 100)):
        write_register(device, name, value)
    write_register(device, "TOKEN_TABLE", 42, 2)
    device.start()
    device.wait(1)
    run = device.seen
    assert (run.program, run.length, run.memory_limit) == (0x1_0000_0020, 9, 100)
    assert run.arguments == (3, 0, 0, 0, 0, 0, 0xFFFFFFFF) and run.tokens == (0, 0, 42, 0)
    assert read_register(device, "CTRL") & Control.DONE and device.fault() is None
    assert read_register(device, "ARGMAX_INDEX") == 7
    counters = device.counters()
    assert counters["cycles"] == 5 << 32 and counters["bytes_read"] == 5 * CONFIG.port_bits // 8


def test_a_fault_stays_until_reset(device):
    device.fault_next = (FaultCause.WATCHDOG, 12, 1)
    device.start()
    assert device.fault() == (FaultCause.WATCHDOG, 12, 1)
    device.seen = None
    device.start()
    assert device.seen is None, "a faulted machine runs nothing"
    device.reset()
    assert device.fault() is None and read_register(device, "STATUS") == Status.IDLE
    device.identify()


def test_read_only_registers_do_not_change(device):
    write_register(device, "LANES", 99)
    assert read_register(device, "LANES") == CONFIG.lanes


def test_memory_is_checked_and_shared(device):
    device.write_memory(1, 4090, np.arange(6, dtype=np.uint8))
    np.testing.assert_array_equal(device.memory(1)[4090:], np.arange(6))
    np.testing.assert_array_equal(device.read_memory(1, 4092, 2), [2, 3])
    for port, first, size in ((0, 4090, 7), (2, 0, 1), (0, -1, 1)):
        with pytest.raises(DeviceError, match=f"of port {port} are outside the 4096 bytes"):
            device.read_memory(port, first, size)


def test_no_debug_view(device):
    write_register(device, "DEBUG_ADDRESS", DebugBuffer.MBUF << 28)
    with pytest.raises(DeviceError, match="no view into MBUF"):
        read_register(device, "DEBUG_DATA")


def test_registered_device_opens_and_closes(monkeypatch):
    monkeypatch.setattr(devices, "DEVICES", dict(devices.DEVICES))
    register_device("recorder", f"{__name__}:Recorder")
    with open_device("recorder", CONFIG, 64) as device:
        assert device.memory_bytes == 64 and device.config is CONFIG
    register_device("absent", "skipopu.nowhere:Device")
    with pytest.raises(DeviceError, match="device 'absent' is not installed"):
        open_device("absent", CONFIG, 64)


def test_unknown_device_suggests_a_name():
    with pytest.raises(DeviceError, match="unknown device 'functionel', did you mean 'functional'.; known: func"):
        open_device("functionel", CONFIG, 64)


@pytest.mark.parametrize(("register", "text"), [
    ("IDENTITY", "this is no skipopu overlay: register IDENTITY must read 0x504f4b53, not 0x504f4b52; load a"),
    ("VERSION", "register VERSION must read 0x.* for configuration tiny, not 0x.*; use the release that it was built"),
    ("CONFIG_HASH", "register CONFIG_HASH must read 0x.* for configuration tiny, not 0x.*; load the matching"),
    ("VECTOR_LANES", "register VECTOR_LANES must read 0x4 for configuration tiny, not 0x5; load the matching"),
])
def test_a_model_refuses_another_overlay_by_the_name_of_what_differs(register, text):
    class Other(Recorder):
        def csr_read(self, offset):
            return super().csr_read(offset) ^ (offset == address(register))

    compiled = compile_model(random_model(1, layers=1), CONFIG)
    device = Other(CONFIG, compiled.map.memory * CONFIG.port_bits // 8)
    with pytest.raises(DeviceError, match=text):
        Accelerator(device, compiled)
    assert not any(memory.any() for memory in device.memories), "nothing was loaded"
