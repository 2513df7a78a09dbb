"""Small random Llamas, made from a seed, to compare the levels on many geometries.

Weights are scaled so that every module adds about as much to the residual stream as it carries, attention prefers some
tokens, and logits spread over a few units: errors anywhere show in the output, none is drowned.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from skipopu.host.gguf_export import write_gguf
from skipopu.host.model import Model, ModelConfig, QuantTensor, tensor_shapes
from skipopu.host.quantise import quantise

__all__ = ["random_model", "write_gguf"]

# the standard deviation of a linear layer's outputs for inputs of about one
GAIN = {"q": 1.5, "k": 1.5, "down": 2.0, "head": 2.5}


def random_model(seed: int, *, kinds: Sequence[str] = ("q4_1", "q4_0", "q8_0", "f16"),
                 embedding: str | None = None, **geometry: object) -> Model:
    """A random model; the same seed and arguments give the same model on every machine.

    kinds : kinds of QuantTensor, one drawn for each linear tensor; embedding : kind of embedding and head, or drawn
    geometry : fields of ModelConfig that replace the small defaults
    """
    rng = np.random.default_rng(seed)
    defaults = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp": 96, "vocab": 96,
                "context": 128, "rms_eps": float(np.float32(1e-5)), "tied_head": bool(seed % 2),
                "name": f"random-{seed}"}
    config = ModelConfig(**(defaults | geometry))  # type: ignore[arg-type]
    embedding = embedding or str(rng.choice(kinds))
    tensors = {}
    for name, shape in tensor_shapes(config).items():
        part = name.rpartition(".")[2]
        if part.endswith("norm"):
            tensors[name] = QuantTensor("f32", values=rng.uniform(0.5, 1.5, shape).astype(np.float32))
            continue
        gain = GAIN.get(part, 1.0)
        if part == "embedding":  # rows of length 1 would drown in the layers, unless the head reads them too
            gain = GAIN["head"] if config.tied_head else shape[-1] ** 0.5
        values = rng.standard_normal(shape, np.float32) * np.float32(gain / shape[-1] ** 0.5)
        tensors[name] = quantise(values, embedding if part in ("embedding", "head") else str(rng.choice(kinds)))
    return Model(config=config, tensors=tensors, identity=f"random-{seed}")
