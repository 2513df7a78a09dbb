"""The program of a model of which only the shape is known: the same instructions and addresses, no contents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from skipopu.hw.config import OverlayConfig

from ..compiler import emit_program
from ..errors import RequestError
from ..image import WeightStream
from ..layout import MemoryMap, ceil_div, row_superbeats, weight_superbeats
from ..model import GROUPS, ModelConfig
from ..passes.weights import Padding, mode_of, shared_blocks
from ..plan import KvSizes, Plan, make_plan
from ..program import WORD_BYTES, Program

__all__ = ["Outline", "check_kind", "outline"]

Kind = Callable[[str], str]  #: name of a matmul -> kind of its weights
Exponent = Callable[[str, int], int]  #: name of a matmul, its inner size -> largest exponent field of its scales


@dataclass(frozen=True, eq=False)
class Outline:
    """A program with its plan and memory map.

    regions : name -> (superbeat address, superbeats); memory : superbeats in all; weights : of each matmul
    """

    plan: Plan
    program: Program
    regions: dict[str, tuple[int, int]]
    memory: int
    weights: dict[str, WeightStream]

    @property
    def config(self) -> OverlayConfig:
        return self.plan.config

    def port_bytes(self) -> int:
        """Memory that the model needs behind each port."""
        return self.memory * self.config.port_bits // 8


class _Placement:
    """What `image.ImageBuilder` says of addresses, in its order, from shapes alone."""

    def __init__(self, plan: Plan, kind: Kind, exponent: Exponent) -> None:
        self.plan, self.kind, self.exponent, self.memory = plan, kind, exponent, MemoryMap(plan.config)
        self.weights: dict[str, WeightStream] = {}
        model, add = plan.model, self.memory.add
        add("embedding", model.vocab * self._row(plan.hidden))
        add("rope", plan.context * self._row(4 * plan.head_dim))
        layers = range(model.layers)
        for name in ["final_norm", *(f"layers.{layer}.{norm}" for layer in layers for norm in ("attn_norm",
                                                                                               "mlp_norm"))]:
            add(name, self._row(plan.hidden))
        if plan.kv:
            for layer in layers:
                add(f"layers.{layer}.routers", self._row(plan.hidden))
        for layer in layers:
            name = f"layers.{layer}."
            for part, rows, cols in (("k", plan.kv_width, plan.hidden), ("v", plan.kv_width, plan.hidden),
                                     ("q", plan.q_width, plan.hidden), ("o", plan.hidden, plan.q_width),
                                     ("gate_up", 2 * plan.mlp, plan.hidden), ("down", plan.hidden, plan.mlp)):
                self._linear(name + part, rows, cols)
        self._linear("head", plan.logits_width, plan.hidden)
        for name in dict.fromkeys(map(plan.kv_region, layers)):
            add(name, plan.region_superbeats)
        add("logits", plan.chunk * self._row(plan.logits_width))

    def _row(self, width: int) -> int:
        return row_superbeats(self.plan.config, width)

    def _linear(self, name: str, rows: int, cols: int) -> None:
        plan, kind = self.plan, self.kind(name)
        config, model = plan.config, plan.model
        inner = (Padding(model.heads, model.head_dim, plan.head_dim) if name.endswith(".o") else
                 Padding(1, model.mlp, plan.mlp) if name.endswith(".down") else Padding(1, model.hidden, plan.hidden))
        if (shared := shared_blocks(inner, config.block, GROUPS[kind])) is None:
            kind, shared = "q8_0", shared_blocks(Padding(1, cols, cols), config.block, GROUPS["q8_0"])
        assert shared is not None  # of the second, which is what `passes.weights.lower_linear` requantises to
        mode, group = mode_of(kind), shared[0]
        count = weight_superbeats(config, mode, ceil_div(rows, config.columns), cols // config.lanes, group)
        self.weights[name] = WeightStream(self.memory.add(name, count), count, mode, self.exponent(name, cols),
                                          group)

    def address(self, name: str) -> int:
        return self.memory.regions[name][0]


def check_kind(kind: str) -> None:
    """Raises RequestError for a kind of weights that no matmul takes."""
    if kind not in GROUPS:
        raise RequestError(f"weights must be {', '.join(GROUPS)}, not {kind!r}")


def outline(model: ModelConfig, config: OverlayConfig, context: int | None = None, *, kv: str = "",
            kind: str | Kind = "q4_0", fused: bool = True, sizes: KvSizes | None = None,
            exponent: Exponent = lambda name, inner: 1) -> Outline:
    """The program that `compile_model` would write for a model of this shape.

    kv : "reuse" or "dense" for a program with routers, "" without; kind : of the weights (`model.GROUPS`), also by
        name of a matmul (``layers.0.gate_up``, ``head``); sizes : of the KV records; exponent : of the scales, for
        whoever runs the program
    Raises CapacityError, CompileError as the compiler does, RequestError for an unknown kind or KV mode.
    """
    if kv not in ("", "reuse", "dense"):
        raise RequestError(f"kv must be reuse or dense, not {kv!r}")
    if isinstance(kind, str):
        check_kind(kind)
    plan = make_plan(config, model, context, kv, sizes)
    placement = _Placement(plan, kind if callable(kind) else lambda name: kind, exponent)
    program = emit_program(plan, placement, [[0, 0]] * model.layers if kv else None, fused)
    placement.memory.add("program", ceil_div(len(program.words) * WORD_BYTES * 8, config.port_bits))
    return Outline(plan, program, placement.memory.regions, placement.memory.top, placement.weights)
