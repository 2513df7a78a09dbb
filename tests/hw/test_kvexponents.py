"""Exponents of a KV buffer: what was written is read at once, and a cycle later, from every piece."""

import random

import pytest
from amaranth.sim import Simulator
from skipopu.hw.blocks.kvexponents import KvExponents


@pytest.mark.parametrize(("heads", "rows"), [(1, 1), (2, 8), (32, 2), (33, 2), (80, 2)])
def test_reads_what_was_written(heads, rows):
    dut = KvExponents(heads=heads, rows=rows)
    generator = random.Random(heads)
    places = [(slot, head) for slot in range(2) for head in range(heads)]
    held, compared = {place: [None] * rows for place in places}, {"now": set(), "ahead": set()}

    async def bench(context):
        def compare(name, wanted):
            got = context.get(getattr(dut, name))
            for row, want in enumerate(wanted):
                if want is not None:
                    assert got[row] == want, (name, row)
                    compared[name].add(want)

        wanted = []
        for step in range(8 * len(places) + 300):
            place, en = generator.choice(places), generator.getrandbits(8)
            if step < len(places):
                place, en = places[step], -1
            exponent, now, ahead = generator.randrange(32), generator.choice(places), generator.choice(places)
            reads = ahead != place and step % 3  # otherwise what was read stays
            for port, value in ((dut.en, en), (dut.slot, place[0]), (dut.head, place[1]), (dut.exponent, exponent),
                                (dut.now_slot, now[0]), (dut.now_head, now[1]), (dut.ahead_en, bool(reads)),
                                (dut.ahead_slot, ahead[0]), (dut.ahead_head, ahead[1])):
                context.set(port, value)
            compare("now", held[now])
            if reads:
                wanted = list(held[ahead])
            await context.tick()
            held[place] = [exponent if en >> row & 1 else old for row, old in enumerate(held[place])]
            compare("ahead", wanted)

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    assert all(len(seen) > 20 for seen in compared.values())
