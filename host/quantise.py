"""Quantise float weights to the group formats of QuantTensor (32, 64 or 128 input features share a scale).

Each group tries several ranges, narrower than its own, and refits scale and minimum to the rounded codes by least
squares: a group's outlier costs less when clipped than when it stretches the step of all other values.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace

import numpy as np

from .errors import ModelError
from .model import BASE, GROUP, GROUPS, LAYER_TENSORS, Model, QuantTensor, tensor_name

__all__ = ["quantise", "requantised"]

SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)  # ranges tried, as a part of the group's own
CHUNK_ROWS = 2048  # bounds the temporaries to some tens of MB for the widest matrices


def quantise(values: np.ndarray, kind: str) -> QuantTensor:
    """Quantise to the nearest codes under the group's best scale (least squared error of those tried).

    values : float32 [rows, cols], cols a multiple of 32 unless ``kind`` is "f32" or "f16"
    Raises ModelError on NaN, infinity, or a magnitude above float16's 65,504. An all-zero group gets scale 0.
    """
    values = np.ascontiguousarray(values, np.float32)
    if kind != "f32" and not (np.isfinite(values).all() and (not values.size or np.abs(values).max() <= 65504)):
        raise ModelError("weights must be finite and at most 65504 in magnitude to be quantised")
    if kind == "f32":
        return QuantTensor(kind, values=values)
    if kind == "f16":
        return QuantTensor(kind, values=values.astype(np.float16))
    if values.ndim != 2 or values.shape[1] % GROUP:
        raise ModelError(f"weights must be [rows, a multiple of {GROUP}] for {kind}, not {list(values.shape)}")
    if kind not in GROUPS:
        raise ModelError(f"weights can be quantised to f32, f16, {', '.join(GROUPS)}, not {kind!r}")
    fit = {"q8_0": _fit_q8_0, "q4_0": _fit_q4_0, "q4_1": _fit_q4_1}[BASE[kind]]
    (rows, cols), group = values.shape, GROUPS[kind]
    codes = np.empty((rows, cols), np.int8)
    scale = np.empty((rows, -(-cols // group)), np.float16)
    minimum = np.empty_like(scale)
    whole = cols // group * group
    for start in range(0, rows, CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        for columns, size in ((slice(0, whole), group), (slice(whole, cols), cols - whole)):  # the last may be shorter
            if not size or not values[part, columns].size:
                continue
            groups = slice(columns.start // group, -(-columns.stop // group))
            found, scale[part, groups], minimum[part, groups] = fit(
                values[part, columns].reshape(len(values[part]), -1, size))
            codes[part, columns] = found.reshape(len(found), -1)
    return QuantTensor(kind, codes=codes, scale=scale, minimum=minimum if BASE[kind] == "q4_1" else None)


def requantised(model: Model, kind: str) -> Model:
    """A model with the linear weights of its layers quantised again to a kind, from the values that they have.

    It has an identity of its own. Raises ModelError, one line, for an unknown kind.
    """
    tensors = dict(model.tensors)
    for layer in range(model.config.layers):
        for part in LAYER_TENSORS:
            name = tensor_name(layer, part)
            if not part.endswith("norm") and tensors[name].kind != kind:
                tensors[name] = quantise(tensors[name].dequantise(), kind)
    return replace(model, tensors=tensors, identity=hashlib.sha256(f"{kind} {model.identity}".encode()).hexdigest())


def _encode(groups: np.ndarray, scale: np.ndarray, minimum: np.ndarray, low: int, high: int) -> np.ndarray:
    """Codes (float32, whole) nearest to ``groups`` [..., group] for the given scale and minimum [...]."""
    step = np.where(scale != 0, scale, 1)[..., None]
    return np.clip(np.rint((groups - minimum[..., None]) / step), low, high)


def _as_half(array: np.ndarray) -> np.ndarray:
    """Round to what float16 holds, as the file will; saturates, since a least-squares fit may overshoot."""
    return np.clip(array, -65504, 65504).astype(np.float16).astype(np.float32)


def _best(groups: np.ndarray, candidates: list[tuple[np.ndarray, np.ndarray]], low: int, high: int) -> tuple:
    """(codes int8, scale float16, minimum float16) of the candidate with the least squared error in each group."""
    best_error = np.full(groups.shape[:-1], np.inf, np.float32)
    best_codes = np.zeros(groups.shape, np.int8)
    best_scale, best_minimum = (np.zeros(groups.shape[:-1], np.float16) for _ in range(2))
    for scale, minimum in candidates:
        codes = _encode(groups, scale, minimum, low, high)
        error = np.square(codes * scale[..., None] + minimum[..., None] - groups).sum(-1)
        better = error < best_error
        best_error[better] = error[better]
        best_codes[better] = codes[better]
        best_scale[better] = scale[better]
        best_minimum[better] = minimum[better]
    best_codes[best_scale == 0] = 0
    return best_codes, best_scale, best_minimum


def _fit_q8_0(groups: np.ndarray) -> tuple:
    scale = _as_half(np.abs(groups).max(-1) / 127)
    return _best(groups, [(scale, np.zeros_like(scale))], -127, 127)


def _fit_q4_0(groups: np.ndarray) -> tuple:
    # the code range -8..7 is lopsided: the sign of the largest value takes the -8 side
    peak = np.take_along_axis(groups, np.abs(groups).argmax(-1)[..., None], -1)[..., 0]
    zero = np.zeros_like(peak)
    candidates = []
    for shrink in SHRINK:
        scale = _as_half(peak / -8 * shrink)
        codes = _encode(groups, scale, zero, -8, 7)
        fitted = (codes * groups).sum(-1) / np.maximum(np.square(codes).sum(-1), 1)
        candidates += [(scale, zero), (_as_half(fitted), zero)]
    return _best(groups, candidates, -8, 7)


def _fit_q4_1(groups: np.ndarray) -> tuple:
    low, high = groups.min(-1), groups.max(-1)
    candidates = []
    for shrink in SHRINK:
        margin = (high - low) * ((1 - shrink) / 2)
        scale, minimum = _as_half((high - low) * (shrink / 15)), _as_half(low + margin)
        codes = _encode(groups, scale, minimum, 0, 15)
        mean_code, mean = codes.mean(-1, keepdims=True), groups.mean(-1, keepdims=True)
        spread = np.square(codes - mean_code).sum(-1)
        fitted = ((codes - mean_code) * (groups - mean)).sum(-1) / np.where(spread, spread, 1)
        candidates += [(scale, minimum), (_as_half(fitted), _as_half(mean[..., 0] - fitted * mean_code[..., 0]))]
    return _best(groups, candidates, 0, 15)
