"""The student: a routed Llama that gradients flow through, on the dequantised weights of a model.

Every module is computed for every token and multiplied by its gate, 0 or 1; the gradient of a gate is that of the
sigmoid of its score (straight-through), so that a router hears also of the modules that did not run. Scores are linear
in the raw layer input, as on the overlay, but trained in coordinates where every feature has mean 0 and deviation 1:
the residual stream has features hundreds of times larger than others. `folded` undoes that.
Weights change only by low-rank deltas, up @ down (LoRA, arXiv 2106.09685), whose down factor is fixed: it sums the 32
features that share a minimum in the 4-bit form, so that a merged model rounds nothing away (`host.lora`).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from skipopu.golden.reference import ReferenceModel, rms_norm, rotate_pairs
from torch import Tensor, nn
from torch.nn import functional

from ..model import GROUP, LAYER_TENSORS, Model
from ..routers import Routers, check_kv

__all__ = ["BIAS_PEAK", "FOLDED_PEAK", "FOLDED_SCALE", "LINEAR_PARTS", "NORM_PARTS", "Exploration", "Student",
           "read_share"]

NORM_PARTS = ("attn_norm", "mlp_norm")
LINEAR_PARTS = tuple(part for part in LAYER_TENSORS if "norm" not in part)
FOLDED_SCALE = 16.0  # folded routers are this much larger, so that few weights fall below float16's normal numbers
FIRST_PEAK = 1.0  # coordinate that a sequence's first token reaches, by features up to 1000 times their usual size
LEAK = 0.02  # least gradient of a gate by its score: a token far on the wrong side still finds back
UP_GAIN = GROUP ** -0.5  # of the trained up factors: a sum of 32 features is about so much larger than one
FOLDED_PEAK = 4096.0  # largest weight of a folded router, far below where float16 ends
BIAS_PEAK = 64.0  # largest bias of a folded router: the overlay takes biases below 128, and points shift them


def read_share(model: Model, kv: str) -> np.ndarray:
    """Share of all layers' weights that a skipped module leaves unread in decode, float64 [layers, 2].

    In KV mode "dense" a token that skips attention still reads the weights of its keys and values.
    """
    skipped = ("q", "o") if kv == "dense" else ("q", "k", "v", "o")
    size = {part: int(np.prod(tensor.shape)) for part, tensor in model.layer(0).items() if part in LINEAR_PARTS}
    of_layer = np.array([sum(size[part] for part in skipped), size["gate"] + size["up"] + size["down"]], float)
    shares = np.tile(of_layer / (sum(size.values()) * model.config.layers), (model.config.layers, 1))
    if kv == "reuse":  # layer 0 computes keys and values of every token
        shares[0, 0] *= (size["q"] + size["o"]) / of_layer[0]
    return shares


@dataclass(frozen=True)
class Exploration:
    """How gates are drawn in training: ``score + noise * logistic >= 0``, its gradient by a sigmoid of ``temperature``.

    generator : of the random numbers; without noise none is needed
    """

    temperature: float = 1.0
    noise: float = 0.0
    generator: torch.Generator | None = None


class Student(nn.Module):
    """A routed Llama with trainable routers and, with ``lora``, up factors and gains of its norms.

    kv : one of KV_MODES; protected : bool [layers, 2], modules that always execute
    weight : Parameter [layers, 2, hidden], in standardised coordinates; bias : Parameter [layers, 2]
    ``calibrate`` must be called once before training.
    """

    def __init__(self, model: Model, kv: str, protected: np.ndarray, *, lora: bool = False,
                 device: str | torch.device = "cpu") -> None:
        super().__init__()
        reference = ReferenceModel(model, device=device)
        self.config, self.kv, self.identity = model.config, check_kv(kv), model.identity
        self._reference = reference
        layers, hidden = model.config.layers, model.config.hidden
        self.protected: Tensor
        self.mean: Tensor
        self.deviation: Tensor
        self.register_buffer("protected", torch.tensor(protected, device=device))
        self.register_buffer("mean", torch.zeros(layers, hidden, device=device))
        self.register_buffer("deviation", torch.ones(layers, hidden, device=device))
        self.weight = nn.Parameter(torch.zeros(layers, 2, hidden, device=device))
        self.bias = nn.Parameter(torch.zeros(layers, 2, device=device))
        self.up = nn.ParameterDict()
        for part in (*LINEAR_PARTS, *NORM_PARTS) if lora else ():
            shape = model.layer(0)[part].shape
            groups = (shape[0], shape[1] // GROUP) if part in LINEAR_PARTS else shape
            self.up[part] = nn.Parameter(torch.zeros(layers, *groups, device=device))

    @property
    def device(self) -> torch.device:
        """Where the student lives."""
        return self.weight.device

    def _linear(self, layer: int, part: str, x: Tensor) -> Tensor:
        rows = functional.linear(x, self._reference.weight(layer, part))
        if part in self.up:
            sums = x.unflatten(-1, (-1, GROUP)).sum(-1)
            rows = rows + functional.linear(sums * UP_GAIN, self.up[part][layer])
        return rows

    def _norm(self, layer: int, part: str, x: Tensor) -> Tensor:
        weight = self._reference.weight(layer, part)
        return rms_norm(x, weight * (1 + self.up[part][layer]) if part in self.up else weight, self.config.rms_eps)

    def _heads(self, layer: int, part: str, x: Tensor) -> Tensor:
        return self._linear(layer, part, x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)

    def scores(self, layer: int, x: Tensor) -> Tensor:
        """Scores [batch, tokens, 2] of layer input [batch, tokens, hidden]; those >= 0 execute."""
        return functional.linear((x - self.mean[layer]) / self.deviation[layer], self.weight[layer], self.bias[layer])

    def _gates(self, layer: int, x: Tensor, explore: Exploration | None) -> Tensor:
        """Gates [batch, tokens, 2], 0 or 1, with straight-through gradients if ``explore``."""
        scores = self.scores(layer, x)
        if explore is None:
            return torch.where(self.protected[layer], 1.0, (scores >= 0).float())
        if explore.noise:
            uniform = torch.rand(scores.shape, generator=explore.generator).clamp(1e-6, 1 - 1e-6).to(x.device)
            scores = scores + explore.noise * uniform.logit()
        soft = torch.sigmoid(scores / explore.temperature) + LEAK * scores
        return torch.where(self.protected[layer], 1.0, (scores >= 0).float() + soft - soft.detach())

    def forward(self, tokens: Tensor, explore: Exploration | None = None, *, gates: Tensor | None = None,
                inputs: list[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Final normalised hidden states [batch, length, hidden] and gates [layers, batch, length, 2].

        tokens : int [batch, length], from position 0 on; explore : how gates are drawn, None for the machine's
        gates : float [layers, batch, length, 2] in place of the routers'; inputs : gets every layer's input
        """
        reference, config = self._reference, self.config
        angles = reference.angles(torch.arange(tokens.shape[1], device=tokens.device))
        x, taken = reference.embed(tokens), []
        keys = values = x  # layer 0 replaces them
        for layer in range(config.layers):
            if inputs is not None:
                inputs.append(x)
            gate = self._gates(layer, x, explore) if gates is None else gates[layer]
            taken.append(gate)
            normed = self._norm(layer, "attn_norm", x)
            new_keys = rotate_pairs(self._heads(layer, "k", normed), angles)
            new_values = self._heads(layer, "v", normed)
            if layer and self.kv == "reuse":
                own = gate[:, None, :, :1]
                new_keys, new_values = keys + own * (new_keys - keys), values + own * (new_values - values)
            keys, values = new_keys, new_values
            queries = rotate_pairs(self._heads(layer, "q", normed), angles)
            mixed = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True, enable_gqa=True)
            x = x + gate[..., :1] * self._linear(layer, "o", mixed.transpose(1, 2).flatten(-2))
            normed = self._norm(layer, "mlp_norm", x)
            inner = functional.silu(self._linear(layer, "gate", normed)) * self._linear(layer, "up", normed)
            x = x + gate[..., 1:] * self._linear(layer, "down", inner)
        return rms_norm(x, reference.weights["final_norm"], config.rms_eps), torch.stack(taken)

    def logits(self, hidden: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits [..., vocab] of final normalised hidden states, or of the tokens ``rows`` only."""
        head = self._reference.head
        return functional.linear(hidden, head if rows is None else head[rows])

    @torch.no_grad()
    def calibrate(self, tokens: Tensor) -> None:
        """Set the coordinates of the routers from the layer inputs of int tokens [batch, length].

        A sequence's first token has features unlike those of all others: it only bounds what becomes of them.
        """
        inputs: list[Tensor] = []
        self(tokens, gates=torch.ones(self.config.layers, *tokens.shape, 2, device=tokens.device), inputs=inputs)
        for layer, x in enumerate(inputs):
            rows = x[:, 1:].flatten(0, 1)
            self.mean[layer] = rows.mean(0)
            first = (x[:, 0] - self.mean[layer]).abs().mean(0) / FIRST_PEAK
            self.deviation[layer] = rows.std(0).clamp(min=1e-6).maximum(first)

    @torch.no_grad()
    def folded(self) -> tuple[np.ndarray, np.ndarray]:
        """Difference float16 [layers, 2, hidden] and bias float32 [layers, 2] on the raw layer input.

        A score and its positive multiples decide alike: all are FOLDED_SCALE times larger than here, or less where a
        weight would exceed FOLDED_PEAK or a bias BIAS_PEAK.
        """
        weight = self.weight.double() / self.deviation.double()[:, None]
        bias = self.bias.double() - (weight * self.mean.double()[:, None]).sum(-1)
        scale = torch.minimum(FOLDED_PEAK / weight.abs().amax(-1).clamp(min=1e-30),
                              BIAS_PEAK / bias.abs().clamp(min=1e-30)).clamp(max=FOLDED_SCALE)
        weight = torch.where(self.protected[..., None], 0.0, weight * scale[..., None])
        weight = torch.where(weight.abs() < torch.finfo(torch.half).tiny, 0.0, weight).half().double()
        # the mean meets the rounded weights, so that their rounding moves no score of an average input
        bias = self.bias.double() * scale - (weight * self.mean.double()[:, None]).sum(-1)
        bias = torch.where(self.protected, 1.0, bias)
        return weight.cpu().numpy().astype(np.float16), bias.cpu().numpy().astype(np.float32)

    def routers(self, notes: dict[str, str] | None = None) -> Routers:
        """What was trained, as Routers of the model."""
        difference, bias = self.folded()
        lora = {part: (up.detach() * (UP_GAIN if part in LINEAR_PARTS else 1)).cpu().numpy().astype(np.float16)
                for part, up in self.up.items()}
        return Routers(kv=self.kv, base=self.identity, difference=difference, bias=bias, lora=lora or None,
                       notes=notes or {})

    @torch.no_grad()
    def adopt(self, routers: Routers) -> None:
        """Start from routers of the same model, of either KV mode, with their LoRA factors if it has such.

        Raises RouterError if the routers have two layers.
        """
        routers.require_linear()
        raw = torch.tensor(routers.difference.astype(np.float64)).to(self.device) / FOLDED_SCALE
        self.weight.copy_(raw * self.deviation[:, None])
        self.bias.copy_(torch.tensor(routers.bias).to(self.device) / FOLDED_SCALE
                        + (raw * self.mean.double()[:, None]).sum(-1))
        for part, change in (routers.lora or {}).items():
            if part in self.up:
                self.up[part].copy_(torch.tensor(change) / (UP_GAIN if part in LINEAR_PARTS else 1))
