"""The self-test finds faults put into a device, names the part, and passes a device without."""

import json
import re

import numpy as np
import pytest
from skipopu.golden.device import FunctionalDevice
from skipopu.host import board_commands, devices
from skipopu.host.cli import main
from skipopu.host.device import read_register
from skipopu.host.devices import register_device
from skipopu.host.errors import DeviceError
from skipopu.host.selftest import CHECKS, Selftest
from skipopu.hw.config import preset
from skipopu.hw.registers import address

CONFIG = preset("tiny")


class OtherHash(FunctionalDevice):
    """Built from another configuration."""

    def csr_read(self, offset):
        return super().csr_read(offset) ^ (offset == address("CONFIG_HASH"))


class StuckBit(FunctionalDevice):
    """One bit of one table entry is always set."""

    def csr_read(self, offset):
        return super().csr_read(offset) | (offset == address("TOKEN_TABLE", 1)) << 9


class SharedBank(FunctionalDevice):
    """Both ports reach the same memory when the host asks."""

    def read_memory(self, port, address, size):
        return super().read_memory(0, address, size)

    def write_memory(self, port, address, data):
        super().write_memory(0, address, data)

    def memory(self, port):
        return None


class BadByte(FunctionalDevice):
    """The last byte of port 1 has a dead bit."""

    def write_memory(self, port, address, data):
        super().write_memory(port, address, data)
        if port == 1 and address + len(data) == self.memory_bytes:
            self.memories[1][-1] |= 1


class Disturbed(FunctionalDevice):
    """After the instruction ``mnemonic`` one value in ``buffer`` has another bit."""

    mnemonic, buffer = "", ""

    def __init__(self, config, memory_bytes):
        super().__init__(config, memory_bytes)

        def disturb(pc, item, values, writes):
            if item.mnemonic == self.mnemonic:
                for write in writes:
                    if write.buffer == self.buffer:
                        getattr(self.machine, self.buffer).view(np.uint16)[write.rows, 0] ^= 4
        self.machine.observer = disturb


def broken_in(mnemonic, buffer):
    return type("Broken", (Disturbed,), {"mnemonic": mnemonic, "buffer": buffer})


class WrongChoice(FunctionalDevice):
    """Chooses another token than its logits say."""

    def csr_read(self, offset):
        return super().csr_read(offset) ^ (offset == address("ARGMAX_INDEX"))


class NeverReady(FunctionalDevice):
    """Does not answer once it has started."""

    def start(self):
        raise DeviceError("the board did not answer within 2 s")


@pytest.fixture
def use(monkeypatch):
    monkeypatch.setattr(devices, "DEVICES", dict(devices.DEVICES))

    def register(kind):
        globals()["Chosen"] = kind
        register_device("chosen", f"{__name__}:Chosen")
        return "chosen"
    return register


def verdicts(name):
    test = Selftest(name, CONFIG)
    return {check.name: check for check in test.run()}


def test_a_device_without_faults_passes_every_check(use):
    found = verdicts(use(FunctionalDevice))
    assert list(found) == list(CHECKS) and all(check.passed for check in found.values()), found
    assert "configuration tiny" in found["identity"].detail
    assert re.fullmatch(r"6 patterns on 2 ports of [\d,]+ bytes", found["memory"].detail)
    assert int(found["nonlinear"].detail.split()[0]) > int(found["array"].detail.split()[0]) > 10


@pytest.mark.parametrize(("kind", "broken", "text"), [
    (OtherHash, "identity", r"register CONFIG_HASH must read 0x\w+ for configuration tiny, not 0x\w+"),
    (StuckBit, "registers", r"TOKEN_TABLE\[1\] holds 0x\w+ after 0x\w+ was written"),
    (SharedBank, "memory", r"port 0 byte 0x7 holds 0x01, not 0x00; 256 of 2048 bytes are wrong"),
    (BadByte, "memory", r"port 1 byte 0x\w+ holds 0x\w\w, not 0x\w\w; 1 of 2048 bytes are wrong"),
    (broken_in("vrope", "kvout"), "array", r"KVOUT row \d+ half-word 0 is .* after instruction \d+ \(layer 0"),
    (broken_in("vswiglu", "mbuf"), "nonlinear", r"MBUF row \d+ half-word 0 is .*gate_up\): vswiglu"),
    (WrongChoice, "layer", r"vlogits.*ARGMAX_INDEX row 0"),
    (NeverReady, "layer", r"did not answer within 2 s"),
])
def test_faults_are_found_and_named(use, kind, broken, text):
    found = verdicts(use(kind))
    assert not found[broken].passed and re.search(text, found[broken].detail), found[broken]
    names = list(CHECKS)
    for name in names[:names.index(broken)]:
        if (kind, name) not in {(NeverReady, "array"), (NeverReady, "nonlinear")}:
            assert found[name].passed, found[name]


def test_the_test_leaves_registers_at_zero(use):
    test = Selftest(use(FunctionalDevice), CONFIG)
    assert test.registers()
    assert read_register(test.device, "PROGRAM") == 0 and read_register(test.device, "TOKEN_TABLE", 3) == 0


def run(capsys, *arguments):
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_the_command_prints_a_line_per_check(capsys, use):
    code, out, _ = run(capsys, "selftest", "--device", "functional")
    assert code == 0 and [line.split()[:2] for line in out.splitlines()] == [["ok", f"{name}:"] for name in CHECKS]
    code, out, _ = run(capsys, "selftest", "--device", use(StuckBit))
    assert code == 1 and [line.split()[0] for line in out.splitlines()] == ["ok", "BROKEN", "ok", "ok", "ok", "ok"]
    code, out, _ = run(capsys, "selftest", "--device", use(StuckBit), "--json")
    report = json.loads(out)
    assert code == 1 and not report["passed"]
    assert [item["name"] for item in report["checks"] if not item["passed"]] == ["registers"]


def test_a_device_that_cannot_be_opened_is_one_line(capsys):
    code, out, err = run(capsys, "selftest", "--device", "functionel")
    assert (code, out) == (1, "") and err.startswith("skipopu: unknown device 'functionel', did you mean")


def test_commands_have_help():
    for command in (board_commands.export, board_commands.devices, board_commands.selftest):
        assert command.__doc__
