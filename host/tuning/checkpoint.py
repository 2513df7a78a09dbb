"""Checkpoints of a tuning run: one safetensors file, its settings and its progress as JSON in the metadata.

Nothing in the file is executed when it is read. It holds the student's parameters and Adam's two moments; the rest of
a run follows from its settings and the step, so that a resumed run goes on bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..console import whole_file
from ..errors import RouterError
from .tuner import Tuner

__all__ = ["restore", "save"]

FORMAT, VERSION = "skipopu-tuning", "1"
_MOMENTS = ("exp_avg", "exp_avg_sq")


def _settings(tuner: Tuner) -> dict[str, object]:
    tokens = hashlib.sha256(np.ascontiguousarray(tuner.sequences, np.int64).tobytes()).hexdigest()
    return {"model": tuner.model.identity, "tokens": f"{list(tuner.sequences.shape)} {tokens[:16]}",
            **asdict(tuner.settings)}


def save(path: str | Path, tuner: Tuner) -> None:
    """Write the state of a run; the file appears whole or not at all. Raises OSError if it cannot be written."""
    tensors = {f"student.{name}": value for name, value in tuner.student.state_dict().items()}
    tensors["costs"] = torch.tensor(tuner.costs)
    counts = {}
    for name, parameter in tuner.student.named_parameters():
        if state := tuner.optimiser.state.get(parameter):
            tensors |= {f"{moment}.{name}": state[moment] for moment in _MOMENTS}
            counts[name] = int(state["step"])
    about = {"format": FORMAT, "version": VERSION, "settings": json.dumps(_settings(tuner)),
             "progress": json.dumps({"step": tuner.step, "counts": counts})}
    with whole_file(path) as partial:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, about)


def restore(path: str | Path, tuner: Tuner) -> None:
    """Continue a run of the same model, tokens and settings in ``tuner``.

    Raises RouterError, one line that begins with the path, for a damaged file or one of another run: which setting
    differs.
    """
    try:
        with safe_open(path, framework="pt", device=str(tuner.student.device)) as content:
            about = content.metadata() or {}
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 not a dict
    except (SafetensorError, OSError) as error:
        raise RouterError(f"{path}: not a readable safetensors file ({error})") from None
    if (about.get("format"), about.get("version")) != (FORMAT, VERSION):
        raise RouterError(f"{path}: not a checkpoint of tuning: its metadata must have format {FORMAT} and version "
                          f"{VERSION}, not {about.get('format', 'none')[:40]!r} and {about.get('version', '')[:40]!r}")
    try:
        settings, progress = json.loads(about["settings"]), json.loads(about["progress"])
        step, counts = int(progress["step"]), {str(key): int(value) for key, value in progress["counts"].items()}
        its_settings = dict(settings)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise RouterError(f"{path}: the checkpoint's settings or progress cannot be read") from None
    for name, ours in _settings(tuner).items():
        if (theirs := its_settings.get(name)) != ours:
            raise RouterError(f"{path}: the checkpoint was made with {name} {theirs}, not {ours}; give the same "
                              "settings, or start anew without --resume")
    _load(path, tuner, tensors, counts)
    tuner.step = step


def _load(path: str | Path, tuner: Tuner, tensors: dict[str, torch.Tensor], counts: dict[str, int]) -> None:
    parameters = dict(tuner.student.named_parameters())
    expected = {f"student.{name}": value.shape for name, value in tuner.student.state_dict().items()}
    expected["costs"] = torch.Size(tuner.costs.shape)
    if strangers := counts.keys() - parameters.keys():
        raise RouterError(f"{path}: the checkpoint counts steps of {min(strangers)}, which the student lacks")
    expected |= {f"{moment}.{name}": parameters[name].shape for name in counts for moment in _MOMENTS}
    for what, names in (("missing", expected.keys() - tensors.keys()),
                        ("unexpected", tensors.keys() - expected.keys())):
        if names:
            raise RouterError(f"{path}: {what} tensors: {', '.join(sorted(names)[:4])}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise RouterError(f"{path}: {name} must be {list(shape)}, not {list(tensors[name].shape)}")
        if tensors[name].is_floating_point() and not tensors[name].isfinite().all():
            raise RouterError(f"{path}: {name} holds NaN or infinity")
    tuner.student.load_state_dict({name.removeprefix("student."): value for name, value in tensors.items()
                                   if name.startswith("student.")})
    tuner.costs[:] = tensors["costs"].cpu().numpy()
    for name, count in counts.items():
        state = {moment: tensors[f"{moment}.{name}"] for moment in _MOMENTS}
        tuner.optimiser.state[parameters[name]] = {"step": torch.tensor(float(count)), **state}
