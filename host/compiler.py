"""Compile a model into one program and one memory image that serve every step of a generation.

The program reads its arguments from registers: POSITION, TOKENS (1..chunk), HEAD_ROW and HEAD_ROWS. It embeds the
tokens of the token table, runs all layers, and writes logits of the chosen rows. With routers the same program serves
every route: each instruction names the row list it runs for, and is dropped where nobody is in it.

Memory data arrives in program order, so that weights which nobody takes yet block what lies behind them. The program is
free of deadlock because nothing that a MATMUL waits for, and nothing that its results wait for, is loaded behind the
first of its weights (`passes.load_order` checks it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from skipopu.hw.config import OverlayConfig
from skipopu.hw.formats import fp32_bits
from skipopu.hw.isa import (
    ROUTER_ROWS_AT,
    Condition,
    Destination,
    Register,
    Resource,
    RowList,
    RowScale,
)

from .attention import AttentionTiles
from .compiled import Compiled, ImageMap
from .errors import RouterError
from .image import ImageBuilder, WeightStream
from .layout import ceil_div, row_superbeats
from .model import Model
from .passes.check import check_program
from .passes.routers import router_biases
from .plan import KvSizes, Plan, make_plan
from .program import WORD_BYTES, Builder, Program, vector_imm
from .routers import Routers

__all__ = ["Placement", "compile_model", "emit_program"]

_INDEX, _LIMIT, _OFFSET, _TOKEN = Register.T1, Register.T2, Register.T3, Register.T4
_R = Resource
_SHORT_QUEUE = 2  #: instructions: a unit's queue that two loads fill


def compile_model(model: Model, config: OverlayConfig, context: int | None = None, routers: Routers | None = None,
                  check: bool = True, fused: bool = True, kv: KvSizes | None = None) -> Compiled:
    """Compile ``model`` for ``config``, with room for ``context`` positions (by default at most 2048).

    routers : linear ones for this model, with which every token decides what it skips; `lora.merged` before, if they
        have LoRA factors
    check : walk the finished program and verify it (see `passes.check`)
    fused : False gives every reduction (sum of squares, router scores, softmax maximum and sum) and every
        normalisation a pass of its own, with the same results: what the fusion saves, for measurements
    kv : format of its records, with KV reuse also their memory and history buffer; by default FP16, and all there is
    Raises CapacityError if the model does not fit the configuration, CompileError for an impossible context or buffer,
    RouterError for routers of another model or beyond what the overlay computes.
    """
    if routers is not None:
        routers.require_linear()
        routers.require_model(model)
        if routers.lora:
            raise RouterError("routers with LoRA factors need a model that holds them; merge them first")
    plan = make_plan(config, model.config, context, routers.kv if routers else "", kv)
    image = ImageBuilder(plan, model, routers)
    program = emit_program(plan, image, None if routers is None else router_biases(routers).tolist(), fused)
    image.memory.add("program", ceil_div(len(program.words) * WORD_BYTES * 8, config.port_bits))
    if check:
        check_program(program, plan, image.memory.regions)
    settings = model.config
    return Compiled(
        config=config, program=program, image=image.image(), notes=image.notes, tokenizer=model.tokenizer,
        chat=model.chat, map=ImageMap(
            regions=image.memory.regions, image=image.top, memory=image.memory.top, chunk=plan.chunk,
            context=plan.context, vocab=settings.vocab, logits_width=plan.logits_width, layers=settings.layers,
            model=settings.name, identity=model.identity, kv=plan.kv, places=plan.places, buffer=plan.buffer,
            kv_format=plan.sizes.format,
            bos_id=settings.bos_id, eos_ids=settings.eos_ids))


class Placement(Protocol):
    """Where a program finds what it loads: addresses of regions, and the weights of each matmul by name."""

    @property
    def weights(self) -> Mapping[str, WeightStream]: ...

    def address(self, name: str) -> int: ...


def emit_program(plan: Plan, image: Placement, biases: Sequence[Sequence[int]] | None, fused: bool = True) -> Program:
    """The program for a plan and a memory image. biases : of the routers of each layer, None without routers"""
    return _Emitter(plan, image, biases, fused).run()


class _Emitter:
    """Writes the instructions of one program.

    attending, feeding : the rows that execute the attention and the MLP of a layer; without routers all
    """

    def __init__(self, plan: Plan, image: Placement, biases: Sequence[Sequence[int]] | None, fused: bool) -> None:
        self.fused, self.biases = fused, biases
        self.plan, self.model, self.image, self.config = plan, plan.model, image, plan.config
        self.attending, self.feeding = ((RowList.ALL, RowList.ALL) if biases is None else
                                        (RowList.ATTENTION, RowList.MLP))
        self.build = Builder()
        self.on_chip = plan.addresses()
        self.tiles = AttentionTiles(plan, self.build, fused)

    def run(self) -> Program:
        self._prologue()
        for layer in range(self.model.layers):
            self._attention(layer)
            self._mlp(layer)
        self._head()
        return self.build.program()

    def _prologue(self) -> None:
        plan, emit, on_chip = self.plan, self.build.emit, self.on_chip
        settings = self.model
        self.build.at(-1, "setup")
        emit("vset", imm=fp32_bits(1 / settings.hidden), eps=fp32_bits(settings.rms_eps))
        self.tiles.count()
        self.build.at(-1, "embedding", "embedding")
        address, row, token = _OFFSET, _LIMIT, _TOKEN
        count = row_superbeats(self.config, plan.hidden)
        emit("addi", rd=_INDEX)
        emit("addi", rd=row)
        loop = emit("token", rd=token, imm_reg=_INDEX)
        emit("muli", rd=address, imm_reg=token, x=count)
        emit("loada", writes=_R.X, imm=self.image.address("embedding"), imm_reg=address, rows=1, x=on_chip["x"],
             x_reg=row, count=count, beats=plan.beats(plan.hidden))
        emit("addi", rd=row, imm_reg=row, imm=plan.beats(plan.hidden))
        emit("addi", rd=_INDEX, imm_reg=_INDEX, imm=1)
        emit("branch", rows_reg=_INDEX, x_reg=Register.TOKENS, condition=Condition.LT, imm=loop)
        self.build.at(-1, "rope", "rope")
        table = 4 * plan.head_dim
        count = row_superbeats(self.config, table)
        emit("muli", rd=address, imm_reg=Register.POSITION, x=count)
        emit("loada", writes=_R.ROPE, imm=self.image.address("rope"), imm_reg=address, rows_reg=Register.TOKENS,
             x=on_chip["rope"], count=count, beats=plan.beats(table), dst_stride=plan.beats(table))
        self._load_gain("layers.0.attn_norm", 0, 0)
        self.build.at(0, "attention", "layers.0.attn_norm")
        self._norm(_R.GAIN0, "gain0", **self._scored(0))
        self._load_mlp_gain(0, RowList.ALL)

    def _beat(self, region: str) -> int:
        """First vector beat of an MBUF region."""
        return self.on_chip[region] * (self.config.lanes // self.config.vector_lanes)

    def _rows(self, width: int) -> dict[str, int]:
        """Loop fields of a vector instruction over plain rows: one aligned vector of ``width`` elements per token."""
        beats = self.plan.beats(width)
        return {"rows_reg": Register.TOKENS, "heads": 1, "groups": 1, "beats": beats, "row_stride": beats,
                "vector": beats}

    def _load_gain(self, name: str, slot: int, layer: int | None = None, rows: RowList = RowList.ALL) -> None:
        """Load the gain of a norm, and the routers' weights of the layer whose input it scales."""
        self.build.at(-1, "gain", name, rows)
        hidden = self.plan.hidden
        self.build.emit("loada", writes=(_R.GAIN0, _R.GAIN1)[slot], imm=self.image.address(name), rows=1,
                        x=self.on_chip[f"gain{slot}"], count=row_superbeats(self.config, hidden),
                        beats=self.plan.beats(hidden))
        if self.biases and layer is not None:
            name = f"layers.{layer}.routers"
            self.build.at(-1, "routers", name)
            # the field is signed, its reading as a row is not
            self.build.emit("loada", writes=_R.GAIN0, imm=self.image.address(name), rows=1,
                            x=ROUTER_ROWS_AT - (1 << 16) + self._slot(layer), count=row_superbeats(self.config, hidden),
                            beats=self.plan.beats(hidden))

    def _load_mlp_gain(self, layer: int, rows: RowList) -> None:
        """Load the gain of the norm before the MLP: while the MLP of the layer before runs, or if nobody executes that
        one (``rows`` is NO_MLP) behind the first weights of the layer, since it waits for the attention's last norm.
        Short queues take it at the layer's begin, as two loads behind those weights would fill them."""
        if self.config.queue_depth > _SHORT_QUEUE:
            self._load_gain(f"layers.{layer}.mlp_norm", 1, rows=rows)

    def _slot(self, layer: int) -> int:
        """First row of the router buffer that holds a layer's weights."""
        return layer % 2 * self.plan.beats(self.plan.hidden)

    def _scored(self, layer: int) -> dict[str, int]:
        """Fields of the norm whose rows the routers of a layer score, none without routers; sets their biases."""
        if not self.biases:
            return {}
        attention, mlp = self.biases[layer]
        self.build.emit("vbias", imm=attention, mlp=mlp, list=RowList.ALL)
        return {"route": 1, "x": self._slot(layer)}

    def _norm(self, gain: Resource, table: str, **scored: int) -> None:
        """Gain and alignment of the residual stream as it is."""
        for fields in ([scored] if self.fused else [{}, scored, {}] if scored else [{}, {}]):
            self.build.emit("vnorm", reads=_R.X | gain, writes=_R.MX,
                            imm=vector_imm(self.on_chip["x"], self._beat("mx")), **self._rows(self.plan.hidden),
                            table=self.on_chip[table], **fields)

    def _add(self, gain: Resource, table: str, others: RowList, every: RowList, **scored: int) -> None:
        """Residual add of a matmul's result, with the next norm's gain; with routers, the norm for ``others`` too.

        Without fusion the norm is apart, and runs for ``every`` row that needs it.
        """
        fused = scored if self.fused else {}
        self.build.emit("vadd", reads=_R.X | gain, writes=_R.X | _R.MX,
                        imm=vector_imm(self.on_chip["x"], self._beat("mx")), **self._rows(self.plan.hidden),
                        table=self.on_chip[table], **fused)
        if self.biases or not self.fused:
            self.build.rows = others if self.fused else every
            self._norm(gain, table, **scored)

    def _loadw(self, name: str, first: int = 0, count: int | None = None) -> None:
        """Load a weight region, or ``count`` superbeats of it from ``first`` on."""
        stream = self.image.weights[name]
        self.build.emit("loadw", imm=stream.address + first, count=stream.count - first if count is None else count)

    def _matmul(self, name: str, reads: Resource, source: str, inner: int, width: int, x_reg: int = 0,
                rows_reg: int = Register.TOKENS, load: bool = True) -> None:
        """Stream a weight region through the array: LOADW, then its MATMUL over rows of an MBUF region."""
        if load:
            self._loadw(name)
        stream, inner_rows = self.image.weights[name], self.plan.rows(inner)
        self.build.emit("matmul", reads=reads, rows_reg=rows_reg, x=self.on_chip[source], x_reg=x_reg, mode=stream.mode,
                        heads=1, groups=1, n_tiles=ceil_div(width, self.config.columns), k_tiles=inner_rows,
                        row_stride=inner_rows, scale_exponent=stream.scale_exponent, group=stream.group,
                        beats=self.plan.beats(width))

    def _attention(self, layer: int) -> None:
        plan, emit, on_chip = self.plan, self.build.emit, self.on_chip
        name = f"layers.{layer}."
        if self.config.queue_depth <= _SHORT_QUEUE:
            self._load_gain(name + "mlp_norm", 1)
        head = plan.beats(plan.head_dim)
        self._keys_values(layer)
        self.build.at(layer, "attention", name + "q", self.attending)
        self._matmul(name + "q", _R.MX, "mx", plan.hidden, plan.q_width)
        emit("vrope", reads=_R.ROPE, writes=_R.MQ, imm=vector_imm(0, self._beat("mq")),
             **self._rows(plan.q_width) | {"vector": head}, table=on_chip["rope"], table_stride=4 * head, wrap=head,
             scale=RowScale.RSQRT, dest=Destination.MBUF)
        self.build.at(layer, "attention", f"kv.{layer}", self.attending)
        self.tiles.emit(layer, self._records(layer))
        if layer == self.model.layers - 1:
            self._load_gain("final_norm", 0)
        else:
            self._load_gain(f"layers.{layer + 1}.attn_norm", 0, layer + 1)
        self.build.at(layer, "attention", name + "o", self.attending)
        emit("vscale", reads=_R.OUT, writes=_R.MO, imm=vector_imm(on_chip["out"], self._beat("mo")),
             **self._rows(plan.q_width), wrap=head, scale=RowScale.RECIPROCAL)
        self._matmul(name + "o", _R.MO, "mo", plan.q_width, plan.hidden)
        self._add(_R.GAIN1, "gain1", RowList.MLP_ONLY, self.feeding)

    def _keys_values(self, layer: int) -> None:
        """Keys and values of the tokens that compute them, and the records to memory.

        With routers the lists of the layer are decided on the way: where all tokens compute keys and values, between
        the matmuls and what takes their results, since by then the array has waited for the scored rows anyway;
        otherwise when the first weights of the keys are already on their way.
        """
        name, every = f"layers.{layer}.", layer == 0 or self.plan.kv != "reuse"
        rows = RowList.ALL if every else self.attending
        if every and layer and self.biases:
            self._load_mlp_gain(layer, RowList.NO_MLP)
        if not every:
            self._early_keys(layer)
        for tensor in "kv":
            self.build.at(layer, "attention", name + tensor, rows)
            self._matmul(name + tensor, _R.MX, "mx", self.plan.hidden, self.plan.kv_width,
                         load=every or tensor == "v")
            if not (every and self.biases):
                self._into_record(tensor)
            if not every and tensor == "k":
                self.build.emit("dropw", count=self._early(layer), list=RowList.NO_ATTENTION)
        if every and self.biases:
            self._route(layer)
            for tensor in "kv":
                self.build.at(layer, "attention", name + tensor, rows)
                self._into_record(tensor)
        self.build.at(layer, "attention", f"kv.{layer}", rows)
        reuse = {"reuse": 1, "places": self.plan.places, "layer": layer} if self.plan.kv == "reuse" else {}
        self.build.emit("storekv", reads=_R.KVOUT, writes=_R.KVMEM, imm=self._records(layer),
                        rows_reg=Register.TOKENS, x_reg=Register.POSITION, **self.plan.record_fields, **reuse)

    def _records(self, layer: int) -> int:
        """Address of the region with the KV records of a layer."""
        return self.image.address(self.plan.kv_region(layer))

    def _early(self, layer: int) -> int:
        """Superbeats of the key projection that are read before the route is known."""
        return min(self.plan.prefetch, self.image.weights[f"layers.{layer}.k"].count)

    def _early_keys(self, layer: int) -> None:
        name, early = f"layers.{layer}.k", self._early(layer)
        self.build.at(layer, "attention", name)
        self._loadw(name, count=early)
        self._load_mlp_gain(layer, RowList.NO_MLP)
        self._route(layer)
        if early < self.image.weights[name].count:
            self.build.at(layer, "attention", name, self.attending)
            self._loadw(name, early)

    def _route(self, layer: int) -> None:
        self.build.at(layer, "attention", f"layers.{layer}.routers")
        self.build.emit("route", rows_reg=Register.TOKENS, layer=layer)

    def _into_record(self, tensor: str) -> None:
        """Rows of keys, rotated, or of values from the array to their place in the records."""
        plan, table = self.plan, self.on_chip["rope"]
        head = plan.beats(plan.head_dim)
        kvout = plan.kvout_record * self.config.beat_elements // self.config.vector_lanes
        rotation = {"table": table + 2 * head, "table_stride": 4 * head, "wrap": head} if tensor == "k" else {}
        self.build.emit("vrope", reads=_R.ROPE if rotation else _R(0), writes=_R.KVOUT,
                        imm=vector_imm(0, "kv".index(tensor) * kvout // 2),
                        **self._rows(plan.kv_width) | {"row_stride": kvout, "vector": head}, **rotation,
                        scale=RowScale.RSQRT, dest=Destination.KVOUT)

    def _mlp(self, layer: int) -> None:
        plan = self.plan
        name = f"layers.{layer}."
        last = layer == self.model.layers - 1
        self.build.at(layer, "mlp", name + "gate_up", self.feeding)
        self._matmul(name + "gate_up", _R.MX, "mx", plan.hidden, 2 * plan.mlp)
        mlp = plan.beats(plan.mlp)
        self.build.emit("vswiglu", writes=_R.MH, imm=vector_imm(0, self._beat("mh")),
                        **self._rows(plan.mlp) | {"beats": 2 * mlp}, scale=RowScale.RSQRT)
        if not last:
            self._load_mlp_gain(layer + 1, self.feeding)
        self.build.at(layer, "mlp", name + "down", self.feeding)
        self._matmul(name + "down", _R.MH, "mh", plan.mlp, plan.hidden)
        self._add(_R.GAIN0, "gain0", RowList.NOT_MLP, RowList.ALL, **{} if last else self._scored(layer + 1))

    def _head(self) -> None:
        plan, emit = self.plan, self.build.emit
        self.build.at(-1, "head", "head")
        skip = emit("halt")
        emit("muli", rd=_OFFSET, imm_reg=Register.HEAD_ROW, x=plan.rows(plan.hidden))
        self._matmul("head", _R.MX, "mx", plan.hidden, plan.logits_width, _OFFSET, Register.HEAD_ROWS)
        emit("vlogits", imm=self.model.vocab, rows_reg=Register.HEAD_ROWS, x_reg=Register.HEAD_ROW, heads=1,
             groups=1, beats=plan.beats(plan.logits_width), scale=RowScale.RSQRT)
        emit("storel", writes=_R.LOGITS, imm=self.image.address("logits"), rows_reg=Register.HEAD_ROWS,
             count=row_superbeats(self.config, plan.logits_width))
        end = emit("halt")
        self.build.patch(skip, "branch", rows_reg=Register.HEAD_ROWS, x_reg=Register.ZERO, condition=Condition.EQ,
                         imm=end)
