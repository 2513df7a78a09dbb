"""Three products per slice are exact for all operands.

1. `Dsp48e2` does what UG579 says (tests/hw/test_dsp.py).
2. A + D fits the pre-adder; every product m * c is h * 2^9 + t with t of the low 9 bits of m alone, and h fits 11 bits:
   all 2^20 pairs. By distributivity P = m * c0 + h1 * 2^20 + h2 * 2^31, within 48 bits.
3. `TripleUnpack` returns the three products from that number: SAT over all fields, h in the range that 2. found.
"""

import random
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from amaranth.sim import Simulator

ROOT = Path(__file__).resolve().parents[2]

PROOF = """
module proof(input signed [19:0] s0, input signed [10:0] h1, h2, input [8:0] t1, t2);
  wire signed [47:0] p = s0 + h1 * 48'sd1048576 + h2 * 48'sd2147483648;
  wire signed [19:0] first, second, third;
  dut dut (.p(p), .low__0(t1), .low__1(t2), .product__0(first), .product__1(second), .product__2(third));
  wire possible = h1 >= -512 && h1 <= {limit};
  always @* if (possible) begin
    assert(first == s0); assert(second == {{h1, t1}}); assert(third == {{h2, t2}});
  end
endmodule
"""


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "tests" / "hw")
    import three_per_slice
    return three_per_slice


def test_every_product_divides_into_its_fields(bench):
    m, c = np.arange(-1 << 15, 1 << 15)[:, None], np.arange(-8, 8)[None]
    product = m * c
    t, h = product & 511, product >> 9
    assert np.array_equal(t, ((m & 511) * c) & 511) and np.array_equal(h * 512 + t, product)
    assert h.min() == -512 and h.max() == 512
    assert product.min() >= -1 << 19 and product.max() < 1 << 19
    for low in (-8, 7):
        assert -1 << 26 <= low * (1 + (1 << 11) + (1 << 22)) < 1 << 26
    assert int(np.abs(product).max()) * (1 + (1 << 11) + (1 << 22)) < 1 << 47


def test_every_triple_of_products_is_unpacked(bench, tmp_path):
    from proof import prove
    prove(tmp_path, {"dut": bench.TripleUnpack()}, PROOF.format(limit=512))


def test_a_field_beyond_its_range_is_refuted(bench, tmp_path):
    from proof import prove
    with pytest.raises(AssertionError, match="FAIL"):
        prove(tmp_path, {"dut": bench.TripleUnpack()}, PROOF.format(limit=512).replace("-512", "-1024"))


def results(dut, rows, drive, read):
    found = []

    async def run(context):
        for cycle in range(len(rows) + dut.latency):
            drive(context, rows[min(cycle, len(rows) - 1)])
            if cycle >= dut.latency:
                found.append(read(context))
            await context.tick()

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(run)
    simulator.run()
    return found


def test_products_at_full_rate(bench, seed=1):
    generator, ends = random.Random(seed), (-8, -1, 0, 7)
    rows = [(m, (a, b, c)) for m in (-32768, -1, 0, 1, 511, 512, 32767) for a in ends for b in ends for c in ends]
    rows += [(generator.randrange(-32768, 32768), tuple(generator.randrange(-8, 8) for _ in range(3)))
             for _ in range(400)]
    dut = bench.CodeTriple()

    def drive(context, row):
        context.set(dut.mantissa, row[0])
        context.set(dut.negated, -row[0])
        for port, code in zip(dut.code, row[1]):
            context.set(port, code)

    got = results(dut, rows, drive, lambda context: [context.get(port) for port in dut.product])
    assert got == [[m * c for c in codes] for m, codes in rows], seed


@pytest.mark.parametrize("packed", [2, 3])
def test_dot_products(bench, packed, seed=2):
    generator, lanes = random.Random(seed), 8
    rows = [[(generator.randrange(-32767, 32768), [generator.randrange(-8, 8) for _ in range(packed)])
             for _ in range(lanes)] for _ in range(30)]
    rows[0] = [(-32767, [-8] * packed)] * lanes
    dut = bench.CodeDot(packed=packed, lanes=lanes)

    def drive(context, row):
        for lane, (m, codes) in enumerate(row):
            context.set(dut.mantissa[lane], m)
            context.set(dut.negated[lane], -m)
            for column, code in enumerate(codes):
                context.set(dut.code[lane][column], code)

    got = results(dut, rows, drive, lambda context: [context.get(port) for port in dut.dot])
    assert got == [[sum(m * codes[column] for m, codes in row) for column in range(packed)] for row in rows], seed


def test_benchmark_prints_both():
    done = subprocess.run([sys.executable, ROOT / "benchmarks" / "three_per_slice.py", "--lanes", "4", "--target",
                           "xcup"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"two per slice: products per DSP +2 .* counted", done.stdout)
    assert re.search(r"three per slice: products per DSP +3 .* counted", done.stdout)
    assert len(re.findall(r"LUTs per product +\d+\.\d .* estimated", done.stdout)) == 2
