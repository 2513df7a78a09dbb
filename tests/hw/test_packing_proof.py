"""Packed products are exact for all operands.

Weight codes:
1. `Dsp48e2` does what UG579 says (test_dsp.py, SAT over all inputs and modes).
2. m * (c0 + c1 * 2^22) = m*c0 + (m*c1) * 2^22 without a wrap anywhere: every m, c0, c1 (2^24 cases).
3. By addition over the lanes a cascade holds s0 + s1 * 2^22; the bounds of 2. times the lanes fit both fields.
4. `CodeUnpack` returns s0 and s1 from that number: SAT over all pairs of 22-bit sums.

Keys and values:
1. q * (k0 + k1 * 2^15) - low * 2^15 = q*k0 + h * 2^23 where q * k1 = h * 2^8 + low: distributivity; that low
   depends on the low bytes of q and k1 only, and that every q * k fits 23 bits, h 15 bits and the packed pair
   27 bits: all pairs.
2. `KvUnpack` returns both products from that number: SAT over all q*k0, h and low.
"""

import random

import numpy as np
import pytest
from amaranth.sim import Simulator
from proof import prove
from skipopu.hw.blocks.packing import FIELD_BITS, CodeLanes, CodeUnpack, KvPair, KvUnpack

UNPACK = """
module proof(input signed [21:0] s0, s1);
  wire signed [47:0] p = s0 + s1 * 48'sd4194304;
  wire signed [21:0] dot0, dot1;
  dut dut (.p(p), .dot__0(dot0), .dot__1(dot1));
  always @* begin assert(dot0 == s0); assert(dot1 == s1 {error}); end
endmodule
"""


def test_every_pair_of_sums_is_unpacked(tmp_path):
    prove(tmp_path, {"dut": CodeUnpack()}, UNPACK.format(error=""))


def test_a_wrong_claim_is_refuted(tmp_path):
    with pytest.raises(AssertionError, match="FAIL"):
        prove(tmp_path, {"dut": CodeUnpack()}, UNPACK.format(error="- s0[21]"))


def test_every_product_stays_in_its_field():
    mantissa = np.arange(-1 << 15, 1 << 15, dtype=np.int64)
    codes = range(-8, 8)
    largest = 0
    for low in codes:
        for high in codes:
            packed = low + (high << FIELD_BITS)
            assert -1 << 26 <= packed < 1 << 26  # the pre-adder
            product = mantissa * packed
            assert np.array_equal(product - mantissa * low, mantissa * high << FIELD_BITS)
            largest = max(largest, int(np.abs(mantissa * low).max()))
    assert largest == 1 << 18 and 7 * largest < 1 << FIELD_BITS - 1 <= 8 * largest
    assert 7 * largest * ((1 << FIELD_BITS) + 1) < 1 << 47  # the ALU


@pytest.mark.parametrize("lanes", [1, 4, 7])
def test_lanes_at_full_rate(lanes, seed=1):
    dut, generator = CodeLanes(lanes=lanes), random.Random(seed)
    corners = [(m, (a, b)) for m in (-32768, -1, 32767) for a in (-8, 0, 7) for b in (-8, 0, 7)]
    rows = [[corner] * lanes for corner in corners]
    rows += [[(generator.randrange(-32768, 32768), (generator.randrange(-8, 8), generator.randrange(-8, 8)))
              for _ in range(lanes)] for _ in range(100)]

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


@pytest.mark.parametrize("lanes", [0, 8])
def test_refuses_sums_that_do_not_fit(lanes):
    with pytest.raises(ValueError, match=rf"lanes must be 1..7 \(lanes \* 262144 < 2\^21\), not {lanes}"):
        CodeLanes(lanes=lanes)


KV_UNPACK = """
module proof(input signed [22:0] s0, input signed [14:0] h, input [7:0] low);
  wire signed [47:0] p = s0 + h * 48'sd8388608;
  wire signed [22:0] first, second;
  dut dut (.p(p), .low(low), .product__0(first), .product__1(second));
  always @* begin assert(first == s0); assert(second == {h, low}); end
endmodule
"""


def test_every_pair_of_products_is_unpacked(tmp_path):
    prove(tmp_path, {"dut": KvUnpack()}, KV_UNPACK)


def test_every_key_product_stays_in_its_field():
    q, k = np.arange(-2048, 2048)[:, None], np.arange(-2047, 2048)[None]
    product = q * k
    low, h = product & 255, product >> 8
    assert np.array_equal(low, ((q & 255) * (k & 255)) & 255)
    assert product.min() >= -1 << 22 and product.max() < 1 << 22
    assert h.min() >= -1 << 14 and h.max() < 1 << 14
    assert -2047 - (2047 << 15) >= -1 << 26 and 2047 + (2047 << 15) < 1 << 26
    assert np.array_equal(q * (k << 15) - (low << 15), h << 23)


def test_key_products_at_full_rate(seed=2):
    dut, generator = KvPair(), random.Random(seed)
    ends = (-2047, -1, 0, 1, 2047)
    rows = [(q, (a, b)) for q in (-2048, *ends) for a in ends for b in ends]
    rows += [(generator.randrange(-2048, 2048), (generator.randrange(-2047, 2048), generator.randrange(-2047, 2048)))
             for _ in range(300)]

    async def bench(context):
        for cycle in range(len(rows) + dut.latency):
            q, k = rows[min(cycle, len(rows) - 1)]
            context.set(dut.q, q)
            for column in range(2):
                context.set(dut.k[column], k[column])
            if cycle >= dut.latency:
                q, k = rows[cycle - dut.latency]
                got = [context.get(dut.product[column]) for column in range(2)]
                assert got == [q * k[0], q * k[1]], (seed, cycle, q, k)
            await context.tick()

    simulator = Simulator(dut)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
