"""What a configuration costs on AMD UltraScale+, from what Yosys counts for its blocks at a few sizes.

Synthesising a whole overlay takes far longer than predicting its speed, so sweeps use a formula: each block is so many
LUTs, flip-flops and DSPs, and so many more per pair of columns, vector lane or port bit. The numbers come from
``skipopu synth`` before placement, at configurations `tiny` and `u280` for the array, `tiny` and `ulx3s` for the rest;
they tell configurations apart, and `skipopu synth --config` counts one. Memories are counted from their sizes.
"""

from __future__ import annotations

from math import ceil

from skipopu.hw.config import OverlayConfig
from skipopu.hw.formats import ACC_BITS, MANTISSA_BITS

__all__ = ["DEVICE", "estimate_resources"]

#: Of the U280's device.
DEVICE = {"luts": 1_303_680, "ffs": 2_607_360, "dsps": 9024, "bram36": 2016, "uram": 960}
_BRAM = (512, 72)  # words and bits of a memory
_URAM = (4096, 72)
_SHALLOW = 128  # words up to which a memory is made of LUTs, 64 bits each

_Cost = tuple[float, float, float]  # LUTs, flip-flops, DSPs
_PAIR_BLOCK: _Cost = (1380, 660, 4)  # two columns, for each block of lanes and for each lane
_PAIR_LANE: _Cost = (74.1, 48.5, 1)
_COLUMN_BLOCK: _Cost = (140, 90, 0)  # scales, minima and draining of a column, for each block of lanes
_VECTOR: _Cost = (4000, 2500, 20)
_VECTOR_LANE: _Cost = (4200, 2600, 16)
_PORT: _Cost = (500, 420, 0)  # reading and writing
_PORT_BIT: _Cost = (12.0, 6.0, 0)
_FIXED: _Cost = (8000, 8000, 8)  # control, fetch, registers, counters


def _memory(words: int, bits: int) -> dict[str, int]:
    """What one memory takes."""
    if words <= _SHALLOW:
        return {"luts": ceil(words / 64) * bits}
    depth, width = _URAM if words * bits >= 8 * _BRAM[0] * _BRAM[1] and words >= 2048 else _BRAM
    return {"uram" if depth == _URAM[0] else "bram36": ceil(words / depth) * ceil(bits / width)}


def estimate_resources(config: OverlayConfig) -> dict[str, int]:
    """luts, ffs, dsps, bram36, uram of a configuration. Estimated, not synthesised."""
    width, elements = 8 * config.superbeat_bytes, config.vector_lanes
    pairs = config.columns / 2
    counted = [(_FIXED, 1), (_PAIR_BLOCK, pairs * config.blocks), (_PAIR_LANE, pairs * config.lanes),
               (_COLUMN_BLOCK, config.columns * config.blocks), (_VECTOR, 1), (_VECTOR_LANE, elements),
               (_PORT, config.ports), (_PORT_BIT, width)]
    total = {name: round(sum(cost[index] * count for cost, count in counted))
             for index, name in enumerate(("luts", "ffs", "dsps"))} | {"bram36": 0, "uram": 0}
    tile_words = 2 * config.tile_tokens // config.ports * 2 * config.kvbuf_heads * config.lanes // config.beat_elements
    memories = [(config.abuf_rows, 32 * elements), (config.abuf_rows, 32 * elements),  # two reads a cycle: two copies
                (config.mbuf_rows, MANTISSA_BITS * config.lanes + 40 * config.blocks), (tile_words, width),
                (config.kvout_rows, config.port_bits), (config.router_rows, 32 * elements),
                (config.cache_words, 256), *[(config.fifo_beats, config.port_bits + 1)] * config.ports,
                *[(2 * config.acc_rows, ACC_BITS)] * config.columns]
    for words, bits in memories:
        for name, count in _memory(words, bits).items():
            total[name] += count
    return total
