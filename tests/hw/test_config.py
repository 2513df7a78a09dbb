"""Configurations: every relation is checked, presets hold, names are told."""

import dataclasses

import pytest
from skipopu.hw.config import PRESETS, ConfigError, preset

TINY = preset("tiny")


@pytest.mark.parametrize(("change", "message"), [
    ({"lanes": 12}, "lanes must be a power of two, not 12"),
    ({"tokens": 0}, "tokens must be a positive number, not 0"),
    ({"kvbuf_heads": 0}, "kvbuf_heads must be a positive number, not 0"),
    ({"kvbuf_heads": 2.5}, "kvbuf_heads must be a positive number, not 2.5"),
    ({"state_rows": -8}, "state_rows must be a positive number, not -8"),
    ({"columns": 8}, "columns must be at least 2 x lanes"),
    ({"port_bits": 16}, "port_bits must be 32..512, not 16"),
    ({"port_bits": 256}, "must not exceed lanes"),
    ({"vector_lanes": 8}, "vector_lanes must not exceed port_bits / 16"),
    ({"vector_lanes": 1}, "vector_lanes must be at least 2"),
    ({"ports": 16}, "ports must not exceed lanes"),
    ({"ports": 8, "port_bits": 128}, "a tile must hold at least one superbeat"),
    ({"ports": 1}, "a superbeat must hold at least one vector row"),
    ({"burst_beats": 512, "fifo_beats": 1024}, "an AXI4 burst is at most 256 beats"),
    ({"fifo_beats": 16}, "fifo_beats must hold two bursts"),
    ({"acc_rows": 2}, "acc_rows must be at least tokens"),
])
def test_relation_is_refused_by_name(change, message):
    with pytest.raises(ConfigError, match=f"tiny: .*{message}|{message}"):
        dataclasses.replace(TINY, **change)


def test_burst_fits_the_4_kib_rule():
    with pytest.raises(ConfigError, match="a burst must fit in 4 KiB"):
        dataclasses.replace(preset("sim"), burst_beats=128)


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(ConfigError, match="unknown configuration 'huge'; known: tiny, sim, sim16, u280"):
        preset("huge")


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_scale_chunk_holds_whole_sets(config):
    for minimum in (False, True):
        for group in range(8):
            beats, sets = config.scale_chunk(minimum, group)
            size = 2 * config.columns * max(config.blocks >> group, 1) * (2 if minimum else 1)
            assert beats == 1 or sets == 1
            assert beats * config.superbeat_bytes == sets * size
            assert config.scale_tiles(group) * config.blocks == max(1 << group, config.blocks)


def test_hashes_tell_every_size_apart():
    base = TINY.config_hash
    changed = dataclasses.replace(TINY, abuf_rows=2 * TINY.abuf_rows)
    assert changed.config_hash != base == dataclasses.replace(TINY).config_hash
