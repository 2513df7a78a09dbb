"""A UART: eight data bits, no parity, one stop bit, at the clock divided by a constant.

The receiver samples in the middle of a bit, so sender and receiver may be apart by about 4% of the rate.
"""

from amaranth.hdl import Cat, Const, Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.cdc import FFSynchronizer
from amaranth.lib.wiring import In, Out

__all__ = ["UartReceiver", "UartTransmitter"]

_DATA_BITS = 8
_LEAST_DIVISOR = 4  # the middle of a bit must be told from its edges


def _checked(divisor):
    if divisor < _LEAST_DIVISOR:
        raise ValueError(f"divisor must be at least {_LEAST_DIVISOR} clocks per bit, not {divisor}")
    return divisor


class UartReceiver(wiring.Component):
    """Bytes from a line.

    Members
    -------
    rx : In(1), the line, asynchronous, high when idle
    data : Out(8); valid : Out(1), pulse: ``data`` has arrived; it cannot be held back
    broken : Out(1), pulse: a byte without its stop bit
    """

    def __init__(self, *, divisor):
        self.divisor = _checked(divisor)
        super().__init__({"rx": In(1, init=1), "data": Out(_DATA_BITS), "valid": Out(1), "broken": Out(1)})

    def elaborate(self, platform):
        m = Module()
        line = Signal(init=1)
        m.submodules.synchroniser = FFSynchronizer(self.rx, line, init=1)
        timer = Signal(range(self.divisor + self.divisor // 2))
        left = Signal(range(_DATA_BITS + 1))
        m.d.sync += [self.valid.eq(0), self.broken.eq(0)]
        with m.FSM():
            with m.State("idle"):
                m.d.sync += timer.eq(self.divisor // 2 - 1)
                with m.If(~line):
                    m.next = "start"
            with m.State("start"):  # half a bit later the line must still be low: otherwise it was a spike
                m.d.sync += [timer.eq(timer - 1), left.eq(_DATA_BITS)]
                with m.If(timer == 0):
                    m.d.sync += timer.eq(self.divisor - 1)
                    m.next = "bits"
                    with m.If(line):
                        m.next = "idle"
            with m.State("bits"):
                m.d.sync += timer.eq(timer - 1)
                with m.If(timer == 0):
                    m.d.sync += [timer.eq(self.divisor - 1), left.eq(left - 1)]
                    with m.If(left == 0):
                        m.d.sync += [self.valid.eq(line), self.broken.eq(~line)]
                        m.next = "high"
                    with m.Else():
                        m.d.sync += self.data.eq(Cat(self.data[1:], line))
            with m.State("high"):  # after a byte without stop bit, the next start needs a high line first
                with m.If(line):
                    m.next = "idle"
        return m


class UartTransmitter(wiring.Component):
    """Bytes to a line.

    Members
    -------
    bytes : In(stream of 8 bits)
    tx : Out(1), the line, a register
    """

    def __init__(self, *, divisor):
        self.divisor = _checked(divisor)
        super().__init__({"bytes": In(stream.Signature(_DATA_BITS)), "tx": Out(1, init=1)})

    def elaborate(self, platform):
        m = Module()
        frame_bits = _DATA_BITS + 2
        timer, left = Signal(range(self.divisor)), Signal(range(frame_bits + 1))
        bits = Signal(frame_bits - 1, init=-1)  # data and stop bit behind the one on the line
        m.d.comb += self.bytes.ready.eq((left == 0) & (timer == 0))
        with m.If(timer != 0):
            m.d.sync += timer.eq(timer - 1)
        with m.Elif(left != 0):
            m.d.sync += [self.tx.eq(bits[0]), bits.eq(Cat(bits[1:], Const(1, 1))), left.eq(left - 1),
                         timer.eq(self.divisor - 1)]
        with m.Elif(self.bytes.valid):
            m.d.sync += [self.tx.eq(0), bits.eq(Cat(self.bytes.payload, Const(1, 1))), left.eq(frame_bits - 1),
                         timer.eq(self.divisor - 1)]
        return m
