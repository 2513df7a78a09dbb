"""Lower routers to what the overlay scores with: FP16 weights in pairs, biases in units of 2^-24.

Requires linear routers of the model that is compiled. Weights round to FP16, below its normal numbers to zero; a score
changes by no more than that.
"""

from __future__ import annotations

import numpy as np

from ..errors import RouterError
from ..routers import MODULES, Routers

__all__ = ["router_biases", "router_rows"]

_BIAS_LIMIT = 1 << 7
_BIAS_FRACTION = 24
_LARGEST = float(np.finfo(np.float16).max)
_SMALLEST_NORMAL = np.finfo(np.float16).tiny


def router_rows(routers: Routers, width: int) -> np.ndarray:
    """The weights of every layer, uint32 [layers, width]: attention's FP16 in the low half, the MLP's in the high one.

    width : features of the residual stream with its padding. Raises RouterError for a weight beyond FP16.
    """
    routers.require_linear()
    weights = routers.difference.astype(np.float32)
    if (largest := float(np.abs(weights).max())) > _LARGEST:
        raise RouterError(f"router weights must be within the FP16 numbers, up to {_LARGEST:g}, not {largest:g}")
    halves = weights.astype(np.float16)
    halves[np.abs(halves) < _SMALLEST_NORMAL] = 0
    bits = np.zeros((*halves.shape[:2], width), np.uint32)
    bits[..., : routers.width] = halves.view(np.uint16)
    return bits[:, 0] | bits[:, 1] << 16


def router_biases(routers: Routers) -> np.ndarray:
    """The biases in units of 2^-24, int64 [layers, 2]. Raises RouterError for one of 128 or more."""
    large = np.argwhere(np.abs(routers.bias) >= _BIAS_LIMIT)
    if len(large):
        layer, module = large[0]
        raise RouterError(f"router bias of layer {layer} {MODULES[module]} must be below {_BIAS_LIMIT} in magnitude, "
                          f"not {routers.bias[layer, module]:g}")
    return np.rint(routers.bias.astype(np.float64) * 2.0**_BIAS_FRACTION).astype(np.int64)
