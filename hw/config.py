"""Overlay configurations: every size of the machine, named and checked once.

Plain Python; hardware, golden model, compiler and drivers all read the same object.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass

from skipopu.hw.isa import MAX_LAYERS, KvFormat, Unit

__all__ = ["ConfigError", "DSPS", "OverlayConfig", "PRESETS", "preset"]

_RESULTLESS = ("dsp", "counters", "passes", "compact")  # change no result: the same program runs with any
DSPS = ("generic", "dsp48e2", "mult18x18d")  #: multipliers: any, AMD UltraScale(+), Lattice ECP5


class ConfigError(ValueError):
    """A configuration whose sizes do not fit together; the message names the relation that fails."""


@dataclass(frozen=True, kw_only=True)
class OverlayConfig:
    """Capacities of one overlay. Nothing here is a property of a model.

    All sizes are positive; powers of two, unless one may be any number.
    """

    name: str
    lanes: int  #: K, elements of one dot product per cycle
    columns: int  #: N, dot products per cycle
    ports: int  #: P, memory ports (AXI4 masters)
    port_bits: int  #: data width of a memory port
    vector_lanes: int  #: V, FP32 lanes of the vector unit
    tokens: int  #: rows of one chunk (prefill tokens processed together)
    acc_rows: int  #: accumulator rows: tokens x query heads per KV head
    abuf_rows: int  #: vector-wide FP32 rows of the activation buffer
    mbuf_rows: int  #: lanes-wide rows of aligned mantissas
    kvbuf_heads: int  #: KV heads x ceil(head_dim / lanes), capacity of one KV tile slot (any number)
    router_rows: int  #: vector-wide rows of the router buffer (two FP16 weights per element, two layers)
    history_tokens: int  #: positions that have pointers to their KV records (KV reuse)
    history_layers: int  #: layers of such a position
    buffer_beats: int  #: KV history buffer: beats per port (zero or a power of two)
    kvout_rows: int  #: port-wide rows of new K and V waiting to be written
    state_rows: int  #: softmax states: query heads x tokens (any number)
    fifo_beats: int  #: read FIFO beats per port
    burst_beats: int  #: longest read or write burst
    outstanding: int  #: read bursts in flight per port
    queue_depth: int = 8  #: instructions waiting per unit
    cache_words: int = 256  #: instruction cache, 256-bit words
    dsp: str = "generic"  #: multipliers that the PE array is made of, one of DSPS; changes no result and no timing
    passes: int = 1  #: cycles in which the array takes a row, columns / passes of its columns in each
    compact: bool = False  #: one unit for all vector lanes, beats four cycles apart; registers of control in a memory
    kv_narrow: bool = True  #: formats of KV records other than FP16
    counters: bool = True  #: of events, besides cycles and instructions; changes no result and no timing

    def __post_init__(self):
        plain = {"name", "dsp", "compact", "counters", "kv_narrow"}
        plain |= {"buffer_beats"} if self.buffer_beats == 0 else set()
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in plain:
                continue
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{field.name} must be a positive number, not {value!r}")
            if value & (value - 1) and field.name not in ("kvbuf_heads", "state_rows"):
                raise ConfigError(f"{field.name} must be a power of two, not {value!r}")
        relations = [
            (self.dsp in DSPS, f"dsp must be one of {', '.join(DSPS)}, not {self.dsp!r}"),
            (self.port_bits in (32, 64, 128, 256, 512), f"port_bits must be 32..512, not {self.port_bits}"),
            (self.passes <= 8 and (self.passes == 1 or self.dsp != "dsp48e2"),
             "passes must be at most 8, and 1 with dsp48e2"),
            (self.columns // self.passes >= self.vector_lanes,
             "columns / passes must be at least vector_lanes"),
            (not self.compact or self.vector_lanes == 2, "vector_lanes must be 2 if compact"),
            (self.columns >= 2 * self.lanes, "columns must be at least 2 x lanes (gate and up share a column tile)"),
            (self.beat_elements <= self.lanes, "a port beat (port_bits / 16 elements) must not exceed lanes"),
            (self.vector_lanes <= self.beat_elements, "vector_lanes must not exceed port_bits / 16"),
            (self.vector_lanes >= 2, "vector_lanes must be at least 2 (a RoPE pair)"),
            (self.ports <= self.lanes, "ports must not exceed lanes"),
            (self.tokens <= 32, "tokens must be at most 32 (one route word)"),
            (self.history_tokens >= self.tile_tokens, "history_tokens must cover a KV tile"),
            (self.history_layers <= MAX_LAYERS, f"history_layers must be at most {MAX_LAYERS}"),
            (self.tile_tokens // self.ports >= 2, "a KV tile must hold two tokens of every port"),
            (self.router_rows <= 0x8000, "router_rows must be at most 32768"),
            (self.lanes * self.columns // 2 >= self.superbeat_bytes, "a tile must hold at least one superbeat"),
            (self.superbeat_bytes >= 4 * self.vector_lanes, "a superbeat must hold at least one vector row"),
            (self.lanes >= 4, "lanes must be at least 4"),
            (self.burst_beats <= 256, "an AXI4 burst is at most 256 beats"),
            (self.burst_beats * self.port_bits // 8 <= 4096, "a burst must fit in 4 KiB"),
            (self.fifo_beats >= 2 * self.burst_beats, "fifo_beats must hold two bursts"),
            (self.acc_rows >= self.tokens, "acc_rows must be at least tokens"),
            (self.tile_tokens % self.ports == 0, "a KV tile must fill every port"),
        ]
        for holds, message in relations:
            if not holds:
                raise ConfigError(f"{self.name}: {message}")

    @property
    def block(self):
        """Elements that share one exponent and one weight scale."""
        return min(self.lanes, 32)

    @property
    def blocks(self):
        """Blocks in a row of lanes."""
        return self.lanes // self.block

    @property
    def beat_elements(self):
        """E, FP16 elements in one port beat."""
        return self.port_bits // 16

    @property
    def superbeat_bytes(self):
        """W, bytes of one beat on every port: the most that memory delivers per cycle."""
        return self.ports * self.port_bits // 8

    @property
    def kv_step(self):
        """Tokens of which the KV buffer delivers a port beat each in one cycle: two of every port, as far as a tile of
        values has so many."""
        return min(2 * self.ports, self.lanes)

    @property
    def kv_beats(self):
        """Port beats of the longest FP16 record in the KV buffer."""
        return 2 * self.kvbuf_heads * self.lanes // self.beat_elements

    @property
    def kv_parts(self):
        """Beats of a record that each part of a memory of the KV buffer holds. Where there are narrow records a power
        of two is in the first, so that the highest bit of a beat's number names the part, and in the second the rest,
        at least the low planes: half as many beats as the high ones."""
        if not self.kv_narrow:
            return [self.kv_beats]
        first = 1 << (self.kv_beats - 1).bit_length() - 1
        return [first, max(self.kv_beats - first, -(-self.kv_beats // 4))]

    @property
    def tile_beats(self):
        """Superbeats of one tile of 4-bit codes."""
        return self.lanes * self.columns // 2 // self.superbeat_bytes

    @property
    def tile_tokens(self):
        """Tokens of one KV tile: columns in QK^T, lanes in PV."""
        return max(self.lanes, self.columns)

    @property
    def config_hash(self):
        """First 32 bits of the SHA-256 of all sizes; readable from the hardware."""
        sizes = {name: value for name, value in dataclasses.asdict(self).items() if name not in _RESULTLESS}
        text = json.dumps(sizes, sort_keys=True)
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")

    def scale_tiles(self, group):
        """Consecutive tiles of a column tile that one set of scales serves if 2^group blocks share a scale."""
        return max((1 << group) // self.blocks, 1)

    def unit_queue(self, unit):
        """(instructions that wait in the queue of a unit, how many of its instructions can be under way at most).

        Loads and matmuls may have to wait behind each other (the compiler checks how many), others only follow them. No
        unit but the load unit has more under way than its queue and the registers around it hold.
        """
        depth = 1 if self.compact and unit in (Unit.VECTOR, Unit.STORE) else self.queue_depth
        return depth, (4 if unit == Unit.LOAD else 2) * depth

    def record_beats(self, heads, head_beats, record_format=KvFormat.FP16):
        """Port beats of a KV record of so many heads, each of which takes ``head_beats`` in FP16."""
        units = heads * head_beats
        if record_format == KvFormat.FP16:
            return 2 * units
        low = -(-units // 2) if record_format == KvFormat.B12 else 0
        return -(-heads // self.beat_elements) + units + low

    def scale_chunk(self, minimum, group=0):
        """(superbeats, scale sets) of one scale chunk of the weight stream.

        A scale set is what one tile needs: FP16 scales of every column, one for each 2^group blocks but at least one,
        followed by as many minima when ``minimum``. A chunk holds as many whole sets as fit one superbeat, or one set
        over several.
        """
        set_bytes = self.columns * max(self.blocks >> group, 1) * 2 * (2 if minimum else 1)
        if set_bytes <= self.superbeat_bytes:
            return 1, self.superbeat_bytes // set_bytes
        return set_bytes // self.superbeat_bytes, 1


PRESETS = {
    config.name: config
    for config in [
        OverlayConfig(
            name="tiny", lanes=8, columns=16, ports=2, port_bits=64, vector_lanes=4, tokens=4, acc_rows=16,
            abuf_rows=4096, mbuf_rows=2048, kvbuf_heads=64, router_rows=256, history_tokens=256,
            history_layers=64, buffer_beats=256, kvout_rows=1024, state_rows=128, fifo_beats=64, burst_beats=16,
            outstanding=4, queue_depth=4, cache_words=64,
        ),
        OverlayConfig(
            name="sim", lanes=32, columns=64, ports=8, port_bits=512, vector_lanes=16, tokens=16, acc_rows=64,
            abuf_rows=8192, mbuf_rows=4096, kvbuf_heads=16, router_rows=256, history_tokens=8192,
            history_layers=64, buffer_beats=8192, kvout_rows=512, state_rows=512, fifo_beats=512, burst_beats=16,
            outstanding=16,
        ),
        OverlayConfig(
            name="sim16", lanes=32, columns=64, ports=16, port_bits=512, vector_lanes=16, tokens=16, acc_rows=64,
            abuf_rows=8192, mbuf_rows=4096, kvbuf_heads=16, router_rows=256, history_tokens=8192,
            history_layers=64, buffer_beats=8192, kvout_rows=512, state_rows=512, fifo_beats=512, burst_beats=16,
            outstanding=16,
        ),
        OverlayConfig(
            name="u280", lanes=64, columns=128, ports=32, port_bits=512, vector_lanes=32, tokens=32, acc_rows=128,
            abuf_rows=16384, mbuf_rows=16384, kvbuf_heads=80, router_rows=1024, history_tokens=8192,
            history_layers=64, buffer_beats=8192, kvout_rows=16384, state_rows=1280, fifo_beats=1024, burst_beats=16,
            outstanding=32, cache_words=512, dsp="dsp48e2",
        ),
        OverlayConfig(
            name="ulx3s", lanes=4, columns=8, ports=1, port_bits=64, vector_lanes=2, tokens=1, acc_rows=4,
            abuf_rows=512, mbuf_rows=128, kvbuf_heads=8, router_rows=256, history_tokens=256, history_layers=16,
            buffer_beats=0, kvout_rows=256, state_rows=8, fifo_beats=16, burst_beats=8, outstanding=4, queue_depth=2,
            cache_words=64, dsp="mult18x18d", passes=4, compact=True, kv_narrow=False, counters=False,
        ),
    ]
}


def preset(name):
    """The named configuration; ConfigError lists the known names."""
    try:
        return PRESETS[name]
    except KeyError:
        raise ConfigError(f"unknown configuration {name!r}; known: {', '.join(PRESETS)}") from None
