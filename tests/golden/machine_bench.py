"""Small programs for the functional machine: memories, weight streams, aligned inputs, and logits as a way out."""

from fractions import Fraction

import numpy as np
from exact import block_by_text
from skipopu.golden.functional import FunctionalMachine
from skipopu.host.layout import pack_weights, scale_exponent, stripe, unpack_logits, weight_superbeats
from skipopu.hw.config import preset
from skipopu.hw.isa import MatmulMode, encode

__all__ = ["BEAT", "CODES", "CONFIG", "HALT", "K", "KV", "LOGITS", "N", "ROW", "ROWS", "SIZE", "TILE", "V", "WEIGHTS",
           "Bench", "imm", "logits", "near", "put", "random_weights", "results", "weight_words"]

CONFIG = preset("tiny")  # K 8, N 16, P 2, V 4, E 4, tile 16 tokens
BEAT, V, K, N, TILE = CONFIG.port_bits // 8, CONFIG.vector_lanes, CONFIG.lanes, CONFIG.columns, CONFIG.tile_tokens
PROGRAM, WEIGHTS, ROWS, KV, LOGITS, SIZE = 0, 2048, 4096, 5120, 7168, 8192  # superbeats
HALT = encode("halt")
CODES = {MatmulMode.W4: (-8, 8), MatmulMode.W4M: (0, 16), MatmulMode.W8: (-128, 128)}


def imm(source, target=0):
    value = target << 16 | source
    return value - (1 << 32) if value >> 31 else value


class Bench:
    """A machine with its memories, and shorthands that fill them."""

    def __init__(self, config=CONFIG):
        self.config = config
        self.image = np.zeros((config.ports, SIZE * config.port_bits // 8), np.uint8)
        self.machine = FunctionalMachine(config, list(self.image))

    def run(self, *words, args=(), tokens=(), **options):
        program = b"".join(word.to_bytes(32, "little") for word in words)
        self.image[0, : len(program)] = np.frombuffer(program, np.uint8)
        self.machine.run(PROGRAM, len(words), args, tokens, **options)
        return self.machine

    def write(self, address, stream):
        stripe(self.config, self.image, address, stream)

    def fill_mbuf(self, row, values, vector=None, bits=16):
        """Align ``values`` [rows, ...] by the text; every ``vector`` MBUF rows share a maximum."""
        config, machine = self.config, self.machine
        values = values.reshape(-1, config.block)
        found = [block_by_text([Fraction(float(x)) for x in block], bits) for block in values]
        e = np.array([item[0] for item in found], np.int16).reshape(-1, config.blocks)
        m = np.array([item[1] for item in found], np.int16).reshape(-1, config.lanes)
        rows = slice(row, row + len(m))
        machine.mbuf[rows], machine.mbuf_exponents[rows] = m, e
        machine.mbuf_sums[rows] = m.reshape(len(m), config.blocks, -1).sum(-1, dtype=np.int32)
        step = vector or len(m)
        for first in range(0, len(m), step):
            machine.mbuf_emax[row + first] = e[first : first + step].max()

    def aligned(self, row, count, bits=16):
        """Values that ``count`` MBUF rows stand for, float64 [count * K]; and each element's unit."""
        m = self.machine
        e = m.mbuf_exponents[row : row + count].astype(int).repeat(self.config.block, axis=1)
        unit = np.ldexp(1.0, e - bits + 2)
        return (m.mbuf[row : row + count] * unit).ravel(), unit.ravel()


def random_weights(rng, mode, rows, cols, spread=0.5, config=CONFIG, group=0):
    codes = rng.integers(*CODES[mode], (rows, cols)).astype(np.int8)
    shape = rows, -(-cols // config.block >> group)
    scale = (rng.choice([-1, 1], shape) * np.exp2(rng.uniform(-spread, spread, shape) - 6)).astype(np.float16)
    minimum = rng.normal(0, 0.1, shape).astype(np.float16) if mode == MatmulMode.W4M else None
    return codes, scale, minimum


def weight_words(bench, mode, weights, at=WEIGHTS, x=0, **fields):
    """LOADW and MATMUL of weights [rows, cols] that are put at superbeat ``at``."""
    config = bench.config
    rows, cols = weights[0].shape
    group = fields.get("group", 0)
    bench.write(at, pack_weights(config, mode, *weights, group=group))
    bench.machine.invalidate()
    n, k = -(-rows // config.columns), cols // config.lanes
    fields = {"heads": 1, "groups": 1, "rows": 1, "row_stride": k, "beats": rows // config.vector_lanes,
              "scale_exponent": scale_exponent(mode, *weights[1:])} | fields
    return (encode("loadw", imm=at, count=weight_superbeats(config, mode, n, k, group)),
            encode("matmul", x=x, mode=mode, n_tiles=n, k_tiles=k, **fields))


def logits(bench, words, rows, width, **fields):
    """Run words, take the results through VLOGITS and STOREL: float32 [rows, width]."""
    config = bench.config
    count = width * 4 // config.superbeat_bytes
    bench.run(*words, encode("vlogits", **{"imm": width, "heads": 1, "groups": 1, "rows": rows,
                                           "beats": width // config.vector_lanes} | fields),
              encode("storel", imm=LOGITS, rows=rows, count=count), HALT)
    beat = config.port_bits // 8
    stored = bench.image[:, LOGITS * beat : (LOGITS + rows * count) * beat]
    stream = stored.reshape(config.ports, -1, beat).transpose(1, 0, 2).reshape(-1).view(np.float32)
    return unpack_logits(config, stream, rows, width)


def results(seed, rows=2, width=2 * N, gain=1.0):
    """(bench, words that make results, the results as float64 [rows, width])."""
    bench, rng = Bench(), np.random.default_rng(seed)
    weights = random_weights(rng, MatmulMode.W8, width, 2 * K)
    bench.fill_mbuf(0, gain * rng.standard_normal((rows, 2 * K)).astype(np.float32), vector=2)
    words = weight_words(bench, MatmulMode.W8, weights, rows=rows)
    return bench, words, logits(bench, words, rows, width).astype(float)


def put(bench, row, values):
    """Set ABUF rows to float values."""
    values = np.asarray(values, np.float32).reshape(-1, V)
    bench.machine.abuf[row : row + len(values)] = values
    return values.astype(float).reshape(-1)


def near(got, want, unit, relative=2.0**-20):
    """Aligned values lie within half a unit, besides the roundings of FP32."""
    error = np.abs(got - np.ravel(want))
    allowed = 0.51 * unit + relative * np.abs(np.ravel(want))
    assert (error <= allowed).all(), f"element {np.argmax(error - allowed)}: {error.max()}"


ROW = {"heads": 1, "groups": 1, "rows": 2, "beats": 2 * N // V, "row_stride": 2 * N // V, "vector": 2 * N // V}
