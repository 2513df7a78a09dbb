# amaranth: UnusedElaboratable=no
"""UART, frames, bridge and block memory together, through their pins: what is served, refused, repeated and dropped.

The registers behind the bridge are a small file that counts its writes, so that a write done twice shows.
"""

import zlib

import numpy as np
import pytest
from amaranth import ClockDomain, ClockSignal, Module, ResetInserter, ResetSignal, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from skipopu.hw.blocks.block_memory import BlockMemory
from skipopu.hw.blocks.serial_bridge import SerialBridge
from skipopu.hw.blocks.uart import UartReceiver, UartTransmitter
from skipopu.hw.config import preset
from skipopu.hw.link import (
    ANSWER,
    END,
    ESC,
    HEADER_BYTES,
    IDENTITY_FIELDS,
    LINK_IDENTITY,
    LINK_VERSION,
    MAX_WORDS,
    Command,
    Frame,
    FrameDecoder,
    LinkStatus,
    encode_frame,
)
from skipopu.hw.verilog import to_verilog
from skipopu.sim.serial_line import DIVISOR, SimulatedBoard

CONFIG = preset("tiny")
MEMORY = 2048
CLOCK = 25_000_000
WRITES, DEAF, BAD = 0x00, 0x40, 0x44  # addresses: count of writes, never answered, answered with an error
HARMLESS = bytes(range(1, 100))


class Registers(wiring.Component):
    """64 words from 0x100 on, a counter of all writes, and two addresses that misbehave."""

    def __init__(self, axil):
        super().__init__({"axil": In(axil), "writes": Out(8)})

    def elaborate(self, platform):
        m = Module()
        axil = self.axil
        words = [Signal(32, name=f"word{i}") for i in range(64)]
        write = axil.awvalid & axil.wvalid & ~axil.bvalid & (axil.awaddr != DEAF)
        m.d.comb += [axil.awready.eq(write), axil.wready.eq(write)]
        with m.If(write):
            m.d.sync += [axil.bvalid.eq(1), axil.bresp.eq((axil.awaddr == BAD) << 1), self.writes.eq(self.writes + 1)]
            for index, word in enumerate(words):
                with m.If(axil.awaddr == 0x100 + 4 * index):
                    m.d.sync += word.eq(axil.wdata)
        with m.If(axil.bvalid & axil.bready):
            m.d.sync += axil.bvalid.eq(0)
        m.d.comb += axil.arready.eq(~axil.rvalid & (axil.araddr != DEAF))
        with m.If(axil.arvalid & axil.arready):
            m.d.sync += [axil.rvalid.eq(1), axil.rresp.eq((axil.araddr == BAD) << 1), axil.rdata.eq(self.writes)]
            for index, word in enumerate(words):
                with m.If(axil.araddr == 0x100 + 4 * index):
                    m.d.sync += axil.rdata.eq(word)
        with m.If(axil.rvalid & axil.rready):
            m.d.sync += axil.rvalid.eq(0)
        return m


class Board(wiring.Component):
    """Bridge, registers and memory."""

    def __init__(self):
        super().__init__({"clk": In(1), "rst": In(1), "rx": In(1), "tx": Out(1), "running": Out(1), "fault": Out(1),
                          "active": Out(1)})

    def elaborate(self, platform):
        m = Module()
        m.domains.sync = ClockDomain()
        m.submodules.bridge = bridge = SerialBridge(config=CONFIG, memory_bytes=MEMORY, divisor=DIVISOR, clock_hz=CLOCK)
        registers = Registers(bridge.axil.signature)
        m.submodules.registers = ResetInserter(bridge.overlay_reset)(registers)
        m.submodules.memory = memory = BlockMemory(config=CONFIG, memory_bytes=MEMORY)
        wiring.connect(m, bridge.axil, registers.axil)
        wiring.connect(m, bridge.memory, memory.link)
        m.d.comb += [ClockSignal().eq(self.clk), ResetSignal().eq(self.rst), bridge.rx.eq(self.rx),
                     self.tx.eq(bridge.tx), self.active.eq(bridge.active)]
        return m


@pytest.fixture(scope="module")
def verilog():
    top = Board()
    names = ("clk", "rst", "rx", "tx", "running", "fault", "active")
    return to_verilog(top, name="skipopu_serial", ports={name: (getattr(top, name), None) for name in names})


@pytest.fixture
def board(verilog):
    line = SimulatedBoard(CONFIG, MEMORY, timeout=8e-3, verilog=verilog)
    yield line
    line.close()


class Talk:
    """Frames to the board and back."""

    def __init__(self, board, identify=True):
        self.board, self.decoder, self.sequence = board, FrameDecoder(), 0
        if identify:
            assert self.ask(Command.IDENTIFY).code == LinkStatus.OK

    def frame(self, command, code=0, address=0, words=None, payload=b""):
        self.sequence = (self.sequence + 1) % 256
        return Frame(self.sequence, command, code, len(payload) // 4 if words is None else words, address, payload)

    def send(self, data):
        """The one answer to bytes on the line, None for none."""
        self.board.write(data)
        while received := self.board.read(1):
            for frame in self.decoder.feed(received):
                return frame
        return None

    def ask(self, command, **fields):
        request = self.frame(command, **fields)
        answer = self.send(encode_frame(request))
        assert (answer.sequence, answer.command, answer.address) == (request.sequence, command | ANSWER,
                                                                     request.address)
        assert len(answer.payload) == 4 * answer.words and self.decoder.damaged == 0
        return answer

    def writes(self):
        return self.ask(Command.READ_REGISTERS, address=WRITES, words=1).payload[0]


def words(*values):
    return np.array(values, "<u4").tobytes()


def test_identify_says_what_the_board_is(board):
    answer = Talk(board, identify=False).ask(Command.IDENTIFY)
    assert dict(zip(IDENTITY_FIELDS, np.frombuffer(answer.payload, "<u4").tolist())) == {
        "LINK_IDENTITY": LINK_IDENTITY, "LINK_VERSION": LINK_VERSION, "CONFIG_HASH": CONFIG.config_hash,
        "PORTS": CONFIG.ports, "MEMORY_BYTES": MEMORY, "CLOCK_HZ": CLOCK}


@pytest.mark.parametrize("command", [command for command in Command if command != Command.IDENTIFY])
def test_nothing_is_served_before_identify(board, command):
    talk = Talk(board, identify=False)
    payload = words(1) if command in (Command.WRITE_REGISTERS, Command.WRITE_MEMORY) else b""
    assert talk.ask(command, address=0x100, words=1, payload=payload).code == LinkStatus.NO_SESSION
    assert talk.ask(Command.IDENTIFY).code == LinkStatus.OK and talk.writes() == 0


@pytest.mark.parametrize("values", [[0], [0xFFFFFFFF], [0xC0DBC0DB, 0xDBDCDDC0], list(range(64))])
def test_registers_keep_what_is_written(board, values):
    talk = Talk(board)
    assert talk.ask(Command.WRITE_REGISTERS, address=0x100, payload=words(*values)).code == LinkStatus.OK
    assert talk.writes() == len(values)
    answer = talk.ask(Command.READ_REGISTERS, address=0x100, words=len(values))
    assert answer.payload == words(*values)


@pytest.mark.parametrize("seed", [1, 2])
def test_memory_of_every_port_keeps_what_is_written(board, seed):
    talk, rng = Talk(board), np.random.default_rng(seed)
    expected = np.zeros((CONFIG.ports, MEMORY), np.uint8)
    for port in range(CONFIG.ports):
        for at in range(0, MEMORY, 4 * 128):
            talk.ask(Command.WRITE_MEMORY, code=port, address=at, payload=bytes(4 * 128))
    pieces = [(0, 0, MAX_WORDS), (1, MEMORY - 4, 1)]
    pieces += [(int(rng.integers(CONFIG.ports)), 4 * int(rng.integers(256)), int(rng.integers(1, 257)))
               for _ in range(12)]
    for port, address, count in pieces:
        data = rng.choice(np.array([0xC0, 0xDB, 0xDC, 0xDD, 0, 255, 7], np.uint8), 4 * min(count, MAX_WORDS))
        assert talk.ask(Command.WRITE_MEMORY, code=port, address=address, payload=data.tobytes()).code == 0
        expected[port, address:address + len(data)] = data
    for port in range(CONFIG.ports):
        for at in range(0, MEMORY, 4 * 128):
            got = talk.ask(Command.READ_MEMORY, code=port, address=at, words=128).payload
            assert got == expected[port, at:at + 512].tobytes(), (port, at)


BAD_REQUESTS = {
    "address beyond the memory": (Command.WRITE_MEMORY, {"address": MEMORY, "payload": words(1)}),
    "end beyond the memory": (Command.READ_MEMORY, {"address": MEMORY - 4, "words": 2}),
    "address that wraps around": (Command.WRITE_MEMORY, {"address": 0xFFFFFFFC, "payload": words(1, 2)}),
    "port that does not exist": (Command.WRITE_MEMORY, {"code": CONFIG.ports, "payload": words(1)}),
    "address between words": (Command.WRITE_MEMORY, {"address": 2, "payload": words(1)}),
    "register beyond the map": (Command.WRITE_REGISTERS, {"address": 0x1000, "payload": words(1)}),
    "register with a port": (Command.WRITE_REGISTERS, {"code": 1, "address": 0x100, "payload": words(1)}),
    "no words": (Command.READ_MEMORY, {"words": 0}),
    "fewer words than announced": (Command.WRITE_MEMORY, {"words": 2, "payload": words(1)}),
    "more words than announced": (Command.WRITE_MEMORY, {"words": 1, "payload": words(1, 2)}),
    "words in a read": (Command.READ_MEMORY, {"words": 1, "payload": words(1)}),
    "half a word": (Command.WRITE_MEMORY, {"words": 1, "payload": words(1) + b"ab"}),
}


@pytest.mark.parametrize("case", BAD_REQUESTS)
def test_bad_requests_are_refused_and_change_nothing(board, case):
    talk = Talk(board)
    command, fields = BAD_REQUESTS[case]
    everything = [talk.ask(Command.WRITE_MEMORY, code=port, address=at, payload=bytes(512))
                  for port in range(CONFIG.ports) for at in range(0, MEMORY, 512)]
    assert not any(answer.code for answer in everything)
    assert talk.ask(command, **fields).code == LinkStatus.BAD_REQUEST
    for port in range(CONFIG.ports):
        for at in range(0, MEMORY, 512):
            assert not any(talk.ask(Command.READ_MEMORY, code=port, address=at, words=128).payload)
    assert talk.writes() == 0


@pytest.mark.parametrize("command", [0, 7, 0x81, 255])
def test_unknown_commands_are_named_so(board, command):
    assert Talk(board).ask(command).code == LinkStatus.UNKNOWN_COMMAND


@pytest.mark.parametrize("command, payload", [(Command.READ_REGISTERS, b""), (Command.WRITE_REGISTERS, words(1))])
@pytest.mark.parametrize("address", [DEAF, BAD])
def test_registers_that_do_not_answer_or_fail(board, command, payload, address):
    talk = Talk(board)
    answer = talk.ask(command, address=address, words=1, payload=payload)
    assert (answer.code, answer.words) == (LinkStatus.BUS_ERROR, 0)
    talk.ask(Command.RESET)
    assert talk.ask(Command.WRITE_REGISTERS, address=0x100, payload=words(5)).code == LinkStatus.OK
    assert talk.writes() == 1


def test_a_repetition_is_answered_again_and_not_done_again(board):
    talk = Talk(board)
    request = encode_frame(talk.frame(Command.WRITE_REGISTERS, address=0x104, payload=words(9)))
    first, second = talk.send(request), talk.send(request)
    assert first == second and first.code == LinkStatus.OK and talk.writes() == 1
    read = encode_frame(talk.frame(Command.READ_REGISTERS, address=0x104, words=1))
    before = talk.send(read)
    assert before == talk.send(read) and before.payload == words(9)


def test_reset_keeps_memory_and_session(board):
    talk = Talk(board)
    talk.ask(Command.WRITE_MEMORY, address=8, payload=words(1, 2))
    talk.ask(Command.WRITE_REGISTERS, address=0x100, payload=words(3))
    assert talk.ask(Command.RESET).code == LinkStatus.OK
    assert talk.writes() == 0
    assert talk.ask(Command.READ_MEMORY, address=8, words=2).payload == words(1, 2)


def damaged_frames():
    """Bytes of a write that must not happen, in every way a line can spoil it."""
    good = encode_frame(Frame(77, Command.WRITE_REGISTERS, 0, 1, 0x100, words(0x12345678)))
    for index in range(1, len(good) - 1):
        yield good[:index] + good[index + 1:]  # a byte lost
        for bit in range(8):
            yield good[:index] + bytes([good[index] ^ 1 << bit]) + good[index + 1:]
    body = bytes(range(HEADER_BYTES))
    for cut in range(HEADER_BYTES + 4):  # short, with a right CRC where there is room for one
        short = (body[:cut] + zlib.crc32(body[:cut]).to_bytes(4, "little"))[:HEADER_BYTES + 3]
        yield bytes([END]) + short + bytes([END])
    yield bytes([END, ESC, 0x01, END])
    yield bytes([END, ESC, END])
    yield encode_frame(Frame(77, Command.WRITE_REGISTERS, 0, 255, 0x100, bytes(4 * MAX_WORDS + 4)))
    yield bytes([END]) + bytes(3000) + bytes([END])
    yield good[:9]  # and never its end


def test_damaged_frames_change_nothing_and_the_next_one_is_served(board):
    talk = Talk(board)
    for frame in damaged_frames():
        board.write(frame)
    board.timeout = 0.05
    board.read(5000)  # a corrupted END may cut one frame into others, none of them sound
    assert talk.writes() == 0
    assert talk.ask(Command.WRITE_REGISTERS, address=0x100, payload=words(1)).code == LinkStatus.OK
    assert talk.writes() == 1


@pytest.mark.parametrize("seed", range(3))
def test_noise_between_frames_is_ignored(board, seed):
    talk, rng = Talk(board), np.random.default_rng(seed)
    for value in range(20):
        board.write(rng.integers(0, 256, int(rng.integers(1, 60)), dtype=np.uint8).tobytes() + bytes([END]))
        board.timeout = 1e-4
        board.read(100)
        board.timeout = 8e-3
        assert talk.ask(Command.WRITE_REGISTERS, address=0x100, payload=words(value)).code == LinkStatus.OK
        assert talk.ask(Command.READ_REGISTERS, address=0x100, words=1).payload == words(value)
    assert talk.writes() == 20


def test_a_frame_that_comes_during_another_ones_answer_is_dropped_or_served_whole(board):
    talk = Talk(board)
    for _ in range(30):
        board.write(encode_frame(talk.frame(Command.READ_MEMORY, address=0, words=MAX_WORDS))
                    + encode_frame(talk.frame(Command.WRITE_REGISTERS, address=0x100, payload=words(6))) * 3)
        board.timeout = 2e-3
        frames = list(talk.decoder.feed(board.read(5000)))
        assert frames and frames[0].words == MAX_WORDS and talk.decoder.damaged == 0
    assert talk.writes() <= 30


def test_the_decoder_takes_apart_what_the_encoder_makes():
    rng = np.random.default_rng(3)
    decoder, frames = FrameDecoder(), []
    for size in (0, 1, 2, 40, MAX_WORDS):
        payload = rng.choice(np.array([END, ESC, 0xDC, 0xDD, 1], np.uint8), 4 * size).tobytes()
        frames.append(Frame(size, Command.WRITE_MEMORY, 1, size, 0xC0DBC0DB, payload))
    stream = HARMLESS + b"".join(map(encode_frame, frames))
    found = [frame for at in range(0, len(stream), 7) for frame in decoder.feed(stream[at:at + 7])]
    assert found == frames and decoder.damaged == 1


@pytest.mark.parametrize("component", [UartReceiver, UartTransmitter])
def test_a_bit_needs_four_clocks(component):
    with pytest.raises(ValueError, match="divisor must be at least 4 clocks per bit, not 3"):
        component(divisor=3)


@pytest.mark.parametrize("size", [0, 255, 300, -256])
def test_memory_sizes_are_whole_lines(size):
    with pytest.raises(ValueError, match=f"memory_bytes must be a positive multiple of 256, not {size}"):
        BlockMemory(config=CONFIG, memory_bytes=size)
