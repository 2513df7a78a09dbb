"""A compiled model in one file: program, per-port memory images, map, tokenizer and chat template.

Layout, little endian: a header of 64 bytes (magic, version, size of the description, size of the file, SHA-256 of
everything behind the header), the description in JSON, then sections at multiples of 4096 bytes. Sizes and digest are
checked before anything is used. Images are mapped, not read, so that loading costs no memory.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import mmap
import struct
from pathlib import Path
from typing import Any

import numpy as np
from skipopu.hw.config import OverlayConfig
from skipopu.hw.isa import ISA_VERSION

from .chat import ChatTemplate
from .compiled import Compiled, ImageMap
from .errors import BundleError
from .layout import pad_to
from .program import WORD_BYTES, Note, Program
from .tokenizer import Tokenizer

__all__ = ["FORMAT_VERSION", "MAGIC", "load_bundle", "save_bundle"]

MAGIC = b"SKPU"
FORMAT_VERSION = 2  # 2: programs with routers
_HEADER = struct.Struct("<4sIQQ32s8x")
_ALIGN = 4096
_PIECE = 1 << 24  # bytes hashed at once


def save_bundle(path: str | Path, compiled: Compiled) -> None:
    """Write ``compiled`` to ``path``. The same compilation gives the same bytes."""
    sections: dict[str, Any] = {"program": compiled.program.to_bytes(), "image": np.ascontiguousarray(compiled.image)}
    if compiled.tokenizer is not None:
        sections["tokenizer"] = json.dumps(compiled.tokenizer.to_dict()).encode()
    chat = compiled.chat
    distinct = list(dict.fromkeys(compiled.program.notes))
    number = {note: index for index, note in enumerate(distinct)}
    about = {
        "config": dataclasses.asdict(compiled.config), "config_hash": compiled.config.config_hash,
        "isa_version": ISA_VERSION, "map": dataclasses.asdict(compiled.map), "notes": compiled.notes,
        "origins": [dataclasses.astuple(note) for note in distinct],
        "origin_of": [number[note] for note in compiled.program.notes],
        "chat": None if chat is None else {"source": chat.source, "bos": chat.bos, "eos": chat.eos},
        "sections": {name: memoryview(data).nbytes for name, data in sections.items()},
    }
    description = json.dumps(about, sort_keys=True).encode()
    digest = hashlib.sha256()
    with Path(path).open("wb") as file:
        file.write(bytes(_HEADER.size))
        position = _HEADER.size
        for data in (description, *(sections[name] for name in sorted(sections))):
            view = memoryview(data).cast("B") if len(data) else memoryview(b"")
            padding = bytes(pad_to(position + view.nbytes, _ALIGN) - position - view.nbytes)
            for part in (view, padding):
                digest.update(part)
                file.write(part)
            position += view.nbytes + len(padding)
        file.seek(0)
        file.write(_HEADER.pack(MAGIC, FORMAT_VERSION, len(description), position, digest.digest()))


def load_bundle(path: str | Path, config: OverlayConfig | None = None, verify: bool = True) -> Compiled:
    """Read a bundle; its image stays on disk, mapped read-only.

    config : refuse a bundle made for another configuration; verify : compare the SHA-256 of the contents
    Raises BundleError, one line that begins with the path.
    """
    try:
        return _load(Path(path), config, verify)
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from None


def _load(path: Path, config: OverlayConfig | None, verify: bool) -> Compiled:
    try:
        with path.open("rb") as file:
            header = file.read(_HEADER.size)
            if header[:4] != MAGIC:
                raise BundleError(f"not a compiled model: it begins with {header[:4]!r}, not {MAGIC!r}")
            if len(header) < _HEADER.size:
                raise BundleError(f"cut short: {len(header)} bytes, the header alone has {_HEADER.size}")
            _, version, described, size, digest = _HEADER.unpack(header)
            if version != FORMAT_VERSION:
                raise BundleError(f"format version {version}, expected {FORMAT_VERSION}; compile the model again")
            actual = path.stat().st_size
            if actual != size or described > size - _HEADER.size:
                raise BundleError(f"must have {size} bytes, has {actual}; the file is cut short or damaged")
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except OSError as error:
        raise BundleError(f"cannot be read ({error.strerror})") from None
    if verify and _digest(data[_HEADER.size :]) != digest:
        raise BundleError("the contents do not match their SHA-256; the file is damaged, compile or copy it again")
    try:
        about = json.loads(bytes(data[_HEADER.size : _HEADER.size + described]))
        parts = _sections(data, _HEADER.size + described, about["sections"])
        return _assemble(about, parts, config)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        if isinstance(error, BundleError):
            raise
        raise BundleError(f"the description is malformed ({type(error).__name__}: {error})") from None


def _digest(data: memoryview) -> bytes:
    digest = hashlib.sha256()
    for first in range(0, len(data), _PIECE):
        digest.update(data[first : first + _PIECE])
    return digest.digest()


def _sections(data: memoryview, position: int, sizes: dict[str, int]) -> dict[str, memoryview]:
    """The sections by name; BundleError if they do not end with the file."""
    parts = {}
    for name in sorted(sizes):
        position = pad_to(position, _ALIGN)
        size = sizes[name]
        if not isinstance(size, int) or size < 0 or position + size > len(data):
            raise BundleError(f"section {name} of {size} bytes does not fit into the file")
        parts[name] = data[position : position + size]
        position += size
    return parts


def _assemble(about: dict[str, Any], parts: dict[str, memoryview], wanted: OverlayConfig | None) -> Compiled:
    config = OverlayConfig(**about["config"])
    if config.config_hash != about["config_hash"] or about["isa_version"] != ISA_VERSION:
        raise BundleError(f"made by another version (ISA {about['isa_version']}, here {ISA_VERSION}); compile again")
    if wanted is not None and wanted.config_hash != config.config_hash:
        raise BundleError(f"made for configuration {config.name} ({config.config_hash:#010x}), not {wanted.name} "
                          f"({wanted.config_hash:#010x}); compile the model for {wanted.name}")
    memory_map = ImageMap(**about["map"] | {
        "regions": {name: (int(first), int(size)) for name, (first, size) in about["map"]["regions"].items()},
        "eos_ids": tuple(about["map"]["eos_ids"])})
    bytes_per_port = memory_map.image * config.port_bits // 8
    if len(parts["image"]) != config.ports * bytes_per_port:
        raise BundleError(f"the image must have {config.ports * bytes_per_port} bytes, not {len(parts['image'])}")
    words = Program.words_from_bytes(bytes(parts["program"]))
    origins = [Note(*origin) for origin in about["origins"]]
    program = Program(words, [origins[index] for index in about["origin_of"]])
    room = memory_map.regions["program"][1] * config.port_bits // 8
    if len(parts["program"]) % WORD_BYTES or len(program.notes) != len(words) or len(parts["program"]) > room:
        raise BundleError(f"the program of {len(parts['program'])} bytes does not fit its {room} bytes of memory or "
                          f"its {len(program.notes)} origins")
    if any(first < 0 or size < 0 or first + size > memory_map.memory for first, size in memory_map.regions.values()):
        raise BundleError(f"a memory region lies outside the {memory_map.memory} superbeats")
    tokenizer = Tokenizer.from_dict(json.loads(bytes(parts["tokenizer"]))) if "tokenizer" in parts else None
    image = np.frombuffer(parts["image"], np.uint8).reshape(config.ports, bytes_per_port)
    return Compiled(config=config, program=program, image=image, map=memory_map, notes=list(about["notes"]),
                    tokenizer=tokenizer, chat=ChatTemplate(**about["chat"]) if about["chat"] else None)
