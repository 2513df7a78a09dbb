"""How KV records move: a program without weights that stores a context and then attends to it, layer by layer.

The set-up stores the records of all positions, where they execute by the routes given; a decode step runs the attention
tiles of all layers for one query at the last position. Bytes are what the device's counters say, so that levels with
and without a clock give the same table; only those with one know shares of the memory's peak.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from skipopu.hw.config import OverlayConfig, preset
from skipopu.hw.isa import Condition, Destination, KvFormat, MatmulMode, Register, Resource, RowList, RowScale
from skipopu.hw.registers import DebugBuffer

from .attention import AttentionTiles
from .compiled import Compiled, ImageMap
from .errors import RequestError
from .layout import MemoryMap, ceil_div, pack_rows, pack_weights, row_superbeats, scale_exponent, stripe
from .model import ModelConfig
from .plan import KvSizes, Plan, make_plan
from .program import WORD_BYTES, Builder, vector_imm
from .routes import RandomRoutes
from .session import open_accelerator

__all__ = ["KV_CONFIG", "LABELS", "PATTERNS", "KvRow", "Pattern", "geometry", "make_pattern", "measure"]

#: `u280` at a quarter of its ports, lanes and columns, with the buffers that a quarter of Llama-2-7B's heads need: a KV
#: tile has the same share of its time in pipelines as there. Preset `sim` holds too few heads for that.
KV_CONFIG = replace(preset("sim"), name="kv", kvbuf_heads=64, kvout_rows=2048)
PATTERNS = ("dense", "random", "layerwise", "alternate", "routers")
LABELS = dict.fromkeys(("memory_bytes", "buffer_bytes_served", "cycles", "physical_share", "effective_share",
                        "hit_rate", "storage_saved"), "simulated")
_DATA = 65521  # numbers of 16 bits that records are filled with, over and over
_STRETCH = 128


@dataclass(frozen=True, eq=False)
class Pattern:
    """Which tokens execute which layer's attention.

    stored : bool [layers, positions], of the context; None for a program without routers, which stores all
    attends : bool [layers, positions], of the decoding token if it stands there
    """

    name: str
    stored: np.ndarray | None
    attends: np.ndarray


@dataclass(frozen=True, kw_only=True)
class KvRow:
    """One decoded token. Bytes of KV records, all ports together; shares of the memory's peak, None without a clock.

    storage_saved : part of the (layer, position) pairs that take no memory; result : digest of all layers' sums
    """

    tokens: int
    pattern: str
    buffer_bytes: int
    memory_bytes: int
    buffer_bytes_served: int
    cycles: int | None
    physical_share: float | None
    effective_share: float | None
    hit_rate: float
    storage_saved: float
    result: str

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return dict(self.__dict__)


def geometry(layers: int, kv_heads: int, head_dim: int, groups: int = 1, context: int = 1) -> ModelConfig:
    """A model of which only the attention's sizes matter. Raises ModelError for impossible ones."""
    return ModelConfig(layers=layers, hidden=32, heads=kv_heads * groups, kv_heads=kv_heads, head_dim=head_dim, mlp=32,
                       vocab=1 << 16, context=context, name="kv")


def make_pattern(name: str, layers: int, positions: int, skip: float = 0.25, seed: int = 0,
                 decisions: np.ndarray | None = None) -> Pattern:
    """A pattern by its name.

    dense : no routers. random : of all (layer, position) pairs, exactly the part ``skip`` is left out, none in layer 0;
    the decoding token attends in every layer. alternate : likewise, but the decoding token attends in every second
    layer. layerwise : all positions skip the same layers. routers : as ``decisions`` say, bool [layers, positions],
    those of the last position for the decoding token
    Raises RequestError for an unknown name, RouterError for a rate outside 0..1, or one that layer 0 does not allow.
    """
    if name not in PATTERNS:
        raise RequestError(f"a pattern is one of {', '.join(PATTERNS)}, not {name!r}")
    RandomRoutes(skip, seed)  # checks both
    attends = np.ones((layers, positions), bool)
    if name == "dense":
        return Pattern(name, None, attends)
    if name == "routers":
        if decisions is None or decisions.shape[0] != layers or decisions.shape[1] < positions:
            raise RequestError("pattern routers needs a model with routers; give --model and --routers")
        stored = decisions[:, :positions].copy()
        stored[0] = True  # layer 0 computes keys and values in any case
        return Pattern(name, stored, stored)
    if round(skip * layers * positions) > (layers - 1) * positions:
        raise RequestError(f"layer 0 is never skipped, so that of {layers} layers at most {(layers - 1) / layers:.1%} "
                           f"can be, not {skip:.1%}")
    stored = np.ones((layers, positions), bool)
    if name == "layerwise":
        count = round(skip * layers)
        stored[1 + ((np.arange(count) + 0.5) * (layers - 1) / max(count, 1)).astype(int)] = False
    else:  # every stretch of positions has its part, so that shorter contexts have it too
        rng = np.random.default_rng(seed)
        for first in range(0, positions, _STRETCH):
            last = min(first + _STRETCH, positions)
            chosen = round(skip * layers * last) - round(skip * layers * first)
            index = rng.permutation((layers - 1) * (last - first))[:chosen]
            stored[1 + index // (last - first), first + index % (last - first)] = False
    if name == "alternate":
        attends[1::2] = False
    return Pattern(name, stored, attends)


class _Program:
    """The compiled program: token 0 stores, token n > 0 attends with the n-th buffer size."""

    def __init__(self, plan: Plan, buffers: Sequence[int]) -> None:
        self.plan, self.config, self.buffers = plan, plan.config, buffers
        self.build = Builder()
        self.memory = MemoryMap(plan.config)
        rng, shape = np.random.default_rng(1), (plan.q_width, plan.hidden)
        codes = rng.integers(-128, 128, shape).astype(np.int8)
        scale = np.full((shape[0], shape[1] // plan.config.block), 2.0**-11, np.float16)
        self.parts = {  # what queries are made of: a row of ones, and weights
            "ones": pack_rows(plan.config, np.ones((1, plan.hidden), np.float32)),
            "weights": pack_weights(plan.config, MatmulMode.W8, codes, scale)}
        self.scale_exponent = scale_exponent(MatmulMode.W8, scale)
        for name, stream in self.parts.items():
            self.memory.add(name, len(stream))
        self.image = self.memory.top
        self.regions = [self.memory.regions[region][0] if region in self.memory.regions
                        else self.memory.add(region, plan.region_superbeats)
                        for region in map(plan.kv_region, range(plan.model.layers))]
        at = plan.addresses()
        self.out, width = at["out"], plan.beats(plan.q_width)
        self.sums = (plan.config.abuf_rows - self.out) // width  # layers with sums of their own
        if self.sums < 1:
            raise RequestError(f"configuration {plan.config.name} has no room for the sums of one layer")

    def compiled(self) -> Compiled:
        plan, emit = self.plan, self.build.emit
        self.build.at(-1, "setup")
        emit("token", rd=Register.T7, imm_reg=Register.ZERO)
        branches = []
        for section in range(1, len(self.buffers) + 1):
            emit("addi", rd=Register.T6, imm=section)
            branches.append(emit("halt"))
        self._store()
        emit("halt")
        tiles = AttentionTiles(plan, self.build)
        for branch, buffer in zip(branches, self.buffers):
            self.build.patch(branch, "branch", rows_reg=Register.T7, x_reg=Register.T6, condition=Condition.EQ,
                             imm=len(self.build.words))
            self.build.at(-1, "setup")
            tiles.count()
            for layer in range(plan.model.layers):
                self._route(layer)
                self.build.at(layer, "attention", f"kv.{layer}", RowList.ATTENTION if plan.kv else RowList.ALL)
                tiles.emit(layer, self.regions[layer], buffer, self.out_of(layer))
            self.build.at(-1, "setup")
            emit("halt")
        self.memory.add("program", ceil_div(len(self.build.words) * WORD_BYTES * 8, self.config.port_bits))
        image = np.zeros((self.config.ports, self.image * self.config.port_bits // 8), np.uint8)
        for name, stream in self.parts.items():
            stripe(self.config, image, self.memory.regions[name][0], stream)
        return Compiled(config=self.config, program=self.build.program(), image=image, map=ImageMap(
            regions=self.memory.regions, image=self.image, memory=self.memory.top, chunk=plan.chunk,
            context=plan.context, vocab=1 << 16, logits_width=0, layers=plan.model.layers, model="kv", identity="kv",
            kv=plan.kv, places=plan.places, buffer=plan.buffer, kv_format=plan.sizes.format))

    def out_of(self, layer: int) -> int:
        """First ABUF row of a layer's sums; where ABUF is too small for all, of several layers in turn."""
        return self.out + layer % self.sums * self.plan.beats(self.plan.q_width)

    def _route(self, layer: int) -> None:
        if self.plan.kv:
            self.build.at(layer, "attention")
            self.build.emit("route", rows_reg=Register.TOKENS, layer=layer)

    def _store(self) -> None:
        """Queries to MBUF, and the records of all layers."""
        plan, emit, at, config = self.plan, self.build.emit, self.plan.addresses(), self.config
        ratio, beats, inner = config.lanes // config.vector_lanes, plan.beats(plan.q_width), plan.beats(plan.hidden)
        row = {"rows": 1, "heads": 1, "groups": 1}
        emit("loada", writes=Resource.X, imm=self.memory.regions["ones"][0], rows=1, x=at["x"],
             count=row_superbeats(config, plan.hidden), beats=inner, dst_stride=inner)
        emit("vscale", reads=Resource.X, writes=Resource.MX, imm=vector_imm(at["x"], at["mx"] * ratio), **row,
             beats=inner, row_stride=inner, vector=inner)
        emit("loadw", imm=self.memory.regions["weights"][0], count=len(self.parts["weights"]))
        emit("matmul", reads=Resource.MX, x=at["mx"], mode=MatmulMode.W8, **row, beats=beats,
             n_tiles=ceil_div(plan.q_width, config.columns), k_tiles=plan.rows(plan.hidden),
             row_stride=plan.rows(plan.hidden), scale_exponent=self.scale_exponent)
        emit("vrope", writes=Resource.MQ, imm=vector_imm(0, at["mq"] * ratio), **row, beats=beats, row_stride=beats,
             vector=plan.beats(plan.head_dim), scale=RowScale.ONE, dest=Destination.MBUF)
        for layer in range(plan.model.layers):
            self._route(layer)
            self.build.at(layer, "attention", f"kv.{layer}",
                          RowList.ATTENTION if plan.kv and layer else RowList.ALL)
            reuse = {"reuse": 1, "places": plan.places, "layer": layer} if plan.kv else {}
            emit("storekv", reads=Resource.KVOUT, writes=Resource.KVMEM, imm=self.regions[layer],
                 rows_reg=Register.TOKENS, x_reg=Register.POSITION, **plan.record_fields, **reuse)


def measure(config: OverlayConfig, model: ModelConfig, contexts: Sequence[int], patterns: Sequence[Pattern],
            buffers: Sequence[int | None], device: str = "functional", log: Callable[[str], None] | None = None,
            tell: Callable[[int], None] | None = None, kv_format: str = "fp16", **options: Any) -> Iterator[KvRow]:
    """Rows by pattern, then by context in rising order, then by buffer; a dense pattern has no buffer.

    buffers : bytes of the history buffer, None for all of it; log : is told of steps of opening a device; tell : of
    positions stored; kv_format : of records, one of `plan.KV_FORMATS`; options : of the device. Patterns that store
    alike share their set-up where they stand together.
    Raises CapacityError or CompileError for a context or buffer beyond the configuration, RequestError for results that
    depend on the buffer.
    """
    contexts = sorted(set(contexts))
    model = replace(model, context=max(contexts))
    groups: list[list[Pattern]] = []
    for pattern in patterns:
        if groups and _alike(groups[-1][0], pattern):
            groups[-1].append(pattern)
        else:
            groups.append([pattern])
    for alike in groups:
        plans = [make_plan(config, model, max(contexts), "" if alike[0].stored is None else "reuse",
                           KvSizes(buffer=size, format=kv_format)) for size in buffers]
        program = _Program(plans[0], sorted({plan.buffer for plan in plans}))
        bench = _Bench(program, alike[0].stored, device, log, options)
        with bench.accelerator.device:
            for context in contexts:
                bench.store(context, tell)
                for pattern in alike:
                    found = [bench.decode(pattern, section) for section in range(len(program.buffers))]
                    yield from found
                    if len({row.result for row in found}) > 1:
                        raise RequestError(f"pattern {pattern.name}, {context} tokens: results depend on the buffer: "
                                           + ", ".join(f"{row.result} with {row.buffer_bytes} bytes" for row in found))


def _alike(first: Pattern, second: Pattern) -> bool:
    """Whether two patterns store the same records."""
    return first.stored is not None and second.stored is not None and np.array_equal(first.stored, second.stored)


class _Bench:
    """A device on which a context grows. stored : of the pattern, None for a program without routers"""

    def __init__(self, program: _Program, stored: np.ndarray | None, device: str, log: Callable[[str], None] | None,
                 options: dict[str, Any]) -> None:
        self.program, self.stored = program, None if stored is None else _both(stored)
        self.accelerator = open_accelerator(device, program.compiled(), log, self.stored, **options)
        self.context = self.written = 0

    def store(self, context: int, tell: Callable[[int], None] | None) -> None:
        """Store records up to ``context``, from where the run before ended."""
        accelerator, config = self.accelerator, self.program.config
        accelerator.force = self.stored
        while self.context < context:
            accelerator.position = self.context
            count = min(accelerator.map.chunk, context - self.context)
            accelerator.run([0] * count)
            self.written += accelerator.stats.pop().counters["kv_written"]
            self.context += count
            if tell:
                tell(self.context)
        rng = np.random.default_rng(2)
        data = rng.standard_normal(_DATA).astype(np.float16).view(np.uint8)
        if self.program.plan.kv_format != KvFormat.FP16:  # any byte may be an exponent
            data = rng.integers(12, 16, 2 * _DATA, np.uint8) + 32 * rng.integers(0, 8, 2 * _DATA, np.uint8)
        beat = config.port_bits // 8
        first = self.program.regions[0] * beat
        size = self.program.plan.region_superbeats * len(set(self.program.regions)) * beat
        for port in range(config.ports):
            accelerator.device.write_memory(port, first, np.resize(np.roll(data, 2 * 977 * port), size))

    def decode(self, pattern: Pattern, section: int) -> KvRow:
        """One decode step at the last position."""
        accelerator, plan, config = self.accelerator, self.program.plan, self.program.config
        attends = pattern.attends[:, : self.context]
        accelerator.force = None if pattern.stored is None else _both(attends)
        accelerator.position = self.context - 1
        accelerator.run([section + 1], 0, 1)
        counters = accelerator.stats.pop().counters
        beat, width = config.port_bits // 8, plan.beats(plan.q_width)
        memory, held = counters["kv_read"] * beat, counters["kv_buffered"] * beat
        rows = [accelerator.device.inspect(DebugBuffer.ABUF, self.program.out_of(int(layer)) + int(layer) % width)
                for layer in np.flatnonzero(attends[:, -1])]
        peak = counters["cycles"] * config.superbeat_bytes
        pairs = plan.model.layers * self.context
        return KvRow(
            tokens=self.context, pattern=pattern.name,
            buffer_bytes=self.program.buffers[section] * plan.record * beat * config.ports, memory_bytes=memory,
            buffer_bytes_served=held, cycles=counters["cycles"] or None, physical_share=memory / peak if peak else None,
            effective_share=(memory + held) / peak if peak else None, hit_rate=held / (memory + held),
            storage_saved=1 - self.written / (pairs * plan.record),
            result=hashlib.sha256(b"".join(rows)).hexdigest()[:16])


def _both(attention: np.ndarray) -> np.ndarray:
    """Routes bool [layers, 2, positions] of bool [layers, positions] for the attention."""
    return np.stack([attention] * 2, 1)
