"""Shapes of known models, for predictions without their weights."""

from __future__ import annotations

from difflib import get_close_matches

from ..errors import RequestError
from ..model import ModelConfig

__all__ = ["GEOMETRIES", "find_geometry"]

#: Name -> shape, as the models' own configuration files give it.
GEOMETRIES = {config.name: config for config in (
    ModelConfig(name="llama2-7b", layers=32, hidden=4096, heads=32, kv_heads=32, head_dim=128, mlp=11008, vocab=32000,
                context=4096),
    ModelConfig(name="llama2-13b", layers=40, hidden=5120, heads=40, kv_heads=40, head_dim=128, mlp=13824, vocab=32000,
                context=4096),
    ModelConfig(name="llama3.1-8b", layers=32, hidden=4096, heads=32, kv_heads=8, head_dim=128, mlp=14336,
                vocab=128256, context=131072, rope_theta=500000.0),
    ModelConfig(name="llama3.2-1b", layers=16, hidden=2048, heads=32, kv_heads=8, head_dim=64, mlp=8192, vocab=128256,
                context=131072, rope_theta=500000.0, tied_head=True),
    ModelConfig(name="tinyllama-1.1b", layers=22, hidden=2048, heads=32, kv_heads=4, head_dim=64, mlp=5632,
                vocab=32000, context=2048),
    ModelConfig(name="smollm2-135m", layers=30, hidden=576, heads=9, kv_heads=3, head_dim=64, mlp=1536, vocab=49152,
                context=8192, rope_theta=100000.0, tied_head=True),
    ModelConfig(name="smollm2-1.7b", layers=24, hidden=2048, heads=32, kv_heads=32, head_dim=64, mlp=8192,
                vocab=49152, context=8192, rope_theta=130000.0, tied_head=True),
)}


def find_geometry(name: str) -> ModelConfig:
    """The shape of that name. Raises RequestError, which lists the known names."""
    if name in GEOMETRIES:
        return GEOMETRIES[name]
    near = get_close_matches(name, GEOMETRIES, 1)
    raise RequestError(f"unknown geometry {name!r}{f', did you mean {near[0]!r}?' if near else ''}; known: "
                       f"{', '.join(GEOMETRIES)}")
