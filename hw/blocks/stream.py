"""Stages that cut the timing paths of an `amaranth.lib.stream` without slowing it down."""

from amaranth.hdl import Module, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out

__all__ = ["StreamRegister"]


class StreamRegister(wiring.Component):
    """One stage in which ``valid``, ``payload`` and ``ready`` all come from registers (a skid buffer).

    A transfer in every cycle, order kept. Holds two payloads: the one on offer, and the one that arrives in the cycle
    in which the output stops, which ``i.ready`` can announce only one cycle later.

    Members
    -------
    i : In(stream of ``shape``)
    o : Out(stream of ``shape``); ``latency`` cycles after the transfer on ``i`` if ``o`` does not stall
    """

    latency = 1

    def __init__(self, shape):
        super().__init__({"i": In(stream.Signature(shape)), "o": Out(stream.Signature(shape))})

    def elaborate(self, platform):
        m = Module()
        # Payload registers need no reset: nothing reads them before a transfer has written them.
        payload = Signal.like(self.o.payload, reset_less=True)
        skid = Signal.like(self.i.payload, reset_less=True)
        ready = Signal(init=1)  # low while the skid register holds a payload
        m.d.comb += [self.o.payload.eq(payload), self.i.ready.eq(ready)]

        with m.If(self.o.ready | ~self.o.valid):
            m.d.sync += [self.o.valid.eq(self.i.valid | ~ready), ready.eq(1)]
            with m.If(ready):
                m.d.sync += payload.eq(self.i.payload)
            with m.Else():
                m.d.sync += payload.eq(skid)
        with m.Elif(self.i.valid):
            m.d.sync += ready.eq(0)
        with m.If(ready):
            m.d.sync += skid.eq(self.i.payload)
        return m
