"""Attention on the functional machine: KV tiles in memory, online softmax, against float64 and the integer formula."""

from fractions import Fraction

import numpy as np
import pytest
from exact import rounded, significand
from machine_bench import BEAT, CONFIG, HALT, KV, TILE, Bench, K, N, V, imm
from skipopu.hw.isa import MatmulMode, RowScale, encode

HEADS, GROUPS, DIM, TOKENS = 2, 3, 16, 2
RECORD = 2 * HEADS * DIM // CONFIG.beat_elements
SCORES, OUT, MQ, MP = 0, 500, 0, 200
LOOPS = {"heads": HEADS, "groups": GROUPS, "rows": TOKENS}
SCORE = {"beats": TILE // V, "row_stride": TILE // V, "group_stride": TOKENS * TILE // V,
         "head_stride": GROUPS * TOKENS * TILE // V, "vector": TILE // V}
OUTPUT = {"beats": DIM // V, "row_stride": HEADS * GROUPS * DIM // V, "group_stride": DIM // V,
          "head_stride": GROUPS * DIM // V, "vector": DIM // V}


def write_records(bench, keys, values):
    """float16 [tokens, heads, dim] each, into port t mod P."""
    records = np.concatenate((keys, values), 1).reshape(len(keys), -1).view(np.uint8)
    for t, record in enumerate(records):
        first = (KV + t // CONFIG.ports * RECORD) * BEAT
        bench.image[t % CONFIG.ports, first : first + len(record)] = record
    bench.machine.invalidate()


def load_tile(tile):
    return encode("loadkv", imm=KV + tile * TILE // CONFIG.ports * RECORD, rows=TILE, heads=HEADS,
                  head_beats=DIM // CONFIG.beat_elements, record=RECORD)


def tile_words(limit):
    """Everything of one KV tile but its load; ``limit``: last column that row 0 may see."""
    return [
        encode("matmul", x=MQ, mode=MatmulMode.QK, n_tiles=TILE // N, k_tiles=DIM // K, beats=TILE // V,
               row_stride=HEADS * GROUPS * DIM // K, group_stride=DIM // K, head_stride=GROUPS * DIM // K, **LOOPS),
        encode("vscore", imm=imm(SCORES), x=limit, **LOOPS, **SCORE),
        encode("vprob", imm=imm(SCORES, MP * K // V), **LOOPS, **SCORE),
        encode("matmul", x=MP, mode=MatmulMode.PV, n_tiles=1, k_tiles=TILE // K, beats=DIM // V,
               row_stride=TILE // K, group_stride=TOKENS * TILE // K, head_stride=GROUPS * TOKENS * TILE // K, **LOOPS),
        encode("vmerge", imm=imm(OUT), **LOOPS, **OUTPUT),
    ]


def attention_bench(seed, steep=1.0):
    """Queries [t, h, g, dim] (aligned in MBUF), and keys, values of three tiles in memory."""
    bench, rng = Bench(), np.random.default_rng(seed)
    size = np.exp2(rng.integers(-3, 3, (2, 3 * TILE, HEADS, 1)))
    keys, values = rng.standard_normal((2, 3 * TILE, HEADS, DIM)) * size
    keys, values = keys.astype(np.float16), values.astype(np.float16)
    queries = steep * rng.standard_normal((TOKENS, HEADS, GROUPS, DIM)).astype(np.float32)
    bench.fill_mbuf(MQ, queries, vector=DIM // K, bits=15)
    bench.machine.abuf[OUT : OUT + 100] = np.nan  # vmerge must not read it after vinit
    write_records(bench, keys, values)
    return bench, queries.astype(float), keys, values


@pytest.mark.parametrize("order", ["one by one", "ahead"])
@pytest.mark.parametrize("length", [1, 16, 17, 40, 46])
def test_attention_is_a_softmax(length, order):
    """Three tiles, masked beyond position length + t; tiles loaded one by one or one ahead."""
    bench, queries, keys, values = attention_bench(length)
    words, tiles = [encode("vinit")], -(-(length + 1) // TILE)
    words += [load_tile(0)] if order == "ahead" else []
    for tile in range(tiles):
        following = tile + (order == "ahead")
        words += [load_tile(following)] if following < tiles else []
        words += tile_words(length - 1 - tile * TILE)
    words.append(encode("vscale", imm=imm(OUT, 1000), scale=RowScale.RECIPROCAL, wrap=DIM // V, heads=1, groups=1,
                        rows=TOKENS, beats=HEADS * GROUPS * DIM // V, row_stride=HEADS * GROUPS * DIM // V,
                        vector=HEADS * GROUPS * DIM // V))
    bench.run(*words, HALT)
    scores = np.einsum("thgd,nhd->thgn", queries, keys.astype(float))
    mask = np.arange(3 * TILE) > (length - 1 + np.arange(TOKENS))[:, None]
    scores[np.broadcast_to(mask[:, None, None], scores.shape)] = -np.inf
    p = np.exp2(scores - scores.max(-1, keepdims=True))
    want = np.einsum("thgn,nhd->thgd", p / p.sum(-1, keepdims=True), values.astype(float))
    got = bench.aligned(1000 * V // K, TOKENS * HEADS * GROUPS * DIM // K)[0].reshape(want.shape)
    # 12-bit keys and values: a few parts in 2^11 of scores of up to about 2^6
    assert np.abs(got - want).max() < 0.02 * np.abs(values).max()
    assert np.sqrt(np.square(got - want).mean() / np.square(want).mean()) < 0.01
    assert not bench.machine._matrix.tiles


def kv_by_text(record):
    """(mantissas, exponent) of one head of a record, float16 [dim]."""
    parts = [significand(x) for x in record]
    top = max(es for _, es in parts)
    size = [(Fraction(2 * abs(sig), 2 ** (top - es)) + Fraction(1, 2)).__floor__() for sig, es in parts]
    return [-m if sig < 0 else m for m, (sig, _) in zip(size, parts)], top


def dot_by_text(bench, row, rows, tile):
    """acc of QK or PV of one MBUF vector; tile: [column][element]."""
    e = bench.machine.mbuf_exponents[row : row + rows].ravel().tolist()
    m = bench.machine.mbuf[row : row + rows].ravel().tolist()
    block, emax = CONFIG.block, max(e)
    return [sum(sum(x * y for x, y in zip(m[b * block : (b + 1) * block], column[b * block : (b + 1) * block])) * 64
                >> min(emax - eb, 63) for b, eb in enumerate(e)) for column in tile], emax


def test_scores_and_outputs_are_the_integer_formula():
    bench, _, keys, values = attention_bench(21)
    first = tile_words(TILE)
    machine = bench.run(encode("vinit"), load_tile(0), *first, HALT)
    scores = machine.abuf[SCORES : SCORES + 2 * 3 * 2 * TILE // V].reshape(HEADS, GROUPS, TOKENS, TILE)
    outputs = machine.abuf[OUT : OUT + TOKENS * HEADS * GROUPS * DIM // V].reshape(TOKENS, HEADS, GROUPS, DIM)
    for h in range(HEADS):
        k, k_exponent = zip(*(kv_by_text(keys[t, h]) for t in range(TILE)))
        v = np.array([kv_by_text(values[t, h])[0] for t in range(TILE)]).T.tolist()
        for g in range(GROUPS):
            for t in range(TOKENS):
                row = MQ + ((t * HEADS + h) * GROUPS + g) * DIM // K
                acc, emax = dot_by_text(bench, row, DIM // K, k)
                want = [float(rounded(a * Fraction(2) ** (emax + es - 45))) for a, es in zip(acc, k_exponent)]
                np.testing.assert_array_equal(scores[h, g, t], np.array(want, np.float32))
                row = MP + ((h * GROUPS + g) * TOKENS + t) * TILE // K
                acc, emax = dot_by_text(bench, row, TILE // K, v)
                want = [float(rounded(a * Fraction(2) ** (emax - 20))) for a in acc]
                np.testing.assert_array_equal(outputs[t, h, g], np.array(want, np.float32))


def test_softmax_states_follow_the_text():
    bench, queries, keys, _ = attention_bench(22, steep=4.0)
    words = [encode("vinit")]
    seen = []
    for tile in range(3):
        words += [load_tile(tile), *tile_words(TILE if tile != 1 else -5)]  # nothing of tile 1 is allowed

    def observe(pc, item, fields, writes):
        machine = bench.machine
        if item.mnemonic == "vprob":
            scores = machine.abuf[SCORES : SCORES + 2 * 3 * 2 * TILE // V].reshape(HEADS, GROUPS, TOKENS, TILE).copy()
            index = (np.arange(HEADS * GROUPS)[:, None] * CONFIG.tokens + np.arange(TOKENS)).reshape(scores.shape[:3])
            seen.append((scores, *(item[index] for item in (machine.maximum, machine.alpha, machine.total))))

    bench.machine.observer = observe
    bench.run(*words, HALT)
    (s0, m0, a0, l0), (s1, m1, a1, l1), (s2, m2, a2, l2) = seen
    np.testing.assert_array_equal(m0, np.ceil(s0.max(-1)))
    assert (a0 == 127).all() and (a1 == 0).all()
    assert (s1 == np.finfo(np.float32).min).all(), "masked scores are the lowest number"
    np.testing.assert_array_equal(m1, m0)
    np.testing.assert_array_equal(l1, l0)
    np.testing.assert_array_equal(m2, np.maximum(m1, np.ceil(s2.max(-1))))
    np.testing.assert_array_equal(a2, m2 - m1)
    assert (a2 > 0).any()
    np.testing.assert_allclose(l0 * 2.0**-30, np.exp2(s0 - m0[..., None].astype(float)).sum(-1), atol=1e-5)
    fresh = np.exp2(s2 - m2[..., None].astype(float)).sum(-1)
    np.testing.assert_allclose(l2 * 2.0**-30, (l1 >> a2) * 2.0**-30 + fresh, atol=1e-5)


def test_storekv_places_tokens_on_ports_and_later_loads_see_it():
    bench, _, keys, values = attention_bench(23)
    machine = bench.machine
    bench.run(load_tile(0), *tile_words(TILE), HALT)
    scores = machine.abuf[SCORES : SCORES + 12 * TILE // V].copy()
    fresh = np.random.default_rng(1).standard_normal((3, 2 * HEADS * DIM)).astype(np.float16)
    machine.kvout[: 3 * RECORD] = fresh.view(np.uint16).reshape(-1, CONFIG.beat_elements)
    store = encode("storekv", imm=KV, rows_reg=2, x_reg=1, record=RECORD)
    bench.run(store, load_tile(0), *tile_words(TILE), HALT, args=(5, 3))
    for t in range(3):
        first = (KV + (5 + t) // CONFIG.ports * RECORD) * BEAT
        got = bench.image[(5 + t) % CONFIG.ports, first : first + RECORD * BEAT].view(np.float16)
        np.testing.assert_array_equal(got, fresh[t])
    changed = (machine.abuf[SCORES : SCORES + 12 * TILE // V] != scores).reshape(-1, TILE).any(0)
    assert changed.nonzero()[0].tolist() == [5, 6, 7]
    assert machine.counters["kv_written"] == 3 * RECORD * BEAT
    assert machine.counters["kv_read"] == TILE * RECORD * BEAT
