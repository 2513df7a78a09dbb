"""What the compiler produces: program, memory image and the map the runtime needs. A bundle file holds one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from skipopu.hw.config import OverlayConfig

from .program import Program

if TYPE_CHECKING:
    from .chat import ChatTemplate
    from .tokenizer import Tokenizer

__all__ = ["Compiled", "ImageMap"]


@dataclass(frozen=True, kw_only=True)
class ImageMap:
    """What the runtime needs to know about a compiled model. Addresses and sizes in superbeats."""

    regions: dict[str, tuple[int, int]]  # name -> (address, superbeats)
    image: int  # superbeats with contents; KV and logits lie behind
    memory: int  # superbeats in all
    chunk: int  # tokens of one run at most
    context: int  # positions of the KV region
    vocab: int
    logits_width: int  # FP32 delivered per row, at least vocab
    layers: int
    model: str
    identity: str
    kv: str = ""  # KV mode of a program with routers, "" without
    places: int = 0  # KV records behind each port (KV reuse)
    buffer: int = 0  # KV records that the history buffer keeps for each port
    kv_format: str = "fp16"  # of KV records, one of plan.KV_FORMATS
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def address(self, name: str) -> int:
        """Superbeat address of a region."""
        return self.regions[name][0]


@dataclass(frozen=True, eq=False, kw_only=True)
class Compiled:
    """A model compiled for one configuration. ``image`` is uint8 [ports, bytes], without program, KV and logits."""

    config: OverlayConfig
    program: Program
    image: np.ndarray
    map: ImageMap
    notes: list[str] = field(default_factory=list)
    tokenizer: Tokenizer | None = None
    chat: ChatTemplate | None = None

    def summary(self) -> dict[str, Any]:
        """Sizes for people: bytes of each kind of region, instructions, chunk, context."""
        kinds: dict[str, int] = {}
        for name, (_, size) in self.map.regions.items():
            kind = "kv" if name.split(".")[0] == "kv" else name.split(".")[-1]
            kinds[kind] = kinds.get(kind, 0) + size * self.config.superbeat_bytes
        return {"configuration": self.config.name, "model": self.map.model, "instructions": len(self.program.words),
                "chunk": self.map.chunk, "context": self.map.context, "kv": self.map.kv,
                "kv_format": self.map.kv_format, "bytes": kinds, "notes": list(self.notes)}
