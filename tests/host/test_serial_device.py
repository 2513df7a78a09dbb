"""The serial driver without a board: absent, busy and several ports, connections that break, strange answers."""

import os
import sys
from types import SimpleNamespace

import pytest
from skipopu.host import devices
from skipopu.host.errors import DeviceError
from skipopu.host.serial_device import SerialDevice, find_port
from skipopu.hw.config import preset
from skipopu.hw.link import ANSWER, Command, Frame, FrameDecoder, LinkStatus, encode_frame, identity

CONFIG = preset("tiny")


class Board:
    """Answers as ``reply(request)`` says; a Frame, bytes or None."""

    timeout = 0.0

    def __init__(self, reply=None, **changes):
        self.reply, self.sent, self.closed = reply or (lambda request: None), b"", False
        self.identity = identity(CONFIG.config_hash, CONFIG.ports, 4096, 1) | changes
        self.decoder = FrameDecoder()

    def write(self, data):
        for request in self.decoder.feed(data):
            if request.command == Command.IDENTIFY:
                words = b"".join(value.to_bytes(4, "little") for value in self.identity.values())
                answer = Frame(request.sequence, Command.IDENTIFY | ANSWER, 0, len(words) // 4, 0, words)
            else:
                answer = self.reply(request)
            if answer is not None:
                self.sent += encode_frame(answer) if isinstance(answer, Frame) else answer

    def read(self, size):
        data, self.sent = self.sent[:size], self.sent[size:]
        return data

    def close(self):
        self.closed = True


def answer_to(request, **changes):
    """A right answer to the read of one register, but for ``changes``."""
    fields = {"sequence": request.sequence, "command": request.command | ANSWER, "words": 1,
              "address": request.address, "payload": bytes([7, 0, 0, 0])}
    return Frame(**(fields | changes))


def read_one(reply):
    return SerialDevice(CONFIG, 4096, line=Board(reply), retries=2).csr_read(8)


def test_a_register_is_read():
    assert read_one(answer_to) == 7


@pytest.mark.parametrize("changes", [
    {"sequence": 300 % 256}, {"command": Command.READ_MEMORY | ANSWER}, {"command": Command.READ_REGISTERS},
    {"address": 12}, {"words": 2}, {"payload": b""},
])
def test_answers_to_something_else_do_not_count(changes):
    if "sequence" in changes:
        def reply(request):
            return answer_to(request, sequence=(request.sequence + 1) % 256)
    else:
        def reply(request):
            return answer_to(request, **changes)
    with pytest.raises(DeviceError, match="no answer from the line to READ_REGISTERS after 3 attempts; nothing came"):
        read_one(reply)


def test_late_answers_of_earlier_requests_are_passed_over():
    def reply(request):
        late = answer_to(request, sequence=(request.sequence - 1) % 256, payload=bytes(4))
        return encode_frame(late) + encode_frame(answer_to(request))

    assert read_one(reply) == 7


def test_damaged_answers_are_counted_and_asked_for_again():
    tries = []

    def reply(request):
        tries.append(request)
        good = encode_frame(answer_to(request))
        return good if len(tries) == 3 else good[:5] + b"?" + good[6:]

    assert read_one(reply) == 7 and len({request.sequence for request in tries}) == 1
    with pytest.raises(DeviceError, match="after 3 attempts; 3 damaged frames came instead: check the cable"):
        read_one(lambda request: encode_frame(answer_to(request))[:-4] + b"\xc0")


@pytest.mark.parametrize("status, message", [
    (LinkStatus.NO_SESSION, "was restarted; open it again"),
    (LinkStatus.BUS_ERROR, "the overlay did not answer READ_REGISTERS at 0x8 of port 0; reset it"),
    (LinkStatus.BAD_REQUEST, "refused READ_REGISTERS at 0x8 of port 0 as BAD_REQUEST"),
    (LinkStatus.UNKNOWN_COMMAND, "as UNKNOWN_COMMAND"), (99, "with the unknown status 99"),
])
def test_refusals_are_errors(status, message):
    with pytest.raises(DeviceError, match=message):
        read_one(lambda request: answer_to(request, code=status, words=0, payload=b""))


@pytest.mark.parametrize("changes, message", [
    ({"LINK_IDENTITY": 1}, "LINK_IDENTITY of the board at the line must be 0x4b4c4b53"),
    ({"LINK_VERSION": 9}, "LINK_VERSION of .* must be 0x1 .*, not 0x9; load the matching bitstream"),
    ({"CONFIG_HASH": 5}, "CONFIG_HASH of .* for configuration tiny, not 0x5"),
    ({"PORTS": 1}, "PORTS of .* must be 0x2"),
    ({"MEMORY_BYTES": 4092}, "the model needs 4096 bytes .* has 4092, 4 too few"),
])
def test_another_board_is_refused_and_let_go(changes, message):
    board = Board(**changes)
    with pytest.raises(DeviceError, match=message):
        SerialDevice(CONFIG, 4096, line=board)
    assert board.closed


def test_a_connection_that_breaks(monkeypatch):
    board = Board(answer_to)
    device = SerialDevice(CONFIG, 4096, line=board)
    monkeypatch.setattr(board, "read", lambda size: (_ for _ in ()).throw(OSError("device disconnected")))
    with pytest.raises(DeviceError, match=r"the connection to the line broke \(device disconnected\); plug it in"):
        device.csr_read(0)


def test_a_port_that_does_not_exist():
    with pytest.raises(DeviceError, match="serial port /dev/ttyNONE does not exist; plug the board in"):
        SerialDevice(CONFIG, 1, port="/dev/ttyNONE")


def test_a_port_that_another_program_has():
    serial = pytest.importorskip("serial")
    ours, theirs = os.openpty()
    name = os.ttyname(theirs)
    with serial.Serial(name, exclusive=True), \
            pytest.raises(DeviceError, match=f"serial port {name} is in use by another program; close it first"):
        SerialDevice(CONFIG, 1, port=name)
    os.close(ours), os.close(theirs)


def test_a_port_where_nobody_answers():
    ours, theirs = os.openpty()
    with pytest.raises(DeviceError, match="no answer from /dev/pts/.* to IDENTIFY after 2 attempts; nothing came"):
        SerialDevice(CONFIG, 1, port=os.ttyname(theirs), timeout=0.02, retries=1)
    os.close(ours), os.close(theirs)


def test_pyserial_is_asked_for(monkeypatch):
    monkeypatch.setitem(sys.modules, "serial", None)
    with pytest.raises(DeviceError, match="a serial port needs the package pyserial: pip install pyserial"):
        SerialDevice(CONFIG, 1, port="/dev/ttyUSB0")


def test_the_only_board_is_found(monkeypatch):
    from serial.tools import list_ports
    ports = [SimpleNamespace(device="/dev/ttyS0", vid=None, pid=None),
             SimpleNamespace(device="/dev/ttyUSB0", vid=0x0403, pid=0x6015)]
    monkeypatch.setattr(list_ports, "comports", lambda: ports)
    monkeypatch.delenv("SKIPOPU_SERIAL_PORT", raising=False)
    assert find_port() == "/dev/ttyUSB0"
    ports.append(SimpleNamespace(device="/dev/ttyUSB1", vid=0x0403, pid=0x6015))
    with pytest.raises(DeviceError, match="set SKIPOPU_SERIAL_PORT to one of: /dev/ttyUSB0, /dev/ttyUSB1"):
        find_port()
    monkeypatch.setenv("SKIPOPU_SERIAL_PORT", "/dev/ttyUSB1")
    assert find_port() == "/dev/ttyUSB1"
    monkeypatch.delenv("SKIPOPU_SERIAL_PORT")
    del ports[1:]
    with pytest.raises(DeviceError, match=r"no board was found .*there are: /dev/ttyS0"):
        devices.open_device("serial", CONFIG, 1)
