"""Elaborate the kernel for an Alveo card with Yosys, down to its slices and memories: every module is there, the array
is made of DSP48E2, and large memories become URAM288.

The configuration is `tiny` with an activation buffer as deep as that of `u280`; `--config u280` takes the real one, and
hours. Fails if a module or a slice is missing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from pathlib import Path

from skipopu.bitstream.alveo import kernel_text
from skipopu.bitstream.boards import ALVEO, alveo_board
from skipopu.bitstream.synth import cells_of
from skipopu.hw.config import preset
from skipopu.hw.kernel import KERNEL
from skipopu.hw.verilog import run_yosys

SLICES = ("DSP48E2", "URAM288", "RAMB36E2", "RAMB18E2")


def main() -> None:
    """Print the slices of the whole kernel; exit with 1 if the array or the large memories are not made of them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--board", default="u280", choices=list(ALVEO))
    parser.add_argument("--config", help="instead of tiny with a deep activation buffer")
    options = parser.parse_args()
    deep = dataclasses.replace(preset("tiny"), name="tiny-deep", dsp="dsp48e2", abuf_rows=preset("u280").abuf_rows)
    config = preset(options.config) if options.config else deep
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        source, result = Path(folder, "kernel.v"), Path(folder, "cells.json")
        source.write_text(kernel_text(alveo_board(options.board), config))
        run_yosys(["read_verilog -lib +/xilinx/cells_sim.v +/xilinx/cells_xtra.v", f"read_verilog {source}",
                   f"hierarchy -check -top {KERNEL}",
                   f"synth_xilinx -family xcup -uram -noiopad -noclkbuf -top {KERNEL} -run begin:map_ffram",
                   f"tee -q -o {result} stat -json -top {KERNEL}"], name=f"the kernel at {config.name}",
                  log=lambda command: print(f"{time.perf_counter() - begin:6.0f} s  {command[:100]}", file=sys.stderr))
        found = cells_of(json.loads(result.read_text())["modules"], KERNEL)
    for name in SLICES:
        print(f"{name:10} {found[name]:6,}  estimated")
    products = config.lanes * config.columns // 2
    if found["DSP48E2"] < products or not found["URAM288"]:
        sys.exit(f"kernel: the array's {products} slices or the large memories are not there")


if __name__ == "__main__":
    main()
