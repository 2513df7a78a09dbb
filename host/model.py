"""The compiler's view of a Llama-family model: configuration, quantised tensors, tokenizer, origin.

Tensors stay in the quantised form of their file, so that the compiler lays them out without requantising.
Linear weights are [output features, input features]; groups of 32, 64 or 128 consecutive input features share a scale.
Rows of Q and K are in GGUF order: rotary embedding turns the adjacent pairs (2i, 2i + 1) of each head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .errors import ModelError

if TYPE_CHECKING:
    from .chat import ChatTemplate
    from .tokenizer import Tokenizer

__all__ = ["BASE", "GROUP", "GROUPS", "KINDS", "LAYER_TENSORS", "Llama3Scaling", "Model", "ModelConfig", "QuantTensor",
           "rope_inv_freq", "tensor_name", "tensor_shapes"]

GROUP = 32  # consecutive input features that share one scale, as in GGUF's Q4_0, Q4_1 and Q8_0
#: kind -> input features that share a scale; those beyond 32 are ours: what GPTQ and AWQ call a group size
GROUPS = {"q8_0": GROUP, "q4_0": GROUP, "q4_1": GROUP, "q4_g64": 64, "q4_g128": 128, "q4m_g64": 64, "q4m_g128": 128}
#: kind -> the one with the same codes and groups of 32
BASE = {kind: kind if kind.endswith(("_0", "_1")) else "q4_1" if kind.startswith("q4m") else "q4_0" for kind in GROUPS}
CODE_RANGE = {"q8_0": (-128, 127), "q4_0": (-8, 7), "q4_1": (0, 15)}  # by base
KINDS = ("f32", "f16", *GROUPS)
LAYER_TENSORS = ("attn_norm", "q", "k", "v", "o", "mlp_norm", "gate", "up", "down")
MAX_LAYERS = 1024  # far above any Llama; keeps a damaged file from asking for a billion tensors
NORMS = ("attn_norm", "mlp_norm", "final_norm")


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Geometry of a Llama-family model. Raises ModelError if a field or a relation between fields is impossible."""

    layers: int
    hidden: int               # features of the residual stream
    heads: int                # query heads
    kv_heads: int             # key/value heads; divides ``heads``
    head_dim: int             # features of a head; even, 8..128
    mlp: int                  # features between gate/up and down
    vocab: int                # tokens
    context: int              # positions the model was made for
    rope_theta: float = 10000.0
    rms_eps: float = 1e-5     # added to the mean square, same unit as x**2
    tied_head: bool = False   # the head is the embedding
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    name: str = "model"

    def __post_init__(self) -> None:
        for key in ("layers", "hidden", "heads", "kv_heads", "head_dim", "mlp", "vocab", "context"):
            value, most = getattr(self, key), MAX_LAYERS if key == "layers" else (1 << 31) - 1
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise ModelError(f"model {key} must be a whole number from 1 to {most}, not {value!r}")
        for key in ("rope_theta", "rms_eps"):
            value = getattr(self, key)
            if not _is_positive(value):
                raise ModelError(f"model {key} must be a positive number, not {value!r}")
        if self.heads % self.kv_heads:
            raise ModelError(f"model kv_heads must divide the {self.heads} heads, not be {self.kv_heads}")
        if self.head_dim % 2 or not 8 <= self.head_dim <= 128:
            raise ModelError(f"model head_dim must be an even number from 8 to 128, not {self.head_dim}")
        for key, ids in ("bos_id", () if self.bos_id is None else (self.bos_id,)), ("eos_ids", self.eos_ids):
            for token in ids:
                if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < self.vocab:
                    raise ModelError(f"model {key} must be a token from 0 to {self.vocab - 1}, not {token!r}")

    @property
    def q_rows(self) -> int:
        """Output features of Q, input features of O."""
        return self.heads * self.head_dim

    @property
    def kv_rows(self) -> int:
        """Output features of K, and of V."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True, eq=False)
class QuantTensor:
    """One tensor, quantised in groups along its columns, or plain.

    kind "f32", "f16": ``values`` float32 / float16 [rows, cols] or [cols].
    kind "q8_0", "q4_0", "q4_1": ``codes`` int8 [rows, cols], ``scale`` float16 [rows, cols / 32]; "q4_1" also has
    ``minimum`` float16 [rows, cols / 32]. The value is ``code * scale (+ minimum)``; codes are -128..127, -8..7
    (the file's 0..15 less 8) and 0..15. cols is a multiple of 32.
    kind "q4_g64", "q4_g128": as "q4_0" with a scale for 64 or 128 columns, the last of a row for as many as are left;
    "q4m_g64", "q4m_g128": as "q4_1".
    Raises ModelError on a wrong dtype or shape, a code out of range, NaN or infinity.
    """

    kind: str
    values: np.ndarray | None = None
    codes: np.ndarray | None = None
    scale: np.ndarray | None = None
    minimum: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ModelError(f"tensor kind must be one of {', '.join(KINDS)}, not {self.kind!r}")
        expected: dict[str, type] = {"values": np.float32 if self.kind == "f32" else np.float16}
        if self.kind in GROUPS:
            expected = {"codes": np.int8, "scale": np.float16}
            if BASE[self.kind] == "q4_1":
                expected["minimum"] = np.float16
        for part in ("values", "codes", "scale", "minimum"):
            array = getattr(self, part)
            if (array is not None) != (part in expected):
                raise ModelError(f"a {self.kind} tensor has exactly {', '.join(expected)}: check {part}")
            if array is None:
                continue
            if array.dtype != expected[part]:
                raise ModelError(f"{self.kind} {part} must be {np.dtype(expected[part])}, not {array.dtype}")
            if part != "codes" and not np.isfinite(array).all():
                raise ModelError(f"{self.kind} {part} holds NaN or infinity ({np.count_nonzero(~np.isfinite(array))} "
                                 f"of {array.size}); the file is damaged or was converted badly")
        if self.codes is None:
            return
        if self.codes.ndim != 2 or self.codes.shape[1] % GROUP:
            raise ModelError(f"{self.kind} codes must be [rows, a multiple of {GROUP}], not {list(self.codes.shape)}")
        groups = (self.codes.shape[0], -(-self.codes.shape[1] // self.group))
        for array in (self.scale, self.minimum):
            if array is not None and array.shape != groups:
                raise ModelError(f"{self.kind} scale and minimum must be {list(groups)}, not {list(array.shape)}")
        low, high = CODE_RANGE[BASE[self.kind]]
        if self.codes.size and not (self.codes.min() >= low and self.codes.max() <= high):
            raise ModelError(f"{self.kind} codes must be {low}..{high}, not {self.codes.min()}..{self.codes.max()}")

    @property
    def group(self) -> int:
        """Columns that share a scale, of a quantised tensor."""
        return GROUPS[self.kind]

    @property
    def shape(self) -> tuple[int, ...]:
        """(rows, cols), or (cols,) of a plain vector."""
        array = self.values if self.codes is None else self.codes
        assert array is not None
        return array.shape

    def dequantise(self) -> np.ndarray:
        """float32, same shape: ``float32(code) * float32(scale) + float32(minimum)``, in that order."""
        if self.codes is None:
            assert self.values is not None
            return self.values.astype(np.float32)
        narrow = self.narrowed()
        assert narrow.scale is not None
        groups = self.codes.reshape(*narrow.scale.shape, GROUP).astype(np.float32)
        groups *= narrow.scale.astype(np.float32)[..., None]
        if narrow.minimum is not None:
            groups += narrow.minimum.astype(np.float32)[..., None]
        return groups.reshape(self.codes.shape)

    def narrowed(self) -> QuantTensor:
        """The same values with a scale for every 32 columns, a kind that GGUF has."""
        if self.codes is None or self.group == GROUP:
            return self
        columns = np.arange(self.codes.shape[1] // GROUP) * GROUP // self.group
        scale, minimum = (part if part is None else part[:, columns] for part in (self.scale, self.minimum))
        return QuantTensor(BASE[self.kind], codes=self.codes, scale=scale, minimum=minimum)

    def take_rows(self, rows: np.ndarray) -> QuantTensor:
        """The tensor with the given rows (int [n] or a boolean mask), in that order."""
        return QuantTensor(self.kind, *(part if part is None else part[rows]
                                        for part in (self.values, self.codes, self.scale, self.minimum)))


@dataclass(frozen=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's stretch of the slow rotary frequencies; the names are those of ``config.json``."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: float

    def __post_init__(self) -> None:
        for key, value in vars(self).items():
            if not _is_positive(value):
                raise ModelError(f"llama3 rope scaling: {key} must be a positive number, not {value!r}")
        if self.high_freq_factor <= self.low_freq_factor:
            raise ModelError(f"llama3 rope scaling: high_freq_factor must be above low_freq_factor "
                             f"{self.low_freq_factor}, not {self.high_freq_factor}")

    def apply(self, inv_freq: np.ndarray) -> np.ndarray:
        """float64 [head_dim / 2], radians per position -> the same, slow frequencies divided by ``factor``."""
        turns = self.original_max_position_embeddings * inv_freq / (2 * np.pi)
        smooth = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        return inv_freq * ((1 - np.clip(smooth, 0, 1)) / self.factor + np.clip(smooth, 0, 1))


def rope_inv_freq(config: ModelConfig, scaling: Llama3Scaling | None = None) -> np.ndarray:
    """Angle per position of each pair, float32 [head_dim / 2], radians: ``theta ** (-2i / head_dim)``, then scaled."""
    inv_freq = float(config.rope_theta) ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    return (scaling.apply(inv_freq) if scaling else inv_freq).astype(np.float32)


def tensor_name(layer: int, part: str) -> str:
    """Name in ``Model.tensors`` of one of LAYER_TENSORS, for example ``layers.0.q``."""
    return f"layers.{layer}.{part}"


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a model of this geometry has, with its shape, in the order of execution."""
    hidden, q, kv, mlp = config.hidden, config.q_rows, config.kv_rows, config.mlp
    layer = {"attn_norm": (hidden,), "q": (q, hidden), "k": (kv, hidden), "v": (kv, hidden), "o": (hidden, q),
             "mlp_norm": (hidden,), "gate": (mlp, hidden), "up": (mlp, hidden), "down": (hidden, mlp)}
    shapes: dict[str, tuple[int, ...]] = {"embedding": (config.vocab, hidden)}
    for index in range(config.layers):
        shapes |= {tensor_name(index, part): shape for part, shape in layer.items()}
    shapes["final_norm"] = (hidden,)
    if not config.tied_head:
        shapes["head"] = (config.vocab, hidden)
    return shapes


@dataclass(frozen=True, eq=False, kw_only=True)
class Model:
    """A model ready for the compiler and the reference. Raises ModelError if a tensor is missing or misshapen.

    tensors : name -> QuantTensor, exactly those of ``tensor_shapes(config)``; norms are plain float32 vectors
    rope_inv_freq : float32 [head_dim / 2], radians per position; made from ``rope_theta`` if not given
    identity : hexadecimal SHA-256 of the source, so that compiled programs name what they were made from
    """

    config: ModelConfig
    tensors: Mapping[str, QuantTensor]
    rope_inv_freq: np.ndarray = field(default=None)  # type: ignore[arg-type]
    tokenizer: Tokenizer | None = None
    chat: ChatTemplate | None = None
    identity: str = ""
    source: str = ""

    def __post_init__(self) -> None:
        shapes = tensor_shapes(self.config)
        if missing := [name for name in shapes if name not in self.tensors]:
            raise ModelError(f"model {self.config.name}: {len(missing)} tensors are missing, first {missing[0]!r}")
        if extra := [name for name in self.tensors if name not in shapes]:
            raise ModelError(f"model {self.config.name}: unexpected tensor {extra[0]!r}")
        for name, shape in shapes.items():
            tensor = self.tensors[name]
            if tensor.shape != shape:
                raise ModelError(f"tensor {name}: shape must be {list(shape)}, not {list(tensor.shape)}")
            if name.rpartition(".")[2] in NORMS and tensor.kind != "f32":
                raise ModelError(f"tensor {name}: a norm must be f32, not {tensor.kind}")
        if self.tokenizer is not None and self.tokenizer.vocab > self.config.vocab:
            raise ModelError(f"model {self.config.name}: the tokenizer has {self.tokenizer.vocab} tokens, but the "
                             f"embedding only {self.config.vocab} rows")
        if self.rope_inv_freq is None:
            object.__setattr__(self, "rope_inv_freq", rope_inv_freq(self.config))
        freq, half = self.rope_inv_freq, self.config.head_dim // 2
        if freq.dtype != np.float32 or freq.shape != (half,) or not (np.isfinite(freq).all() and (freq > 0).all()):
            raise ModelError(f"rope_inv_freq must be {half} positive float32 numbers, "
                             f"not {freq.dtype} {list(freq.shape)}")

    @property
    def head(self) -> QuantTensor:
        """The output projection [vocab, hidden]: its own tensor, or the embedding if tied."""
        return self.tensors["embedding" if self.config.tied_head else "head"]

    def layer(self, index: int) -> dict[str, QuantTensor]:
        """The tensors of one layer by their short names (LAYER_TENSORS)."""
        return {part: self.tensors[tensor_name(index, part)] for part in LAYER_TENSORS}
