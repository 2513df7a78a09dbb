"""Drives the vector unit and the golden vector unit with the same instructions and compares everything they leave."""

from collections import Counter

import cocotb
import numpy as np
from cocotb.triggers import First, RisingEdge, ValueChange
from commands import as_command
from skipopu.golden.arithmetic import from_int, widen_half
from skipopu.golden.state import BeatStream, MachineState
from skipopu.golden.vector import VectorUnit
from skipopu.hw.blocks.command import Command
from skipopu.hw.blocks.load import AbufWrite
from skipopu.hw.blocks.mbuf import AlignedRow
from skipopu.hw.isa import ROUTER_ROWS_AT
from skipopu.sim.bench import StreamSink, StreamSource, cycle, pack, unpack

__all__ = ["VectorBench", "accumulators", "geometry"]

_NEVER_WRITTEN = -999  # no exponent


def geometry(rng, heads, groups, rows, beats, *, unit=1):
    """Counts and strides of a nest whose rows do not overlap; strides in random order, multiples of ``unit``."""
    counts = {"row_stride": rows, "group_stride": groups, "head_stride": heads}
    values, step = {"heads": heads, "groups": groups, "rows": rows, "beats": beats}, beats
    for name in rng.permutation(list(counts)):
        step += unit * int(rng.integers(0, 3))
        values[str(name)] = step
        step *= counts[name]
    return values


def accumulators(rng, beats, lanes, *, wild=0.05, exponent=4):
    """(acc, n), int64 [beats, lanes]: values of up to 2^exponent, a part of them anything that 48 and 10 bits hold."""
    shape = beats, lanes
    bits = rng.integers(0, 48, shape)
    acc = rng.integers(-(1 << 47), 1 << 47, shape) >> (47 - bits)
    n = exponent - bits - np.minimum(rng.geometric(0.3, shape) - 1, 20)
    strange = rng.random(shape) < wild
    n = np.where(strange, rng.integers(-512, 512, shape), n)
    corners = np.array([0, 1, -1, (1 << 47) - 1, -(1 << 47), 0xFFFFFF, 0x1000001, -0x1000001, 0x1FFFFFF])
    return np.where(rng.random(shape) < 0.1, rng.choice(corners, shape), acc), n


class VectorBench:
    """The unit under test with its streams, beside a golden machine that starts from the same buffers."""

    def __init__(self, dut, config, *, stall=0.0, load_stall=0.0, logits_stall=0.0, seed=0):
        self.dut, self.config, self.edge = dut, config, RisingEdge(dut.clk)
        per_tile = config.columns // config.vector_lanes
        self.state, self.results = MachineState(config), BeatStream(per_tile)
        self.logits = BeatStream(per_tile)
        self.tiles, self.tile = [], 0  # V exponents, int [heads, tokens], of the KV tiles; which one is next
        self.golden = VectorUnit(self.state, self.results, self.logits, self._fail, self._exponents)
        self.commands = StreamSource(dut, "cmd", shape=Command(config), seed=seed)
        self.acc = StreamSource(dut, "acc", stall=stall, seed=seed)
        self.load = StreamSource(dut, "load", stall=load_stall, seed=seed)
        self.sink = StreamSink(dut, "logits", stall=logits_stall, seed=seed)
        self.count = Counter()  # sum of an output over all cycles
        self.acc_cycles = []  # when each beat of results was taken
        self.mbuf, self.maxima, self.mbuf_writes = {}, {}, 0
        cocotb.start_soon(self._monitor())
        cocotb.start_soon(self._serve_exponents())

    def _fail(self, cause, detail):
        raise AssertionError(f"the bench sent what is a fault: {cause.name}, {detail}")

    def _exponents(self):
        return self.tiles[self.tile]

    async def take_buffers(self):
        """Take ABUF and KVOUT as they are into the golden machine, so that `compare_everything` may be used."""
        rows = np.arange(self.config.abuf_rows)
        self.state.load_abuf(rows, await self.read_abuf(rows))
        self.state.kvout[:] = await self.read_kvout(np.arange(self.config.kvout_rows))

    # ---- watching the outputs

    async def _monitor(self):
        dut, layout = self.dut, AlignedRow(self.config)
        while True:
            await self.edge
            for name in ("done", "saturated", "waiting", "busy"):
                self.count[name] += int(getattr(dut, name).value)
            if dut.acc__valid.value and dut.acc__ready.value:
                self.acc_cycles.append(cycle())
            if dut.write_en.value:
                row, vector = dut.write_row.value.to_unsigned(), dut.write_vector.value.to_unsigned()
                data = unpack(layout, dut.write_data.value.to_unsigned())
                largest = max(data["exponent"])
                self.mbuf[row], self.mbuf_writes = data, self.mbuf_writes + 1
                assert dut.write_first.value or vector in self.maxima, f"MBUF row {row} before the vector's first"
                self.maxima[vector] = largest if dut.write_first.value else max(self.maxima[vector], largest)

    async def _serve_exponents(self):
        """The KV buffer's exponent memory: as many tiles as there are, two of them visible."""
        dut, slot, tile = self.dut, 0, 0
        while True:
            if int(dut.exponent_slot.value) != slot:
                slot, tile = 1 - slot, tile + 1
            head = dut.exponent_head.value.to_unsigned()
            if tile < len(self.tiles) and head < len(self.tiles[tile]):
                dut.exponents.value = sum(int(e) << 5 * i for i, e in enumerate(self.tiles[tile][head]))
            # A command may be the first of a tile that is new here.
            await First(*(ValueChange(signal) for signal in (dut.exponent_slot, dut.exponent_head, dut.cmd__valid)))

    async def _read(self, row, data, rows, width, kind):
        """One row a cycle; the data follows one cycle after its row."""
        out = []
        for index in [*rows, 0]:
            row.value = int(index)
            await self.edge
            out.append(np.frombuffer(data.value.to_unsigned().to_bytes(width, "little"), kind))
        return np.array(out[1:])

    async def read_abuf(self, rows):
        """FP32 bits of rows of ABUF, uint32 [rows, V]; the unit is idle."""
        return await self._read(self.dut.debug_row, self.dut.debug_data, rows, 4 * self.config.vector_lanes, "<u4")

    async def read_kvout(self, rows):
        """FP16 bits of rows of KVOUT, uint16 [rows, E]."""
        return await self._read(self.dut.kvout_row, self.dut.kvout_data, rows, self.config.port_bits // 8, "<u2")

    # ---- instructions

    def send_rows(self, first, values):
        """Write rows of ABUF (uint32 [rows, V]) as LOADA does, from row ``first`` on; returns at once."""
        self.state.load_abuf(np.arange(first, first + len(values)), values)
        self._send(first, values.astype("<u4"))

    def _send(self, first, rows):
        shape = AbufWrite(self.config)
        self.load.send(pack(shape, {"addr": first + i, "data": int.from_bytes(row.tobytes(), "little")})
                       for i, row in enumerate(rows))

    async def write_abuf(self, first, values):
        """Write rows of ABUF and wait until they are there."""
        self.send_rows(first, values)
        await self.load.sent()

    async def write_routers(self, first, weights):
        """Write rows of the router buffer as LOADA does: FP16 bits, uint16 [rows, V, 2], attention and MLP."""
        self.state.routers[:, first:first + len(weights)] = np.moveaxis(widen_half(weights), -1, 0)
        self._send(ROUTER_ROWS_AT + first, weights.astype("<u2"))
        await self.load.sent()

    async def run(self, *instructions):
        """Send instructions (mnemonic, fields, (acc, n) or None) one after the other and compare when all are done."""
        state, done = self.state, self.count["done"]
        written, kvout, mbuf_rows, wanted = [np.arange(0)], [np.arange(0)], [np.arange(0)], []
        state.mbuf_emax[:] = _NEVER_WRITTEN
        self.mbuf.clear()
        self.maxima.clear()
        self.mbuf_writes, clamped = 0, state.saturations
        saturated = self.count["saturated"]
        for mnemonic, values, beats in instructions:
            if beats is not None:
                self.results.items.append(from_int(*beats))
            for write in self.golden.execute(mnemonic, values):
                {"abuf": written, "kvout": kvout, "mbuf": mbuf_rows}.get(write.buffer, []).append(write.rows)
            if mnemonic == "vprob":
                self.tile += 1
            wanted += [*self.logits.take_flat(len(self.logits))]
        for *_, beats in instructions:
            if beats is not None:
                self.acc.send(self._acc_bits(*beats))
        imm = [values.get("imm", 0) for _, values, _ in instructions]
        self.commands.send([as_command(mnemonic, **values | {"imm": (value + (1 << 31)) % (1 << 32) - (1 << 31)})
                            for (mnemonic, values, _), value in zip(instructions, imm)])
        while self.count["done"] < done + len(instructions):
            await self.edge
        await self.edge
        assert not self.dut.busy.value
        name = f"{[mnemonic for mnemonic, _, _ in instructions]} {instructions[-1][1]}"
        got = await self.sink.take(len(wanted))
        want = [int.from_bytes(row.astype("<f4").tobytes(), "little") for row in wanted]
        assert got == want, f"{name}: logits differ, first at beat {[a == b for a, b in zip(got, want)].index(False)}"
        assert await self.sink.rest(4) == []
        if any(mnemonic == "vlogits" for mnemonic, _, _ in instructions):
            got = self.dut.argmax.value.to_unsigned(), self.dut.argmax_value.value.to_unsigned()
            assert got == (state.argmax_index, state.argmax_value), \
                f"{name}: argmax {got}, expected {state.argmax_index, state.argmax_value}"
        self._compare_mbuf(name, np.concatenate([rows.ravel() for rows in mbuf_rows]))
        await self._compare_rows(name, "abuf", np.unique(np.concatenate(written)))
        await self._compare_rows(name, "kvout", np.unique(np.concatenate(kvout)))
        got = [getattr(self.dut, f"decided_{module}").value.to_unsigned() for module in ("attention", "mlp")]
        want = [sum(1 << t for t, value in enumerate(scores) if value >= 0) for scores in state.scores.tolist()]
        assert got == want, f"{name}: decided {got}, expected {want} by the scores {state.scores.tolist()}"
        clamped, saturated = state.saturations - clamped, self.count["saturated"] - saturated
        assert saturated == clamped, f"{name}: {saturated} values saturated, expected {clamped}"

    def _acc_bits(self, acc, n):
        lanes = self.config.vector_lanes
        for values, exponents in zip(acc.tolist(), n.tolist()):
            bits = sum((value & (1 << 48) - 1) << 48 * i for i, value in enumerate(values))
            yield bits | sum((e & 1023) << 48 * lanes + 10 * i for i, e in enumerate(exponents))

    def _compare_mbuf(self, name, rows):
        state = self.state
        assert self.mbuf_writes == len(rows), f"{name}: {self.mbuf_writes} MBUF rows written, expected {len(rows)}"
        for row in rows.tolist():
            want = {"mantissa": state.mbuf[row].tolist(), "exponent": state.mbuf_exponents[row].tolist(),
                    "sum": state.mbuf_sums[row].tolist()}
            assert self.mbuf.get(row) == want, f"{name}: MBUF row {row} is {self.mbuf.get(row)}, expected {want}"
        starts = np.flatnonzero(state.mbuf_emax != _NEVER_WRITTEN)
        want = dict(zip(starts.tolist(), state.mbuf_emax[starts].tolist()))
        assert self.maxima == want, f"{name}: largest exponents {self.maxima}, expected {want}"

    async def _compare_rows(self, name, buffer, rows):
        if not len(rows):
            return
        if buffer == "abuf":
            got, want = await self.read_abuf(rows), self.state.abuf.view(np.uint32)[rows]
        else:
            got, want = await self.read_kvout(rows), self.state.kvout[rows]
        bad = np.argwhere(got != want)
        assert not len(bad), (f"{name}: {len(bad)} elements of {buffer} differ, first row {rows[bad[0][0]]} element "
                              f"{bad[0][1]}: {got[tuple(bad[0])]:#x}, expected {want[tuple(bad[0])]:#x}")

    async def compare_everything(self):
        """Every row of ABUF and KVOUT, written or not."""
        await self.load.sent()
        await self.edge
        await self._compare_rows("at the end", "abuf", np.arange(self.config.abuf_rows))
        await self._compare_rows("at the end", "kvout", np.arange(self.config.kvout_rows))
