"""VectorUnit leaves bit for bit what the golden vector unit leaves, for every instruction and under every stall."""

import dataclasses

import numpy as np
import pytest
from lanes import spread_floats
from skipopu.hw.blocks.vector import VectorUnit
from skipopu.hw.config import OverlayConfig, preset
from skipopu.hw.isa import Destination, RowScale
from skipopu.sim.bench import Stall, bench, bench_parameters, run_bench
from vector_model import VectorBench, accumulators, geometry

TINY = preset("tiny")
COMPACT = dataclasses.replace(TINY, name="compact", vector_lanes=2, compact=True)


def _of_the_bench():
    """The configuration that a test gave to its benches; the ordinary one outside of them."""
    try:
        return OverlayConfig(**bench_parameters())
    except KeyError:
        return TINY


CONFIG = _of_the_bench()
V = CONFIG.vector_lanes
VECTORS = CONFIG.columns // V
PER_ROW = CONFIG.lanes // V  # beats of one MBUF row
SOURCE, TABLE, LOADED = 0, 2048, 3072  # ABUF: operands, tables, rows that only LOADA writes


def bits(value):
    """FP32 bits of one number."""
    return int(np.float32(value).view(np.uint32))


def floats(rng, rows, *, strange=0.05, low=112, high=134):
    """FP32 bits [rows, V]: ordinary exponents, a part of them of any size, subnormal or with exponent field 255."""
    values = spread_floats(rng, rows * V, low, high)
    anything = spread_floats(rng, rows * V)
    corners = np.array([0, 1 << 31, 1, 0x807FFFFF, 0x7F800000, 0xFFFFFFFF, 0x7F7FFFFF, 0xFF7FFFFF, 1 << 23], np.uint32)
    values = np.where(rng.random(rows * V) < strange, anything, values)
    return np.where(rng.random(rows * V) < strange, rng.choice(corners, rows * V), values).reshape(rows, V)


def total(values):
    return values["heads"] * values["groups"] * values["mask"].bit_count() * values["beats"]


def some_rows(rng, rows):
    """A mask of ``rows`` rows, in half of all cases the lowest ones."""
    picked = range(rows) if rng.integers(2) else rng.permutation(CONFIG.tokens)[:rows]
    return sum(1 << int(t) for t in picked)


def sizes(rng, limit=12):
    """heads, groups, rows of a nest with at most ``limit`` rows in all."""
    while True:
        heads, groups, rows = (int(rng.integers(1, top + 1)) for top in (3, 4, CONFIG.tokens))
        if heads * groups * rows <= limit:
            return heads, groups, rows


def instruction(rng, mnemonic, *, shape=None, beats=None, mask=None, wild=0.05, **fixed):
    """(mnemonic, fields, results) with random geometry inside the operand areas. shape : heads, groups, rows in mask"""
    aligned = mnemonic in ("vnorm", "vadd", "vswiglu", "vscale", "vrope", "vprob")
    unit = {"vswiglu": 2 * PER_ROW}.get(mnemonic, PER_ROW if aligned else 1)
    single = mnemonic in ("vnorm", "vadd", "vlogits")  # one sum, one argmax: no heads and groups
    if shape is None:
        shape = (1, 1, int(rng.integers(1, CONFIG.tokens + 1))) if single else sizes(rng)
    if mask is None:
        mask = some_rows(rng, shape[2])
    beats = beats or unit * int(rng.integers(1, (24 if single else 12) // unit + 2))
    values = geometry(rng, *shape[:2], mask.bit_length(), beats, unit=unit) | {"mask": mask}
    span = sum((values[a] - 1) * values[b] for a, b in (
        ("heads", "head_stride"), ("groups", "group_stride"), ("rows", "row_stride"))) + beats
    assert span < 1024
    source = SOURCE + int(rng.integers(0, 1024 - span))
    target = PER_ROW * int(rng.integers(0, (CONFIG.kvout_rows - span) // PER_ROW + 1))
    wrap = int(rng.choice([0, 1 + beats // 32, 3, beats]))  # at most 32 turns, each of them has softmax states
    values |= {"imm": source | target << 16, "x": 0, "table": TABLE + int(rng.integers(0, 128)),
               "table_stride": int(rng.integers(0, 30)), "wrap": wrap, "scale": int(rng.choice(list(RowScale))),
               "dest": 0, "vector": PER_ROW * int(rng.integers(1, 7)), "route": 0} | fixed
    stream = mnemonic not in ("vnorm", "vprob", "vscale")
    return mnemonic, values, accumulators(rng, total(values), V, wild=wild) if stream else None


async def prepare(dut, rng, **settings):
    """A bench with operands and tables loaded, a norm done and every softmax state known."""
    machine = VectorBench(dut, CONFIG, **settings)
    await machine.write_abuf(SOURCE, floats(rng, 1024))
    await machine.write_abuf(TABLE, floats(rng, 512, low=120, high=129))
    norm = instruction(rng, "vnorm", shape=(1, 1, CONFIG.tokens), imm=TABLE)  # of ordinary numbers
    await machine.run(("vset", {"imm": bits(1 / 24), "eps": bits(1e-5)}, None), ("vinit", {}, None), norm)
    await attend(machine, rng, shape=(8, CONFIG.state_rows // CONFIG.tokens // 8, CONFIG.tokens))
    return machine


async def attend(machine, rng, *, shape, mask=None, x=None, exponent=4, scores=None, beats=VECTORS, wild=0.05):
    """One KV tile: scores, probabilities, merge; at most ABUF's operand area. shape : heads, groups, rows in mask"""
    mask = (1 << shape[2]) - 1 if mask is None else mask
    machine.tiles.append(rng.integers(1, 32, (shape[0], CONFIG.tile_tokens)))
    rows = mask.bit_length()
    strides = {"row_stride": VECTORS, "group_stride": VECTORS * rows, "head_stride": VECTORS * shape[1] * rows}
    nest = {"heads": shape[0], "groups": shape[1], "rows": rows, "mask": mask, "beats": beats} | strides
    x = int(rng.integers(-2, CONFIG.tile_tokens)) if x is None else x
    rest = {"table": 0, "table_stride": 0, "wrap": 0, "scale": 0, "dest": 0, "vector": VECTORS, "x": x, "route": 0}
    source = int(rng.integers(0, 256))
    if scores is None:
        scores = accumulators(rng, total(nest), V, wild=wild, exponent=exponent)
    await machine.run(("vscore", nest | rest | {"imm": source}, scores))
    await machine.run(("vprob", nest | rest | {"imm": source | 64 << 16}, None))
    await machine.run(instruction(rng, "vmerge", shape=shape, mask=mask, beats=int(rng.integers(1, 4))))


def choices(rng):
    """One of each instruction that needs no softmax state of its own, with random geometry."""
    for mnemonic in ("vnorm", "vadd", "vswiglu", "vscale", "vmerge"):
        yield instruction(rng, mnemonic)
    rows = int(rng.integers(1, 1 << CONFIG.tokens))
    yield instruction(rng, "vlogits", mask=rows, x=int(rng.integers(0, CONFIG.tokens + 1 - rows.bit_length())),
                      imm=int(rng.integers(1, 100)))
    for destination in Destination:
        yield instruction(rng, "vrope", dest=int(destination))
    yield instruction(rng, "vrope", dest=int(Destination.KVOUT), wrap=0)


@bench(stall=Stall, seed=[1], timeout_cycles=60_000)
async def every_instruction_matches(dut, stall, seed):
    """One instruction after the other, each compared as soon as it is done."""
    rng = np.random.default_rng(seed)
    machine = await prepare(dut, rng, stall=stall, logits_stall=stall, seed=seed)
    await machine.take_buffers()
    for _ in range(4):
        for item in choices(rng):
            await machine.run(item)
    await machine.compare_everything()


@bench(stall=[Stall.NEVER, Stall.HALF], seed=[3, 4], timeout_cycles=60_000)
async def queued_instructions_match(dut, stall, seed):
    """Instructions wait in the queue while others run, and LOADA writes rows of its own at the same time."""
    rng = np.random.default_rng(seed)
    machine = await prepare(dut, rng, stall=stall, load_stall=stall, logits_stall=stall, seed=seed)
    await machine.take_buffers()
    for _ in range(3):
        machine.send_rows(LOADED, floats(rng, 400))
        items = list(choices(rng))
        rng.shuffle(items)
        await machine.run(*items)
    await machine.compare_everything()


@bench(stall=[Stall.NEVER, Stall.HALF], seed=[5], timeout_cycles=80_000)
async def softmax_over_tiles(dut, stall, seed):
    """Running maxima that rise, stay and fall; rows that are masked wholly, at first or later; VINIT in between."""
    rng = np.random.default_rng(seed)
    machine = await prepare(dut, rng, stall=stall, seed=seed)
    for shape in ((2, 3, 4), (1, 1, 1), (3, 1, 2)):
        await machine.run(("vinit", {}, None))
        mask = some_rows(rng, shape[2])
        # x: the last column that row 0 may see; -4 masks every row of a tile.
        for x, exponent in ((-4, 4), (0, 2), (-1, 3), (CONFIG.tile_tokens, 8), (5, 0), (7, 16), (3, -3)):
            await attend(machine, rng, shape=shape, mask=mask, x=x, exponent=exponent)
        states = shape[0] * shape[1]
        wrap = PER_ROW * int(rng.integers(1, 3))
        for mnemonic in ("vscale", "vrope"):
            await machine.run(instruction(rng, mnemonic, mask=mask, beats=states * wrap, wrap=wrap,
                                          scale=int(RowScale.RECIPROCAL), dest=int(Destination.MBUF)))


@bench(timeout_cycles=80_000)
async def running_maximum_corners(dut):
    """Scores at the edges of the ceiling: whole numbers and their neighbours, its clamps, ties, the lowest number."""
    rng = np.random.default_rng(6)
    machine = await prepare(dut, rng)
    one = 1 << 23
    corners = [(0, 0), (1, -149), (-1, -149), (one, -23), (one + 1, -23), (one - 1, -23), (-one, -23), (-one - 1, -23),
               (1 - one, -23), (1, -1), (-1, -1), (16383, 0), (16384, 0), (32767 << 8, -8), (-16383, 0), (-16384, 0),
               (-16385, 0), (16383 << 8 | 1, -8), (1, 200), (-1, 200), (3 << 20, -20), (-3 << 20, -20), (125, 0),
               (126, 0), (127, 0), (128, 0), (253, 0), (-127, 0)]
    shape = 2, 2, 2
    for _ in range(2):
        await machine.run(("vinit", {}, None))
        for _ in range(12):
            # One row of a tile has one of the corners in all columns but a few, which are lower or as high.
            picks = [corners[i] for i in rng.integers(0, len(corners), np.prod(shape))]
            acc = np.array([[[pick[0]] * V] * VECTORS for pick in picks]).reshape(-1, V)
            n = np.array([[[pick[1]] * V] * VECTORS for pick in picks]).reshape(-1, V)
            lower = rng.random(acc.shape) < 0.7
            n = np.where(lower & (acc > 0), n - 1, np.where(lower & (acc < 0), n + 1, n))
            await attend(machine, rng, shape=shape, x=CONFIG.tile_tokens, scores=(acc, n))


@bench(timeout_cycles=80_000)
async def masks_the_columns_beyond_the_limit(dut):
    rng = np.random.default_rng(7)
    machine = await prepare(dut, rng)
    for x in (-32768, -5, -4, -3, -1, 0, 1, 3, 4, 14, 15, 16, 32767):
        await machine.run(instruction(rng, "vscore", shape=(1, 2, 4), beats=VECTORS, x=x),
                          instruction(rng, "vscore", shape=(1, 1, 2), mask=0b1010, beats=VECTORS, x=x))
    for beats in range(1, VECTORS):
        await machine.run(instruction(rng, "vscore", shape=(2, 1, 4), beats=beats, x=2))


@bench(stall=Stall, logits_stall=Stall)
async def logits_leave_in_order(dut, stall, logits_stall):
    """More logits than the queue to the store unit holds."""
    rng = np.random.default_rng(8)
    machine = await prepare(dut, rng, stall=stall, logits_stall=logits_stall)
    await machine.run(instruction(rng, "vlogits", shape=(1, 1, 3), beats=37, imm=1000, wild=0),
                      instruction(rng, "vlogits", mask=1, beats=50, imm=1000, x=3, wild=0))


@bench(timeout_cycles=80_000)
async def argmax_of_the_last_row(dut):
    rng = np.random.default_rng(9)
    machine = await prepare(dut, rng)
    beats = 11

    async def check(values, imm, rows=1):
        name, fields, _ = instruction(rng, "vlogits", shape=(1, 1, rows), beats=beats, imm=imm, scale=0)
        stream = np.zeros((rows, beats, V), np.int64)
        stream[-1] = np.reshape(values, (beats, V))
        # From rows of beats to the order n, t, c of the stream.
        stream = np.concatenate([stream[:, n:n + VECTORS].reshape(-1, V) for n in range(0, beats, VECTORS)])
        await machine.run((name, fields, (stream, np.zeros_like(stream))))

    ramp = np.arange(beats * V)
    for imm in (1, 2, V - 1, V, V + 1, 2 * V, beats * V - 1, beats * V, beats * V + 1, 0x7FFFFFFF, 0, -1):
        await check(ramp, imm)  # the largest that counts is the last
        await check(-ramp, imm)
        await check(np.full(beats * V, -3), imm)  # all equal: the first
        await check(rng.integers(-2, 2, beats * V), imm, rows=2)  # ties everywhere
    for place in range(beats * V):
        values = -1 - ramp % 5
        values[place:] = np.maximum(values[place:], 3 * (ramp[place:] % 2 == place % 2))
        await check(values, beats * V)
    name, fields, _ = instruction(rng, "vlogits", shape=(1, 1, 1), beats=beats, imm=9, scale=0)
    await machine.run((name, fields, (np.full((beats, V), -1), np.full((beats, V), 300))))  # all are the lowest number


@bench(timeout_cycles=80_000)
async def sums_saturate_and_halves_clamp(dut):
    rng = np.random.default_rng(10)
    machine = await prepare(dut, rng)
    await machine.write_abuf(SOURCE, np.full((300, V), bits(3e38), np.uint32))
    for beats in (128 // V - PER_ROW, 128 // V, 128 // V + PER_ROW, 256 // V):  # 2^63 is reached by 128 terms of 2^56
        norm = instruction(rng, "vnorm", shape=(1, 1, 2), beats=beats, imm=0)
        await machine.run(norm, instruction(rng, "vscale", shape=(1, 1, 2), scale=int(RowScale.RSQRT)))
    # Halves: the largest, the tie above it and its neighbours, subnormal numbers and ties among them.
    acc = np.array([[65504, 65519, 65520, 65521], [-65504, -65519, -65520, -70000],
                    [1, 3, -1, -3], [0, 1023, 1025, 2047]]).reshape(-1, V)
    for n in (0, -25, -24, -30, 100, -200):
        name, fields, _ = instruction(rng, "vrope", shape=(1, 1, 1), beats=len(acc), wrap=0, scale=0,
                                      dest=int(Destination.KVOUT))
        await machine.run((name, fields, (acc, np.full_like(acc, n))))
    # Results of the array: the largest FP32 number and beyond saturate, the number before it does not.
    acc = np.array([(1 << 24) - 1, (1 << 24) - 2, 1 << 24, -(1 << 24) - 1, 1 - (1 << 24), -1, 1 << 47, 0])
    acc = acc.reshape(-1, V)
    for n, count in ((104, 5), (103, 1), (90, 1)):
        before = machine.count["saturated"]
        await machine.run(instruction(rng, "vscore", shape=(1, 1, 1), beats=len(acc), imm=0, x=0)[:2]
                          + ((acc, np.full_like(acc, n)),))
        assert machine.count["saturated"] - before == count


def biases(attention, mlp):
    return "vbias", {"imm": int(attention), "mlp": int(mlp)}, None


@bench(stall=[Stall.NEVER, Stall.HALF], seed=[1, 2], timeout_cycles=60_000)
async def routers_decide_for_the_rows_that_run(dut, stall, seed):
    """Weights of every kind; scores far from zero, and a unit on either side of it. Other rows keep their decision."""
    rng = np.random.default_rng(seed)
    machine = await prepare(dut, rng, stall=stall, load_stall=stall, seed=seed)
    await machine.take_buffers()
    ordinary = rng.normal(0, 0.1, (CONFIG.router_rows, V, 2)).astype(np.float16).view(np.uint16)
    wild = rng.integers(0, 1 << 16, ordinary.shape, dtype=np.uint16)
    await machine.write_routers(0, np.where(rng.random(ordinary.shape) < 0.03, wild, ordinary))

    def routed(mnemonic, **fixed):
        item = instruction(rng, mnemonic, **fixed | {"route": 1})
        item[1]["x"] = int(rng.integers(0, CONFIG.router_rows + 1 - item[1]["beats"]))
        return item

    extremes = [0, 1, -1, (1 << 31) - 1, -(1 << 31)]
    for _ in range(4):
        await machine.run(biases(*rng.choice(extremes, 2)), routed("vnorm"), instruction(rng, "vadd"))
        await machine.run(routed("vadd"))
    await machine.write_routers(0, ordinary)
    await machine.write_abuf(SOURCE, floats(rng, 1024, strange=0, low=110, high=127))
    for t in range(CONFIG.tokens):
        item = routed("vnorm", mask=1 << t)  # so small that the bias can take its scores to zero
        await machine.run(biases(0, 0), item)
        scores = machine.state.scores[:, t].copy()
        assert (np.abs(scores) < 1 << 31).all() and scores.any()
        for above in ((0, 0), (-1, 0), (0, -1), (1, -1)):
            await machine.run(biases(*np.array(above) - scores), item)
            assert (machine.state.scores[:, t] == above).all()
    await machine.compare_everything()


@bench(timeout_cycles=80_000)
async def takes_a_beat_in_every_cycle(dut):
    """Without stalls the stream flows at one beat a cycle, four if compact; the unit waits only for a stream that
    stalls."""
    step = 4 if CONFIG.compact else 1
    rng = np.random.default_rng(11)
    machine = await prepare(dut, rng)
    await machine.write_routers(0, np.zeros((48, V, 2), np.uint16))
    for mnemonic, fixed in (("vadd", {}), ("vadd", {"route": 1}), ("vadd", {"mask": 0b1010}), ("vrope", {"wrap": 4}),
                            ("vswiglu", {}), ("vmerge", {}), ("vlogits", {})):
        machine.acc_cycles.clear()
        machine.count["waiting"] = 0
        await machine.run(instruction(rng, mnemonic, shape=(1, 1, 2), beats=48, scale=0, **fixed))
        first = machine.acc_cycles[0]
        assert machine.acc_cycles == list(range(first, first + 96 * step, step)), f"{mnemonic}: {machine.acc_cycles}"
        assert machine.count["waiting"] == 0
    machine.acc.stall = Stall.HALF
    await machine.run(instruction(rng, "vnorm"))
    assert machine.count["waiting"] == 0
    machine.acc_cycles.clear()
    await machine.run(instruction(rng, "vadd", shape=(1, 1, 2), beats=48))
    passed = machine.acc_cycles[-1] + 1 - machine.acc_cycles[0]
    assert machine.count["waiting"] <= passed - 96 + 20
    assert CONFIG.compact or passed - 96 <= machine.count["waiting"]


@pytest.mark.parametrize("config", [TINY, COMPACT], ids=lambda config: config.name)
def test_instructions(config):
    run_bench(VectorUnit(config=config), every_instruction_matches, queued_instructions_match, softmax_over_tiles,
              running_maximum_corners, masks_the_columns_beyond_the_limit, logits_leave_in_order,
              argmax_of_the_last_row, sums_saturate_and_halves_clamp, routers_decide_for_the_rows_that_run,
              takes_a_beat_in_every_cycle, parameters=dataclasses.asdict(config))
