"""Routing on the functional machine: row lists, scores, dropped instructions."""

from fractions import Fraction

import numpy as np
import pytest
from exact import exact, rounded
from machine_bench import (
    BEAT,
    CONFIG,
    HALT,
    KV,
    LOGITS,
    ROW,
    ROWS,
    SIZE,
    TILE,
    Bench,
    K,
    N,
    V,
    imm,
    logits,
    put,
    random_weights,
    results,
    weight_words,
)
from skipopu.golden.device import FunctionalDevice
from skipopu.golden.functional import MachineFault, ProgramError
from skipopu.host.device import read_register, write_register
from skipopu.hw.isa import ROUTER_ROWS_AT, Condition, MatmulMode, RowList, RowScale, decode, encode
from skipopu.hw.registers import FaultCause
from test_attention import MP, OUT, RECORD, SCORES, TOKENS, attention_bench, load_tile, tile_words

T = CONFIG.tokens
WIDTH = 2 * N


def members(mask):
    return {t for t in range(T) if mask >> t & 1}


def lists_by_text(attention, mlp, present):
    """The rows of every list as sets, word for word from RowList; an empty one drops."""
    chunk, a, m = (members(mask) for mask in (present, attention, mlp))
    rows = {RowList.ALL: chunk, RowList.ATTENTION: a, RowList.MLP: m, RowList.MLP_ONLY: m - a,
            RowList.NOT_MLP: chunk - m, RowList.NO_ATTENTION: set() if a else chunk,
            RowList.NO_MLP: set() if m else chunk}
    return [rows[kind] for kind in RowList]


def listed(words, kind):
    """The same instructions for the rows of a list."""
    return [encode(decode(word)[0].mnemonic, **decode(word)[1] | {"list": kind}) for word in words]


# ---- lists


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_each_list_runs_its_rows_or_is_dropped(rows):
    bench, seen = Bench(), []
    bench.machine.observer = lambda pc, item, fields, writes: seen.append((members(fields["mask"]), writes))
    norms = [encode("vnorm", imm=imm(0, 80), table=50, list=kind, **ROW | {"rows": rows}) for kind in RowList]
    for attention in range(1 << rows):
        for mlp in range(1 << rows):
            words = [encode("route", rows=rows), *norms, HALT]
            seen.clear()
            machine = bench.run(*words, forced=[attention | 1 << rows, mlp | 1 << rows])  # of rows that are not there
            want = lists_by_text(attention, mlp, (1 << rows) - 1)
            for kind, found, (mask, writes) in zip(RowList, want, seen[1:]):
                got = [set(write.rows.tolist()) for write in writes if write.buffer == "sumsq"]
                assert mask == found and got == ([found] if found else []), (attention, mlp, kind.name)
            assert machine.counters["dropped"] == sum(not found for found in want)
            assert machine.counters["instructions"] == len(words)
            assert machine.routes == {0: (attention, mlp)}


def test_before_the_first_route_of_a_run_every_row_executes():
    bench, words = Bench(), [encode("addi", rd=8 + kind, imm=1, list=kind) for kind in RowList]
    for _ in range(2):
        machine = bench.run(*words, encode("route", rows=4), HALT, forced=[0, 0])  # does not outlast its run
        assert machine.registers[8:15] == [1, 1, 1, 0, 0, 0, 0]
        assert machine.counters["dropped"] == 4


@pytest.mark.parametrize(("mask", "want"), [(0, 4), (2, 5)])
def test_a_branch_is_predicated_as_a_scalar_is(mask, want):
    """The end of a loop over tiles: a count of 0 unless there are rows, then back while below it."""
    words = [encode("route", rows=4), encode("addi", rd=9, imm=2),
             encode("addi", rd=10), encode("add", rd=10, imm_reg=9, list=RowList.ATTENTION),
             encode("addi", rd=8, imm_reg=8, imm=1), encode("addi", rd=11, imm_reg=11, imm=2, list=RowList.ATTENTION),
             encode("branch", condition=Condition.LT, rows_reg=8, x_reg=10, imm=4),
             encode("branch", condition=Condition.EQ, imm=9, list=RowList.NO_ATTENTION),
             encode("addi", rd=12, imm=5), encode("addi", rd=12, imm_reg=12, imm=0), HALT]
    machine = Bench().run(*words, forced=[mask, 0])
    assert machine.registers[8:13] == ([2, 2, 2, 4, 5] if mask else [1, 2, 0, 0, 0])


def test_dropped_instructions_have_no_effect_and_count():
    bench, words, _ = results(1)
    put(bench, 0, np.ones(4 * N))
    before = bench.machine.snapshot(["abuf", "mbuf", "sumsq", "kvout"])
    memory, seen = bench.image[:, 16 * 32 :].copy(), []  # behind the program
    bench.machine.observer = lambda pc, item, fields, writes: seen.append((pc, writes))
    work = listed([*words, encode("vadd", table=50, **ROW), encode("loada", imm=0, rows=1, count=2, beats=1),
                   load_tile(0), encode("storekv", imm=KV, rows=2, record=RECORD), encode("dropw", count=3),
                   encode("storel", imm=LOGITS, rows=1, count=1), encode("route", layer=1), HALT], RowList.ATTENTION)
    machine = bench.run(encode("route", rows=2), *work, HALT, forced=[0, 3])
    assert machine.counters == dict.fromkeys(machine.counters, 0) | {
        "instructions": len(work) + 2, "dropped": len(work)}
    assert seen[1:-1] == [(pc, []) for pc in range(1, len(work) + 1)] and machine.pc == len(work) + 1
    for name, value in before.items():
        np.testing.assert_array_equal(getattr(machine, name), value)
    np.testing.assert_array_equal(bench.image[:, 16 * 32 :], memory)
    assert machine.routes == {0: (0, 3)}


# ---- rows keep their places


@pytest.mark.parametrize("mask", [1, 4, 5, 6, 7])
def test_matmul_and_vector_instructions_compute_only_rows_in_the_list(mask):
    bench, words, _ = results(2, rows=3)
    shape = ROW | {"rows": 3}
    put(bench, 200, np.random.default_rng(5).standard_normal(2 * WIDTH))
    put(bench, 300, np.random.default_rng(6).standard_normal(3 * 64))
    x = put(bench, 0, np.random.default_rng(7).standard_normal(3 * WIDTH))
    work = [*words, encode("vadd", imm=imm(0, 80), table=200, **shape),
            encode("vnorm", imm=imm(0, 160), table=200, **shape),
            *words, encode("vrope", imm=imm(0, 16), dest=1, table=300, table_stride=16, wrap=4, scale=RowScale.RSQRT,
                           **shape),
            *words, encode("vswiglu", imm=imm(0, 240), scale=RowScale.RSQRT,
                           **shape | {"row_stride": N // V, "vector": N // V}),
            encode("vscale", imm=imm(0, 320), **shape)]
    start = [encode("vset", imm=0x3D000000, eps=0), encode("route", rows=3)]
    names = ["abuf", "mbuf", "mbuf_exponents", "mbuf_emax", "kvout", "sumsq"]

    def run(kind):
        bench.machine.reset()
        bench.fill_mbuf(0, np.random.default_rng(2).standard_normal((3, 2 * K)).astype(np.float32), vector=2)
        for at, values in ((200, np.random.default_rng(5).standard_normal(2 * WIDTH)),
                           (300, np.random.default_rng(6).standard_normal(3 * 64)), (0, x)):
            put(bench, at, values)
        before = bench.machine.snapshot(names)
        bench.run(*start, *listed(work, kind), HALT, forced=[mask, 0])
        return before, bench.machine.snapshot(names)

    def split(name, rows):
        """Places of buffer rows that belong to token ``t`` of each instruction's result."""
        per = WIDTH // V
        return {"abuf": [slice(per * t, per * t + per) for t in rows],
                "mbuf": [slice(at + step * t, at + step * t + step) for t in rows
                         for at, step in ((40, 4), (80, 4), (120, 2), (160, 4))],
                "kvout": [slice(16 + per * t, 16 + per * t + per) for t in rows], "sumsq": [t for t in rows],
                }[name.removesuffix("_exponents").removesuffix("_emax")]

    _, full = run(RowList.ALL)
    before, part = run(RowList.ATTENTION)
    for name in names:
        want = before[name].copy()
        for place in split(name, members(mask)):
            want[place] = full[name][place]
        np.testing.assert_array_equal(part[name], want, err_msg=name)
        assert mask == 7 or (part[name] != full[name]).any()


@pytest.mark.parametrize("mask", [1, 2, 3])
def test_attention_of_some_rows(mask):
    names = ["abuf", "mbuf", "maximum", "alpha", "total"]
    found = []
    for kind in (RowList.ALL, RowList.ATTENTION):
        bench, *_ = attention_bench(3)
        bench.machine.abuf[:600] = 7.0
        bench.run(encode("route", rows=TOKENS), encode("vinit"),
                  *listed([word for tile in range(3) for word in (load_tile(tile), *tile_words(40 - tile * TILE))]
                          + [encode("vscale", imm=imm(OUT, 1000), scale=RowScale.RECIPROCAL, wrap=4, heads=1, groups=1,
                                    rows=TOKENS, beats=24, row_stride=24, vector=24)], kind), HALT, forced=[mask, 0])
        found.append(bench.machine.snapshot(names))
    full, part = found
    t = np.array(sorted(members(mask)))
    other = np.setdiff1d(np.arange(TOKENS), t)

    def views(state):
        yield state["abuf"][SCORES : SCORES + 6 * TOKENS * TILE // V].reshape(6, TOKENS, -1).swapaxes(0, 1)
        yield state["abuf"][OUT : OUT + 48].reshape(TOKENS, -1)
        yield state["mbuf"][MP : MP + 6 * TOKENS * TILE // K].reshape(6, TOKENS, -1).swapaxes(0, 1)
        yield state["mbuf"][500:524].reshape(TOKENS, -1)
        for name in ("maximum", "alpha", "total"):
            yield state[name][: 6 * T].reshape(6, T).T

    for got, want in zip(views(part), views(full)):
        np.testing.assert_array_equal(got[t], want[t])
        assert all(len(np.unique(got[row])) == 1 for row in other), "rows outside of the list keep what they held"


def test_accumulator_rows_are_those_of_the_list():
    weights = random_weights(np.random.default_rng(1), MatmulMode.W4, N, K)
    bench = Bench()
    bench.fill_mbuf(0, np.ones((32, K)), vector=1)
    words = weight_words(bench, MatmulMode.W4, weights, rows=4, groups=8, group_stride=4)
    take = encode("vrope", dest=1, heads=1, groups=8, rows=4, beats=N // V, row_stride=4, group_stride=16)
    run = [encode("route", rows=4), *listed([*words, take], RowList.MLP), HALT]
    bench.run(*run, forced=[0, 0b1010])
    with pytest.raises(MachineFault, match="8 x 3 accumulator rows"):
        bench.run(*run, forced=[0, 0b1110])


def test_two_partial_norms_give_every_row_its_scale():
    """Row scales that were formed between the passes are formed anew, and those of some rows are not those of all."""
    bench, words, y = results(4)
    x = put(bench, 0, np.random.default_rng(5).normal(0, 3, 4 * N)).reshape(2, -1)
    x[1] = put(bench, WIDTH // V, 8 * x[1])
    norm, take = encode("vnorm", imm=imm(0, 80), table=50, **ROW), encode("vrope", dest=1, scale=RowScale.RSQRT, **ROW)
    bench.machine.sumsq[:] = 1 << 30
    machine = bench.run(encode("vset", imm=int(np.float32(1 / WIDTH).view(np.uint32))), encode("route", rows=2),
                        *words, take, *listed([norm], RowList.NOT_MLP), *words, take,
                        *listed([norm], RowList.MLP), *listed([*words, take], RowList.NOT_MLP), *words, take, HALT,
                        forced=[0, 2])
    got = machine.kvout.view(np.float16)[: 4 * N // V].reshape(2, -1)
    want = y / np.sqrt((x * x).mean(1, keepdims=True))
    np.testing.assert_allclose(got, want, rtol=2.0**-10, atol=1e-6)


# ---- scores and decisions


def half_by_text(bits):
    """The number that a router's FP16 weight means."""
    field = bits >> 10 & 31
    size = Fraction(0) if field == 0 else (1024 + (bits & 1023)) * Fraction(2) ** (field - 25)
    return -size if bits >> 15 else size


def score_by_text(row, weights, bias):
    """A score in units of 2^-24: row of FP32, FP16 bits of as many weights."""
    total = bias
    for x, bits in zip(row, weights):
        p = rounded(exact(x) * half_by_text(int(bits)))
        term = min((abs(p) * 2**24 + Fraction(1, 2)).__floor__(), 1 << 44)
        total += -term if p < 0 else term
    return total


def router_words(bench, weights, row=0, at=ROWS):
    """LOADA of router rows from FP16 bits, uint16 [2, elements], to ``row`` of the router buffer."""
    words = weights[0].astype(np.uint32) | weights[1].astype(np.uint32) << 16
    stream = words.view(np.uint8).reshape(-1, CONFIG.superbeat_bytes)
    bench.write(at, stream)
    x = ROUTER_ROWS_AT + row
    return encode("loada", imm=at, rows=1, count=len(stream), beats=words.size // V, x=x - (1 << 16))


EXTREME = np.array([0x00000000, 0x80000000, 0x00000001, 0x807FFFFF, 0x7F800000, 0xFFFFFFFF, 0x7F7FFFFF, 0x33000000,
                    0xB3000000, 0x33000001, 0x3F800000, 0xBF800001, 0x49800000, 0x53800000, 0x00800000, 0x4B7FFFFF],
                   np.uint32)


def test_scores_are_the_integer_formula():
    """Corners of FP32 against corners of FP16, and ordinary numbers; two rows, both modules, a bias each."""
    bench, rng = Bench(), np.random.default_rng(3)
    rows = rng.normal(0, 3, (2, WIDTH)).astype(np.float32)
    rows[1] = np.resize(EXTREME, WIDTH).view(np.float32)
    weights = rng.normal(0, 1, (2, WIDTH)).astype(np.float16).view(np.uint16)
    weights[1, : WIDTH // 2] = np.array([0x0000, 0x8000, 0x0001, 0x83FF, 0x7C00, 0xFFFF, 0x7BFF, 0x0400, 0x8400, 0x3C00,
                                         0xBC00, 0x3800, 0xFC01, 0x7E00, 0x0401, 0x3555], np.uint16)
    weights[1, WIDTH // 2 :] = 0x3C00
    bench.machine.load_abuf(np.arange(2 * WIDTH // V), rows.view(np.uint32).reshape(-1, V))
    bias = (-1234567890, 2**31 - 1)
    load = router_words(bench, weights, row=9)
    machine = bench.run(load, encode("vbias", imm=bias[0], mlp=bias[1]),
                        encode("vnorm", imm=imm(0, 80), table=50, route=1, x=4, x_reg=1, **ROW), HALT, args=(5,))
    want = [[score_by_text(row, part, b) for row in rows] for part, b in zip(weights, bias)]
    assert machine.scores[:, :2].tolist() == want
    assert abs(want[1][1]) > 1 << 44, "a term saturates"
    # Ordinary numbers: near the product in floats, each term within half a unit and a rounding of FP32.
    products = rows[0].astype(float) * weights[0].view(np.float16)
    error = machine.scores[0, 0] * 2.0**-24 - (products.sum() + bias[0] * 2.0**-24)
    assert abs(error) <= WIDTH * 2.0**-25 + 2.0**-24 * np.abs(products).sum()


def test_vadd_scores_the_row_that_it_stores():
    bench, words, _ = results(5)
    put(bench, 0, np.random.default_rng(6).normal(0, 3, 4 * N))
    weights = np.random.default_rng(7).normal(0, 1, (2, WIDTH)).astype(np.float16).view(np.uint16)
    machine = bench.run(router_words(bench, weights), encode("vbias", imm=77, mlp=-5), *words,
                        encode("vadd", imm=imm(0, 80), table=50, route=1, **ROW), HALT)
    rows = machine.abuf[: 2 * WIDTH // V].reshape(2, -1)
    want = [[score_by_text(row, part, b) for row in rows] for part, b in zip(weights, (77, -5))]
    assert machine.scores[:, :2].tolist() == want
    before = machine.scores.copy()
    bench.run(encode("vbias", imm=1), encode("vnorm", imm=imm(0, 80), table=50, **ROW), HALT)
    np.testing.assert_array_equal(machine.scores, before, "without route nothing is scored")


@pytest.mark.parametrize("module", [0, 1], ids=["attention", "mlp"])
def test_a_tie_executes_and_one_unit_below_skips(module):
    bench, values = Bench(), np.zeros((4, WIDTH))
    values[:, 5] = [0.5, 0.5 - 2.0**-24, 0.5 + 2.0**-24, -1]
    put(bench, 0, values)
    weights = np.zeros((2, WIDTH), np.uint16)
    weights[module, 5] = 0x3C00
    machine = bench.run(router_words(bench, weights), encode("vbias", **{("imm", "mlp")[module]: -(1 << 23)}),
                        encode("vnorm", imm=imm(0, 80), table=100, route=1, **ROW | {"rows": 4}),
                        encode("route", rows=4, layer=3), HALT)
    want = [0b1111, 0b1111]  # the other module's scores are all 0
    want[module] = 0b0101
    assert machine.routes == {3: tuple(want)}


def test_two_passes_decide_together_and_route_keeps_to_its_rows():
    """NOT_MLP rows are scored by vnorm, MLP rows by another pass; rows that neither runs keep their decision."""
    bench = Bench()
    weights = np.zeros((2, WIDTH), np.uint16)
    weights[:, 0] = 0x3C00, 0xBC00
    values = np.zeros((4, WIDTH))
    values[:, 0] = [1, -2, 3, -4]
    put(bench, 0, values)
    norm = encode("vnorm", imm=imm(0, 80), table=100, route=1, **ROW | {"rows": 4})
    machine = bench.run(router_words(bench, weights), norm, encode("route", rows=4), HALT)
    assert machine.routes == {0: (0b0101, 0b1010)}
    put(bench, 0, -values)
    machine = bench.run(norm, encode("route", rows=4, layer=1),  # now MLP is 0101
                        *listed([norm], RowList.ATTENTION), encode("route", rows=3, layer=2), HALT)
    assert machine.routes == {1: (0b1010, 0b0101), 2: (0b010, 0b101)}
    put(bench, 0, values)
    machine = bench.run(encode("route", rows=4), *listed([norm], RowList.NOT_MLP), encode("route", rows=4, layer=5),
                        HALT)
    assert machine.routes == {0: (0b1010, 0b0101), 5: (0b0000, 0b1111)}


# ---- weights fetched ahead


def test_dropw_takes_the_beginning_of_the_stream():
    bench, words, y = results(6)
    load = decode(words[0])[1]
    ahead = [encode("loadw", imm=0, count=5), encode("loadw", imm=load["imm"], count=2), encode("dropw", count=3),
             encode("dropw", count=2), encode("loadw", imm=load["imm"] + 2, count=load["count"] - 2), words[1]]
    np.testing.assert_array_equal(logits(bench, ahead, 2, WIDTH), y)
    assert bench.machine.counters["weights_read"] == (5 + load["count"]) * CONFIG.superbeat_bytes


@pytest.mark.parametrize("attention", [0, 2])
def test_a_prefetch_is_used_or_dropped(attention):
    bench, words, y = results(7)
    load, multiply = decode(words[0])[1], words[1]
    rest = [encode("loadw", imm=load["imm"] + 3, count=load["count"] - 3), multiply,
            encode("vrope", dest=1, **ROW)]
    machine = bench.run(encode("loadw", imm=load["imm"], count=3), encode("route", rows=2),
                        *listed(rest, RowList.ATTENTION), encode("dropw", count=3, list=RowList.NO_ATTENTION), HALT,
                        forced=[attention, 0])
    assert machine.counters["weights_read"] == (load["count"] if attention else 3) * CONFIG.superbeat_bytes
    got = machine.kvout.view(np.float16)[: 4 * N // V].reshape(2, -1)
    np.testing.assert_array_equal(got, y.astype(np.float16) * np.array([[0], [attention > 0]], np.float16))


# ---- faults, undefined programs, registers


@pytest.mark.parametrize("words, cause, message", [
    ([encode("dropw", count=1)], FaultCause.WATCHDOG, "needs 1 superbeats of weights, 1 are missing"),
    ([encode("loada", imm=ROWS, rows=1, count=4, beats=2, x=-1)], FaultCause.BUFFER_RANGE, "routers row 32768 of 256"),
    ([encode("loada", imm=ROWS, rows=2, count=1, beats=1, dst_stride=256, x=-32768)], FaultCause.BUFFER_RANGE, "256"),
    ([encode("vnorm", route=1, x=253, **ROW)], FaultCause.BUFFER_RANGE, "routers row 260 of 256"),
    ([encode("route", rows=4), encode("storekv", imm=KV, rows=4, record=300, list=RowList.MLP)],
     FaultCause.BUFFER_RANGE, "kvout row 1199 of 1024"),
])
def test_faults(words, cause, message):
    with pytest.raises(MachineFault, match=message) as info:
        Bench().run(*words, HALT, forced=[0, 0b1000])
    assert info.value.cause == cause


@pytest.mark.parametrize("words, message", [
    ([encode("addi", list=7)], "list must be a RowList, not 7"),
    ([encode("route", rows=5)], "at most 4, not 5"),
    ([encode("route")], "at least 1"),
    ([encode("matmul", rows=5, heads=1, groups=1, n_tiles=1, k_tiles=1, beats=4)], "matmul: rows must be at least 1"),
    ([encode("storekv", rows=0, record=4)], "storekv: rows must be at least 1"),
    ([encode("route", rows=4), encode("vnorm", list=RowList.MLP, **ROW)], "none of the 2 rows is in the list MLP"),
    ([encode("vnorm", route=1, x=-1, **ROW)], "first row of the routers must not be negative"),
])
def test_undefined_programs_are_refused(words, message):
    with pytest.raises(ProgramError, match=message):
        Bench().run(*words, HALT, forced=[0, 0b1000])


def test_too_many_forced_words_are_refused():
    with pytest.raises(ValueError, match="128 forced words, not 0, 0 and 129"):
        Bench().run(HALT, forced=[0] * 129)


def test_registers_force_routes_and_report_them():
    device = FunctionalDevice(CONFIG, SIZE * BEAT)
    weights = encode("loadw", imm=0, count=3), encode("dropw", count=3)
    words = [encode("route", rows=3, layer=63),
             encode("loadkv", imm=KV, heads=2, head_beats=2, record=8, rows=7, list=RowList.MLP),
             encode("storekv", imm=KV, rows=3, record=8, list=RowList.MLP),
             *listed(weights, RowList.NO_ATTENTION), HALT]
    program = np.frombuffer(b"".join(word.to_bytes(32, "little") for word in words), np.uint8)
    device.write_memory(0, 0, program)
    for name, value in (("PROGRAM_LENGTH", len(words)), ("MEMORY_LIMIT", SIZE), ("ROUTE_FORCE", 1)):
        write_register(device, name, value)
    for index, value in ((126, 0), (127, 0xF6)):
        write_register(device, "ROUTES_FORCED", value, index)
    device.machine.scores[:] = 0
    device.start()
    assert [read_register(device, "ROUTES", index) for index in (126, 127)] == [0, 6]
    counters = device.counters()
    assert counters == dict.fromkeys(counters, 0) | {
        "instructions": 6, "weights_read": 3, "kv_read": 8 * 8, "kv_written": 2 * 8,
        "bytes_read": (3 * CONFIG.superbeat_bytes + 8 * 8 * BEAT), "bytes_written": 2 * 8 * BEAT}
    write_register(device, "ROUTE_FORCE", 0)
    device.start()
    assert [read_register(device, "ROUTES", index) for index in (126, 127)] == [7, 7]
    assert device.counters()["dropped"] == 2
    device.reset()
    assert read_register(device, "ROUTES", 127) == 0
