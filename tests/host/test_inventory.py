"""`skipopu devices` lists what is there, and what is missing for the rest, without failing over it."""

import json
import sys
from types import SimpleNamespace

import pytest
from fake_pyxrt import make_pyxrt
from skipopu.host.cli import main
from skipopu.host.inventory import Found, inventory
from skipopu.hw.config import preset
from skipopu.sim import toolchain


def of(name):
    return [item for item in inventory() if item.name == name]


@pytest.fixture
def bare(monkeypatch):
    """A machine without compiler, XRT and pyserial."""
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: None)
    for module in ("pyxrt", "serial", "serial.tools", "serial.tools.list_ports"):
        monkeypatch.setitem(sys.modules, module, None)


def ports(monkeypatch, *found):
    monkeypatch.setitem(sys.modules, "serial.tools.list_ports", SimpleNamespace(comports=lambda: list(found)))


def test_the_model_is_always_there(bare):
    first, *others = inventory()
    assert (first.name, first.present) == ("functional", True)
    assert [(item.name, item.present) for item in others] == [("rtl", False), ("xrt", False), ("serial", False)]
    rtl, xrt, serial = (item.detail for item in others)
    assert rtl.startswith("g++ not found: install") and "install AMD's XRT" in xrt and "pip install pyserial" in serial


def test_simulation_needs_its_tools():
    assert of("rtl")[0].present and "Verilator 5." in of("rtl")[0].detail


def test_every_card_and_every_usb_port_is_an_entry(monkeypatch):
    module, _ = make_pyxrt(preset("tiny"), 4096, cards=2)
    monkeypatch.setitem(sys.modules, "pyxrt", module)
    ports(monkeypatch, SimpleNamespace(device="/dev/ttyUSB1", description="FT231X", vid=0x403),
          SimpleNamespace(device="/dev/ttyS0", description="n/a", vid=None),
          SimpleNamespace(device="/dev/ttyUSB0", description="ULX3S", vid=0x403))
    assert of("xrt") == [Found("xrt", True, "card 0: fake_u280"), Found("xrt", True, "card 1: fake_u280")]
    assert of("serial") == [Found("serial", True, "/dev/ttyUSB0: ULX3S"), Found("serial", True, "/dev/ttyUSB1: FT231X")]


def test_nothing_plugged_in(monkeypatch):
    module, _ = make_pyxrt(preset("tiny"), 4096, cards=0)
    monkeypatch.setitem(sys.modules, "pyxrt", module)
    ports(monkeypatch)
    assert of("xrt") == [Found("xrt", False, "XRT sees no card: see `xbutil examine`")]
    assert of("serial") == [Found("serial", False, "no serial port on USB: connect the board's cable")]


def test_a_broken_xrt_is_an_entry_too(monkeypatch):
    def fail():
        raise RuntimeError("driver not loaded")
    monkeypatch.setitem(sys.modules, "pyxrt", SimpleNamespace(enumerate_devices=fail))
    assert of("xrt") == [Found("xrt", False, "driver not loaded")]


def test_the_command(capsys, bare):
    with pytest.raises(SystemExit) as stop:
        main(["devices"])
    lines = capsys.readouterr().out.splitlines()
    assert not stop.value.code and [line.split()[0] for line in lines] == ["functional", "rtl", "xrt", "serial"]
    assert "not here" not in lines[0] and all("not here: " in line for line in lines[1:])
    with pytest.raises(SystemExit):
        main(["devices", "--json"])
    assert [item["present"] for item in json.loads(capsys.readouterr().out)["devices"]] == [True, False, False, False]
