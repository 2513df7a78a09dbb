"""Vector instructions of the functional machine on results of matmuls: near float64, within what alignment loses."""

from fractions import Fraction

import numpy as np
import pytest
from exact import rounded
from machine_bench import CONFIG, HALT, ROW, Bench, K, N, V, imm, logits, near, put, results
from skipopu.hw.isa import Destination, RowScale, decode, encode


def norm_words(n, eps=1e-5):
    bits = [int(np.float32(x).view(np.uint32)) for x in (1 / n, eps)]
    return encode("vset", imm=bits[0], eps=bits[1])


def test_vnorm_then_scaled_results_are_an_rms_norm():
    bench, words, y = results(1)
    rng = np.random.default_rng(2)
    x = put(bench, 0, rng.normal(0, 3, 4 * N)).reshape(2, -1)
    gain = put(bench, 50, rng.uniform(0.5, 1.5, 2 * N))
    norm = encode("vnorm", imm=imm(0, 80), table=50, **ROW)
    bench.run(norm_words(2 * N), norm, HALT)
    assert bench.machine.sumsq[:2].tolist() == [
        sum((rounded(Fraction(v) ** 2) * 2**24 + Fraction(1, 2)).__floor__() for v in row) for row in x.tolist()]
    got, unit = bench.aligned(40, 8)
    near(got, x * gain, unit)
    assert (bench.machine.mbuf_emax[[40, 44]] == bench.machine.mbuf_exponents[40:48].reshape(2, -1).max(1)).all()
    bench.fill_mbuf(0, np.random.default_rng(1).standard_normal((2, 2 * K)).astype(np.float32), vector=2)
    scaled = logits(bench, (norm_words(2 * N), norm, *words), 2, 2 * N, scale=RowScale.RSQRT)
    rms = np.sqrt((x * x).mean(1, keepdims=True) + 1e-5)
    y = logits(bench, words, 2, 2 * N).astype(float)
    np.testing.assert_allclose(scaled, y / rms, rtol=2.0**-20)
    # x of vlogits: row t of the results takes the scale of row x + t
    one = logits(bench, (norm_words(2 * N), norm, *weight_words_one_row(bench, words)), 1, 2 * N,
                 scale=RowScale.RSQRT, x=1)
    np.testing.assert_allclose(one[0], y[1] / rms[1], rtol=2.0**-20)


def weight_words_one_row(bench, words):
    """The same LOADW, and its MATMUL for the second row alone."""
    fields = decode(words[1])[1]
    return words[0], encode("matmul", **fields | {"rows": 1, "x": 2})


def test_sum_of_squares_saturates():
    bench = Bench()
    put(bench, 0, np.full(2 * N, 3e38))
    bench.run(encode("vnorm", table=50, **ROW | {"rows": 1}), HALT)
    assert bench.machine.sumsq[0] == 2 * N << 56
    wide = {"heads": 1, "groups": 1, "rows": 1, "beats": 64, "row_stride": 64, "vector": 64}
    put(bench, 0, np.full(64 * V, 3e38))
    bench.run(encode("vnorm", table=100, **wide), HALT)
    assert bench.machine.sumsq[0] == (1 << 63) - 1


def test_vadd_adds_stores_squares_and_aligns():
    bench, words, y = results(3)
    x = put(bench, 0, np.random.default_rng(4).normal(0, 3, 4 * N)).reshape(2, -1)
    gain = put(bench, 50, np.random.default_rng(5).uniform(0.5, 1.5, 2 * N))
    machine = bench.run(*words, encode("vadd", imm=imm(0, 80), table=50, **ROW), HALT)
    want = (y + x).astype(np.float32)
    np.testing.assert_array_equal(machine.abuf[:16].reshape(2, -1), want)
    near(*bench.aligned(40, 8)[:1], want * gain, bench.aligned(40, 8)[1])
    np.testing.assert_allclose(machine.sumsq[:2] * 2.0**-24, (want.astype(float) ** 2).sum(1), rtol=1e-6)


@pytest.mark.parametrize("dest", Destination)
def test_vrope_rotates_adjacent_pairs(dest):
    bench, words, y = results(6)
    head = 2
    angle = np.random.default_rng(7).uniform(-3, 3, (2, head * V // 2)).repeat(2, axis=1)
    sign = np.tile([-1, 1], head * V // 2)
    tables = [put(bench, 60 + 10 * t, np.concatenate((np.cos(angle[t]), sign * np.sin(angle[t])))) for t in range(2)]
    cos, sin = np.array(tables).reshape(2, 2, -1).transpose(1, 0, 2)
    rope = encode("vrope", imm=imm(0, 80), table=60, table_stride=10, wrap=head, dest=dest, **ROW | {"vector": head})
    machine = bench.run(*words, rope, HALT)
    heads = y.reshape(2, -1, head * V)
    swapped = heads.reshape(2, -1, head * V // 2, 2)[..., ::-1].reshape(heads.shape)
    want = heads * cos[:, None] + swapped * sin[:, None]
    if dest == Destination.KVOUT:
        got = machine.kvout.view(np.float16).ravel()[80 * V : 80 * V + want.size]
        np.testing.assert_array_equal(got, want.astype(np.float32).astype(np.float16).ravel())
    else:
        got, unit = bench.aligned(40, 8, bits=15)
        near(got, want, unit, 2.0**-19)
        np.testing.assert_array_equal(machine.mbuf_emax[40:48], machine.mbuf_exponents[40:48, 0])


def test_vrope_without_rotation_saturates_and_counts():
    bench, words, y = results(8, gain=1e5)
    machine = bench.run(*words, encode("vrope", imm=imm(0, 80), dest=Destination.KVOUT, **ROW), HALT)
    got = machine.kvout.view(np.float16).ravel()[80 * V : 80 * V + y.size]
    np.testing.assert_array_equal(got, np.clip(y, -65504, 65504).astype(np.float16).ravel())
    assert machine.counters["saturations"] == (np.abs(y) >= 65520).sum() > 0


def test_results_beyond_fp32_saturate_and_count():
    bench, words, y = results(8)
    put(bench, 80, np.zeros(y.size))
    bench.fill_mbuf(0, np.full((2, 2 * K), 2.0**127, np.float32), vector=2)
    machine = bench.run(*words, encode("vadd", imm=imm(80, 40), table=60, **ROW), HALT)
    got = machine.abuf[80 : 80 + y.size // V]
    largest = np.finfo(np.float32).max
    assert machine.counters["saturations"] == (np.abs(got) == largest).sum() > 0


def test_vswiglu_gates_alternate_beats():
    bench, words, y = results(10, gain=8)
    bench.run(*words, encode("vswiglu", imm=imm(0, 80), **ROW | {"row_stride": N // V, "vector": N // V}), HALT)
    gate, up = y.reshape(2, -1, 2, V).transpose(2, 0, 1, 3)
    got, unit = bench.aligned(40, 4)
    near(got, gate * up / (1 + np.exp(-gate)), unit)


def test_vscale_divides_by_the_softmax_sum():
    bench = Bench()
    x = put(bench, 0, np.random.default_rng(11).standard_normal(4 * N)).reshape(2, 4, 2 * V)
    sums = np.array([[3.0, 0.75], [1.0, 17.0], [2.5, 5.0], [1.125, 9.0]])  # [turn, t]
    for turn in range(4):
        bench.machine.total[turn * CONFIG.tokens :][:2] = sums[turn] * 2.0**30
    bench.run(encode("vscale", imm=imm(0, 80), scale=RowScale.RECIPROCAL, wrap=2, **ROW), HALT)
    got, unit = bench.aligned(40, 8)
    near(got, x / sums.T[..., None], unit)
    bench.run(encode("vscale", imm=imm(0, 80), **ROW), HALT)
    near(*bench.aligned(40, 8)[:1], x, bench.aligned(40, 8)[1], 0)


def test_vlogits_finds_the_first_largest_of_the_last_row():
    bench, words, y = results(12, rows=3)
    for count in (2 * N, 7, 1):
        logits(bench, words, 3, 2 * N, imm=count)
        assert bench.machine.argmax_index == y[2, :count].argmax()
        assert bench.machine.argmax_value == np.float32(y[2, :count].max()).view(np.uint32)
    bench.fill_mbuf(0, np.zeros((3, 2 * K)), vector=2)
    logits(bench, words, 3, 2 * N)
    assert bench.machine.argmax_index == 0 and bench.machine.argmax_value == 0


def test_one_matmul_may_feed_several_vector_instructions():
    bench, words, y = results(13)
    half = {"heads": 1, "groups": 1, "rows": 2, "beats": N // V, "row_stride": N // V, "vector": N // V}
    parts = [encode("vrope", imm=imm(0, 80 + 8 * i), dest=Destination.KVOUT, **half) for i in range(2)]
    machine = bench.run(*words, *parts, HALT)
    got = machine.kvout.view(np.float16).ravel()[80 * V : 96 * V].reshape(2, 2, N)
    np.testing.assert_array_equal(got, y.reshape(2, 2, N).transpose(1, 0, 2).astype(np.float16))
