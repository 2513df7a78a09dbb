"""Memory image of a model: embedding, rotation tables, norm gains and weight streams, each at its address."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from skipopu.hw.isa import MatmulMode

from .layout import MemoryMap, pack_rows, pack_weights, row_superbeats, scale_exponent, stripe
from .model import Model, QuantTensor
from .passes.routers import router_rows
from .passes.weights import Linear, Padding, interleave, lower_linear, same_kind
from .plan import Plan
from .routers import Routers

__all__ = ["ImageBuilder", "WeightStream", "rope_table"]

_EMBED_ROWS_AT_ONCE = 4096  # bounds the temporaries


@dataclass(frozen=True)
class WeightStream:
    """What a LOADW and its MATMUL need to know of one packed linear layer."""

    address: int  # superbeat
    count: int  # superbeats
    mode: MatmulMode
    scale_exponent: int
    group: int  # log2 of the blocks that share a scale


class ImageBuilder:
    """Places a model's tensors, the weights of its routers and the working memory.

    weights : name of a matmul -> its packed weights; notes : what was requantised; top : superbeats with contents
    """

    def __init__(self, plan: Plan, model: Model, routers: Routers | None = None) -> None:
        self.plan, self.model, self.config = plan, model, plan.config
        self.memory = MemoryMap(plan.config)
        self.notes: list[str] = []
        self.weights: dict[str, WeightStream] = {}
        self._contents: list[tuple[int, np.ndarray]] = []
        self._place_constants()
        if routers is not None:
            self._place_routers(routers)
        for layer in range(model.config.layers):
            self._place_layer(layer)
        head = Padding(1, model.config.vocab, plan.logits_width)
        self._place_linear("head", model.head, head, self._hidden)
        self.top = self.memory.top  # superbeats with contents
        for layer in range(model.config.layers):
            if (region := plan.kv_region(layer)) not in self.memory.regions:
                self.memory.add(region, plan.region_superbeats)
        self.memory.add("logits", plan.chunk * row_superbeats(self.config, plan.logits_width))

    def address(self, name: str) -> int:
        """Superbeat address of a region."""
        return self.memory.regions[name][0]

    def image(self) -> np.ndarray:
        """The contents of every port, uint8 [ports, bytes]; working memory is not part of it."""
        image = np.zeros((self.config.ports, self.top * self.config.port_bits // 8), np.uint8)
        for address, stream in self._contents:
            stripe(self.config, image, address, stream)
        return image

    @property
    def _hidden(self) -> Padding:
        return Padding(1, self.model.config.hidden, self.plan.hidden)

    def _place(self, name: str, stream: np.ndarray) -> None:
        self._contents.append((self.memory.add(name, len(stream)), stream))

    def _place_constants(self) -> None:
        plan = self.plan
        self._place("embedding", self._embedding(self.model.tensors["embedding"]))
        self._place("rope", pack_rows(self.config, rope_table(plan, self.model.rope_inv_freq)))
        gains = ["final_norm"] + [f"layers.{layer}.{norm}" for layer in range(self.model.config.layers)
                                  for norm in ("attn_norm", "mlp_norm")]
        for name in gains:
            gain = np.zeros((1, plan.hidden), np.float32)
            gain[0, : self.model.config.hidden] = self.model.tensors[name].values
            self._place(name, pack_rows(self.config, gain))

    def _place_routers(self, routers: Routers) -> None:
        for layer, row in enumerate(router_rows(routers, self.plan.hidden)):
            self._place(f"layers.{layer}.routers", pack_rows(self.config, row[None]))

    def _embedding(self, tensor: QuantTensor) -> np.ndarray:
        """The embedding as padded FP32 rows, some thousand rows at a time."""
        vocab, hidden = tensor.shape
        per_row = row_superbeats(self.config, self.plan.hidden)
        packed = np.zeros((vocab, per_row * self.config.superbeat_bytes // 4), np.float32)
        for first in range(0, vocab, _EMBED_ROWS_AT_ONCE):
            rows = slice(first, min(first + _EMBED_ROWS_AT_ONCE, vocab))
            packed[rows, :hidden] = tensor.take_rows(np.arange(rows.start, rows.stop)).dequantise()
        return packed.view(np.uint8).reshape(-1, self.config.superbeat_bytes)

    def _place_layer(self, layer: int) -> None:
        plan, settings = self.plan, self.model.config
        part = self.model.layer(layer)
        q_heads = Padding(settings.heads, settings.head_dim, plan.head_dim)
        kv_heads = Padding(settings.kv_heads, settings.head_dim, plan.head_dim)
        mlp = Padding(1, settings.mlp, plan.mlp)
        name = f"layers.{layer}."
        self._place_linear(name + "k", part["k"], kv_heads, self._hidden)
        self._place_linear(name + "v", part["v"], kv_heads, self._hidden)
        self._place_linear(name + "q", part["q"], q_heads, self._hidden)
        self._place_linear(name + "o", part["o"], self._hidden, q_heads)
        pair = [lower_linear(self.config, name + tensor_part, tensor, mlp, self._hidden, self.notes)
                for tensor_part, tensor in zip(
                    ("gate", "up"), same_kind(part["gate"], part["up"], name + "gate_up", self.notes))]
        self._place_weights(name + "gate_up", interleave(self.config, *pair))
        self._place_linear(name + "down", part["down"], self._hidden, mlp)

    def _place_linear(self, name: str, tensor: QuantTensor, rows: Padding, cols: Padding) -> None:
        self._place_weights(name, lower_linear(self.config, name, tensor, rows, cols, self.notes))

    def _place_weights(self, name: str, linear: Linear) -> None:
        stream = pack_weights(self.config, linear.mode, linear.codes, linear.scale, linear.minimum,
                              linear.group)
        self._place(name, stream)
        exponent = scale_exponent(linear.mode, linear.scale, linear.minimum)
        self.weights[name] = WeightStream(self.address(name), len(stream), linear.mode, exponent, linear.group)


def rope_table(plan: Plan, inv_freq: np.ndarray) -> np.ndarray:
    """float32 [context, 4 * padded head]: query cos, query sin, key cos, key sin of each position.

    inv_freq : float32 [head_dim / 2], radians per position. Both elements of a pair hold the cosine; the sines are
    -sin, +sin. The query's are in units of log2(e) / sqrt(head_dim), so that scores are powers of two.
    """
    head = plan.model.head_dim
    angle = np.arange(plan.context)[:, None] * inv_freq.astype(np.float64)
    table = np.zeros((plan.context, 4, plan.head_dim))
    table[:, 2, :head] = np.repeat(np.cos(angle), 2, axis=1)
    table[:, 3, :head:2], table[:, 3, 1:head:2] = -np.sin(angle), np.sin(angle)
    table[:, :2] = table[:, 2:] * (math.log2(math.e) / math.sqrt(head))
    return table.reshape(plan.context, -1).astype(np.float32)
