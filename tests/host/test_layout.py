"""What the compiler packs, read back by an independent, slow reading of the layout's definition."""

import numpy as np
import pytest
from float_machine import unpack_weights
from skipopu.host.layout import (
    MemoryMap,
    interleave_gate_up,
    pack_rows,
    pack_weights,
    record_beats,
    scale_exponent,
    stripe,
    unpack_logits,
    weight_superbeats,
)
from skipopu.hw.config import PRESETS
from skipopu.hw.isa import MatmulMode

RANGE = {MatmulMode.W4: (-8, 8), MatmulMode.W4M: (0, 16), MatmulMode.W8: (-128, 128)}
PRESET = pytest.mark.parametrize("config", PRESETS.values(), ids=list(PRESETS))
MODE = pytest.mark.parametrize("mode", RANGE, ids=lambda mode: mode.name)


@PRESET
@MODE
@pytest.mark.parametrize("group", [0, 1, 2, 5])
@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (3, 2), (2, 9)], ids=str)
def test_weight_stream_reads_back(config, mode, shape, group):
    """Also where the last blocks of a row are fewer than share a scale."""
    n_tiles, k_tiles = shape
    rng = np.random.default_rng(n_tiles * 10 + k_tiles)
    rows = n_tiles * config.columns - config.columns // 4  # the last column tile is not full
    codes = rng.integers(*RANGE[mode], (rows, k_tiles * config.lanes), dtype=np.int8)
    scale = rng.standard_normal((rows, -(-k_tiles * config.blocks >> group))).astype(np.float16)
    minimum = rng.standard_normal(scale.shape).astype(np.float16) if mode == MatmulMode.W4M else None
    stream = pack_weights(config, mode, codes, scale, minimum, group)
    assert stream.shape == (weight_superbeats(config, mode, n_tiles, k_tiles, group), config.superbeat_bytes)
    got_codes, got_scale, got_minimum = unpack_weights(config, mode, stream, n_tiles, k_tiles, group)
    of_block = np.arange(k_tiles * config.blocks) >> group
    np.testing.assert_array_equal(got_codes[:rows], codes)
    np.testing.assert_array_equal(got_scale[:rows], scale[:, of_block])
    assert not got_scale[rows:].any()
    if minimum is not None:
        np.testing.assert_array_equal(got_minimum[:rows], minimum[:, of_block])


def test_scale_exponent_counts_subnormals_as_one_and_w8_as_four_more():
    tiny, one = np.float16([[6e-8]]), np.float16([[-1.0]])
    assert scale_exponent(MatmulMode.W4, tiny) == 1
    assert scale_exponent(MatmulMode.W4, one) == 15
    assert scale_exponent(MatmulMode.W8, one) == 19
    assert scale_exponent(MatmulMode.W4M, tiny, one) == 15


@PRESET
def test_gate_and_up_alternate_in_vector_beats(config):
    v = config.vector_lanes
    gate, up = np.arange(3 * v)[:, None], 1000 + np.arange(3 * v)[:, None]
    beats = interleave_gate_up(config, gate, up).reshape(-1, v)
    np.testing.assert_array_equal(beats[0::2].ravel(), gate.ravel())
    np.testing.assert_array_equal(beats[1::2].ravel(), up.ravel())


@PRESET
def test_stripe_puts_consecutive_beats_on_consecutive_ports(config):
    beat = config.port_bits // 8
    stream = np.random.default_rng(1).integers(0, 256, (5, config.superbeat_bytes), dtype=np.uint8)
    image = np.zeros((config.ports, 9 * beat), np.uint8)
    stripe(config, image, 2, stream)
    for port in (0, config.ports - 1):
        np.testing.assert_array_equal(image[port, 5 * beat : 6 * beat], stream[3, port * beat : (port + 1) * beat])
    assert not image[:, : 2 * beat].any() and not image[:, 7 * beat :].any()


@PRESET
def test_rows_start_at_superbeats(config):
    rows = np.random.default_rng(2).standard_normal((3, 5), np.float32)
    packed = pack_rows(config, rows).view(np.float32)
    per_row = len(packed) // 3
    np.testing.assert_array_equal(packed.reshape(3, -1)[:, :5], rows)
    assert packed.size * 4 == 3 * per_row * config.superbeat_bytes


@PRESET
@pytest.mark.parametrize("rows", [1, 3])
def test_logits_come_back_from_column_tiles(config, rows):
    width = 2 * config.columns + config.superbeat_bytes // 4
    logits = np.random.default_rng(3).standard_normal((rows, width), np.float32)
    tiles = [logits[:, first : first + config.columns].ravel() for first in range(0, width, config.columns)]
    got = unpack_logits(config, np.concatenate(tiles), rows, width - 1)
    np.testing.assert_array_equal(got, logits[:, : width - 1])


def test_memory_regions_do_not_overlap_and_start_bursts():
    config = PRESETS["sim"]
    memory = MemoryMap(config)
    for index, size in enumerate([1, 16, 17, 0, 5]):
        assert memory.add(str(index), size) % config.burst_beats == 0
    ends = sorted((first, first + size) for first, size in memory.regions.values())
    assert all(end <= first for (_, end), (first, _) in zip(ends, ends[1:]))
    with pytest.raises(KeyError, match="twice"):
        memory.add("0", 1)


def test_kv_record_pads_heads_to_lanes():
    assert record_beats(PRESETS["sim"], 3, 64) == 2 * 3 * 64 // 32
    assert record_beats(PRESETS["sim"], 3, 80) == 2 * 3 * 96 // 32
