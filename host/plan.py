"""Fit a model to a configuration: padded sizes, the chunk length, and where everything lies on chip.

A `Plan` is made once per (model, configuration, context); the compiler writes instructions from its numbers alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from skipopu.hw.config import PRESETS, OverlayConfig
from skipopu.hw.isa import COMMON, INSTRUCTIONS, MAX_LAYERS, KvFormat

from .errors import CapacityError, CompileError
from .layout import ceil_div, kv_tile_superbeats, pad_to, record_beats, row_superbeats
from .model import ModelConfig

__all__ = ["DEFAULT_CONTEXT", "KV_FORMATS", "KvSizes", "Plan", "make_plan", "shortages"]

DEFAULT_CONTEXT = 2048
_DECISION = 256  # superbeats that memory delivers about until a row is added up and scored
KV_FORMATS = {"fp16": KvFormat.FP16, "12": KvFormat.B12, "8": KvFormat.B8}  #: by name: bits of an element
_INNER_LIMIT = (1 << 16) - 1  # inner size of a matmul for which 48 accumulator bits are enough
_FIELDS = {item.mnemonic: item.fields for item in INSTRUCTIONS}


@dataclass(frozen=True)
class KvSizes:
    """What a program may spend on its KV records, and their format, one of KV_FORMATS.

    Of share and buffer only programs with KV reuse make use.
    share : part of all (layer, position) pairs that memory holds records for, 0..1; it runs out with a fault where
        tokens execute attention more often
    buffer : bytes of the history buffer, all ports together; by default all of it
    """

    share: float = 1.0
    buffer: int | None = None
    format: str = "fp16"


@dataclass(frozen=True)
class Plan:
    """Sizes of one model on one configuration. ABUF addresses and all strides are in vector beats, MBUF ones in rows.

    chunk : rows processed together at most; context : positions the KV region holds
    kv : KV mode of a program with routers, "" without; sizes : of its records
    """

    config: OverlayConfig
    model: ModelConfig
    context: int
    chunk: int
    kv: str = ""
    sizes: KvSizes = KvSizes()

    # padded sizes, elements
    @property
    def hidden(self) -> int:
        return pad_to(self.model.hidden, self.config.lanes)

    @property
    def mlp(self) -> int:
        return pad_to(self.model.mlp, self.config.lanes)

    @property
    def head_dim(self) -> int:
        return pad_to(self.model.head_dim, self.config.lanes)

    @property
    def q_width(self) -> int:
        return self.model.heads * self.head_dim

    @property
    def kv_width(self) -> int:
        return self.model.kv_heads * self.head_dim

    @property
    def logits_width(self) -> int:
        """Logits delivered per row: the vocabulary padded to whole superbeats of FP32."""
        return pad_to(self.model.vocab, self.config.superbeat_bytes // 4)

    @property
    def groups(self) -> int:
        """Query heads per KV head."""
        return self.model.heads // self.model.kv_heads

    @property
    def record(self) -> int:
        """Port beats of one KV record in memory."""
        return record_beats(self.config, self.model.kv_heads, self.model.head_dim, self.kv_format)

    @property
    def kvout_record(self) -> int:
        """Rows of KVOUT of one KV record."""
        return record_beats(self.config, self.model.kv_heads, self.model.head_dim)

    @property
    def kv_format(self) -> KvFormat:
        return KV_FORMATS[self.sizes.format]

    @property
    def record_fields(self) -> dict[str, int]:
        """Fields of LOADKV and STOREKV that say what a record is."""
        return {"record": self.record, "format": self.kv_format, "heads": self.model.kv_heads,
                "head_beats": self.head_dim // self.config.beat_elements}

    @property
    def tile_superbeats(self) -> int:
        """Superbeats of one KV tile."""
        return kv_tile_superbeats(self.config, self.record)

    @property
    def context_tiles(self) -> int:
        """KV tiles that hold the context."""
        return ceil_div(self.context, self.config.tile_tokens)

    @property
    def places(self) -> int:
        """KV records behind each port, of all layers together (KV reuse)."""
        if self.kv != "reuse":
            return 0
        rows = ceil_div(self.context, self.config.ports)
        return max(rows, math.ceil(rows * self.model.layers * self.sizes.share))

    @property
    def buffer(self) -> int:
        """KV records that the history buffer keeps for each port (KV reuse)."""
        if self.kv != "reuse":
            return 0
        config = self.config
        beats = config.buffer_beats
        if self.sizes.buffer is not None:
            beats = self.sizes.buffer // config.superbeat_bytes
        return min(beats // self.record, config.history_tokens // config.ports)

    @property
    def region_superbeats(self) -> int:
        """Superbeats of one KV region."""
        return self.places * self.record or self.context_tiles * self.tile_superbeats

    def kv_region(self, layer: int) -> str:
        """Name of the region that holds the KV records of a layer."""
        return "kv" if self.kv == "reuse" else f"kv.{layer}"

    @property
    def prefetch(self) -> int:
        """Superbeats of a key projection read before it is known whether any token computes keys (KV reuse).

        Memory would idle while the last rows are added up and scored, so that they cost nothing even where they are
        dropped. No more than that lasts, and at most half of the read FIFOs: behind them what the decision asks for is
        already on its way.
        """
        return min(self.config.fifo_beats // 2, _DECISION)

    def beats(self, elements: int) -> int:
        """Vector beats of that many elements (a multiple of vector_lanes)."""
        return elements // self.config.vector_lanes

    def rows(self, elements: int) -> int:
        """MBUF rows of that many elements (a multiple of lanes)."""
        return elements // self.config.lanes

    def abuf(self) -> dict[str, int]:
        """Sizes of the regions of the activation buffer, in order."""
        tile = self.config.tile_tokens
        return {
            "x": self.chunk * self.beats(self.hidden),
            "scores": self.model.heads * self.chunk * self.beats(tile),
            "out": self.chunk * self.beats(self.q_width),
            "gain0": self.beats(self.hidden),
            "gain1": self.beats(self.hidden),
            "rope": self.chunk * 4 * self.beats(self.head_dim),
        }

    def mbuf(self) -> dict[str, int]:
        """Sizes of the regions of the mantissa buffer, in order."""
        return {
            "mx": self.chunk * self.rows(self.hidden),
            "mq": self.chunk * self.rows(self.q_width),
            "mp": self.model.heads * self.chunk * self.rows(self.config.tile_tokens),
            "mo": self.chunk * self.rows(self.q_width),
            "mh": self.chunk * self.rows(self.mlp),
        }

    def addresses(self) -> dict[str, int]:
        """First row of every region of both buffers."""
        found = {}
        for sizes in (self.abuf(), self.mbuf()):
            top = 0
            for name, size in sizes.items():
                found[name] = top
                top += size
        return found

    def requirements(self) -> Iterator[tuple[str, int, int]]:
        """(limit, needed, available) of everything that can be too small."""
        config, model = self.config, self.model
        yield "acc_rows (tokens x query heads per KV head)", self.chunk * self.groups, config.acc_rows
        yield "state_rows (query heads x tokens)", (model.heads - 1) * config.tokens + self.chunk, config.state_rows
        yield "kvbuf_heads (KV heads x head_dim / lanes)", self.rows(self.kv_width), config.kvbuf_heads
        yield "kvout_rows (new K and V)", self.chunk * self.kvout_record, config.kvout_rows
        yield "abuf_rows (activation buffer)", sum(self.abuf().values()), config.abuf_rows
        yield "mbuf_rows (mantissa buffer)", sum(self.mbuf().values()), config.mbuf_rows
        yield "inner size of a matmul", max(self.hidden, self.q_width, self.mlp), _INNER_LIMIT
        yield "positions (instruction field x)", self.context, COMMON["x"].maximum + 1
        loadkv, matmul, vector = _FIELDS["loadkv"], _FIELDS["matmul"], _FIELDS["vscore"]
        longest = max(self.q_width, self.hidden, 2 * self.mlp, self.logits_width)
        for name, needed, field in [
            ("loadkv.heads", model.kv_heads, loadkv["heads"]),
            ("loadkv.head_beats", self.head_dim // config.beat_elements, loadkv["head_beats"]),
            ("loadkv.record", self.record, loadkv["record"]),
            ("matmul.groups", self.groups, matmul["groups"]),
            ("matmul.n_tiles", ceil_div(longest, config.columns), matmul["n_tiles"]),
            ("matmul.k_tiles", self.rows(max(self.hidden, self.q_width, self.mlp)), matmul["k_tiles"]),
            ("matmul.head_stride", self.groups * self.chunk * self.rows(config.tile_tokens), matmul["head_stride"]),
            ("vector beats", self.beats(longest), vector["beats"]),
            ("vector row_stride", self.beats(max(self.q_width, self.hidden, self.mlp)), vector["row_stride"]),
            ("vector group_stride", self.chunk * self.beats(config.tile_tokens), vector["group_stride"]),
            ("vector head_stride", self.groups * self.chunk * self.beats(config.tile_tokens), vector["head_stride"]),
            ("vector table_stride", 4 * self.beats(self.head_dim), vector["table_stride"]),
            ("muli factor (superbeats of an embedding row)", row_superbeats(config, self.hidden), COMMON["x"]),
        ]:
            yield name, needed, field.maximum
        if self.kv:
            yield "router_rows (weights of two layers)", 2 * self.beats(self.hidden), config.router_rows
            yield "layers of a routed model", model.layers, MAX_LAYERS
        if self.kv == "reuse":
            yield "history_tokens (positions with KV reuse)", self.context, config.history_tokens
            yield "history_layers (layers with KV reuse)", model.layers, config.history_layers
            yield "storekv.places (KV records behind a port)", self.places, _FIELDS["storekv"]["places"].maximum


def _shortage(plan: Plan) -> tuple[str, int, int] | None:
    return next((item for item in plan.requirements() if item[1] > item[2]), None)


def shortages(config: OverlayConfig, model: ModelConfig, context: int, kv: str = "",
              sizes: KvSizes | None = None) -> list[tuple[str, int, int]]:
    """(limit, needed, available) of everything that is too small for even one row at a time."""
    plan = _largest(config, model, context, kv, sizes or KvSizes())
    return [item for item in plan.requirements() if item[1] > item[2]]


def _largest(config: OverlayConfig, model: ModelConfig, context: int, kv: str, sizes: KvSizes) -> Plan:
    """The plan with the longest chunk that fits; if none fits, the plan for one row."""
    for chunk in range(config.tokens, 1, -1):
        plan = Plan(config, model, context, chunk, kv, sizes)
        if _shortage(plan) is None:
            return plan
    return Plan(config, model, context, 1, kv, sizes)


def make_plan(config: OverlayConfig, model: ModelConfig, context: int | None = None, kv: str = "",
              sizes: KvSizes | None = None) -> Plan:
    """The plan with the longest chunk that fits the configuration.

    context : positions to provide for, 1..model.context; by default the model's, but at most 2048, and with KV reuse at
        most those whose written layers the configuration remembers
    kv : KV mode of a program with routers, "" without; sizes : of the KV records
    Raises CompileError for a context outside the model's, for a share outside 0..1, a history buffer larger than the
    configuration's and a KV format that it does not have, CapacityError if not even one row at a time fits: the message
    names the limit, what is needed, and the presets that would do.
    """
    if context is None:
        context = min(model.context, DEFAULT_CONTEXT, config.history_tokens if kv == "reuse" else DEFAULT_CONTEXT)
    if not 1 <= context <= model.context:
        raise CompileError(f"context must be 1..{model.context} positions for model {model.name}, not {context}")
    sizes = sizes or KvSizes()
    if not 0 <= sizes.share <= 1:
        raise CompileError(f"the share of KV records that memory holds must be 0..1, not {sizes.share:g}")
    if sizes.format not in KV_FORMATS:
        raise CompileError(f"KV format must be {', '.join(KV_FORMATS)}, not {sizes.format!r}")
    if sizes.format != "fp16" and not config.kv_narrow:
        others = [name for name, other in PRESETS.items() if other.kv_narrow]
        raise CompileError(f"configuration {config.name} has KV records in FP16 only, not in {sizes.format} bits; use "
                           f"KV format fp16, or configuration {' or '.join(others)}")
    capacity = config.buffer_beats * config.superbeat_bytes
    if sizes.buffer is not None and not 0 <= sizes.buffer <= capacity:
        raise CompileError(f"the history buffer of configuration {config.name} has {capacity} bytes; ask for "
                           f"0..{capacity}, not {sizes.buffer}")
    plan = _largest(config, model, context, kv, sizes)
    short = _shortage(plan)
    if short is None:
        return plan
    others = [name for name, other in PRESETS.items() if _shortage(_largest(other, model, context, kv, sizes)) is None]
    advice = f"use configuration {' or '.join(others)}" if others else "no preset is large enough"
    raise CapacityError(f"model {model.name} does not fit configuration {config.name}: {short[0]} must be at least "
                        f"{short[1]} but is {short[2]}; {advice}")
