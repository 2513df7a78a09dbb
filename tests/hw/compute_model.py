"""What MATMUL has to deliver, from integers alone, and the streams that it reads (docs/numerics.md, Weights)."""

from dataclasses import dataclass, field

import numpy as np
from skipopu.hw.blocks.mbuf import AlignedRow
from skipopu.hw.isa import MatmulMode
from skipopu.sim.bench import pack

__all__ = ["Matmul", "aligned_row", "contribution", "half", "make_rows"]

NEVER = 63  # shifts of this or more give -1 or 0


def half(bits):
    """FP16 bits to int64 (significand, es): value = significand * 2^(es - 25)."""
    bits = np.asarray(bits, np.int64)
    exponent = bits >> 10 & 31
    significand = (bits & 1023) + 1024 * (exponent > 0)
    return np.where(bits >> 15, -significand, significand), np.maximum(exponent, 1)


def contribution(mode, codes, row, gap, scale, minimum, scale_exponent, plane=0):
    """One row's part of each accumulator from one tile, int64 [columns].

    codes : as stored in the tile, [columns, lanes]; row : mantissas [lanes]; gap : emax - e, [blocks]
    scale, minimum : FP16 bits [blocks, columns], or None for KV tiles and where there are no minima
    """
    blocks = len(gap)
    dots = (codes.astype(np.int64) * row).reshape(len(codes), blocks, -1).sum(-1).T  # [blocks, columns]
    sums = row.reshape(blocks, -1).sum(-1)[:, None]
    if mode in (MatmulMode.QK, MatmulMode.PV):
        return ((dots * 64) >> np.minimum(gap, NEVER)[:, None]).sum(0)
    if mode == MatmulMode.W4M or (mode == MatmulMode.W8 and plane):
        dots = dots + 8 * sums
    significand, es = half(scale)
    shift = gap[:, None] + scale_exponent - es - (4 if mode == MatmulMode.W8 and not plane else 0)
    total = (dots * significand) >> np.minimum(shift, NEVER)
    if mode == MatmulMode.W4M:
        significand, es = half(minimum)
        total = total + ((sums * significand) >> np.minimum(gap[:, None] + scale_exponent - es, NEVER))
    return total.sum(0)


def make_rows(rng, config, vectors, rows, *, spread=None, limit=32767):
    """Aligned vectors: mantissas int64 [vectors, rows, lanes] up to ``limit``, exponents [vectors, rows, blocks]."""
    mantissas = rng.integers(-limit, limit + 1, (vectors, rows, config.lanes))
    small = rng.random((vectors, rows, 1)) < 0.3
    mantissas = np.where(small, rng.integers(-3, 4, mantissas.shape), mantissas)
    extreme = rng.random((vectors, rows, 1)) < 0.1  # all lanes at one end: the largest sums
    mantissas = np.where(extreme, limit * (1 - 2 * rng.integers(0, 2, (vectors, rows, 1))), mantissas)
    top = rng.integers(-100, 127, (vectors, 1, 1))
    spread = rng.choice([1, 4, 20, 300], (vectors, 1, 1)) if spread is None else spread
    exponents = np.maximum(top - rng.integers(0, spread, (vectors, rows, config.blocks)), -127)
    return mantissas, exponents


def aligned_row(config, mantissas, exponents):
    """The bits of one MBUF row."""
    return pack(AlignedRow(config), {
        "mantissa": mantissas.tolist(), "exponent": exponents.tolist(),
        "sum": mantissas.reshape(config.blocks, -1).sum(-1).tolist()})


@dataclass
class Matmul:
    """One MATMUL with random operands: ``fields`` of the command, and everything around it.

    ``fields["mask"]``, if there, says which rows run.
    """

    config: object
    mode: MatmulMode
    fields: dict
    rng: np.random.Generator
    scale_limit: int = 31  #: exponent fields of scales below this
    rows: dict = field(default_factory=dict)  #: MBUF row -> (mantissas, exponents, vector, first)

    def __post_init__(self):
        config, rng, fields = self.config, self.rng, self.fields
        heads, groups = fields["heads"], fields["groups"]
        self.t = [t for t in range(fields["rows"]) if fields.get("mask", -1) >> t & 1]
        self.is_kv = self.mode in (MatmulMode.QK, MatmulMode.PV)
        self.planes = 2 if self.mode == MatmulMode.W8 else 1
        n_tiles, k_tiles = fields["n_tiles"], fields["k_tiles"]
        vectors = heads * groups * len(self.t)
        self.mantissas, self.exponents = make_rows(rng, config, vectors, k_tiles, limit=16383 if self.is_kv else 32767)
        h, g, t = np.unravel_index(np.arange(vectors), (heads, groups, len(self.t)))
        t = np.array(self.t)[t]
        starts = fields["x"] + t * fields["row_stride"] + g * fields["group_stride"] + h * fields["head_stride"]
        for vector, start in enumerate(starts.tolist()):
            for k in range(k_tiles):
                self.rows[start + k] = self.mantissas[vector, k], self.exponents[vector, k], start, int(k == 0)
        self.shape = heads, n_tiles, k_tiles, self.planes
        limit = 4094 if self.is_kv else 8
        self.codes = rng.integers(-limit, limit + self.is_kv, (*self.shape, config.columns, config.lanes))
        extreme = rng.random((*self.shape, 1, 1)) < 0.1
        self.codes = np.where(extreme, rng.choice([-limit, limit - 1 + self.is_kv], extreme.shape), self.codes)
        self.scales = self._scales(heads, n_tiles, k_tiles)
        if not self.is_kv:
            es = half(self.scales)[1].max()
            fields["scale_exponent"] = int(es) + (4 if self.planes == 2 else 0) + int(rng.integers(0, 3))
        self.key_exponents = rng.integers(1, 32, (heads, config.tile_tokens))

    def _scales(self, heads, n_tiles, k_tiles):
        """FP16 bits [h, n, k, scale or minimum, blocks, columns]: any finite value, subnormal and zero among them.

        2^group blocks in a row have the same.
        """
        rng, blocks, group = self.rng, self.config.blocks, self.fields.get("group", 0)
        shape = heads, n_tiles, -(-k_tiles * blocks >> group), 2, self.config.columns
        bits = rng.integers(0, 2, shape) << 15 | rng.integers(0, self.scale_limit, shape) << 10
        bits |= rng.integers(0, 1024, shape)
        bits = np.where(rng.random(shape) < 0.1, rng.choice([0, 0x8000, 1, 0x83FF, 0x0400], shape), bits)
        of_block = bits[:, :, np.arange(k_tiles * blocks) >> group]
        return of_block.reshape(heads, n_tiles, k_tiles, blocks, 2, -1).swapaxes(3, 4)

    def expected(self):
        """The AccBeat payloads, in order."""
        config, fields = self.config, self.fields
        heads, n_tiles, k_tiles, planes = self.shape
        per_tile, lanes = config.columns // config.vector_lanes, config.vector_lanes
        emax = self.exponents.max((1, 2))
        vectors = np.arange(len(emax)).reshape(heads, -1)
        out = []
        for h in range(heads):
            for n in range(n_tiles):
                for vector in vectors[h]:
                    acc = np.zeros(config.columns, np.int64)
                    for k in range(k_tiles):
                        scale, minimum = self.scales[h, n, k]
                        for plane in range(planes):
                            acc += contribution(
                                self.mode, self.codes[h, n, k, plane], self.mantissas[vector, k],
                                emax[vector] - self.exponents[vector, k], scale, minimum,
                                fields.get("scale_exponent", 0), plane)
                    exponent = np.full(config.columns, emax[vector] - 20)
                    if self.mode == MatmulMode.QK:
                        first = n * config.columns
                        exponent += self.key_exponents[h, first:first + config.columns] - 25
                    elif not self.is_kv:
                        exponent += fields["scale_exponent"] - 19
                    for c in range(per_tile):
                        if n * per_tile + c < fields["beats"]:
                            part = slice(c * lanes, (c + 1) * lanes)
                            out.append((acc[part].tolist(), exponent[part].tolist()))
        return out

    def weight_stream(self):
        """Superbeats of the weight stream, as integers."""
        config = self.config
        if self.is_kv:
            return []
        kinds, size = 2 if self.mode == MatmulMode.W4M else 1, config.superbeat_bytes
        blocks, share = config.blocks, 1 << self.fields.get("group", 0)
        runs = []  # of tiles that one set of scales serves: (set, codes)
        for h, n in np.ndindex(*self.shape[:2]):
            for k in range(self.shape[2]):
                nibbles = self.codes[h, n, k].reshape(-1, 2) & 15
                packed = (nibbles[:, 0] | nibbles[:, 1] << 4).astype(np.uint8).tobytes()
                if k * blocks % share == 0:
                    scales = self.scales[h, n, k, :kinds, ::min(share, blocks)]
                    runs.append((scales.astype("<u2").tobytes(), packed))
                else:
                    runs[-1] = runs[-1][0], runs[-1][1] + packed
        stream, chunk = b"", max(size // len(runs[0][0]), 1)
        for first in range(0, len(runs), chunk):
            scales, codes = (b"".join(parts) for parts in zip(*runs[first:first + chunk]))
            stream += scales + self.rng.bytes(-len(scales) % size) + codes
        return [int.from_bytes(stream[i:i + size], "little") for i in range(0, len(stream), size)]

    def requests(self, slot):
        """What the KV buffer is asked for: (slot, value, head, n, k), in order."""
        heads, n_tiles, k_tiles, _ = self.shape
        return [(slot, int(self.mode == MatmulMode.PV), h, n, k)
                for h in range(heads) for n in range(n_tiles) for k in range(k_tiles)] if self.is_kv else []

    def kv_tile(self, head, n, k):
        """The superbeats of one KV tile: lists of P*E mantissas."""
        config, tile = self.config, self.codes[head, n, k, 0]
        tokens = tile.T if self.mode == MatmulMode.PV else tile  # [tokens, dims]
        step, elements = config.kv_step, config.beat_elements
        beats = tokens.reshape(len(tokens) // step, step, -1, elements).transpose(0, 2, 1, 3)
        return beats.reshape(-1, step * elements).tolist()
