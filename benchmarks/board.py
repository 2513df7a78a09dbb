"""The bitstream of a board, made from the whole overlay by the real tools: time taken, room left, and clock reached.

Fails unless the report shows the clock with its margin, the time, and a bitstream that begins as one does.
"""

import argparse
import sys
import tempfile
from pathlib import Path

from common import Row, at_least, at_most, machine, show
from skipopu.bitstream import ulx3s
from skipopu.bitstream.ecp5 import TimingError
from skipopu.hw.config import ConfigError, preset
from skipopu.hw.verilog import YosysError
from skipopu.sim.toolchain import ToolError

__all__ = ["rows"]

MARGIN = 0.05
SECONDS = 1200
IMAGE_BYTES = 100_000  #: an empty device of this size compresses to less


def rows(report, image):
    """The table of a report and its bitstream's bytes."""
    for name, item in report["utilisation"].items():
        yield Row(f"{name} of the device's", item["used"] / item["available"], "estimated", "{:.1%}",
                  at_most(1, "{:.0%}"))
    yield Row("clock, MHz", report["fmax_mhz"], "estimated", "{:.1f}", at_least(report["clock_mhz"]))
    yield Row("margin", report["margin"], "estimated", "{:.1%}", at_least(MARGIN, "{:.0%}"))
    for kind in ("wall", "processor"):
        seconds = sum(spent[kind] for spent in report["seconds"].values())
        # Other programs on this machine lengthen the first, not the second.
        yield Row(f"seconds, {kind}", seconds, target=at_most(SECONDS) if kind == "processor" else None)
    yield Row("bytes of bitstream", len(image) if image[:2] == b"\xff\x00" else 0, target=at_least(IMAGE_BYTES))


def main():
    """Build, print, and fail when a target is missed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="ulx3s", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="of the placement (default: %(default)s)")
    parser.add_argument("-o", "--output", help="folder to keep bitstream, report and logs in")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(options.output or scratch)
        report = ulx3s.build(preset(options.config), folder, seed=options.seed,
                             log=lambda line: print(line, file=sys.stderr, flush=True))
        table = list(rows(report, (folder / report["bitstream"]).read_bytes()))
    show(f"ulx3s-85f, configuration {report['config']}, seed {report['seed']}; {machine()}", table)
    return any(row.cells()[3] == "MISSED" for row in table)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ConfigError, TimingError, ToolError, YosysError) as error:
        sys.exit(f"error: {error}")
