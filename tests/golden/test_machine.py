"""Matmuls, loads, scalar instructions and faults of the functional machine, on small hand-made programs."""

from fractions import Fraction

import numpy as np
import pytest
from exact import rounded, significand
from machine_bench import (
    BEAT,
    CODES,
    CONFIG,
    HALT,
    KV,
    LOGITS,
    ROW,
    ROWS,
    SIZE,
    WEIGHTS,
    Bench,
    K,
    N,
    imm,
    logits,
    put,
    random_weights,
    results,
    weight_words,
)
from skipopu.golden.functional import FunctionalMachine, MachineFault, ProgramError
from skipopu.host.layout import pack_rows, pack_weights, scale_exponent, weight_superbeats
from skipopu.hw.config import preset
from skipopu.hw.isa import Condition, MatmulMode, encode
from skipopu.hw.registers import FaultCause


def matmul_by_text(bench, mode, codes, scale, minimum, row, exponent, group=0):
    """One row of a weight matmul in whole numbers: float32 [rows of codes]."""
    config, machine = bench.config, bench.machine
    k = codes.shape[1] // config.lanes
    m = machine.mbuf[row : row + k].ravel().tolist()
    e = machine.mbuf_exponents[row : row + k].ravel().tolist()
    emax, block, out = max(e), config.block, []
    for n in range(len(codes)):
        acc = 0
        for b, eb in enumerate(e):
            part, q = m[b * block : (b + 1) * block], codes[n, b * block : (b + 1) * block].tolist()
            total = sum(part)
            sig, es = significand(scale[n, b >> group])
            shift = emax - eb + exponent - es
            if mode == MatmulMode.W8:
                high = sum(x * (y >> 4) for x, y in zip(part, q))
                low = sum(x * ((y & 15) - 8) for x, y in zip(part, q)) + 8 * total
                acc += (high * sig >> min(shift - 4, 63)) + (low * sig >> min(shift, 63))
                continue
            offset = 8 if mode == MatmulMode.W4M else 0
            dot = sum(x * (y - offset) for x, y in zip(part, q)) + offset * total
            acc += dot * sig >> min(shift, 63)
            if mode == MatmulMode.W4M:
                sig, es = significand(minimum[n, b >> group])
                acc += total * sig >> min(emax - eb + exponent - es, 63)
        out.append(float(rounded(acc * Fraction(2) ** (emax + exponent - 39))))
    return np.array(out, np.float32)


def dequantise(config, codes, scale, minimum):
    values = codes * scale.astype(float).repeat(config.block, axis=1)
    return values if minimum is None else values + minimum.astype(float).repeat(config.block, axis=1)


@pytest.mark.parametrize("spread", [0.5, 8, 14], ids="spread{}".format)
@pytest.mark.parametrize("mode", CODES, ids=lambda mode: mode.name)
def test_weight_matmul_is_the_integer_formula(mode, spread):
    bench, rng = Bench(), np.random.default_rng(int(spread))
    weights = random_weights(rng, mode, 2 * N, 3 * K, spread)
    x = rng.standard_normal((3, 3 * K)) * np.exp2(rng.uniform(-2 * spread, 2 * spread, (3, 3))).repeat(K, axis=1)
    x = x.astype(np.float32).astype(float)
    x[2, K:] = 0
    bench.fill_mbuf(5, x, vector=3)
    exponent = scale_exponent(mode, *weights[1:])
    got = logits(bench, weight_words(bench, mode, weights, x=5, rows=3), 3, 2 * N)
    for t in range(3):
        want = matmul_by_text(bench, mode, *weights, 5 + 3 * t, exponent)
        np.testing.assert_array_equal(got[t].view(np.uint32), want.view(np.uint32), err_msg=f"row {t}")
    # Alignment: half a unit of 2^(emax - 14) per element; shifts: one unit of the accumulator per block and plane.
    dense = dequantise(CONFIG, *weights)
    top = np.abs(x).max(axis=1, keepdims=True)
    bound = top * (2.0**-14 * np.abs(dense).sum(axis=1) + 2.0 ** (exponent - 25) * 9 * 2.0**-14) + 1e-30
    assert (np.abs(got - x @ dense.T) <= bound).all()


@pytest.mark.parametrize("name, group", [("tiny", 1), ("tiny", 4), ("sim", 0), ("sim", 1), ("u280", 0), ("u280", 1),
                                         ("u280", 2), ("u280", 5)])
@pytest.mark.parametrize("mode", CODES, ids=lambda mode: mode.name)
def test_weight_matmul_of_other_configurations(mode, name, group):
    """Blocks that share a scale among them; the last ones of a row may be fewer."""
    config = preset(name)
    bench, rng = Bench(config), np.random.default_rng(3)
    weights = random_weights(rng, mode, config.columns, 3 * config.lanes, 4, config, group)
    x = rng.standard_normal(3 * config.lanes).astype(np.float32)
    bench.fill_mbuf(0, x)
    width = config.superbeat_bytes // 4
    words = weight_words(bench, mode, weights, beats=min(width, config.columns) // config.vector_lanes, group=group)
    if width > config.columns:  # sim and u280 store whole superbeats only: two matmuls fill one
        words *= width // config.columns
    got = logits(bench, words, 1, width)[0]
    want = matmul_by_text(bench, mode, *weights, 0, scale_exponent(mode, *weights[1:]), group)
    np.testing.assert_array_equal(got, np.resize(want[:width], width))


def test_w8_reaches_every_code_and_largest_mantissas():
    bench = Bench()
    codes = np.arange(-128, 128).astype(np.int8)[: N * K * 2].reshape(N, 2 * K)
    scale = np.ones((N, 2), np.float16)
    bench.fill_mbuf(0, np.full(2 * K, 2.0 - 2.0**-23))
    got = logits(bench, weight_words(bench, MatmulMode.W8, (codes, scale, None)), 1, N)[0]
    np.testing.assert_array_equal(got, codes.astype(float).sum(1) * 32767 * 2.0**-14)


def test_all_zero_input_gives_plus_zero():
    bench = Bench()
    bench.fill_mbuf(0, np.zeros(2 * K))
    weights = random_weights(np.random.default_rng(1), MatmulMode.W4M, N, 2 * K)
    assert not logits(bench, weight_words(bench, MatmulMode.W4M, weights), 1, N).view(np.uint32).any()


def test_heads_and_groups_address_mbuf_and_the_stream():
    """Two heads read their own weights and rows; the delivery order is h, n, g, t."""
    bench, rng = Bench(), np.random.default_rng(9)
    parts = [random_weights(rng, MatmulMode.W4, 2 * N, K) for _ in range(2)]
    weights = tuple(None if a is None else np.concatenate((a, b)) for a, b in zip(*parts))
    x = rng.standard_normal((16, K)).astype(np.float32)
    bench.fill_mbuf(0, x, vector=1)
    bench.write(WEIGHTS, pack_weights(CONFIG, MatmulMode.W4, *weights))
    loops = {"heads": 2, "groups": 2, "rows": 3}
    exponent = scale_exponent(MatmulMode.W4, weights[1])
    load = encode("loadw", imm=WEIGHTS, count=weight_superbeats(CONFIG, MatmulMode.W4, 4, 1))
    multiply = encode("matmul", x=1, mode=MatmulMode.W4, n_tiles=2, k_tiles=1, row_stride=2, group_stride=1,
                      head_stride=7, scale_exponent=exponent, beats=6, **loops)
    merge = encode("vmerge", imm=imm(100), beats=6, row_stride=6, group_stride=18, head_stride=36, **loops)
    machine = bench.run(encode("vinit"), load, multiply, merge, HALT)
    got = machine.abuf[100 : 100 + 72].reshape(2, 2, 3, 24)
    for h in range(2):
        for g in range(2):
            for t in range(3):
                part = [None if item is None else item[h * 2 * N : h * 2 * N + 24] for item in weights]
                want = matmul_by_text(bench, MatmulMode.W4, *part, 1 + 7 * h + g + 2 * t, exponent)
                np.testing.assert_array_equal(got[h, g, t], want, err_msg=f"head {h} group {g} row {t}")


# ---- loads, scalars, faults


def test_loada_places_rows():
    bench = Bench()
    rows = np.random.default_rng(1).standard_normal((3, 24)).astype(np.float32)
    rows[0, :4] = np.array([0x7F800001, 0x00000001, 0x80000000, 0xFFFFFFFF], np.uint32).view(np.float32)
    packed = pack_rows(CONFIG, rows)
    bench.write(ROWS, packed)
    machine = bench.run(encode("loada", imm=ROWS - 7, imm_reg=1, rows=3, x=20, count=len(packed) // 3, beats=5,
                               dst_stride=9), HALT, args=(7,))
    for r in range(3):
        np.testing.assert_array_equal(machine.abuf[20 + 9 * r : 25 + 9 * r].view(np.uint32).ravel(),
                                      rows[r, :20].view(np.uint32))
    assert not machine.abuf[25].any() and machine.counters["activations_read"] == packed.size


def test_operands_with_extreme_exponents_are_ordinary_or_zero():
    bench = Bench()
    rows = np.array([[0x7F800000, 0x00000001, 0x3F800000, 0xFF800000] * 2], np.uint32).view(np.float32)
    bench.write(ROWS, pack_rows(CONFIG, rows))
    put(bench, 50, np.full(8, 0.5))
    bench.run(encode("loada", imm=ROWS, rows=1, count=2, beats=2),
              encode("vnorm", imm=imm(0, 80), table=50, heads=1, groups=1, rows=1, beats=2, vector=2), HALT)
    got = bench.aligned(40, 1)[0]
    np.testing.assert_array_equal(got[:4], [2.0**127, 0, 0, -(2.0**127)])


@pytest.mark.parametrize("words, register, want", [
    ([encode("addi", rd=8, imm_reg=1, imm=-9)], 8, -4), ([encode("add", rd=8, imm_reg=1, rows_reg=2)], 8, -2),
    ([encode("sub", rd=8, imm_reg=1, rows_reg=2)], 8, 12), ([encode("shli", rd=8, imm_reg=1, rows=30)], 8, 1 << 30),
    ([encode("shri", rd=8, imm_reg=2, rows=1)], 8, -4), ([encode("muli", rd=8, imm_reg=2, x=-300)], 8, 2100),
    ([encode("min", rd=8, imm_reg=1, rows_reg=2)], 8, -7), ([encode("token", rd=8, imm_reg=3)], 8, 77),
    ([encode("addi", rd=0, imm=5), encode("addi", rd=8)], 8, 0),
    ([encode("addi", rd=8, imm=0x7FFFFFFF), encode("addi", rd=8, imm_reg=8, imm=1)], 8, -(1 << 31)),
])
def test_scalar_instructions(words, register, want):
    machine = Bench().run(*words, HALT, args=(5, -7 & 0xFFFFFFFF, 2), tokens=[1, 2, 77])
    assert machine.registers[register] == want
    assert machine.counters["instructions"] == len(words) + 1 and machine.pc == len(words)


@pytest.mark.parametrize("condition, left, right, taken", [
    (Condition.EQ, 3, 3, True), (Condition.EQ, 3, -3, False), (Condition.NE, 3, -3, True), (Condition.NE, 3, 3, False),
    (Condition.LT, -1, 0, True), (Condition.LT, 0, 0, False), (Condition.LT, 1, -1, False),
    (Condition.GE, 0, 0, True), (Condition.GE, 1, -1, True), (Condition.GE, -1, 1, False),
])
def test_branches_compare_signed(condition, left, right, taken):
    words = [encode("branch", condition=condition, rows_reg=1, x_reg=2, imm=2), HALT, encode("addi", rd=8, imm=1), HALT]
    assert Bench().run(*words, args=(left, right)).registers[8] == taken


def test_loop_and_instruction_limit():
    words = [encode("addi", rd=8, imm_reg=8, imm=1),
             encode("branch", condition=Condition.LT, rows_reg=8, x_reg=1, imm=0), HALT]
    bench, seen = Bench(), []
    bench.machine.observer = lambda pc, item, fields, writes: seen.append((pc, item.mnemonic))
    machine = bench.run(*words, args=(3,))
    assert machine.registers[8] == 3 and machine.counters["instructions"] == 7
    assert seen == [(0, "addi"), (1, "branch")] * 3 + [(2, "halt")]
    machine = bench.run(*words, args=(3,), instruction_limit=3)
    assert machine.registers[8] == 2 and machine.pc == 0 and machine.counters["instructions"] == 3


def test_memory_changes_are_seen_after_invalidate():
    bench, words, y = results(14)
    weights = random_weights(np.random.default_rng(99), MatmulMode.W8, 2 * N, 2 * K)
    bench.write(WEIGHTS, pack_weights(CONFIG, MatmulMode.W8, *weights))
    bench.machine.invalidate((WEIGHTS - 8) * BEAT, 8 * BEAT)
    np.testing.assert_array_equal(logits(bench, words, 2, 2 * N), y)
    bench.machine.invalidate(WEIGHTS * BEAT, 1)
    assert (logits(bench, words, 2, 2 * N) != y).any()


def test_a_small_cache_changes_nothing():
    bench, words, y = results(15)
    bench.machine.cache.limit = 1
    for _ in range(2):
        np.testing.assert_array_equal(logits(bench, words * 1, 2, 2 * N), y)
    other = weight_words(bench, MatmulMode.W4, random_weights(np.random.default_rng(0), MatmulMode.W4, N, K), at=ROWS)
    logits(bench, other, 1, N)
    assert len(bench.machine.cache.entries) == 1


def test_observer_names_what_changed():
    bench, words, _ = results(16)
    seen = {}
    bench.machine.observer = lambda pc, item, fields, writes: seen.setdefault(
        item.mnemonic, {write.buffer: write.rows.tolist() for write in writes})
    put(bench, 50, np.ones(2 * N))
    bench.run(*words, encode("vadd", imm=imm(0, 80), imm_reg=0, table=50, **ROW), HALT)
    assert seen["vadd"] == {"abuf": list(range(16)), "sumsq": [0, 1], "mbuf": list(range(40, 48))}
    assert seen["matmul"] == {}


MATMUL = {"mode": MatmulMode.W4, "heads": 1, "groups": 1, "rows": 1, "n_tiles": 1, "k_tiles": 1, "beats": 4}


@pytest.mark.parametrize("words, cause, pc, message", [
    ([0xFF], FaultCause.ILLEGAL_OPCODE, 0, "opcode 0xff"),
    ([encode("addi")], FaultCause.FETCH_RANGE, 1, "has 1 instructions"),
    ([encode("branch", imm=2), HALT], FaultCause.FETCH_RANGE, 0, "branch to 2"),
    ([encode("addi", rd=8, imm=4), encode("token", imm_reg=8)], FaultCause.TOKEN_RANGE, 1, "index 4"),
    ([encode("token", imm_reg=2)], FaultCause.TOKEN_RANGE, 0, "index -1"),
    ([encode("loadw", imm=SIZE - 3, count=4)], FaultCause.MEMORY_RANGE, 0, "8189..8192"),
    ([encode("loadw", imm=-1, count=4)], FaultCause.MEMORY_RANGE, 0, "memory has 8192"),
    ([encode("loada", imm=SIZE, rows=1, count=1)], FaultCause.MEMORY_RANGE, 0, "8192"),
    ([encode("loadkv", imm=SIZE - 1, rows=1, heads=1, head_beats=2, record=4)], FaultCause.MEMORY_RANGE, 0, "8191"),
    ([encode("storekv", imm=SIZE, rows=1, x=1, record=4)], FaultCause.MEMORY_RANGE, 0, "8192"),
    ([encode("storel", imm=SIZE, rows=1, count=1)], FaultCause.MEMORY_RANGE, 0, "8192"),
    ([encode("loada", imm=ROWS, rows=2, x=4000, count=1, beats=1, dst_stride=96)], FaultCause.BUFFER_RANGE, 0, "abuf"),
    ([encode("matmul", x=2048, **MATMUL)], FaultCause.BUFFER_RANGE, 0, "mbuf rows 2048"),
    ([encode("vnorm", imm=imm(4090), **ROW)], FaultCause.BUFFER_RANGE, 0, "abuf row 4105 of 4096"),
    ([encode("vnorm", imm=imm(0, 4096), **ROW)], FaultCause.BUFFER_RANGE, 0, "mbuf"),
    ([encode("vnorm", table=4095, **ROW)], FaultCause.BUFFER_RANGE, 0, "table"),
    ([encode("storekv", imm=KV, rows=4, record=1024)], FaultCause.BUFFER_RANGE, 0, "kvout row 4095"),
    ([encode("matmul", **MATMUL)], FaultCause.WATCHDOG, 0, "needs 6 superbeats of weights, 6 are missing"),
    ([encode("vadd", **ROW)], FaultCause.WATCHDOG, 0, "needs 16 beats of matmul results, 0"),
    ([encode("storel", imm=LOGITS, rows=1, count=1)], FaultCause.WATCHDOG, 0, "beats of logits"),
    ([encode("matmul", **MATMUL | {"mode": MatmulMode.QK})], FaultCause.WATCHDOG, 0, "without a KV tile"),
    ([encode("loadw", imm=0, count=4), HALT], FaultCause.WATCHDOG, 1, "4 superbeats of weights that nothing"),
])
def test_faults(words, cause, pc, message):
    with pytest.raises(MachineFault, match=message) as info:
        Bench().run(*words, args=(0, -1 & 0xFFFFFFFF))
    assert (info.value.cause, info.value.pc) == (cause, pc)


def test_fetch_beyond_memory_and_the_port_of_a_fault():
    bench = Bench()
    with pytest.raises(MachineFault) as info:
        bench.machine.run(SIZE * BEAT - 16, 4)
    assert info.value.cause == FaultCause.FETCH_ERROR
    with pytest.raises(MachineFault) as info:
        bench.run(encode("storekv", imm=SIZE - 4, rows=2, x=2, record=4))
    assert (info.value.cause, info.value.port) == (FaultCause.MEMORY_RANGE, 0)
    with pytest.raises(MachineFault) as info:
        bench.run(encode("storekv", imm=SIZE - 4, rows=1, x=3, record=4))
    assert info.value.port == 1


def test_a_limit_below_the_memory_is_kept():
    bench = Bench()
    with pytest.raises(MachineFault, match="memory has 100"):
        bench.run(encode("loadw", imm=99, count=2), HALT, limit=100)


@pytest.mark.parametrize("words, message", [
    ([encode("vnorm", **ROW | {"beats": 0})], "at least 1"),
    ([encode("vscale", **ROW | {"rows": 5})], "at most 4, not 5"),
    ([encode("vnorm", **ROW | {"vector": 3})], "whole rows of 2 beats"),
    ([encode("vnorm", imm=imm(0, 1), **ROW)], "destination 1"),
    ([encode("matmul", **MATMUL | {"beats": 5})], "beats must reach into the last of 1"),
    ([encode("matmul", **MATMUL | {"k_tiles": 0})], "at least 1"),
    ([encode("loadkv", imm=KV, heads=2, head_beats=2, record=4)], "must fit a record of 4"),
    ([encode("storekv", imm=KV, rows=1, x=-1, record=4)], "position must not be negative"),
    ([encode("loada", imm=ROWS, rows=1, count=1, beats=2)], "must fit in 1 superbeats"),
])
def test_undefined_programs_are_refused(words, message):
    with pytest.raises(ProgramError, match=message):
        Bench().run(*words, HALT)


def test_scale_exponent_must_cover_all_scales():
    bench = Bench()
    weights = random_weights(np.random.default_rng(1), MatmulMode.W4, N, K)
    words = weight_words(bench, MatmulMode.W4, weights, scale_exponent=3)
    with pytest.raises(ProgramError, match="scale_exponent must be at least"):
        bench.run(*words)


def test_wrong_number_of_memories_or_arguments():
    with pytest.raises(ValueError, match="tiny has 2 memory ports, 1 memories"):
        FunctionalMachine(CONFIG, [np.zeros(64, np.uint8)])
    with pytest.raises(ValueError, match="at most 7 arguments"):
        Bench().run(HALT, args=range(8))
