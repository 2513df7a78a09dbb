"""Decode on the RTL: is every logit right, how many cycles does a token take, and where do they go?

The functional level runs beside the RTL; every logit of prompt and answer is compared bit for bit, and at the end all
of memory. Exits with 1 if a bit differs.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from typing import Any

import numpy as np
from common import Row, at_least, at_most, machine, peak_memory, show
from skipopu.golden.random_model import random_model
from skipopu.host.compiled import Compiled
from skipopu.host.errors import SkipopuError
from skipopu.host.model import Model
from skipopu.host.report import memory_report
from skipopu.host.routes import RandomRoutes
from skipopu.host.runtime import Accelerator, RunStats
from skipopu.host.session import (
    Routing,
    compile_source,
    open_accelerator,
    open_source,
    prompt_tokens,
    route_source,
)
from skipopu.hw.config import OverlayConfig

TARGETS = {
    "efficiency": at_least(0.70, "{:.1%}"),
    "rate": at_least(0.3),
    "memory": at_most(4.0),
    "build": at_most(300),
    "start": at_most(3),
}
#: Counters that say what a unit did or waited for, in the order of the data's way.
WHERE = {
    "hazard_wait_load": "load waits for another unit",
    "weight_starved": "array waits for weights", "array_active": "array multiplies",
    "drain_blocked": "array waits for the vector unit", "hazard_wait_compute": "matmul waits for its operand",
    "stream_wait": "vector unit waits for the array", "hazard_wait_vector": "vector unit waits for another unit",
    "busy_load": "load busy", "busy_compute": "compute busy", "busy_vector": "vector busy", "busy_store": "store busy",
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="as for `skipopu generate`, or random: a small made-up one "
                                                           "that configuration tiny holds (default: %(default)s)")
    parser.add_argument("--config", default="sim", help="overlay configuration (default: %(default)s)")
    parser.add_argument("--prompt", default="The capital of France is a city on the river", help="text to continue")
    parser.add_argument("--count", type=int, default=16, help="tokens to generate (default: %(default)s)")
    parser.add_argument("--context", type=int, default=128, help="positions to provide for (default: %(default)s)")
    parser.add_argument("--skip", type=float, metavar="RATE", help="skip exactly this share of the attentions and of "
                                                                   "the MLPs, with KV reuse; drawn by seed 1")
    parser.add_argument("--memory", choices=("ideal", "hbm"), default="ideal",
                        help="timing of the simulated memory (default: %(default)s)")
    parser.add_argument("--rebuild", action="store_true", help="measure a build into an empty cache")
    return parser.parse_args()


def open_rtl(compiled: Compiled, rebuild: bool, **options: Any) -> tuple[Accelerator, float, float]:
    """The model on the RTL; seconds of the build (0 if it came from the cache), seconds of a start from the cache.

    options : of `open_accelerator`
    """
    folder = tempfile.TemporaryDirectory() if rebuild else None
    if folder is not None:
        os.environ["SKIPOPU_CACHE"] = folder.name
    lines: list[str] = []

    def log(line: str) -> None:
        lines.append(line)
        print(f"  {line}", flush=True)

    begin = time.perf_counter()
    accelerator = open_accelerator("rtl", compiled, log, **options)
    seconds, built = time.perf_counter() - begin, bool(lines)
    if not built:
        return accelerator, 0.0, seconds
    accelerator.device.close()
    begin = time.perf_counter()
    return open_accelerator("rtl", compiled, log, **options), seconds, time.perf_counter() - begin


def different(expected: np.ndarray, got: np.ndarray) -> int:
    """Values whose bits differ."""
    return int(np.count_nonzero(expected.view(np.uint32) != got.view(np.uint32)))


def decode(functional: Accelerator, rtl: Accelerator, prompt: list[int], count: int) -> tuple[list[int], int, int]:
    """Generate greedily on both: (tokens, logits compared, logits that differ). Progress on stdout."""
    found, compared, wrong = list[int](), 0, 0
    for expected, got in zip(functional.evaluate(prompt), rtl.evaluate(prompt), strict=True):
        compared, wrong = compared + expected.size, wrong + different(expected, got)
    while True:
        found.append(functional.argmax())
        wrong += functional.argmax() != rtl.argmax()
        if len(found) == count:
            return found, compared, wrong
        for accelerator in (functional, rtl):
            accelerator.step(found[-1])
        compared, wrong = compared + functional.vocab, wrong + different(functional.logits(), rtl.logits())


def memories_equal(functional: Accelerator, rtl: Accelerator) -> bool:
    """Is all of memory the same, keys and values of every layer included?"""
    size = functional.device.memory_bytes
    return all(np.array_equal(functional.device.read_memory(port, 0, size), rtl.device.read_memory(port, 0, size))
               for port in range(functional.config.ports))


def rows_of(runs: list[RunStats], config: OverlayConfig) -> list[Row]:
    """Results of the prompt's last run and the decode behind it."""
    report, steps = memory_report(runs, config), runs[1:]
    seconds = [run.seconds for run in steps]
    return [
        Row("cycles per token", report["cycles_per_token"], "simulated"),
        Row("memory bandwidth used", report["bandwidth_efficiency"], "simulated", "{:.1%}", TARGETS["efficiency"]),
        Row("bytes per token", sum(run.counters["bytes_read"] for run in steps) / len(steps), "simulated"),
        Row("array busy", report["array_utilisation"], "simulated", "{:.1%}"),
        Row("tokens/s on this machine", len(seconds) / sum(seconds), "measured", "{:.3g}", TARGETS["rate"]),
        Row("cycles/s on this machine", sum(run.counters["cycles"] for run in steps) / sum(seconds)),
    ]


def share_of(steps: list[RunStats], name: str) -> float:
    """A counter's part of all cycles."""
    return sum(run.counters[name] for run in steps) / sum(run.counters["cycles"] for run in steps)


def memory_rows(steps: list[RunStats], config: OverlayConfig) -> list[Row]:
    """Every cycle of decode once, as memory sees it."""
    delivered = share_of(steps, "bytes_read") / config.superbeat_bytes
    blocked = share_of(steps, "memory_blocked")
    return [Row("a superbeat is delivered", delivered, "simulated", "{:.1%}"),
            Row("a superbeat is there, its receiver is busy", blocked, "simulated", "{:.1%}"),
            Row("nothing is there: latency, or nothing asked for", 1 - delivered - blocked, "simulated", "{:.1%}")]


def unit_rows(steps: list[RunStats]) -> list[Row]:
    """What the units did and waited for, as parts of all cycles."""
    return [Row(f"{text} ({name})", share_of(steps, name), "simulated", "{:.1%}") for name, text in WHERE.items()]


def main() -> int:
    """Run, print, and say with the exit code whether all bits are equal."""
    options = arguments()
    source = random_model(1, context=options.context) if options.model == "random" else open_source(options.model)
    begin = time.perf_counter()
    source, routers, _ = route_source(source, Routing(force_skip=options.skip))
    force = None if options.skip is None else RandomRoutes(options.skip, 1, exact=True)
    compiled = compile_source(source, options.config, options.context, routers)
    compile_seconds = time.perf_counter() - begin
    if isinstance(source, Model) and source.tokenizer is None:
        prompt = [(7 * index + 3) % compiled.map.vocab for index in range(11)]
    else:
        prompt = prompt_tokens(source, options.prompt)
    print(f"{compiled.map.model} on configuration {compiled.config.name}: {len(prompt)} tokens of prompt, "
          f"{options.count} generated, {options.skip or 0:.0%} skipped, {options.memory} memory; {machine()}",
          flush=True)
    rtl, build, start = open_rtl(compiled, options.rebuild, force=force, memory=options.memory)
    build_memory = peak_memory(children=True)
    functional = open_accelerator("functional", compiled, force=force)
    with rtl.device:
        tokens, compared, wrong = decode(functional, rtl, prompt, options.count)
        equal = not wrong and memories_equal(functional, rtl)
    chunks = -(-len(prompt) // compiled.map.chunk)
    runs = rtl.stats[chunks - 1:]
    text = source.tokenizer.decode(tokens) if source.tokenizer else " ".join(map(str, tokens))
    print(f"generated: {text!r}")
    print(f"bit for bit: {compared:,} logits compared, " + (
        "all equal, and all of memory" if equal else f"{wrong:,} DIFFER" if wrong else "all equal, but memory DIFFERS"))
    show("decode", rows_of(runs, compiled.config))
    show("where the cycles of decode go: memory", memory_rows(runs[1:], compiled.config))
    show("where the cycles of decode go: units, which work side by side", unit_rows(runs[1:]))
    show("this machine", [
        Row("compiling the model, s", compile_seconds, form="{:.1f}"),
        Row("building the simulator, s" + ("" if build else " (was cached; --rebuild measures it)"), build or None,
            form="{:.0f}", target=TARGETS["build"]),
        Row("peak memory of one process of the build, GiB", build_memory / 2**30 if build else None, form="{:.2f}"),
        Row("start from the cache, s", start, form="{:.1f}", target=TARGETS["start"]),
        Row("peak memory with both levels, GiB", peak_memory() / 2**30, form="{:.2f}", target=TARGETS["memory"]),
    ])
    return 0 if equal else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SkipopuError as error:
        sys.exit(f"error: {error}")
