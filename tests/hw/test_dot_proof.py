"""Two products per DSP48E2 slice are exact for all operands that alignment makes.

1. `Dsp48e2` does what UG579 says (test_dsp.py, SAT over all inputs and modes).
2. A cascade of four holds S0 + S1 * 2^14, by distributivity, if nothing wraps: bounds of every intermediate sum.
3. `BoothRow` subtracts one digit times the mantissa: SAT over all inputs. The digits of a word are the word: all 8192.
   `LowLane` is seven such rows at their places: SAT over all inputs. So four lanes make -S1 modulo 2^15.
4. With that added, `Fields` returns S0, and S1 less its low part: SAT over all S0 and S1.
What is left are sums of these and the way of each operand bit to its place: test_dot.py.
"""

import numpy as np
import pytest
from proof import prove
from skipopu.hw.blocks.dot import CASCADE, BoothRow, Fields, LowLane

MANTISSA, WORD = 16383, 4094  # largest magnitudes of queries and probabilities, of keys and values
LONG = 1 << 15  # and of activations, with codes 0..15 only
BIAS = 8 * 32 * LONG  # with codes only
WIDTHS = range(3, 16, 2)  # of the rows

ROW = """
module proof(input [{top}:0] acc, mantissa, input [2:0] digit);
  wire signed [2:0] value = {{digit[2], 2'b0}} + digit[1] + digit[0] + {{digit[2], 1'b0}};
  wire [{top}:0] total;
  dut dut (.acc(acc), .mantissa(mantissa), .digit(digit), .total(total));
  wire [{top}:0] expected = value == -2 ? acc + 2 * mantissa : value == -1 ? acc + mantissa : value == 0 ? acc {wrong}
                         : value == 1 ? acc - mantissa : acc - 2 * mantissa;
  always @* assert(total == expected);
endmodule
"""


@pytest.mark.parametrize("width", WIDTHS)
def test_every_row_subtracts_its_digit(tmp_path, width):
    prove(tmp_path, {"dut": BoothRow(width=width)}, ROW.format(top=width - 1, wrong=""))


def test_a_wrong_claim_is_refuted(tmp_path):
    with pytest.raises(AssertionError, match="FAIL"):
        prove(tmp_path, {"dut": BoothRow(width=15)}, ROW.format(top=14, wrong="+ mantissa[14]"))


def digit_of(bits):
    """Value of three bits, the highest one counting -2 (twice the place of the digit)."""
    return -2 * (bits >> 2 & 1) + (bits >> 1 & 1) + (bits & 1)


def test_the_digits_of_every_word_are_the_word():
    words = np.arange(-4096, 4096)
    doubled = words << 1  # the first digit has a 0 below it
    assert np.array_equal(sum(digit_of(doubled >> place) << place for place in range(0, 14, 2)), words)


LANE = """
module proof(input clk, input signed [15:0] mantissa, input signed [12:0] word, input [14:0] upper_in,
             input [8:0] lower_in);
  wire [14:0] digits = {{word[12], word, 1'b0}};
  wire [14:0] t0;  row15 r0(.acc(upper_in), .digit(digits[2:0]), .mantissa(mantissa[14:0]), .total(t0));
  wire [12:0] t2;  row13 r2(.acc(t0[14:2]), .digit(digits[4:2]), .mantissa(mantissa[12:0]), .total(t2));
  wire [10:0] t4;  row11 r4(.acc(t2[12:2]), .digit(digits[6:4]), .mantissa(mantissa[10:0]), .total(t4));
  wire [8:0] t6;  row9 r6(.acc(lower_in), .digit(digits[8:6]), .mantissa(mantissa[8:0]), .total(t6));
  wire [6:0] t8;  row7 r8(.acc(t6[8:2]), .digit(digits[{low}+2:{low}]), .mantissa(mantissa[6:0]), .total(t8));
  wire [4:0] t10;  row5 r10(.acc(t8[6:2]), .digit(digits[12:10]), .mantissa(mantissa[4:0]), .total(t10));
  wire [2:0] t12;  row3 r12(.acc(t10[4:2]), .digit(digits[14:12]), .mantissa(mantissa[2:0]), .total(t12));
  reg [14:0] upper_want;
  reg [8:0] lower_want;
  always @(posedge clk) begin
    upper_want <= {{t4, t2[1:0], t0[1:0]}};
    lower_want <= {{t12, t10[1:0], t8[1:0], t6[1:0]}};
  end
  wire [14:0] upper;
  wire [8:0] lower;
  dut dut (.clk(clk), .rst(1'b0), .mantissa(mantissa), .word(word), .upper_in(upper_in), .lower_in(lower_in),
           .upper(upper), .lower(lower));
  always @* begin assert(upper == upper_want); assert(lower == lower_want); end
endmodule
"""


def test_every_lane_has_its_rows_at_their_places(tmp_path):
    rows = {f"row{width}": BoothRow(width=width) for width in WIDTHS}
    prove(tmp_path, {"dut": LowLane(), **rows}, LANE.format(low=8), skip=1)


def test_a_row_with_a_wrong_digit_is_refuted(tmp_path):
    rows = {f"row{width}": BoothRow(width=width) for width in WIDTHS}
    with pytest.raises(AssertionError, match="proof did fail"):
        prove(tmp_path, {"dut": LowLane(), **rows}, LANE.format(low=6), skip=1)


FIELDS = """
module proof(input signed [28:0] s0, s1);
  wire [14:0] low = -s1;
  wire signed [47:0] s1_wide = s1, s0_wide = s0;
  wire signed [47:0] p = s0_wide + 48'sd268435456 + ((s1_wide + $signed({33'd0, low})) <<< 14);
  wire signed [28:0] lower;
  wire signed [13:0] upper;
  dut dut (.p(p), .lower(lower), .upper(upper));
  wire signed [31:0] upper_wide = upper;
  wire fits = s1 <= 29'sd268402688;
  always @* begin assert(lower == s0); assert(!fits || (upper_wide <<< 15) - $signed({17'd0, low}) == s1); end
endmodule
"""


def test_every_pair_of_sums_is_unpacked(tmp_path):
    """S1 up to 2^28 - 2^15: where H fits 14 bits. Its bound is below."""
    prove(tmp_path, {"dut": Fields()}, FIELDS)


def test_nothing_wraps():
    words = np.array([-WORD, WORD, 0, 15])
    packed = words[:, None] + (words[None] << 14)
    assert np.abs(packed).max() < 1 << 26, "the pre-adder"
    largest = CASCADE * MANTISSA * WORD  # of keys and values, both signs
    codes = CASCADE * LONG * 15 + BIAS
    assert max(largest, codes) <= (1 << 28) - (1 << 15), "S0 and S1"
    total = (max(largest, codes) + (1 << 28)) * (1 + (1 << 14))
    assert total < 1 << 47, "the ALU, whatever of it has been added yet"
    assert 32 * MANTISSA * WORD < 1 << 31 and 32 * LONG * 15 + BIAS < 1 << 31, "a block"


@pytest.mark.parametrize("mantissa", [-MANTISSA, 1 - MANTISSA, MANTISSA, -12345, 77, -LONG, LONG - 1])
def test_packed_products_are_the_products(mantissa):
    """Distributivity, with the bits of a 27 x 18 multiplier: pairs of words, every value of each."""
    words = np.arange(-WORD, WORD + 1)
    for turn in (0, 1, 5, 2048, 5555):
        other = np.roll(words, turn)
        packed = words + (other << 14)
        assert np.array_equal(mantissa * packed, mantissa * words + (mantissa * other << 14))
