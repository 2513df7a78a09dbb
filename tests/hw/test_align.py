"""Block alignment equals its model, and the model equals exact rational arithmetic."""

from fractions import Fraction
from math import floor

import numpy as np
import pytest
from lanes import Lanes, check_lanes, spread_floats
from skipopu.hw.blocks.align import BlockAlign
from skipopu.sim.bench import bench, bench_parameters, run_bench
from test_fp import CORNERS, from_float64, to_float64


def blocks(seed, block, count):
    """FP32 blocks [.., block]: corners, one large element, ties and clamps, close and spread exponents, zeros."""
    generator = np.random.default_rng(seed)
    largest = np.uint32(0x3FFFFFFF)  # rounds up to a power of two in its own block: the clamp
    rows = [np.zeros(block), np.full(block, 0x80000000), np.full(block, largest), np.full(block, largest | 0x80000000),
            np.full(block, 0x7FFFFFFF), np.full(block, 0xFF800000), np.full(block, 0x00800000),
            np.full(block, 0x007FFFFF),
            np.where(np.arange(block) == block - 1, largest, 0), np.where(np.arange(block) == 0, largest, 0x807FFFFF)]
    for distance in range(20):  # 1 and halves of the last place, one unit of FP32 to either side
        tie = from_float64(2.0**-distance)
        others = np.arange(block - 1)
        rows += [np.concatenate([[0x3F800000], (tie + others % 3 - 1) | (others % 2 << 31)])]
        odd = from_float64(2.0**-14 * (distance + 0.5)), from_float64(2.0**-10 * -(distance + 0.5))
        rows += [np.concatenate([[0x3F800000], np.resize(odd, block - 1)])]
    rows += [np.resize(np.roll(CORNERS, -k), block) for k in range(len(CORNERS))]
    parts = [spread_floats(generator, count * block, low, high) for low, high in ((0, 256), (110, 130), (100, 102))]
    tables = [np.stack(rows).astype(np.int64), *(part.reshape(count, block) for part in parts)]
    return np.concatenate(tables).astype(np.uint32)


@bench(seed=[1], timeout_cycles=50_000)
async def aligns(dut, seed):
    block = bench_parameters()["block"]
    a = blocks(seed, block, 4096 // block * 2)
    a = a[np.random.default_rng(seed).permutation(len(a))]
    short = np.random.default_rng(seed + 1).integers(0, 2, len(a))  # both kinds, in no order
    mantissas, e, total = BlockAlign.model(a, short)
    await check_lanes(
        dut, count=1, seed=seed, inputs={"short": short, **{f"a_{k}": a[:, k] for k in range(block)}},
        outputs={"e": e, "s": total, **{f"m_{k}": mantissas[:, k] for k in range(block)}})


@pytest.mark.parametrize("block", [8, 32])
def test_alignment_equals_model(block):
    run_bench(Lanes(lambda: BlockAlign(block), count=1), aligns, parameters={"block": block})


@pytest.mark.parametrize(("short", "places", "limit"), [(False, 14, 32767), (True, 13, 16383)])
def test_model_is_exact_arithmetic(short, places, limit):
    a = blocks(2, 8, 300)
    values = to_float64(a)
    for row, mantissa, exponent, total in zip(values, *BlockAlign.model(a, short)):
        largest = Fraction(float(np.abs(row).max()))
        if largest == 0:
            assert exponent == -127 and not mantissa.any() and total == 0
            continue
        assert Fraction(2) ** int(exponent) <= largest < Fraction(2) ** (int(exponent) + 1)
        scale = Fraction(2) ** (places - int(exponent))
        expected = [min(floor(abs(Fraction(float(x))) * scale + Fraction(1, 2)), limit) for x in row]
        assert mantissa.tolist() == [-v if x < 0 else v for x, v in zip(row, expected)]
        assert total == mantissa.sum()


def test_block_must_be_a_power_of_two():
    with pytest.raises(ValueError, match="block must be a power of two, not 12"):
        BlockAlign(12)
