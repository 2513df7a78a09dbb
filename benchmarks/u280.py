"""Models at full size on the RTL of the whole U280 configuration: 64 x 128 array, 32 ports with timed HBM2.

Whole layers of a known shape with seeded random 4-bit weights, memory-mapped: decode behind contexts of random KV
records, and a prompt chunk by chunk. Every run is predicted too: exits with 1 if cycles are off by more than 2%, bytes
by any, or with --check a bit differs from the functional level.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import machine, peak_memory
from skipopu.golden.random_image import RandomImage, random_image
from skipopu.host.devices import open_device
from skipopu.host.errors import SkipopuError
from skipopu.host.model import ModelConfig
from skipopu.host.passes.walk import Arguments
from skipopu.host.performance.cycles import predict
from skipopu.host.performance.fit import CORE_MHZ, resized
from skipopu.host.performance.geometries import GEOMETRIES, find_geometry
from skipopu.host.performance.history import KvHistory
from skipopu.host.performance.memory import HbmMemory, memory_model
from skipopu.host.plan import KV_FORMATS, KvSizes
from skipopu.host.routes import RandomRoutes, forced_routes, words_of_routes
from skipopu.host.runtime import Accelerator
from skipopu.hw.config import PRESETS, ConfigError, OverlayConfig, preset
from skipopu.sim.device import MEMORIES

TOLERANCE = 0.02
SKIP_SEED = 1


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--geometry", default="llama2-7b", help=f"{', '.join(GEOMETRIES)} (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="of them, 0 for all (default: %(default)s)")
    parser.add_argument("--config", default="u280", help=f"{', '.join(PRESETS)}, or one of these with other sizes, "
                                                         "like u280,ports=16,kvout_rows=8192 (default: %(default)s)")
    parser.add_argument("--context", type=int, nargs="*", default=[128, 1024], help="positions that the decoded token "
                                                                                    "attends to")
    parser.add_argument("--prompt", type=int, default=0, help="also read a prompt of so many tokens")
    parser.add_argument("--chunks", type=int, default=0, help="only its last chunks, behind random records")
    parser.add_argument("--skip", type=float, nargs="+", default=[0.25, 0.0], help="shares of the modules that tokens "
                                                                                   "skip, with KV reuse if not 0")
    parser.add_argument("--weights", default="q4_0", help="kind: q4_0, q4_g64 or q4_g128 (default: %(default)s)")
    parser.add_argument("--kv-format", default="fp16", choices=KV_FORMATS, help="of KV records (default: fp16)")
    parser.add_argument("--buffer", type=int, help="bytes of the history buffer (default: all of it)")
    parser.add_argument("--check", action="store_true", help="compare logits and KV records with the functional level")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, help="for the memory images (default: a temporary one)")
    return parser.parse_args()


def configuration(text: str) -> OverlayConfig:
    """A preset, with sizes changed. Multipliers are plain words: the same bits and cycles, built in far less time."""
    name, *sizes = text.split(",")
    return resized(replace(preset(name), dsp="generic"), sizes)


@dataclass(frozen=True)
class Line:
    """One run of the program: simulated cycles and bytes, predicted ones, the simulator's speed, bits that differ."""

    what: str
    cycles: int
    predicted: int
    bytes_moved: int
    predicted_bytes: int
    served: int  # bytes from the history buffer
    predicted_served: int
    share: float  # of the ports' peak
    of_memory: float  # of what the memory's timing allows
    seconds: float
    wrong: int | None

    def cells(self) -> tuple[str, ...]:
        """As text, in the order of HEAD."""
        return (self.what, f"{self.cycles:,}", f"{self.predicted:,}", f"{self.predicted / self.cycles - 1:+.2%}",
                f"{self.bytes_moved:,}", f"{self.served:,}", f"{self.share:.2%}", f"{self.of_memory:.2%}",
                f"{self.cycles / self.seconds:,.0f}",
                "-" if self.wrong is None else "equal" if not self.wrong else f"{self.wrong} DIFFER")

    @property
    def holds(self) -> bool:
        """Whether the prediction and the bits do."""
        near = abs(self.predicted / self.cycles - 1) <= TOLERANCE
        return not self.wrong and near and (self.bytes_moved, self.served) == (self.predicted_bytes,
                                                                               self.predicted_served)


HEAD = ("", "cycles, simulated", "predicted", "", "bytes moved", "from the buffer", "share of peak", "of the memory's",
        "cycles/s", "bits")


class Bench:
    """A random model on the RTL and, to check, on the functional level.

    force : routes of all positions, None without routers; history : of the runs so far, for predictions
    """

    def __init__(self, image: RandomImage, force: RandomRoutes | None, check: bool) -> None:
        self.image, self.force, self.config = image, force, image.compiled.config
        self.history: KvHistory | None = None
        self.devices = {name: open_device(
            name, self.config, image.files[0].stat().st_size, memories=image.memories(), **options)
            for name, options in devices(check)}

    def close(self) -> None:
        """Free the simulators."""
        for device in self.devices.values():
            device.close()

    def accelerators(self, context: int) -> dict[str, Accelerator]:
        """On every device, with records of so many positions."""
        found = {}
        if self.image.history is not None:
            self.history = KvHistory(self.config)
            chunk = self.image.compiled.map.chunk
            for first in range(0, context, chunk):
                self.history.store(first, self.routes(first, min(chunk, context - first)))
        for name, device in self.devices.items():
            if self.image.history is not None and context:
                storing = Accelerator(device, self.image.history, force=self.force)
                for first in range(0, context, storing.map.chunk):
                    storing.run([0] * min(storing.map.chunk, context - first))
            for port, memory in enumerate(self.image.memories()):
                for first, size in self.image.records():
                    device.write_memory(port, first, memory[first:first + size])
            found[name] = Accelerator(device, self.image.compiled, timeout=36_000, force=self.force)
            found[name].position = context
        return found

    def routes(self, position: int, count: int) -> tuple[tuple[int, int], ...]:
        """The rows that execute attention and MLP of each layer, () without routers."""
        if self.force is None:
            return ()
        words = words_of_routes(forced_routes(self.force, self.image.compiled.map.layers, position, count))
        return tuple(zip(words[::2], words[1::2]))

    def run(self, what: str, accelerators: dict[str, Accelerator], tokens: list[int], rows: int) -> Line:
        """One run on every device."""
        rtl = accelerators["rtl"]
        position, sim = rtl.position, self.devices["rtl"].sim
        sim.record()
        for accelerator in accelerators.values():
            accelerator.run(tokens, len(tokens) - rows, rows)
        first = int(sim.events()["cycle"][0])
        stats, superbeat = rtl.stats[-1], self.config.superbeat_bytes
        counters = stats.counters
        moved = counters["bytes_read"] + counters["bytes_written"]
        expected = self.predicted(position, tokens, rows, first)
        share = moved / counters["cycles"] / superbeat
        return Line(what, counters["cycles"], expected.cycles, moved,
                    expected.bytes_read(self.config) + expected.beats_written * self.config.port_bits // 8,
                    counters["kv_buffered"] * self.config.port_bits // 8,
                    expected.kv_buffered * self.config.port_bits // 8, share,
                    share / memory_model("hbm", self.config).share, stats.seconds,
                    self.different(accelerators, rows) if len(accelerators) > 1 else None)

    def predicted(self, position: int, tokens: list[int], rows: int, first: int) -> Any:
        """The cycle model's run, with refreshes where the simulator had them: ``first``, cycle of the first dispatch"""
        compiled, past = self.image.compiled, self.history
        run = Arguments(position, len(tokens), len(tokens) - rows, rows, self.routes(position, len(tokens)))
        timing = MEMORIES["hbm"].hbm
        for begin in (0, first):  # the first pass tells how long the first dispatch takes
            self.history = deepcopy(past)
            channel = HbmMemory(self.config.ports, self.config.port_bits // 8, timing, begin,
                                ahead=self.config.fifo_beats)
            found = predict(self.config, compiled.program, run, tokens=tokens, channel=channel,
                            program_at=compiled.map.address("program"), history=self.history)
            first -= found.spans[0].dispatch + 1 if not begin else 0
        return found

    def different(self, accelerators: dict[str, Accelerator], rows: int) -> int:
        """Logits and bytes of KV records that are not the functional level's."""
        both = [accelerators[name] for name in ("functional", "rtl")]
        wrong = 0
        if rows:
            one, other = (accelerator.logits().view(np.uint32) for accelerator in both)
            wrong += int(np.count_nonzero(one != other)) + (both[0].argmax() != both[1].argmax())
        for port in range(self.config.ports):
            for first, size in self.image.records():
                one, other = (accelerator.device.read_memory(port, first, size) for accelerator in both)
                wrong += int(np.count_nonzero(one != other))
        return wrong


def devices(check: bool) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names of devices and their options."""
    yield "rtl", {"memory": "hbm", "log": lambda line: print(f"  {line}", flush=True)}
    if check:
        yield "functional", {"threads": os.cpu_count() or 1}


def measure(model: ModelConfig, config: OverlayConfig, skip: float, options: argparse.Namespace,
            folder: Path) -> Iterator[Line]:
    """All runs of one share of skipped modules."""
    longest = max([*options.context, options.prompt])
    kv = "reuse" if skip else ""
    tokens = np.random.default_rng(options.seed).integers(0, model.vocab, longest).tolist()
    begin = time.perf_counter()
    image = random_image(model, config, longest, folder, kv=kv, kind=options.weights, seed=options.seed,
                         tokens=tokens, sizes=KvSizes(format=options.kv_format, buffer=options.buffer))
    size = sum(path.stat().st_size for path in image.files)
    print(f"  {size / 1e9:.2f} GB of memory image in {time.perf_counter() - begin:.0f} s, chunks of "
          f"{image.compiled.map.chunk} tokens", flush=True)
    bench = Bench(image, RandomRoutes(skip, SKIP_SEED, exact=True) if kv else None, options.check)
    try:
        for context in options.context:
            accelerators = bench.accelerators(context - 1)
            yield bench.run(f"{skip:.0%} skipped, decode, {context} positions", accelerators, [tokens[context - 1]], 1)
        starts = list(range(0, options.prompt, image.compiled.map.chunk))[-options.chunks:]
        accelerators = bench.accelerators(starts[0]) if starts else {}
        for first in starts:
            part = tokens[first:min(first + image.compiled.map.chunk, options.prompt)]
            last = first + len(part) == options.prompt
            yield bench.run(f"{skip:.0%} skipped, prompt {first}..{first + len(part) - 1}", accelerators, part,
                            int(last))
    finally:
        bench.close()


def main() -> int:
    """Run everything and print a table."""
    options = arguments()
    config, whole = configuration(options.config), find_geometry(options.geometry)
    model = replace(whole, layers=options.layers or whole.layers)
    print(f"{model.name}, {model.layers} of {whole.layers} layers, {options.weights}, KV {options.kv_format}, "
          f"configuration {config.name}; {machine()}", flush=True)
    lines: list[Line] = []
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        for skip in options.skip:
            for line in measure(model, config, skip, options, Path(folder)):
                lines.append(line)
                print("  " + " | ".join(line.cells()), flush=True)
    print("\n" + "\n".join(f"| {' | '.join(cells)} |" for cells in
                           (HEAD, ("---",) * len(HEAD), *(line.cells() for line in lines))))
    if model.layers == whole.layers:
        for line in lines:
            if "decode" in line.what:
                print(f"{line.what}: {CORE_MHZ * 1e6 / line.cycles:.1f} tokens/s at {CORE_MHZ} MHz (simulated)")
    print(f"peak memory {peak_memory() / 2**30:.1f} GiB, mapped images included")
    return int(not all(line.holds for line in lines))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (SkipopuError, ConfigError) as error:
        sys.exit(f"u280: {error}")
