"""The XRT driver against a strict stand-in for pyxrt: same tokens, right banks, aligned transfers, clear refusals."""

import sys

import numpy as np
import pytest
from fake_pyxrt import Sync, make_pyxrt
from skipopu.golden.random_model import random_model
from skipopu.host.compiler import compile_model
from skipopu.host.device import read_register, write_register
from skipopu.host.devices import open_device
from skipopu.host.errors import DeviceError
from skipopu.host.runtime import Accelerator
from skipopu.host.xrt_device import BUFFER_ALIGNMENT, XrtDevice, list_cards
from skipopu.hw.config import preset
from skipopu.hw.registers import FaultCause, Status

CONFIG = preset("tiny")
PROMPT = [3, 1, 4, 1, 5, 9]


@pytest.fixture
def xclbin(tmp_path):
    path = tmp_path / "skipopu.xclbin"
    path.write_bytes(b"xclbin2\0")
    return str(path)


@pytest.fixture
def install(monkeypatch):
    def make(memory_bytes=1 << 16, config=CONFIG, **options):
        module, state = make_pyxrt(config, memory_bytes, **options)
        monkeypatch.setitem(sys.modules, "pyxrt", module)
        monkeypatch.setitem(sys.modules, "skipopu_xrt_ip", getattr(module, "binding", None))
        return state
    return make


@pytest.fixture(scope="module")
def compiled():
    return compile_model(random_model(3, layers=1), CONFIG)


def size_of(compiled):
    size = compiled.map.memory * CONFIG.port_bits // 8
    return -(-size // BUFFER_ALIGNMENT) * BUFFER_ALIGNMENT


@pytest.mark.parametrize("with_ip", [True, False], ids=["pyxrt.ip", "own binding"])
def test_a_model_generates_the_same_tokens_through_the_driver(install, xclbin, monkeypatch, compiled, with_ip):
    state = install(size_of(compiled), with_ip=with_ip)
    monkeypatch.setenv("SKIPOPU_XCLBIN", xclbin)
    plain = Accelerator(open_device("functional", CONFIG, size_of(compiled)), compiled)
    wanted = list(plain.generate(PROMPT, 8, None))
    accelerator = Accelerator(open_device("xrt", CONFIG, size_of(compiled)), compiled)
    assert list(accelerator.generate(PROMPT, 8, None)) == wanted
    np.testing.assert_array_equal(accelerator.logits(), plain.logits())
    assert {group for group, *_ in state.syncs} == set(range(CONFIG.ports))


def test_a_port_stands_in_the_bank_of_its_number_whatever_its_index(install, xclbin, compiled):
    state = install(size_of(compiled), banks=["HBM[1]", "HBM[0]"])
    device = XrtDevice(CONFIG, size_of(compiled), xclbin=xclbin)
    assert [device.port_base(port) for port in (0, 1)] == [state.base(1), state.base(0)]


def test_memory_is_moved_in_aligned_blocks_and_neighbours_stay(install, xclbin):
    state = install()
    device = XrtDevice(CONFIG, 1 << 16, xclbin=xclbin)
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 256, 1 << 16, dtype=np.uint8)
    state.kernel.memory(1)[:] = truth  # what the kernel has written, unseen by the host so far
    for address, size in [(0, 64), (1, 1), (63, 2), (64, 64), (100, 300), (65535, 1), (65536 - 64, 64), (5, 64)]:
        data = rng.integers(0, 256, size, dtype=np.uint8)
        device.write_memory(1, address, data)
        truth[address:address + size] = data
        np.testing.assert_array_equal(state.kernel.memory(1), truth)
        first = max(address - 3, 0)
        np.testing.assert_array_equal(device.read_memory(1, first, size), truth[first:first + size])
    state.kernel.memory(1)[7] ^= 255
    assert device.read_memory(1, 7, 1)[0] == truth[7] ^ 255, "a read asks the card"
    assert {direction for _, direction, *_ in state.syncs} == set(Sync)
    assert device.memory(1) is None, "nobody may write past sync"


def test_memory_ends_at_the_buffer(install, xclbin):
    install()
    device = XrtDevice(CONFIG, 5000, xclbin=xclbin)
    assert device.memory_bytes == 8192
    for port, address, size in ((0, 8190, 3), (2, 0, 1), (0, -1, 1)):
        with pytest.raises(DeviceError, match=f"of port {port} are outside the 8192 bytes behind each of 2 ports"):
            device.read_memory(port, address, size)


def test_a_fault_is_reported_and_a_reset_clears_it(install, xclbin, compiled):
    install(size_of(compiled))
    accelerator = Accelerator(XrtDevice(CONFIG, size_of(compiled), xclbin=xclbin), compiled)
    wanted = list(accelerator.generate(PROMPT, 3, None))
    accelerator.clear()
    write_register(accelerator.device, "MEMORY_LIMIT", 1)
    with pytest.raises(DeviceError, match=FaultCause.MEMORY_RANGE.name):
        list(accelerator.generate(PROMPT, 3, None))
    accelerator.reset()
    assert read_register(accelerator.device, "STATUS") == Status.IDLE
    assert list(accelerator.generate(PROMPT, 3, None)) == wanted


def test_a_kernel_without_reset_says_so(install, xclbin, monkeypatch):
    state = install()
    device = XrtDevice(CONFIG, 4096, xclbin=xclbin)
    state.kernel._set("STATUS", Status.FAULT)
    monkeypatch.setattr(state.kernel, "reset", lambda: None)
    with pytest.raises(DeviceError, match="the kernel did not reset .STATUS 0x8.; load the bitstream again"):
        device.reset()


def test_a_run_that_never_ends_times_out(install, xclbin):
    state = install()
    device = XrtDevice(CONFIG, 4096, xclbin=xclbin)
    state.kernel._set("STATUS", Status.RUNNING)
    with pytest.raises(DeviceError, match="did not finish within 0.01 s; it is at instruction 0"):
        device.wait(0.01)


def test_closed_devices_release_their_buffers(install, xclbin):
    state = install()
    with XrtDevice(CONFIG, 4096, xclbin=xclbin) as device:
        device.write_memory(0, 0, np.ones(64, np.uint8))
    assert device._buffers == [] and state.syncs


def test_cards_are_listed(install):
    install(cards=2)
    assert list_cards() == ["fake_u280", "fake_u280"]


def test_without_xrt(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyxrt", None)
    with pytest.raises(DeviceError, match="Python cannot import pyxrt .*: install AMD's XRT and source its setup.sh"):
        open_device("xrt", CONFIG, 4096)


def test_what_is_missing_is_named(install, xclbin, monkeypatch, tmp_path):
    install(1 << 16, banks=["HBM[0]"])
    monkeypatch.delenv("SKIPOPU_XCLBIN", raising=False)
    bad = tmp_path / "bad.xclbin"
    bad.write_bytes(b"none")
    for options, text in [
        ({}, "set SKIPOPU_XCLBIN to the skipopu.xclbin that `make` built"),
        ({"xclbin": "/nowhere.xclbin"}, "/nowhere.xclbin is no file"),
        ({"xclbin": str(bad)}, "XRT refused .*bad.xclbin on card 0: No valid xclbin"),
        ({"xclbin": xclbin, "card": 1}, r"XRT card 1 is not there \(there are 1\); see `skipopu devices`"),
        ({"xclbin": xclbin}, r"connects nothing to HBM\[1\], but configuration tiny has 2 ports"),
    ]:
        with pytest.raises(DeviceError, match=text):
            XrtDevice(CONFIG, 4096, **options)
    install()
    with pytest.raises(DeviceError, match=r"needs 536870912 bytes behind each port, HBM\[0\] has 268435456"):
        XrtDevice(CONFIG, 512 << 20, xclbin=xclbin)
    monkeypatch.setenv("SKIPOPU_XRT_CARD", "first")
    with pytest.raises(DeviceError, match="XRT card first is not there .it must be a number"):
        XrtDevice(CONFIG, 4096, xclbin=xclbin)


def test_registers_need_a_binding(install, xclbin, monkeypatch):
    install(with_ip=False)
    monkeypatch.setitem(sys.modules, "skipopu_xrt_ip", None)
    with pytest.raises(DeviceError, match="this pyxrt cannot access registers: run `make binding`"):
        XrtDevice(CONFIG, 4096, xclbin=xclbin)


def test_registers_that_do_not_answer(install, xclbin):
    install()
    device = XrtDevice(CONFIG, 4096, xclbin=xclbin)

    class Dead:
        def read_register(self, offset):
            raise RuntimeError("Input/output error")

        def write_register(self, offset, value):
            raise RuntimeError("Input/output error")

    device._registers = Dead()
    with pytest.raises(DeviceError, match="register 0x4c does not answer: Input/output error"):
        read_register(device, "STATUS")
    with pytest.raises(DeviceError, match="register 0x3c does not answer: Input/output error"):
        write_register(device, "WATCHDOG", 0)
