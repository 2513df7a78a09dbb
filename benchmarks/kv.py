"""KV records on the RTL with HBM2 timing, beside the paper's shares of the peak and the functional level's counters.

Stores contexts and decodes one token behind each (`skipopu bench kv`): dense, skipped at random with and without the
buffer, and with every second layer of the decoding token skipped. Bytes, hits and results must be the functional
level's, results the same for every buffer. Exits with 1 if not, or if a target is missed at the longest context.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from common import Row, at_least, machine, show
from skipopu.host.errors import SkipopuError
from skipopu.host.kv_bench import KV_CONFIG, KvRow, geometry, make_pattern, measure
from skipopu.host.kv_report import draw_cost, draw_shares, table
from skipopu.hw.config import preset
from skipopu.sim.hbm import HbmTiming
from skipopu.sim.native import MemoryTiming

#: Two ports of 64 bits at eight times the clock: a port has the bytes per second, per burst and in flight of 512 bits
#: at 225 MHz, with the latencies, refreshes and rows of the same memory; an access brings one of its beats. The
#: history buffer holds 1,024 records of 32 heads x 16, as u280's does of Llama-2-7B's. Small enough to be built and
#: run in minutes.
SMALL = replace(preset("tiny"), name="kvsmall", burst_beats=128, fifo_beats=4096, outstanding=16, history_tokens=8192,
                buffer_beats=131072)
_HBM = HbmTiming()
SMALL_TIMING = MemoryTiming(hbm=HbmTiming(core_mhz=8 * _HBM.core_mhz, memory_mhz=8 * _HBM.core_mhz, same_group=1))
PAPER = {"dense": 0.887, "reuse": 0.782, "reuse, buffer": 1.015, "alternate, buffer": 0.831}
TARGETS = {"dense": 0.90, "reuse": 0.86, "reuse, buffer": 1.12, "alternate, buffer": 0.94}
SAVED = 0.249
COUNTED = ("tokens", "pattern", "buffer_bytes", "memory_bytes", "buffer_bytes_served", "storage_saved", "result")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default=KV_CONFIG.name, help="overlay configuration, or kvsmall: narrow ports at "
                                                                 "a higher clock (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--kv-heads", type=int, default=32, help="default: %(default)s")
    parser.add_argument("--head-dim", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 2048], help="contexts")
    parser.add_argument("--skip", type=float, default=0.25, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kv-format", default="fp16", help="of KV records: fp16, 12 or 8 (default: %(default)s)")
    parser.add_argument("--memory", default="hbm", help="hbm or ideal (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="folder for pictures and kv.json")
    return parser.parse_args()


def different(expected: list[KvRow], got: list[KvRow]) -> list[str]:
    """What the levels count differently, a line each."""
    return [f"{want.pattern}, {want.tokens} tokens, {want.buffer_bytes} bytes: {key} {getattr(found, key)}, functional "
            f"level {getattr(want, key)}" for want, found in zip(expected, got, strict=True) for key in COUNTED
            if getattr(want, key) != getattr(found, key)]


def summary(rows: list[KvRow]) -> list[Row]:
    """Shares at the longest context beside paper and targets."""
    longest = max(row.tokens for row in rows)
    at = {(row.pattern, row.buffer_bytes > 0): row for row in rows if row.tokens == longest}
    named = {"dense": ("dense", False), "reuse": ("random", False), "reuse, buffer": ("random", True),
             "alternate, buffer": ("alternate", True)}
    found = [Row(f"{name}, effective (paper {PAPER[name]:.1%})", at[key].effective_share, "simulated", "{:.1%}",
                 at_least(TARGETS[name], "{:.0%}")) for name, key in named.items() if key in at]
    found += [Row(f"{name}, from memory", at[key].physical_share, "simulated", "{:.1%}") for name, key in named.items()
              if key in at and at[key].hit_rate]
    saved = at["random", False].storage_saved
    return [*found, Row("KV storage saved (paper 25.4%)", saved, "counted", "{:.2%}", at_least(SAVED, "{:.1%}"))]


def main() -> int:
    """Measure on both levels and print the tables."""
    options = arguments()
    own = {item.name: item for item in (KV_CONFIG, SMALL)}
    config = own.get(options.config) or preset(options.config)
    memory = {"timing": SMALL_TIMING} if config is SMALL else {"memory": options.memory}
    model = geometry(options.layers, options.kv_heads, options.head_dim)
    patterns = [make_pattern(name, options.layers, max(options.tokens), options.skip, options.seed)
                for name in ("dense", "random", "alternate")]
    print(f"{machine()}\nconfiguration {config.name}, {options.layers} layers of {options.kv_heads} KV heads x "
          f"{options.head_dim}, memory {options.memory}, KV records {options.kv_format}", flush=True)
    expected = list(measure(config, model, options.tokens, patterns, (0, None), kv_format=options.kv_format))
    got = []
    for row in measure(config, model, options.tokens, patterns, (0, None), "rtl", lambda line: print(f"  {line}"),
                       kv_format=options.kv_format, **memory):
        got.append(row)
        print(f"  {row.pattern}, {row.tokens} tokens, {row.buffer_bytes} bytes of buffer: {row.cycles:,} cycles, "
              f"effective {row.effective_share:.1%}, physical {row.physical_share:.1%}", flush=True)
    print("\n" + "\n".join(table(got)))
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        draw_cost(options.output / "cost.png", got, config)
        draw_shares(options.output / "shares.png", got, config)
        report = {"config": config.name, "layers": options.layers, "memory": options.memory,
                  "rows": [row.as_json() for row in got]}
        (options.output / "kv.json").write_text(json.dumps(report, indent=1) + "\n")  # for `skipopu bench paper --kv`
    wrong = different(expected, got)
    print("\n".join(wrong) or f"counters and results of all {len(got)} rows are the functional level's")
    rows = summary(got)
    show(f"KV records at {max(options.tokens)} tokens", rows)
    return int(bool(wrong) or any(row.cells()[3] == "MISSED" for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SkipopuError as error:
        sys.exit(f"kv: {error}")
