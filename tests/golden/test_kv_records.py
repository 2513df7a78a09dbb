"""KV formats: what a narrow record holds, by the text, and that the functional machine stores and loads it so."""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest
from machine_bench import BEAT, CONFIG, HALT, KV, TILE, Bench
from skipopu.golden.functional import MachineFault
from skipopu.golden.kv_records import pack_records, unpack_records
from skipopu.hw.config import preset
from skipopu.hw.isa import KvFormat, encode
from skipopu.hw.registers import FaultCause

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
from kv_formats import rounded  # noqa: E402

E, P = CONFIG.beat_elements, CONFIG.ports
CORNERS = np.array([0, 0x8000, 1, 0x8001, 0x3FF, 0x400, 0x7BFF, 0xFBFF, 0x7C00, 0x7FFF, 0xFFFF, 0x3C00, 0xBBFF],
                   np.uint16)
NARROW = {KvFormat.B12: 12, KvFormat.B8: 8}


def make_bits(rng, shape):
    """FP16 bits: corners, heads of subnormals, of exponents near each other, and anything finite."""
    bits = rng.integers(0, 1 << 16, shape, dtype=np.uint16)
    kind = rng.integers(0, 4, shape[:-1])
    bits[kind == 0] = rng.choice(CORNERS, bits[kind == 0].shape)
    bits[kind == 1] &= 0x83FF
    bits[kind == 2] = bits[kind == 2] & 0x8FFF | 0x3000
    return bits


@pytest.mark.parametrize("record_format", KvFormat)
@pytest.mark.parametrize("heads, head_beats", [(1, 2), (3, 2), (5, 3), (9, 1), (2, 8)])
def test_a_record_read_back_is_what_the_text_says(heads, head_beats, record_format):
    """One exponent a head; halves up; what is too large becomes the largest."""
    bits = make_bits(np.random.default_rng(heads), (40, 2, heads, head_beats * E))
    beats = pack_records(CONFIG, bits, record_format)
    assert beats.shape == (40, CONFIG.record_beats(heads, head_beats, record_format), BEAT)
    padded = np.concatenate((beats, np.full((40, 2, BEAT), 0xA5, np.uint8)), 1)
    mantissa, exponent = unpack_records(CONFIG, padded, record_format, heads, head_beats)
    kept = NARROW.get(record_format, 13)
    for index in np.ndindex(40, 2, heads):
        fields = [max(int(word) >> 10 & 31, 1) for word in bits[index]]
        values = [((int(word) & 1023) + (1024 if int(word) >> 10 & 31 else 0)) * 2 ** (field - 1)
                  for word, field in zip(bits[index], fields)]
        assert exponent[index] == (top := max(fields))
        unit = 2 ** (top - 1 + 12 - kept)  # of the last bit kept: half a unit more, and no fraction
        wanted = [min((2 * value + unit) // (2 * unit), 2 ** (kept - 1) - 1) if unit >= 1 else int(value / unit)
                  for value in values]
        signs = [-1 if word >> 15 else 1 for word in bits[index].tolist()]
        assert mantissa[index].tolist() == [sign * value << 13 - kept for sign, value in zip(signs, wanted)]


@pytest.mark.parametrize("record_format, width", NARROW.items())
def test_narrow_records_are_the_formats_whose_quality_was_measured(record_format, width):
    bits = make_bits(np.random.default_rng(7), (100, 2, 3, 16))
    bits = np.where(bits >> 10 & 31 == 31, bits & 0xBFFF, bits).astype(np.uint16)  # numpy's FP16 has infinities there
    got = unpack_records(CONFIG, pack_records(CONFIG, bits, record_format), record_format, 3, 4)
    same = rounded(bits, width)
    want = unpack_records(CONFIG, pack_records(CONFIG, same, KvFormat.FP16), KvFormat.FP16, 3, 4)
    for one, other in zip(got, want):
        np.testing.assert_array_equal(one, other)


def test_where_the_bits_of_a_record_lie():
    """Two heads of a beat each, 4 elements to a beat: a beat of exponents, two of high planes, one of low planes."""
    bits = np.zeros((1, 2, 2, 4), np.uint16)
    bits[0, 0, 0] = 0x3C00, 0xBC01, 0x3800, 0x3801  # 1, -1 - 2^-10, 0.5, 0.5 + 2^-11: a half in the last place
    bits[0, 1, 1] = 0x7BFF, 0xFBFF, 0, 0x8000
    shared, high, low = [15, 1, 1, 30], 1024 >> 4, 512 >> 4
    assert pack_records(CONFIG, bits, KvFormat.B12)[0].tolist() == [
        [*shared, 0, 0, 0, 0], [high, 128 | high, low, low, 0, 0, 0, 0], [0, 0, 0, 0, 127, 255, 0, 128],
        [0x10, 0x10, 0, 0, 0, 0, 0xFF, 0]]
    assert pack_records(CONFIG, bits, KvFormat.B8)[0].tolist() == [
        [*shared, 0, 0, 0, 0], [64, 128 | 64, 32, 32, 0, 0, 0, 0], [0, 0, 0, 0, 127, 255, 0, 128]]


# ---- on the machine


def store(record_format, heads, head_beats, **fields):
    return encode("storekv", **{"imm": KV, "rows_reg": 2, "x_reg": 1, "format": record_format, "heads": heads,
                                "head_beats": head_beats,
                                "record": CONFIG.record_beats(heads, head_beats, record_format), **fields})


def load(record_format, heads, head_beats, **fields):
    return encode("loadkv", **{"imm": KV, "rows": TILE, "format": record_format, "heads": heads,
                               "head_beats": head_beats,
                               "record": CONFIG.record_beats(heads, head_beats, record_format), **fields})


@pytest.mark.parametrize("reuse", [0, 1])
@pytest.mark.parametrize("record_format", NARROW)
@pytest.mark.parametrize("heads, head_beats", [(1, 2), (3, 4), (5, 2)])
def test_the_machine_stores_and_loads_them(heads, head_beats, record_format, reuse):
    rng, bench, size = np.random.default_rng(heads), Bench(), 2 * heads * head_beats
    bits = make_bits(rng, (TILE, 2, heads, head_beats * E))
    fields = {"reuse": reuse, "layer": 0}
    for first in range(0, TILE, CONFIG.tokens):
        bench.machine.kvout[: CONFIG.tokens * size] = bits[first : first + CONFIG.tokens].reshape(-1, E)
        bench.run(store(record_format, heads, head_beats, **fields, places=reuse * TILE), HALT,
                  args=(first, CONFIG.tokens))
    packed, record = pack_records(CONFIG, bits, record_format), CONFIG.record_beats(heads, head_beats, record_format)
    assert bench.machine.counters["kv_written"] == CONFIG.tokens * record * BEAT
    for t in range(TILE):
        begin = (KV + t // P * record) * BEAT
        assert bench.image[t % P, begin : begin + record * BEAT].tobytes() == packed[t].tobytes()
    bench.run(load(record_format, heads, head_beats, **fields), HALT)
    assert bench.machine.counters["kv_read"] == TILE * record * BEAT
    (tile,) = bench.machine._matrix.tiles
    mantissa, exponent = unpack_records(CONFIG, packed, record_format, heads, head_beats)
    np.testing.assert_array_equal(tile.key.reshape(heads, -1, TILE), mantissa[:, 0].transpose(1, 2, 0))
    np.testing.assert_array_equal(tile.value.reshape(heads, TILE, -1), mantissa[:, 1].transpose(1, 0, 2))
    np.testing.assert_array_equal((tile.key_exponent, tile.value_exponent), exponent.transpose(1, 2, 0))


@pytest.mark.parametrize("word, cause, text", [
    (store(KvFormat.B12, 2, 2, format=3), FaultCause.KV_FORMAT, "KV format 3; tiny has FP16, B12, B8"),
    (load(KvFormat.B12, 2, 2, format=3), FaultCause.KV_FORMAT, "KV format 3"),
    (store(KvFormat.B12, 2, 2, record=6), FaultCause.BUFFER_RANGE, "a B12 record of 2 heads of 2 beats has 7 beats, "
                                                                   "not 6"),
    (store(KvFormat.B8, 2, 2, record=6), FaultCause.BUFFER_RANGE, "has 5 beats, not 6"),
    (store(KvFormat.B8, 0, 2), FaultCause.BUFFER_RANGE, "a B8 record of 0 heads"),
    (store(KvFormat.B8, 65, 1), FaultCause.BUFFER_RANGE, "the KV buffer has 64 heads"),
    (store(KvFormat.B8, 64, 5), FaultCause.BUFFER_RANGE, "kvout row 1279 of 1024"),
])
def test_what_does_not_fit_is_a_fault(word, cause, text):
    with pytest.raises(MachineFault, match=text) as info:
        Bench().run(word, HALT, args=(0, 2))
    assert info.value.cause == cause


@pytest.mark.parametrize("make", [store, load])
def test_a_configuration_without_them_faults(make):
    config = dataclasses.replace(preset("tiny"), name="plain", kv_narrow=False)
    bench = Bench()
    bench.machine.config = config
    with pytest.raises(MachineFault, match="KV_FORMAT.* KV format 2; plain has FP16$"):
        bench.run(make(KvFormat.B8, 2, 2), HALT, args=(0, 2))
