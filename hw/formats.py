"""Number formats of the overlay: widths and binary points, named once. `docs/numerics.md` defines the arithmetic."""

__all__ = [
    "ACC_BITS", "ALPHA_DROP", "ATTENTION_BITS", "CODE_BITS", "KV_BITS", "KV_FRACTION", "KV_LARGEST", "LOWEST",
    "MANTISSA_BITS", "MAXIMUM_INIT", "PROB_FRACTION", "STATE_BITS", "SUM_BITS", "SUM_FRACTION", "fp32_bits",
]

import struct

MANTISSA_BITS = 16  #: signed mantissa of an aligned activation
ATTENTION_BITS = 15  #: signed mantissa of an aligned query or probability
KV_BITS = 13  #: signed mantissa of aligned K and V
KV_LARGEST = 2047 << KV_BITS - 12  #: its largest magnitude: an FP16 significand, 11 bits, with zeros behind
KV_FRACTION = 6  #: bits below the unit of a dot product with K or V in an accumulator
CODE_BITS = 4  #: weight code in the array
ACC_BITS = 48  #: accumulator
SUM_BITS = 64  #: sum of squares, unsigned, saturating at 2^63 - 1
SUM_FRACTION = 24  #: binary point of the sum of squares
STATE_BITS = 48  #: softmax sum
PROB_FRACTION = 30  #: binary point of the softmax sum
MAXIMUM_INIT = -32768  #: running maximum of a fresh softmax state
ALPHA_DROP = 127  #: rescale exponent that means: forget what was accumulated
LOWEST = 0xFF7FFFFF  #: FP32 bits of the most negative number: a masked score


def fp32_bits(value):
    """Bits (unsigned int) of a Python float rounded to FP32."""
    return struct.unpack("<I", struct.pack("<f", value))[0]
