"""Frames of the serial link (`hw/link.py`) from and to bytes: escapes, delimiters and the CRC-32."""

from amaranth.hdl import Module, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.crc import catalog
from amaranth.lib.wiring import In, Out

from ..link import CRC_BYTES, END, ESC, ESC_END, ESC_ESC, HEADER_BYTES, MAX_WORDS

__all__ = ["FRAME_BYTES", "FrameByte", "FrameReceiver", "FrameTransmitter"]

FRAME_BYTES = HEADER_BYTES + 4 * MAX_WORDS + CRC_BYTES  #: of the longest frame, without escapes

#: A byte of a frame's header or words; ``last``: the CRC follows.
FrameByte = data.StructLayout({"byte": 8, "last": 1})


def _crc():
    return catalog.CRC32_ETHERNET(data_width=8).create()


class FrameReceiver(wiring.Component):
    """Frames from bytes that cannot be held back.

    Members
    -------
    line : In(8), line_valid : In(1), line_broken : In(1), from `UartReceiver`
    busy : In(1), a frame with a byte in such a cycle is dropped: what it was to be stored in is in use
    byte : Out(8); valid : Out(1), pulse per byte of the frame, CRC included; index : Out, which one
    good : Out(1), pulse: a whole frame with the right CRC has ended; count : its bytes, CRC included, then
    """

    def __init__(self):
        super().__init__({
            "line": In(8), "line_valid": In(1), "line_broken": In(1), "busy": In(1),
            "byte": Out(8), "valid": Out(1), "index": Out(range(FRAME_BYTES + 1)),
            "good": Out(1), "count": Out(range(FRAME_BYTES + 1)),
        })

    def elaborate(self, platform):
        m = Module()
        m.submodules.crc = crc = _crc()
        escaped, bad = Signal(), Signal()
        special = Signal()
        m.d.comb += [
            special.eq((self.line == END) | ((self.line == ESC) & ~escaped)),
            self.valid.eq(self.line_valid & ~special & ~self.busy & (self.index != FRAME_BYTES)),
            self.byte.eq(self.line), crc.data.eq(self.byte), crc.valid.eq(self.valid),
        ]
        with m.If(escaped):
            m.d.comb += self.byte.eq(END)
            with m.If(self.line == ESC_ESC):
                m.d.comb += self.byte.eq(ESC)
        with m.If(self.valid):
            m.d.sync += self.index.eq(self.index + 1)

        m.d.sync += self.good.eq(0)
        with m.If(self.line_valid):
            with m.If(self.line == END):
                m.d.comb += crc.start.eq(1)
                m.d.sync += [
                    self.good.eq(crc.match_detected & ~bad & ~escaped & ~self.busy
                                 & (self.index >= HEADER_BYTES + CRC_BYTES)),
                    self.count.eq(self.index), self.index.eq(0), escaped.eq(0), bad.eq(0),
                ]
            with m.Else():
                m.d.sync += escaped.eq((self.line == ESC) & ~escaped)
                with m.If(self.busy | (escaped & (self.line != ESC_END) & (self.line != ESC_ESC))
                          | (~special & (self.index == FRAME_BYTES))):
                    m.d.sync += bad.eq(1)
        with m.If(self.line_broken):
            m.d.sync += bad.eq(1)
        return m


class FrameTransmitter(wiring.Component):
    """Frames to bytes; every frame gets its CRC and an ``END`` on both sides.

    Members
    -------
    frame : In(stream of FrameByte)
    line : Out(stream of 8 bits)
    """

    def __init__(self):
        super().__init__({"frame": In(stream.Signature(FrameByte)), "line": Out(stream.Signature(8))})

    def elaborate(self, platform):
        m = Module()
        m.submodules.crc = crc = _crc()
        frame, line = self.frame, self.line
        byte, have, escape = Signal(8), Signal(), Signal()
        check, left = Signal(8 * CRC_BYTES), Signal(range(CRC_BYTES + 1))
        special, sent = Signal(), Signal()
        m.d.comb += [
            special.eq((byte == END) | (byte == ESC)),
            sent.eq(line.valid & line.ready), crc.data.eq(frame.payload.byte),
        ]
        m.d.comb += line.valid.eq(have)
        with m.FSM():
            with m.State("idle"):
                m.d.comb += [crc.start.eq(1), line.payload.eq(END), line.valid.eq(frame.valid)]
                with m.If(sent):
                    m.next = "frame"
            with m.State("frame"):  # one byte at a time, so that the CRC has seen the last one before it is sent
                m.d.comb += frame.ready.eq(~have)
                with m.If(frame.valid & frame.ready):
                    m.d.comb += crc.valid.eq(1)
                    m.d.sync += [byte.eq(frame.payload.byte), have.eq(1)]
                    with m.If(frame.payload.last):
                        m.d.sync += left.eq(CRC_BYTES)
                        m.next = "check"
            with m.State("check"):
                with m.If(~have & (left != 0)):
                    m.d.sync += [byte.eq(check), have.eq(1), check.eq(check >> 8), left.eq(left - 1)]
                    with m.If(left == CRC_BYTES):
                        m.d.sync += [byte.eq(crc.crc), check.eq(crc.crc >> 8)]
                with m.Elif(~have):
                    m.next = "end"
            with m.State("end"):
                m.d.comb += [line.payload.eq(END), line.valid.eq(1)]
                with m.If(sent):
                    m.next = "idle"
        with m.If(have):
            m.d.comb += line.payload.eq(byte)
            with m.If(escape):
                m.d.comb += line.payload.eq(ESC_ESC)
                with m.If(byte == END):
                    m.d.comb += line.payload.eq(ESC_END)
            with m.Elif(special):
                m.d.comb += line.payload.eq(ESC)
            with m.If(sent):
                m.d.sync += [escape.eq(special & ~escape), have.eq(special & ~escape)]
        return m
