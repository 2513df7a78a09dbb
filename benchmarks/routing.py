"""What skipping saves on the RTL: decode in proportion to the bytes skipped, attention in a prompt step by step.
Also what the reductions cost.

Routes are forced, so that every variant skips the same modules, and exactly as many as wanted. Decode has layers of
SmolLM2's shapes; the prompt also has a model with as many KV heads as query heads, like the paper's Llama-2. Exits with
1 if a target is missed.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import numpy as np
from common import Row, at_least, at_most, machine, show
from skipopu.golden.random_model import random_model
from skipopu.host.compiler import compile_model
from skipopu.host.model import Model
from skipopu.host.routes import always_executing
from skipopu.host.runtime import Accelerator
from skipopu.host.session import open_accelerator
from skipopu.host.timeline import blocks, exposed, spans
from skipopu.hw.config import OverlayConfig, preset

SMOLLM2 = {"hidden": 576, "heads": 9, "kv_heads": 3, "head_dim": 64, "mlp": 1536}
LLAMA2 = {"hidden": 512, "heads": 8, "kv_heads": 8, "head_dim": 64, "mlp": 1376}  # its proportions, an eighth as wide
TINY = {"hidden": 64, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp": 192}
REDUCTIONS = ("vnorm", "vadd", "vscore", "vprob", "vscale", "vbias", "vinit")
HALF_A_POINT = 0.005
PAPER = {"skip": 1.14, "reuse": 1.29, "fused": 1.40}  # SkipOPU, figure 8


@dataclass
class Result:
    """Sums over the runs of one variant: cycles, superbeats and port beats.

    read : superbeats from memory or the history buffer: what a buffered record saves in bytes is not skipped
    """

    cycles: int = 0
    attention: int = 0
    read: int = 0
    kv_written: int = 0
    exposed: int = 0
    skipped: int = 0  # attention blocks, of ``asked``
    asked: int = 0


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--config", default="sim", help="overlay configuration (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=6, help="layers, for the prompt (default: %(default)s)")
    parser.add_argument("--decode-layers", type=int, default=12, help="layers, for decode (default: %(default)s)")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt (default: %(default)s)")
    parser.add_argument("--count", type=int, default=12, help="tokens to decode (default: %(default)s)")
    parser.add_argument("--skip", type=float, default=0.25, help="share of modules that skip (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of the forced routes (default: %(default)s)")
    return parser.parse_args()


def routes(layers: int, prompt: int, count: int, rate: float, seed: int) -> np.ndarray:
    """bool [layers, 2, prompt + count], true where a module executes.

    Of the attention and of the MLPs ``rate`` is skipped, in the prompt and in the tokens behind it each; but no
    attention of layer 0, which computes keys and values in any case.
    """
    rng, parts = np.random.default_rng(seed), []
    for tokens in (prompt, count):
        part = np.ones((layers, 2, tokens), bool)
        for module, first in ((0, min(1, layers - 1)), (1, 0)):
            ends = np.rint(np.linspace(0, rate * layers * tokens, layers - first + 1)).astype(int)
            for layer, skipped in enumerate(np.diff(ends), first):
                part[layer, module, rng.choice(tokens, min(skipped, tokens), replace=False)] = False
        parts.append(part)
    return np.concatenate(parts, 2)


def recorded(accelerator: Accelerator, result: Result, tokens: list[int], rows: int) -> None:
    """One run, added to the result."""
    sim = accelerator.device.sim
    sim.record()
    accelerator.run(tokens, 0, rows)
    events = sim.events()
    counters, program = accelerator.stats[-1].counters, accelerator.compiled.program
    run = spans(program, events)
    if (routes := accelerator.stats[-1].routes) is not None:
        result.skipped += int((~routes[:, 0]).sum())
        result.asked += routes[:, 0].size
    result.cycles += counters["cycles"]
    config = accelerator.config
    result.read += counters["bytes_read"] // config.superbeat_bytes + counters["kv_buffered"] // config.ports
    result.kv_written += counters["kv_written"]
    result.attention += sum(block.cycles for block in blocks(program, run) if block.module == "attention")
    result.exposed += sum(cycles for name, cycles in exposed(program, run, events).items() if name in REDUCTIONS)


def measure(model: Model, config: OverlayConfig, args: argparse.Namespace, kv: str = "",
            fused: bool = True, prompt: int = 0, count: int = 0, skip: float | None = None) -> Result:
    """One variant: a prompt without logits, or ``count`` tokens with logits behind a short prompt.

    skip : share of modules, in place of the one asked for
    """
    routers = always_executing(model, kv) if kv else None
    compiled = compile_model(model, config, args.prompt + args.count, routers, fused=fused)
    ahead = compiled.map.chunk if count else prompt  # tokens before those that are decoded
    rate = args.skip if skip is None else skip
    force = routes(model.config.layers, ahead, count, rate, args.seed) if kv else None
    accelerator = open_accelerator("rtl", compiled, lambda line: print(f"  {line}", flush=True), force=force)
    tokens = np.random.default_rng(args.seed).integers(0, model.config.vocab, args.prompt + args.count).tolist()
    result = Result()
    try:
        for first in range(0, prompt, compiled.map.chunk):
            recorded(accelerator, result, tokens[first:min(first + compiled.map.chunk, prompt)], 0)
        if count:
            accelerator.run(tokens[:compiled.map.chunk])
            for token in tokens[compiled.map.chunk:][:count]:
                recorded(accelerator, result, [token], 1)
    finally:
        accelerator.device.close()
    return result


def decode(model: Model, config: OverlayConfig, args: argparse.Namespace) -> list[Row]:
    """Cycles and bytes of decoding, beside the same program when nothing is skipped, and beside one without routers."""
    plain = measure(model, config, args, count=args.count)
    rows = [Row("no routers: cycles per token", plain.cycles / args.count, "simulated")]
    for kv in ("dense", "reuse"):
        whole, got = (measure(model, config, args, kv, count=args.count, skip=skip) for skip in (0, None))
        saved, ideal = 1 - got.cycles / whole.cycles, 1 - got.read / whole.read
        rows += [
            Row(f"{kv}, nothing skipped: cycles per token", whole.cycles / args.count, "simulated"),
            Row(f"{kv}: cycles per token", got.cycles / args.count, "simulated"),
            Row(f"{kv}: superbeats saved", ideal, "counted", "{:.1%}"),
            Row(f"{kv}: cycles saved", saved, "simulated", "{:.1%}"),
            Row(f"{kv}: share of the ideal saving", saved / ideal, "simulated", "{:.1%}", at_least(0.95, "{:.0%}")),
            Row(f"{kv}: the same against no routers", (1 - got.cycles / plain.cycles) / (1 - got.read / plain.read),
                "simulated", "{:.1%}"),
            Row(f"{kv}: reductions that nothing hides", got.exposed / got.cycles, "simulated", "{:.2%}",
                at_most(0.02, "{:.0%}")),
        ]
    return rows


def prompt(model: Model, config: OverlayConfig, args: argparse.Namespace, like_paper: bool) -> list[Row]:
    """Cycles of attention while a prompt is read, from the dense program without fusion to the one that is shipped."""
    base = measure(model, config, args, fused=False, prompt=args.prompt)
    rows = [Row("dense, not fused: cycles of attention", base.attention, "simulated")]
    for name, kv, fused in (("skip", "dense", False), ("skip, reuse", "reuse", False),
                            ("skip, reuse, fused", "reuse", True)):
        got = measure(model, config, args, kv, fused, prompt=args.prompt)
        paper = PAPER[name.rpartition(" ")[2]]
        if name == "skip, reuse":
            skipped, saved = got.skipped / got.asked, 1 - got.kv_written / base.kv_written
            rates = [Row("skip, reuse: attention skipped", skipped, "counted", "{:.2%}"),
                     Row("skip, reuse: KV bytes saved", saved, "counted", "{:.2%}",
                         at_least(skipped - HALF_A_POINT, "{:.1%}"))]
        rows += [Row(f"{name}: cycles of attention", got.attention, "simulated"),
                 Row(f"{name}: speed-up (paper {paper:.2f})", base.attention / got.attention, "simulated", "{:.2f}",
                     at_least(paper, "{:.2f}") if like_paper else None)]
    plain = measure(model, config, args, prompt=args.prompt)
    return [*rows, *rates, Row("dense, fused: speed-up", base.attention / plain.attention, "simulated", "{:.2f}")]


def main() -> int:
    """Run all variants and print the tables."""
    args = arguments()
    config = preset(args.config)
    print(machine())
    print(f"configuration {config.name}, {args.skip:.0%} of modules forced to skip")
    print(f"layers: {args.layers} for the prompt, {args.decode_layers} for decode")
    tables = []
    for name, shape in (("SmolLM2's shapes", SMOLLM2), ("Llama-2's proportions", LLAMA2)):
        if config.name == "tiny":
            name, shape = f"{name}, for tiny", TINY | {"kv_heads": 2 if shape is SMOLLM2 else 4}

        def model(layers: int, shape: dict[str, int] = shape) -> Model:
            return random_model(args.seed, kinds=("q4_1",), layers=layers, vocab=1024, context=1024, **shape)

        if shape["kv_heads"] != shape["heads"]:
            tables.append(decode(model(args.decode_layers), config, args))
            show(f"Decode of {args.count} tokens, {name}", tables[-1])
        tables.append(prompt(model(args.layers), config, args, shape["kv_heads"] == shape["heads"]))
        show(f"Attention in a prompt of {args.prompt} tokens, {name}", tables[-1])
    return int(any(row.cells()[3] == "MISSED" for table in tables for row in table))


if __name__ == "__main__":
    sys.exit(main())
