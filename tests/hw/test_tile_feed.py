"""TileFeed shows the scales of each tile, with several blocks in a tile and with several tiles to a set of scales."""

import dataclasses

import numpy as np
from cocotb.triggers import RisingEdge
from compute_model import Matmul, half
from skipopu.hw.blocks.array import Scale
from skipopu.hw.blocks.compute import TileFeed
from skipopu.hw.config import OverlayConfig, preset
from skipopu.hw.formats import KV_FRACTION
from skipopu.hw.isa import MatmulMode
from skipopu.sim.bench import Stall, StreamSource, bench, bench_parameters, run_bench, unpack

CONFIG = preset("u280")  # two blocks in a tile, up to eight sets in a chunk


@bench(stall=[Stall.NEVER, Stall.HALF], timeout_cycles=40_000)
async def every_tile_has_its_scales(dut, stall):
    config, rng = OverlayConfig(**bench_parameters()), np.random.default_rng(1)
    layout, edge = Scale(), RisingEdge(dut.clk)
    weights = StreamSource(dut, "weights", stall=stall, seed=1)
    dut.enable.value = 1
    for mode in (MatmulMode.W4, MatmulMode.W4M, MatmulMode.W8):
        for group in range(5):
            fields = {"heads": 1, "groups": 1, "rows": 1, "n_tiles": 3, "k_tiles": int(rng.integers(3, 8)),
                      "row_stride": 1, "group_stride": 1, "head_stride": 1, "x": 0, "group": group}
            matmul = Matmul(config, mode, fields, rng)
            for name in ("k_tiles", "group", "scale_exponent"):
                getattr(dut, name).value = fields[name]
            dut.mode.value, dut.reset.value, dut.allow.value = int(mode), 1, 1
            await edge
            dut.reset.value = 0
            weights.send(matmul.weight_stream())
            for n, k, plane in np.ndindex(matmul.shape[1:]):
                while not dut.arrived.value:
                    await edge
                dut.allow.value, dut.swap.value = 0, 1
                await edge
                dut.allow.value, dut.swap.value, dut.use_first.value = 1, 0, 1  # the next tile may come meanwhile
                await edge
                dut.use_first.value = 0
                await edge
                shift = fields["scale_exponent"] - (4 if mode == MatmulMode.W8 and not plane else 0)
                for index, (name, less) in enumerate((("scale", 1 << KV_FRACTION), ("minimum", 0))[:1 + (
                        mode == MatmulMode.W4M)]):
                    significand, es = half(matmul.scales[0, n, k, index])
                    for column in rng.integers(0, config.columns, 24).tolist():
                        for block in range(config.blocks):
                            got = unpack(layout, int(getattr(dut, f"{name}__{column}__{block}").value))
                            assert (got["significand"], got["shift"]) == (
                                significand[block, column] - less, shift - es[block, column]), (
                                    f"{mode.name} group {group}, tile {n}, {k}, column {column}, block {block}")


def test_scales():
    run_bench(TileFeed(config=CONFIG), every_tile_has_its_scales, parameters=dataclasses.asdict(CONFIG))
