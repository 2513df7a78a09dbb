"""What a configuration costs on AMD UltraScale+, from what Yosys counts for its blocks.

Synthesising a whole overlay takes far longer than predicting its speed, so sweeps use a formula: each block is so many
LUTs, flip-flops and DSPs, and so many more per pair of columns, vector lane, port or bit of a superbeat. The numbers
are those of ``skipopu synth`` before placement: the array at `tiny` and `u280`, the other blocks at `u280`
(docs/boards.md; the vector unit's less what its parts save since), narrow records in the store unit at `tiny`. At
`u280` the formula gives what was counted within 2%; how blocks grow with other sizes is from their structure. `skipopu
synth --config` counts a configuration. Memories follow from their sizes.
"""

from __future__ import annotations

from math import ceil

from skipopu.hw.config import OverlayConfig
from skipopu.hw.formats import MANTISSA_BITS

__all__ = ["DEVICE", "estimate_resources"]

#: Of the U280's device.
DEVICE = {"luts": 1_303_680, "ffs": 2_607_360, "dsps": 9024, "bram36": 2016, "uram": 960}
_BRAM18 = ((512, 36), (1024, 18), (2048, 9))  # words and bits of half a BRAM36
_URAM = 4096 * 72
_SHALLOW = 128  # words up to which a memory is made of LUTs, 64 bits each

_Cost = tuple[float, float, float]  # LUTs, flip-flops, DSPs
_PAIR_BLOCK: _Cost = (1380, 660, 4)  # two columns, for each block of lanes and for each lane
_PAIR_LANE: _Cost = (74.1, 48.5, 1)
_COLUMN_BLOCK: _Cost = (140, 90, 0)  # scales, minima and draining of a column, for each block of lanes
_LANE: _Cost = (100, 0, 0)  # activations
_VECTOR: _Cost = (4000, 2500, 20)
_VECTOR_LANE: _Cost = (4853, 3400, 21.8)
_KV_BIT: _Cost = (8.0, 1.9, 1 / 8)  # of a superbeat: KV tiles, two rows of records a cycle; slices shift
_NARROW_BIT: _Cost = (4.7, 3.9, 0)  # more for narrow records, in the KV buffer; in the store unit by bit of a port
_NARROW_PORT_BIT: _Cost = (8.8, 0, 0)
_PORT: _Cost = (2800, 3500, 2)  # reading, pointers, tags, counters; the crossing to the memory's clock
_WRITE_BIT: _Cost = (2.2, 3.5, 0)
_FIXED: _Cost = (7100, 7300, 8)  # control, fetch, registers


def _memory(words: int, bits: int) -> dict[str, float]:
    """What one memory takes."""
    if words <= _SHALLOW:
        return {"luts": ceil(words / 64) * bits}
    if words >= 4096:
        return {"uram": ceil(words * bits / _URAM)}
    return {"bram36": min(ceil(words / depth) * ceil(bits / width) for depth, width in _BRAM18) / 2}


def estimate_resources(config: OverlayConfig) -> dict[str, int]:
    """luts, ffs, dsps, bram36, uram of a configuration. Estimated, not synthesised."""
    width, elements = 8 * config.superbeat_bytes, config.vector_lanes
    pairs = config.columns / 2
    ports, rows = config.ports, config.history_tokens // config.ports
    counted = [(_FIXED, 1), (_PAIR_BLOCK, pairs * config.blocks), (_PAIR_LANE, pairs * config.lanes),
               (_COLUMN_BLOCK, config.columns * config.blocks), (_LANE, config.lanes), (_VECTOR, 1),
               (_VECTOR_LANE, elements), (_KV_BIT, width), (_NARROW_BIT, width * config.kv_narrow),
               (_NARROW_PORT_BIT, config.port_bits * config.kv_narrow), (_PORT, ports), (_WRITE_BIT, width)]
    total = {name: sum(cost[index] * count for cost, count in counted)
             for index, name in enumerate(("luts", "ffs", "dsps"))} | {"bram36": 0.0, "uram": 0.0}
    memories = [(config.abuf_rows, 32 * elements)] * 2 + [  # two reads a cycle: two copies
        (config.mbuf_rows, MANTISSA_BITS * config.lanes + 40 * config.blocks), (config.kvout_rows, config.port_bits),
        (config.router_rows, 32 * elements), (config.cache_words, 256)]
    # Keys and values of even and of odd rows, of two tiles.
    memories += [(config.tile_tokens // ports * beats, config.port_bits) for beats in config.kv_parts] * 2 * ports
    memories += [(config.fifo_beats, config.port_bits + 2), (rows * config.history_layers, 17),
                 (rows, config.history_layers + 1)] * ports
    if config.buffer_beats:
        memories += [(config.buffer_beats, config.port_bits), (rows, 36)] * ports
    for words, bits in memories:
        for name, count in _memory(words, bits).items():
            total[name] += count
    return {name: ceil(count) for name, count in total.items()}
