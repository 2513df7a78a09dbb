"""An overlay in plain floats: a Device that runs compiled programs in float64, KV records in FP16.

It knows the instruction set and the memory layout but none of the overlay's arithmetic, so a program that disagrees
with the float reference here is compiled wrongly.
"""

import numpy as np
from skipopu.host.layout import weight_superbeats
from skipopu.host.passes.walk import Arguments, rows_in, walk
from skipopu.host.program import WORD_BYTES, Note, Program
from skipopu.host.software_device import Outcome, SoftwareDevice
from skipopu.hw.isa import ROUTER_ROWS_AT, Destination, MatmulMode, RowScale

__all__ = ["FloatDevice", "unpack_weights"]


def unpack_weights(config, mode, stream, n_tiles, k_tiles, group=0):
    """(codes, scale, minimum) of a weight stream, tile by tile as the hardware reads it; a scale for each block."""
    planes = 2 if mode == MatmulMode.W8 else 1
    lanes, columns, blocks = config.lanes, config.columns, config.blocks
    codes = np.zeros((n_tiles * columns, k_tiles * lanes), np.int64)
    scale, minimum = (np.zeros((n_tiles * columns, k_tiles * blocks), np.float16) for _ in range(2))
    at, left = 0, np.zeros(0, np.float16)
    lines, tiles = max(blocks >> group, 1), max((1 << group) // blocks, 1)
    size = columns * lines * (2 if mode == MatmulMode.W4M else 1)
    chunk_beats = max(2 * size // config.superbeat_bytes, 1)
    for tile in range(n_tiles * k_tiles):
        n, k = divmod(tile, k_tiles)
        rows, cols = slice(n * columns, (n + 1) * columns), slice(k * lanes, (k + 1) * lanes)
        if k % tiles == 0:
            if not len(left):
                left = np.ascontiguousarray(stream[at : at + chunk_beats]).reshape(-1).view(np.float16)
                at += chunk_beats
            own, left = left[:size].reshape(-1, lines, columns).repeat(blocks // lines, axis=1), left[size:]
        scale[rows, k * blocks : (k + 1) * blocks] = own[0].T
        if mode == MatmulMode.W4M:
            minimum[rows, k * blocks : (k + 1) * blocks] = own[1].T
        for plane in range(planes):
            data = stream[at : at + config.tile_beats].reshape(-1).astype(np.int64)
            at += config.tile_beats
            nibbles = np.stack([data & 15, data >> 4], axis=-1).reshape(columns, lanes)
            nibbles = nibbles - 16 * (nibbles >= 8)
            if mode == MatmulMode.W8:
                nibbles = nibbles * 16 if plane == 0 else nibbles + 8
            elif mode == MatmulMode.W4M:
                nibbles = nibbles + 8
            codes[rows, cols] += nibbles
    assert at == len(stream), f"the stream has {len(stream)} superbeats, its tiles take {at}"
    return codes, scale, minimum


class FloatDevice(SoftwareDevice):
    """``fail`` = (cause, instruction index) makes the next run end with that fault."""

    def __init__(self, config, memory_bytes, seed=0):
        super().__init__(config, memory_bytes)
        # what was never written holds noise: a program must not depend on it
        self.ports = np.random.default_rng(seed).integers(0, 124, (config.ports, memory_bytes), dtype=np.uint8)
        self.memories = list(self.ports)
        self.fail = None
        self.runs = 0
        self._weights = {}
        self.places, self.pointers = [0] * config.ports, {}

    def execute(self, run):
        self.runs += 1
        if self.fail:
            return Outcome(registers={}, fault=(*self.fail, 0))
        words = Program.words_from_bytes(self.ports[0, run.program : run.program + run.length * WORD_BYTES].tobytes())
        program = Program(words, [Note(-1, "")] * run.length)
        core, count, dropped, routes = _Core(self), 0, 0, {}

        def decide(layer):
            words = core.decisions() if run.forced is None else run.forced[2 * layer : 2 * layer + 2]
            routes[layer] = tuple(words)
            return routes[layer]

        for _, mnemonic, _, fields in walk(program, Arguments(*run.arguments[:4]), run.tokens, decide):
            count += 1
            dropped += not fields["mask"]
            if fields["mask"] and hasattr(core, mnemonic):
                getattr(core, mnemonic)(fields | {"t": rows_in(fields)})
        return Outcome(registers={"INSTRUCTIONS": count, "DROPPED": dropped, "ARGMAX_INDEX": core.best}, routes=routes)

    def superbeats(self, first, count):
        """uint8 [count, W]."""
        beat = self.config.port_bits // 8
        ports = self.ports[:, first * beat : (first + count) * beat].reshape(self.config.ports, count, beat)
        return ports.transpose(1, 0, 2).reshape(count, -1)

    def weights(self, fields, first, count):
        """float64 [columns, lanes] of a whole stream."""
        key = (first, count)
        if key not in self._weights:
            stream = self.superbeats(first, count)
            codes, scale, minimum = unpack_weights(self.config, MatmulMode(fields["mode"]), stream, fields["n_tiles"],
                                                   fields["k_tiles"], fields["group"])
            spread = [np.repeat(part.astype(np.float64), self.config.block, axis=1) for part in (scale, minimum)]
            self._weights[key] = codes * spread[0] + spread[1]
        return self._weights[key]


class _Core:
    """Buffers of one run, and a method per instruction; arrays of rows are [head, group, token, element]."""

    def __init__(self, device):
        self.device, self.config = device, device.config
        config = device.config
        self.abuf = np.full((config.abuf_rows, config.vector_lanes), np.nan)
        self.mbuf = np.full(config.mbuf_rows * config.lanes, np.nan)
        self.kvout = np.zeros(config.kvout_rows * config.beat_elements, np.float16)
        self.sumsq = np.zeros(config.tokens)
        self.routers = np.full((2, config.router_rows, config.vector_lanes), np.nan)
        self.scores = np.full((2, config.tokens), np.nan)
        self.maximum = np.full(config.state_rows, np.nan)
        self.total = np.full(config.state_rows, np.nan)
        self.pending, self.tiles, self.stream, self.logits = [], [], [], None
        self.tile, self.best = None, 0

    # load and store
    def loadw(self, f):
        self.pending.append((f["imm"], f["count"]))

    def loada(self, f):
        for row in range(f["rows"]):
            data = self.device.superbeats(f["imm"] + row * f["count"], f["count"]).reshape(-1).view(np.float32)
            data = data[: f["beats"] * self.config.vector_lanes].reshape(f["beats"], -1)
            first = (f["x"] & 0xFFFF) + row * f["dst_stride"]
            if first < ROUTER_ROWS_AT:
                self.abuf[first : first + f["beats"]] = data
            else:
                halves = np.ascontiguousarray(data).view(np.float16).reshape(f["beats"], -1, 2)
                first -= ROUTER_ROWS_AT
                self.routers[:, first : first + f["beats"]] = halves.transpose(2, 0, 1)

    def _record(self, token, place, f):
        beat = self.config.port_bits // 8
        first = (f["imm"] + place * f["record"]) * beat
        return self.device.ports[token % self.config.ports, first : first + f["record"] * beat].view(np.float16)

    def _pointer(self, position, layer):
        return next(self.device.pointers[position, last] for last in range(layer, -1, -1)
                    if (position, last) in self.device.pointers)

    def loadkv(self, f):
        count = min(f["rows"], self.config.tile_tokens)
        records = np.zeros((self.config.tile_tokens, f["record"] * self.config.beat_elements))
        for token in range(count):
            place = self._pointer(f["x"] + token, f["layer"]) if f["reuse"] else token // self.config.ports
            records[token] = self._record(token, place, f)
        self.tiles.append(records.reshape(len(records), 2, f["heads"], -1))

    def storekv(self, f):
        record = f["record"] * self.config.beat_elements
        for row in f["t"]:
            position = f["x"] + row
            place, places = position // self.config.ports, self.device.places
            if f["reuse"]:
                if position == f["layer"] == 0:
                    places[:], self.device.pointers = [0] * len(places), {}
                place = places[position % len(places)]
                places[position % len(places)] += 1
                self.device.pointers[position, f["layer"]] = place
            self._record(position, place, f)[:] = self.kvout[row * record : (row + 1) * record]

    def storel(self, f):
        data = self.logits.reshape(f["rows"] * f["count"], self.config.ports, -1).transpose(1, 0, 2)
        beat = self.config.port_bits // 8
        self.device.ports[:, f["imm"] * beat : (f["imm"] + data.shape[1]) * beat] = data.reshape(self.config.ports, -1)

    # compute
    def matmul(self, f):
        offsets = self._offsets(f, f["k_tiles"]) + f["x"]
        lanes = self.config.lanes
        rows = self.mbuf.reshape(-1, lanes)[offsets].reshape(*offsets.shape[:3], -1)
        mode = MatmulMode(f["mode"])
        width = f["beats"] * self.config.vector_lanes
        if mode == MatmulMode.QK:
            self.tile = self.tiles.pop(0)
            result = np.einsum("hgtd,chd->hgtc", rows, self.tile[:, 0])
        elif mode == MatmulMode.PV:
            result = np.einsum("hgtc,chd->hgtd", rows, self.tile[:, 1])
        else:
            count = weight_superbeats(self.config, mode, f["n_tiles"], f["k_tiles"], f["group"])
            result = rows @ self.device.weights(f, self._take_weights(count), count).T
        assert result.shape[-1] >= width
        self.stream.append(result[..., :width])

    def dropw(self, f):
        self._take_weights(f["count"])

    def _take_weights(self, needed):
        """Where the next superbeats of weights begin, which lie in one piece however many loads brought them."""
        first, taken = self.pending[0][0], 0
        while taken < needed:
            address, count = self.pending.pop(0)
            assert address == first + taken
            taken += count
        assert taken == needed
        return first

    # vector
    def _offsets(self, f, beats):
        grid = np.ix_(range(f["heads"]), range(f["groups"]), f["t"], range(beats))
        strides = (f["head_stride"], f["group_stride"], f["row_stride"], 1)
        return sum(index * stride for index, stride in zip(grid, strides))

    def _take(self, f):
        return self.stream.pop(0) * self._scale(f)

    def _scale(self, f):
        rows = np.array(f["t"])
        if f["scale"] == RowScale.RSQRT:
            return (1 / np.sqrt(self.sumsq[f["x"] + rows] * self.inv_n + self.eps))[:, None]
        if f["scale"] == RowScale.RECIPROCAL:
            states = np.arange(f["beats"]) // f["wrap"] * self.config.tokens + rows[:, None]
            return np.repeat(1 / self.total[states], self.config.vector_lanes, axis=1)
        return 1

    def _source(self, f):
        return (f["imm"] & 0xFFFF) + self._offsets(f, f["beats"])

    def _read(self, index):
        return self.abuf[index].reshape(*index.shape[:3], -1)

    def _write(self, index, values):
        self.abuf[index] = values.reshape(*index.shape, self.config.vector_lanes)

    def _align(self, f, values):
        index = (f["imm"] >> 16 & 0xFFFF) + self._offsets(f, values.shape[-1] // self.config.vector_lanes)
        self.mbuf.reshape(-1, self.config.vector_lanes)[index] = values.reshape(*index.shape, -1)

    def _table(self, f, first, count):
        return self.abuf[first : first + count].reshape(-1)

    def vset(self, f):
        self.inv_n = np.array(f["imm"] & 0xFFFFFFFF, np.uint32).view(np.float32).astype(float)
        self.eps = np.array(f["eps"], np.uint32).view(np.float32).astype(float)

    def vinit(self, f):
        self.maximum[:], self.total[:] = -np.inf, 0

    def vbias(self, f):
        self.bias = np.array([[f["imm"]], [f["mlp"]]]) * 2.0**-24

    def decisions(self):
        """Words of ROUTES; rows that were never scored do not execute."""
        return [int(((score >= 0) << np.arange(len(score))).sum()) for score in self.scores]

    def _norm(self, f, values):
        self.sumsq[list(f["t"])] = (values[0, 0] ** 2).sum(-1)
        if f["route"]:
            weights = self.routers[:, f["x"] : f["x"] + f["beats"]].reshape(2, -1)
            self.scores[:, f["t"]] = weights @ values[0, 0].T + self.bias
        self._align(f, values * self._table(f, f["table"], f["beats"]))

    def vnorm(self, f):
        self._norm(f, self._read(self._source(f)))

    def vadd(self, f):
        index = self._source(f)
        values = self._take(f) + self._read(index)
        self._write(index, values)
        self._norm(f, values)

    def vrope(self, f):
        values = self._take(f)
        if f["wrap"]:
            half = f["wrap"] * self.config.vector_lanes
            table = np.stack([self._table(f, f["table"] + row * f["table_stride"], 2 * f["wrap"])
                              for row in f["t"]])
            repeat = values.shape[-1] // half
            cos, sin = (np.tile(part, repeat) for part in (table[:, :half], table[:, half:]))
            values = values * cos + values.reshape(*values.shape[:3], -1, 2)[..., ::-1].reshape(values.shape) * sin
        if f["dest"] == Destination.KVOUT:
            index = (f["imm"] >> 16 & 0xFFFF) + self._offsets(f, f["beats"])
            self.kvout.reshape(-1, self.config.vector_lanes)[index] = values.reshape(*index.shape, -1)
        else:
            self._align(f, values)

    def vswiglu(self, f):
        pairs = self._take(f).reshape(1, 1, len(f["t"]), -1, 2, self.config.vector_lanes)
        gate, up = pairs[..., 0, :], pairs[..., 1, :]
        self._align(f, (gate * up / (1 + np.exp(-gate))).reshape(1, 1, len(f["t"]), -1))

    def _states(self, f):
        heads = np.arange(f["heads"] * f["groups"]).reshape(f["heads"], f["groups"], 1)
        return heads * self.config.tokens + np.array(f["t"])

    def vscore(self, f):
        values = self._take(f)
        last = f["x"] + np.array(f["t"])[:, None]
        values = np.where(np.arange(values.shape[-1]) > last, -np.inf, values)
        self._write(self._source(f), values)
        states = self._states(f)
        old = self.maximum[states]
        self.maximum[states] = np.maximum(old, np.ceil(values.max(-1)))
        self.alpha = np.where(np.isneginf(old), 0, np.exp2(old - self.maximum[states]))

    def vprob(self, f):
        states = self._states(f)
        values = np.exp2(self._read(self._source(f)) - self.maximum[states][..., None])
        self.total[states] = self.total[states] * self.alpha + values.sum(-1)
        self._align(f, values)

    def vmerge(self, f):
        index = self._source(f)
        alpha = self.alpha[..., None]
        self._write(index, self._take(f) + np.where(alpha == 0, 0, self._read(index) * alpha))

    def vscale(self, f):
        self._align(f, self._read(self._source(f)) * self._scale(f))

    def vlogits(self, f):
        values = self._take(f)[0, 0].astype(np.float32)
        self.best = int(values[-1, : f["imm"]].argmax())
        columns = self.config.columns
        tiles = [values[:, first : first + columns].ravel() for first in range(0, values.shape[1], columns)]
        self.logits = np.concatenate(tiles).view(np.uint8)

    def halt(self, f):
        assert not (self.pending or self.tiles or self.stream)
