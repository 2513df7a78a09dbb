"""Random models of any size as memory images on disk: a file per port, mapped where it is used.

Only shapes decide what a run costs, so weights are drawn where they will lie: 4-bit codes of any value with FP16 scales
that keep activations at about one, gains, rows of the tokens that will be read, and KV records for the whole context. A
model of 7 billion weights takes less than a minute to write and is never held in memory twice: levels that map its
files share their pages, and keep what they write to themselves.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from skipopu.host.compiled import Compiled, ImageMap
from skipopu.host.errors import RequestError
from skipopu.host.image import rope_table
from skipopu.host.layout import ceil_div, pack_rows, pad_to
from skipopu.host.model import ModelConfig, rope_inv_freq
from skipopu.host.performance.outline import Outline, outline
from skipopu.host.plan import KvSizes
from skipopu.host.program import WORD_BYTES, Builder, Program
from skipopu.hw.config import OverlayConfig
from skipopu.hw.isa import KvFormat, MatmulMode, Register, Resource, RowList, decode

from .operands import scale_places
from .random_model import GAIN

__all__ = ["RandomImage", "random_image"]

_LINE = 256  # bytes of the longest line that the instruction cache fetches: a port's memory holds whole ones
_AT_ONCE = 1 << 16  # superbeats drawn together
_CODE, _SCALE = math.sqrt(255 / 12), 1.5  # deviation of a code, mean of a scale in units of its power of two


@dataclass(frozen=True, eq=False)
class RandomImage:
    """A program and its memory in files.

    compiled : without an image, for `Accelerator` on a device that has ``memories``
    history : likewise, a program that only stores records, as routes say; None without KV reuse
    files : one for each port; outline : what it was made from
    """

    compiled: Compiled
    history: Compiled | None
    files: list[Path]
    outline: Outline

    def memories(self) -> list[np.ndarray]:
        """The memory behind each port, uint8: writable, but what is written stays with these arrays."""
        return [np.asarray(np.memmap(path, np.uint8, "c")) for path in self.files]

    def records(self) -> list[tuple[int, int]]:
        """(first byte, bytes) of each region with KV records, behind every port."""
        beat = self.outline.config.port_bits // 8
        return [(address * beat, size * beat) for name, (address, size) in self.outline.regions.items()
                if name.split(".")[0] == "kv"]


def random_image(model: ModelConfig, config: OverlayConfig, context: int, folder: Path, *, kv: str = "",
                 kind: str = "q4_0", seed: int = 1, tokens: Sequence[int] = (),
                 sizes: KvSizes | None = None) -> RandomImage:
    """Write the image of a random model into ``folder``, which must exist.

    kv : KV mode of a program with routers, whose routes have to be forced, "" without; kind : of the weights, 4-bit
    codes without minima; tokens : that will be read, the embedding of others is 0; sizes : of KV records
    The same arguments give the same bytes.
    Raises RequestError if the disk is too small, CapacityError and CompileError as the compiler does.
    """
    found = outline(model, config, context, kv=kv, kind=kind, exponent=_exponent, sizes=sizes)
    plan, beat = found.plan, config.port_bits // 8
    history = _storing(found) if kv == "reuse" else None
    at = pad_to(found.memory, config.burst_beats)
    top = at + ceil_div(len(history.words) * WORD_BYTES, beat) if history else at
    size = pad_to(top * beat, _LINE)
    files = [folder / f"port{port:02}.bin" for port in range(config.ports)]
    room = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in files if path.exists())
    if room < size * config.ports:
        raise RequestError(f"the memory image of {model.name} needs {size * config.ports / 1e9:.1f} GB in {folder}, "
                           f"there are {room / 1e9:.1f}; name a folder on a larger disk, or take fewer layers")
    for path in files:
        path.unlink(missing_ok=True)  # whoever has mapped an older one keeps it
        with path.open("wb") as file:
            file.truncate(size)
    ports = [np.memmap(path, np.uint8, "r+").reshape(-1, beat) for path in files]
    for address, stream in _rows(found, seed, tokens):
        for port, memory in enumerate(ports):
            memory[address:address + len(stream)] = stream[:, port * beat:(port + 1) * beat]
    for port, memory in enumerate(ports):
        _fill(found, memory, np.random.default_rng((seed, port)))
        memory.flush()
    compiled = Compiled(config=config, program=found.program, image=np.zeros((config.ports, 0), np.uint8), map=ImageMap(
        regions=found.regions, image=0, memory=top, chunk=plan.chunk, context=plan.context, vocab=model.vocab,
        logits_width=plan.logits_width, layers=model.layers, model=model.name, identity=f"random-{seed}", kv=plan.kv,
        places=plan.places, buffer=plan.buffer))
    stores = None if history is None else replace(compiled, program=history, map=replace(
        compiled.map, regions=found.regions | {"program": (at, top - at)}))
    return RandomImage(compiled, stores, files, found)


def _exponent(name: str, inner: int) -> int:
    """Exponent field of a matmul's scales, for which inputs of about one give outputs of the usual size."""
    scale = GAIN.get(name.rpartition(".")[2], 1.0) / (_CODE * _SCALE * math.sqrt(inner))
    return round(math.log2(scale)) + 15


def _rows(found: Outline, seed: int, tokens: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """(superbeat address, uint8 [superbeats, W]) of what is no weight."""
    plan, config, model = found.plan, found.config, found.plan.model
    rng = np.random.default_rng(seed)

    def packed(row: np.ndarray) -> np.ndarray:
        padded = np.zeros((1, plan.hidden), np.float32)
        padded[0, :model.hidden] = row
        return pack_rows(config, padded)

    address, size = found.regions["embedding"]
    for token in sorted(set(tokens)):
        yield address + token * (size // model.vocab), packed(rng.standard_normal(model.hidden, np.float32))
    yield found.regions["rope"][0], pack_rows(config, rope_table(plan, rope_inv_freq(model)))
    for name, (address, _) in found.regions.items():
        if name.endswith("norm"):
            yield address, packed(rng.uniform(0.5, 1.5, model.hidden))


def _fill(found: Outline, memory: np.ndarray, rng: np.random.Generator) -> None:
    """Weights and KV records of one port, uint8 [superbeats, beat]."""
    matmuls = dict(_matmuls(found.program))
    for name, stream in found.weights.items():
        if stream.mode != MatmulMode.W4:
            raise RequestError(f"random weights are 4-bit codes without minima, {name} would be {stream.mode.name}")
        n_tiles, k_tiles = matmuls[name]
        is_scale, _ = scale_places(found.config, stream.mode, n_tiles, k_tiles, stream.group)
        for first in range(0, stream.count, _AT_ONCE):
            last = min(first + _AT_ONCE, stream.count)
            part = np.frombuffer(rng.bytes((last - first) * memory.shape[1]), np.uint8).reshape(last - first, -1).copy()
            scales = part[is_scale[first:last]].view(np.uint16)
            part[is_scale[first:last]] = (scales & 0x3FF | stream.scale_exponent << 10).view(np.uint8)
            memory[stream.address + first:stream.address + last] = part
    for name, (address, size) in found.regions.items():
        if name.split(".")[0] == "kv":
            some = rng.standard_normal(65521).astype(np.float16).view(np.uint8)  # a prime: beats differ
            if found.plan.kv_format != KvFormat.FP16:
                some &= 31  # any of them can be an exponent
            memory[address:address + size] = np.resize(some, size * memory.shape[1]).reshape(size, -1)


def _matmuls(program: Program) -> Iterator[tuple[str, tuple[int, int]]]:
    """(name, (column tiles, lane tiles)) of each matmul with weights."""
    for word, note in zip(program.words, program.notes, strict=True):
        item, fields = decode(word)
        if item.mnemonic == "matmul" and fields["mode"] == MatmulMode.W4:
            yield note.tensor, (fields["n_tiles"], fields["k_tiles"])


def _storing(found: Outline) -> Program:
    """Routes and STOREKV of every layer: gives the history what a prompt would, in a fraction of its time."""
    plan, build = found.plan, Builder()
    for layer in range(plan.model.layers):
        build.at(layer, "attention", f"kv.{layer}")
        build.emit("route", rows_reg=Register.TOKENS, layer=layer)
        build.at(layer, "attention", f"kv.{layer}", RowList.ATTENTION if layer else RowList.ALL)
        build.emit("storekv", reads=Resource.KVOUT, writes=Resource.KVMEM, imm=found.regions[plan.kv_region(layer)][0],
                   rows_reg=Register.TOKENS, x_reg=Register.POSITION, reuse=1, places=plan.places, layer=layer,
                   **plan.record_fields)
    build.at(-1, "end")
    build.emit("halt")
    return build.program()
