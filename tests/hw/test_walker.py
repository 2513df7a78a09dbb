"""LoopWalker visits every beat of a plain Python loop nest, in order, with the addresses that the loops give."""

import random
from collections import namedtuple

from cocotb.triggers import RisingEdge
from skipopu.hw.blocks.walker import LoopWalker, Nest
from skipopu.hw.config import preset
from skipopu.sim.bench import Stall, bench, pack, run_bench

TINY = preset("tiny")
VECTORS = TINY.columns // TINY.vector_lanes

Beat = namedtuple("Beat", "offset beat row head column state table turn place row_last final_row last")


def loops(heads=1, groups=1, mask=1, beats=1, row_stride=0, group_stride=0, head_stride=0, wrap=0, vector=1,
          table_stride=0, per_tile=VECTORS):
    """One nest, as the fields of the port."""
    return locals()


def walk(nest):
    """Every Beat of a nest, from five loops."""
    rows = [t for t in range(TINY.tokens) if nest["mask"] >> t & 1]
    order = [(h, n, g, t, c) for h in range(nest["heads"]) for n in range(-(-nest["beats"] // nest["per_tile"]))
             for g in range(nest["groups"]) for t in rows for c in range(nest["per_tile"])
             if n * nest["per_tile"] + c < nest["beats"]]
    for h, n, g, t, c in order:
        beat = n * nest["per_tile"] + c
        offset = t * nest["row_stride"] + g * nest["group_stride"] + h * nest["head_stride"] + beat
        turn, inside = divmod(beat, nest["wrap"]) if nest["wrap"] else (0, beat)
        yield Beat(offset=offset % 2**16, beat=beat, row=t, head=h, column=c,
                   state=(h * nest["groups"] + g) * TINY.tokens + t, table=t * nest["table_stride"] + inside,
                   turn=turn, place=beat % nest["vector"], row_last=int(beat == nest["beats"] - 1),
                   final_row=int(t == rows[-1]), last=int((h, n, g, t, c) == order[-1]))


CORNERS = [
    loops(),
    loops(mask=15, row_stride=1),
    loops(groups=5, group_stride=3),
    loops(heads=6, head_stride=1000),
    loops(beats=VECTORS), loops(beats=VECTORS - 1), loops(beats=VECTORS + 1), loops(beats=5 * VECTORS),
    loops(heads=2, groups=3, mask=3, beats=2 * VECTORS + 1, row_stride=9, group_stride=18, head_stride=54, vector=9),
    loops(heads=3, mask=3, beats=10, wrap=1, table_stride=7),  # every beat wraps
    loops(mask=7, beats=3 * VECTORS, wrap=2 * VECTORS, table_stride=20, vector=VECTORS),
    loops(mask=7, beats=11, wrap=11, vector=11, table_stride=1),  # wraps once, at the end
    loops(mask=3, beats=9, wrap=4095, vector=65535, table_stride=1023),
    loops(heads=2, groups=2, mask=3, beats=6, per_tile=1, vector=2, wrap=3),
    loops(heads=2, groups=2, mask=15, beats=7, per_tile=VECTORS // 2, vector=6, wrap=5),  # as VSWIGLU's output
    loops(mask=3, beats=4, row_stride=2**14 - 1, group_stride=2**14 - 1, head_stride=2**16 - 1, heads=3, groups=2),
    loops(heads=TINY.state_rows // TINY.tokens, mask=(1 << TINY.tokens) - 1),  # every softmax state
    *(loops(heads=2, groups=2, mask=mask, beats=VECTORS + 1, row_stride=9, group_stride=100, head_stride=1000,
            table_stride=7) for mask in range(2, 1 << TINY.tokens)),
    loops(mask=8, groups=3, row_stride=2**14 - 1, table_stride=2**10 - 1, group_stride=1),
]


def random_nest(generator):
    heads, groups = generator.randint(1, 3), generator.randint(1, 4)
    return loops(
        heads=heads, groups=groups, mask=generator.randrange(1, 1 << TINY.tokens), beats=generator.randint(1, 14),
        row_stride=generator.randrange(2**14), group_stride=generator.randrange(2**14),
        head_stride=generator.randrange(2**16), wrap=generator.randint(0, 9), vector=generator.randint(1, 9),
        table_stride=generator.randrange(2**10), per_tile=generator.choice([1, VECTORS // 2, VECTORS]))


async def begin(dut, nest):
    dut.nest.value = pack(Nest(TINY), nest)
    dut.start.value = 1
    await RisingEdge(dut.clk)
    dut.start.value = 0


async def follow(dut, nest, generator, stall, beats=None):
    """Start ``nest``, step through the first ``beats`` of it (None: all) and compare each with the model."""
    await begin(dut, nest)
    for number, want in enumerate(list(walk(nest))[:beats]):
        while True:
            step = generator.random() >= stall
            dut.step.value = int(step)
            await RisingEdge(dut.clk)
            got = Beat(*(int(getattr(dut, name).value) for name in Beat._fields))
            assert got == want, f"beat {number} of {nest}: got {got}, expected {want}"
            if step:
                break
    dut.step.value = 0


@bench(stall=[Stall.NEVER, Stall.HALF])
async def visits_the_corners(dut, stall):
    generator = random.Random(f"{stall}")
    for nest in CORNERS:
        await follow(dut, nest, generator, stall)


@bench(seed=[1, 2])
async def visits_random_nests(dut, seed):
    generator = random.Random(seed)
    for _ in range(20):
        await follow(dut, random_nest(generator), generator, Stall.NEVER)


@bench()
async def start_abandons_a_walk(dut):
    generator = random.Random(3)
    nests = [random_nest(generator) for _ in range(10)]
    for nest in nests:
        total = len(list(walk(nest)))
        await follow(dut, nest, generator, Stall.NEVER, generator.randint(1, total))


def test_visits_every_beat():
    run_bench(LoopWalker(config=TINY), visits_the_corners, visits_random_nests, start_abandons_a_walk)
