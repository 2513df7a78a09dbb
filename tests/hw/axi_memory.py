"""A memory behind one AXI4 port of a bench: latency, pauses on every channel, injected errors, protocol checks.

Unlike cocotbext-axi's AxiRam it answers many bursts at once, each ``latency`` cycles after its request, as a memory
controller does; that is what read-ahead is measured against.
"""

import random
from collections import deque

import cocotb
from cocotb.triggers import RisingEdge
from skipopu.sim.bench import cycle

OKAY, SLVERR, DECERR = 0, 2, 3


class AxiMemory:
    """Serve the port ``prefix`` of ``dut``, whichever of the read and write channels it has.

    data : bytearray; base : byte address of its first byte; latency : cycles from request to first beat, and from the
    last written beat to the response; stall : probability of a pause in each cycle on each channel
    errors : {byte address of a beat: response code}; requests : (address, beats) of every burst; beats : cycle of each
    beat read; clock : of the port, `dut.clk` if None
    """

    def __init__(self, dut, prefix, data, *, base=0, latency=8, stall=0.0, seed=0, errors=None, clock=None):
        self.data, self.base, self.latency, self.stall = data, base, latency, stall
        self.errors = dict(errors or {})
        self.reads, self.writes, self.beats = [], [], []
        self._random = random.Random(f"{prefix} {seed}")
        self._clock = RisingEdge(dut.clk if clock is None else clock)
        self._signal = lambda name: getattr(dut, f"{prefix}__{name}")
        if hasattr(dut, f"{prefix}__araddr"):
            cocotb.start_soon(self._read())
        if hasattr(dut, f"{prefix}__awaddr"):
            cocotb.start_soon(self._write())

    def _go(self):
        return self._random.random() >= self.stall

    def _request(self, channel, offered, ready):
        """(address, beats) if a request was transferred at this edge; checks what AXI demands of it."""
        names = ("addr", "len", "size", "burst")
        now = tuple(self._signal(channel + name).value.to_unsigned() for name in names) \
            if self._signal(channel + "valid").value else None
        assert offered is None or now == offered, f"cycle {cycle()}: {channel} {offered} became {now} before ready"
        if now is None:
            return None, None
        address, length, size, burst = now
        count, width = length + 1, 1 << size
        assert burst == 1 and address % width == 0
        assert address // 4096 == (address + count * width - 1) // 4096, f"burst at {address:#x} crosses 4 KiB"
        return (None, (address, count, width)) if ready else (now, None)

    async def _read(self):
        s = self._signal
        pending, offered, ready, beat = deque(), None, False, None
        while True:
            await self._clock
            offered, burst = self._request("ar", offered, ready)
            if burst:
                address, count, width = burst
                self.reads.append((address, count))
                due = cycle() + self.latency
                pending.extend((due, address + i * width, width, i == count - 1) for i in range(count))
            if beat and s("rready").value:
                self.beats.append(cycle())
                beat = None
            if beat is None and pending and pending[0][0] <= cycle() + 1 and self._go():
                beat = pending.popleft()
                _, address, width, last = beat
                code = self._code(address)
                place = address - self.base
                s("rdata").value = 0 if code else int.from_bytes(self.data[place:place + width], "little")
                s("rresp").value, s("rlast").value = code, int(last)
            s("rvalid").value = int(beat is not None)
            ready = self._go()
            s("arready").value = int(ready)

    async def _write(self):
        s = self._signal
        bursts, responses, beats = deque(), deque(), []
        offered, ready, w_ready, w_offered, response = None, False, False, None, None
        while True:
            await self._clock
            valid = bool(s("wvalid").value)
            payload = tuple(s(name).value for name in ("wdata", "wstrb", "wlast"))
            now = tuple(int(value) for value in payload) if valid else None
            assert w_offered is None or now == w_offered, f"cycle {cycle()}: w changed before ready"
            w_offered = None if w_ready else now
            if valid and w_ready:
                beats.append(now)
            offered, burst = self._request("aw", offered, ready)
            if burst:
                self.writes.append(burst[:2])
                bursts.append(burst)
            asked = sum(count for _, count, _ in bursts) + (offered[1] + 1 if offered else 0)
            assert asked >= len(beats) + (valid and not w_ready), f"cycle {cycle()}: w without an address"
            while bursts and len(beats) >= bursts[0][1]:
                address, count, width = bursts.popleft()
                codes = [self._code(address + i * width) for i in range(count)]
                for i in range(count):
                    value, strobe, last = beats.pop(0)
                    assert strobe == (1 << width) - 1 and last == (i == count - 1)
                    place = address + i * width - self.base
                    if not codes[i]:
                        self.data[place:place + width] = value.to_bytes(width, "little")
                responses.append((cycle() + self.latency, max(codes)))
            if response is not None and s("bready").value:
                response = None
            if response is None and responses and responses[0][0] <= cycle() + 1 and self._go():
                response = responses.popleft()[1]
                s("bresp").value = response
            s("bvalid").value = int(response is not None)
            ready = self._go()
            s("awready").value = int(ready)
            # Data may not overtake their address: the interconnect would not know where they go.
            expected = sum(count for _, count, _ in bursts) - len(beats)
            w_ready = expected > 0 and self._go()
            s("wready").value = int(w_ready)

    def _code(self, address):
        if not 0 <= address - self.base < len(self.data):
            return DECERR
        return self.errors.get(address, OKAY)
