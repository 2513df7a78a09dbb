"""The board's end of the serial link (`hw/link.py`): requests become accesses to registers and memory.

A request acts only after its last byte has come and its CRC is right; anything else on the line is dropped, and the
host asks again. A request with the sequence number of the one before is a repetition, because its answer was lost: the
answer is sent again and nothing is done twice (a second START would run the program twice). Only IDENTIFY, which begins
a session, is always done; before it every other request is refused, so that a board that lost its power is noticed.
"""

from amaranth.hdl import Array, Cat, Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import exact_log2

from ..link import ANSWER, CRC_BYTES, HEADER_BYTES, MAX_WORDS, Command, LinkStatus, identity
from ..registers import ADDRESS_BITS
from .axi import AxiLite
from .serial_frame import FrameReceiver, FrameTransmitter
from .uart import UartReceiver, UartTransmitter

__all__ = ["SerialBridge", "WordAccess"]

_RESET_CYCLES = 16
_WAIT_CYCLES = 1 << 12  #: for an answer of registers or memory


class WordAccess(wiring.Signature):
    """One 32-bit word of the memory behind a port, seen from who asks.

    valid, and with it the rest, stays until ``done``, a pulse; ``answer`` then is the word read
    address : bytes, a multiple of 4
    """

    def __init__(self):
        super().__init__({"valid": Out(1), "write": Out(1), "port": Out(5), "address": Out(32), "data": Out(32),
                          "done": In(1), "answer": In(32)})


class SerialBridge(wiring.Component):
    """Serves one host.

    Members
    -------
    rx : In(1), tx : Out(1), the line
    axil : Out(AXI4-Lite) to the registers; memory : Out(WordAccess)
    overlay_reset : Out(1), a register, high for some cycles on RESET
    active : Out(1), while a request is served

    divisor : clocks per bit; memory_bytes : behind each port; clock_hz : what IDENTIFY says of the clock
    """

    def __init__(self, *, config, memory_bytes, divisor, clock_hz):
        self.config, self.memory_bytes, self.divisor, self.clock_hz = config, memory_bytes, divisor, clock_hz
        super().__init__({
            "rx": In(1, init=1), "tx": Out(1, init=1), "axil": Out(AxiLite(ADDRESS_BITS)), "memory": Out(WordAccess()),
            "overlay_reset": Out(1), "active": Out(1),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.receiver = receiver = UartReceiver(divisor=self.divisor)
        m.submodules.transmitter = transmitter = UartTransmitter(divisor=self.divisor)
        m.submodules.from_line = request = FrameReceiver()
        m.submodules.to_line = out = FrameTransmitter()
        wiring.connect(m, out.line, transmitter.bytes)
        m.d.comb += [
            receiver.rx.eq(self.rx), self.tx.eq(transmitter.tx), request.busy.eq(self.active),
            request.line.eq(receiver.data), request.line_valid.eq(receiver.valid),
            request.line_broken.eq(receiver.broken),
        ]

        # What comes in: the header, and words into a memory.
        header = Signal(8 * HEADER_BYTES)
        sequence, command, code, words, address = (header[:8], header[8:16], header[16:24], header[24:32], header[32:])
        m.submodules.received = received = Memory(shape=32, depth=MAX_WORDS + 1, init=[])
        word_write, word_read = received.write_port(), received.read_port()
        partial, place = Signal(24), request.index - HEADER_BYTES
        m.d.comb += [
            word_write.addr.eq(place[2:]), word_write.data.eq(Cat(partial, request.byte)),
            word_write.en.eq(request.valid & (request.index >= HEADER_BYTES) & (request.index[:2] == 3)),
        ]
        with m.If(request.valid):
            m.d.sync += partial.eq(Cat(partial[8:], request.byte))
            with m.If(request.index < HEADER_BYTES):
                m.d.sync += header.eq(Cat(header[8:], request.byte))

        # The answer, kept to be sent again.
        last, session = Signal(8), Signal()
        done_command, done_address = Signal(8), Signal(32)
        status, answered = Signal(LinkStatus), Signal(range(MAX_WORDS + 1))
        m.submodules.answer = answer = Memory(shape=32, depth=MAX_WORDS + 1, init=[])
        answer_write, answer_read = answer.write_port(), answer.read_port()

        axil, memory = self.axil, self.memory
        at, where = Signal(range(MAX_WORDS + 1)), Signal(32)
        waiting = Signal(range(_WAIT_CYCLES))
        reading, writing, of_memory = Signal(), Signal(), Signal()
        m.d.comb += [
            reading.eq((command == Command.READ_REGISTERS) | (command == Command.READ_MEMORY)),
            writing.eq((command == Command.WRITE_REGISTERS) | (command == Command.WRITE_MEMORY)),
            of_memory.eq((command == Command.READ_MEMORY) | (command == Command.WRITE_MEMORY)),
            word_read.addr.eq(at), answer_write.addr.eq(at),
            axil.awaddr.eq(where), axil.araddr.eq(where), axil.wdata.eq(word_read.data), axil.wstrb.eq(0b1111),
            memory.address.eq(where), memory.port.eq(code), memory.write.eq(writing), memory.data.eq(word_read.data),
        ]
        carried = Signal(range(MAX_WORDS + 1))  # words that came with the request
        size, end, fits = Signal(range(4 * MAX_WORDS + 1)), Signal(33), Signal()
        m.d.comb += [
            carried.eq((request.count - (HEADER_BYTES + CRC_BYTES))[2:]), size.eq(Cat(Const(0, 2), words)),
            end.eq(address + size),
            fits.eq((words != 0) & (address[:2] == 0) & (request.count[:2] == 0)
                    & (carried == Mux(writing, words, 0))
                    & Mux(of_memory, (end <= self.memory_bytes) & (code < self.config.ports),
                          (end <= 1 << ADDRESS_BITS) & (code == 0))),
        ]

        # Word accesses: one after the other.
        asked = Signal(3)  # channels of the register access that are not through: address, data, answer
        finished, failed, read_data = Signal(), Signal(), Signal(32)
        m.d.comb += [
            axil.awvalid.eq(asked[0] & writing), axil.wvalid.eq(asked[1] & writing),
            axil.arvalid.eq(asked[0] & reading), axil.bready.eq(asked[2] & writing), axil.rready.eq(asked[2] & reading),
        ]
        with m.If((axil.awvalid & axil.awready) | (axil.arvalid & axil.arready)):
            m.d.sync += asked[0].eq(0)
        with m.If(axil.wvalid & axil.wready):
            m.d.sync += asked[1].eq(0)
        with m.If((axil.bvalid & axil.bready) | (axil.rvalid & axil.rready)):
            m.d.sync += asked[2].eq(0)
            m.d.comb += [finished.eq(1), failed.eq(Mux(writing, axil.bresp, axil.rresp)[1]), read_data.eq(axil.rdata)]
        with m.If(memory.valid & memory.done):
            m.d.comb += [finished.eq(1), read_data.eq(memory.answer)]
        m.d.comb += answer_write.data.eq(read_data)

        words_of_identity = Array(identity(self.config.config_hash, self.config.ports, self.memory_bytes,
                                           self.clock_hz).values())
        m.d.comb += self.active.eq(1)
        m.d.sync += self.overlay_reset.eq(0)
        with m.FSM():
            with m.State("idle"):
                m.d.comb += self.active.eq(0)
                m.d.sync += [at.eq(0), where.eq(address), waiting.eq(0)]
                with m.If(request.good):
                    m.next = "judge"
            with m.State("judge"):
                m.next = "send"
                with m.If((command == Command.IDENTIFY) | ~session | (sequence != last)):
                    m.d.sync += [done_command.eq(command), done_address.eq(address), status.eq(LinkStatus.OK),
                                 answered.eq(0)]
                    with m.If(command == Command.IDENTIFY):
                        m.d.sync += [session.eq(1), last.eq(sequence)]
                        m.next = "identify"
                    with m.Elif(~session):
                        m.d.sync += status.eq(LinkStatus.NO_SESSION)
                    with m.Else():
                        m.d.sync += last.eq(sequence)
                        with m.If(command == Command.RESET):
                            m.next = "reset"
                        with m.Elif(~reading & ~writing):
                            m.d.sync += status.eq(LinkStatus.UNKNOWN_COMMAND)
                        with m.Elif(~fits):
                            m.d.sync += status.eq(LinkStatus.BAD_REQUEST)
                        with m.Else():
                            m.next = "fetch"
            with m.State("identify"):
                m.d.comb += [answer_write.data.eq(words_of_identity[at]), answer_write.en.eq(1)]
                m.d.sync += at.eq(at + 1)
                with m.If(at == len(words_of_identity) - 1):
                    m.d.sync += [answered.eq(len(words_of_identity)), at.eq(0)]
                    m.next = "send"
            with m.State("reset"):
                m.d.sync += [self.overlay_reset.eq(waiting[exact_log2(_RESET_CYCLES)] == 0), waiting.eq(waiting + 1)]
                with m.If(waiting == 2 * _RESET_CYCLES):  # as long again until the next request
                    m.next = "send"
            with m.State("fetch"):
                m.next = "begin"
            with m.State("begin"):
                m.d.sync += [asked.eq(Mux(of_memory, 0, Cat(Const(1, 1), writing, Const(1, 1)))), waiting.eq(0)]
                m.next = "access"
            with m.State("access"):
                m.d.comb += [memory.valid.eq(of_memory), answer_write.en.eq(finished)]
                m.d.sync += waiting.eq(waiting + 1)
                with m.If(finished):
                    m.d.sync += [at.eq(at + 1), where.eq(where + 4)]
                    m.next = "fetch"
                    with m.If(at + 1 == words):
                        m.d.sync += answered.eq(Mux(reading, words, 0))
                        m.next = "send"
                with m.If((finished & failed) | (waiting == _WAIT_CYCLES - 1)):
                    m.d.sync += [status.eq(LinkStatus.BUS_ERROR), answered.eq(0), asked.eq(0)]
                    m.next = "send"
            with m.State("send"):
                m.d.sync += at.eq(0)
                m.next = "header"

            # The answer goes out byte by byte: the header, then words.
            byte, word = Signal(range(HEADER_BYTES)), Signal(32)
            head = Cat(sequence, done_command | ANSWER, Cat(status, Const(0, 8 - len(status))), Cat(answered)[:8],
                       done_address)
            m.d.comb += answer_read.addr.eq(at)
            with m.State("header"):
                m.d.comb += [out.frame.valid.eq(1), out.frame.payload.byte.eq(head.word_select(byte, 8)),
                             out.frame.payload.last.eq((byte == HEADER_BYTES - 1) & (answered == 0))]
                with m.If(out.frame.ready):
                    m.d.sync += byte.eq(byte + 1)
                    with m.If(byte == HEADER_BYTES - 1):
                        m.next = "word"
                        with m.If(answered == 0):
                            m.next = "idle"
            with m.State("word"):
                m.d.sync += [word.eq(answer_read.data), at.eq(at + 1)]
                m.next = "bytes"
            with m.State("bytes"):
                m.d.comb += [out.frame.valid.eq(1), out.frame.payload.byte.eq(word),
                             out.frame.payload.last.eq((byte == 3) & (at == answered))]
                with m.If(out.frame.ready):
                    m.d.sync += [byte.eq(byte + 1), word.eq(word >> 8)]
                    with m.If(byte == 3):
                        m.d.sync += byte.eq(0)
                        m.next = "word"
                        with m.If(at == answered):
                            m.next = "idle"
        return m
