"""Two codes per slice are exact for all operands.

1. `Dsp48e2` does what UG579 says (tests/hw/test_dsp.py).
2. m * (c0 + c1 * 2^22) = m*c0 + (m*c1) * 2^22 without a wrap anywhere: every m, c0, c1 (2^24 cases).
3. By addition over the lanes a cascade holds s0 + s1 * 2^22; the bounds of 2. times the lanes fit both fields.
4. `CodeUnpack` returns s0 and s1 from that number: SAT over all pairs of 22-bit sums.
"""

import random
from pathlib import Path

import numpy as np
import pytest
from amaranth.sim import Simulator

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def lanes(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.syspath_prepend(ROOT / "tests" / "hw")
    from common import code_lanes
    return code_lanes


UNPACK = """
module proof(input signed [21:0] s0, s1);
  wire signed [47:0] p = s0 + s1 * 48'sd4194304;
  wire signed [21:0] dot0, dot1;
  dut dut (.p(p), .dot__0(dot0), .dot__1(dot1));
  always @* begin assert(dot0 == s0); assert(dot1 == s1 {error}); end
endmodule
"""


def test_every_pair_of_sums_is_unpacked(lanes, tmp_path):
    from proof import prove
    prove(tmp_path, {"dut": lanes.CodeUnpack()}, UNPACK.format(error=""))


def test_a_wrong_claim_is_refuted(lanes, tmp_path):
    from proof import prove
    with pytest.raises(AssertionError, match="FAIL"):
        prove(tmp_path, {"dut": lanes.CodeUnpack()}, UNPACK.format(error="- s0[21]"))


def test_every_product_stays_in_its_field(lanes):
    mantissa = np.arange(-1 << 15, 1 << 15, dtype=np.int64)
    codes = range(-8, 8)
    largest = 0
    for low in codes:
        for high in codes:
            packed = low + (high << lanes.FIELD_BITS)
            assert -1 << 26 <= packed < 1 << 26  # the pre-adder
            product = mantissa * packed
            assert np.array_equal(product - mantissa * low, mantissa * high << lanes.FIELD_BITS)
            largest = max(largest, int(np.abs(mantissa * low).max()))
    assert largest == 1 << 18 and 7 * largest < 1 << lanes.FIELD_BITS - 1 <= 8 * largest
    assert 7 * largest * ((1 << lanes.FIELD_BITS) + 1) < 1 << 47  # the ALU


@pytest.mark.parametrize("count", [1, 4, 7])
def test_lanes_at_full_rate(lanes, count, seed=1):
    dut, generator = lanes.CodeLanes(lanes=count), random.Random(seed)
    corners = [(m, (a, b)) for m in (-32768, -1, 32767) for a in (-8, 0, 7) for b in (-8, 0, 7)]
    rows = [[corner] * count for corner in corners]
    rows += [[(generator.randrange(-32768, 32768), (generator.randrange(-8, 8), generator.randrange(-8, 8)))
              for _ in range(count)] for _ in range(100)]

    async def bench(context):
        for cycle in range(len(rows) + dut.latency):
            for lane, (mantissa, codes) in enumerate(rows[min(cycle, len(rows) - 1)]):
                context.set(dut.mantissa[lane], mantissa)
                for column in range(2):
                    context.set(dut.code[lane][column], codes[column])
            if cycle >= dut.latency:
                row = rows[cycle - dut.latency]
                expected = [sum(m * codes[column] for m, codes in row) for column in range(2)]
                assert [context.get(dut.dot[column]) for column in range(2)] == expected, (seed, cycle, row)
            await context.tick()

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()


@pytest.mark.parametrize("count", [0, 8])
def test_refuses_sums_that_do_not_fit(lanes, count):
    with pytest.raises(ValueError, match=rf"lanes must be 1..7 \(lanes \* 262144 < 2\^21\), not {count}"):
        lanes.CodeLanes(lanes=count)
