"""``skipopu train``: from lines of text to a small routed Llama in 4 bits, as a GGUF file and its routers."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from ..console import note, progress, whole_file
from .command import command_line

__all__ = ["train"]

_EVERY = 100  # steps between two lines where the progress bar cannot be seen
_ROPE_THETA = 1000.0  # for contexts of some hundred positions


def train(output: Annotated[str, typer.Option("-o", "--output", help="GGUF file to write, and beside it the routers, "
                                                                     "with -reuse or -dense in their file's name.")],
          text: Annotated[str | None, typer.Option("--text", help="Text file, one story a line, of few different "
                                                                  "words. Default: stories from a grammar.")] = None,
          count: Annotated[int, typer.Option("--stories", min=2, help="Stories that the grammar tells.")] = 30000,
          layers: Annotated[int, typer.Option("--layers")] = 4,
          hidden: Annotated[int, typer.Option("--hidden", help="Features of the residual stream.")] = 64,
          heads: Annotated[int, typer.Option("--heads", help="Query heads.")] = 4,
          kv_heads: Annotated[int, typer.Option("--kv-heads", help="Key and value heads.")] = 1,
          head_dim: Annotated[int, typer.Option("--head-dim")] = 16,
          mlp: Annotated[int, typer.Option("--mlp", help="Features inside the MLP.")] = 128,
          context: Annotated[int, typer.Option("--context", help="Tokens of a sequence.")] = 104,
          vocab: Annotated[int, typer.Option("--vocab", help="Most tokens that the text may need.")] = 1024,
          steps: Annotated[int, typer.Option("--steps")] = 1500,
          batch: Annotated[int, typer.Option("--batch", help="Sequences a step.")] = 24,
          rate: Annotated[float, typer.Option("--rate", help="Learning rate.")] = 4e-3,
          skip: Annotated[float, typer.Option("--skip", help="Share of the layers' weights to leave unread, 0..0.9.")]
          = 0.25,
          kv: Annotated[str, typer.Option("--kv", help="Keys and values of tokens that skip attention: reuse those of "
                                                       "an earlier layer, or dense.")] = "reuse",
          seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random numbers.")] = 0,
          held_out: Annotated[int, typer.Option("--held-out", help="Stories at the end of the text that only measure.")]
          = 500) -> None:
    """Train a small Llama from nothing, with 4-bit weights and routers by which its tokens skip modules."""
    import numpy as np

    from ..errors import RequestError
    from ..gguf_export import write_gguf
    from ..gguf_import import load_gguf
    from ..model import GROUP, ModelConfig
    from ..routers import check_kv, save_routers
    from .stories import tell
    from .training import Recipe, Trainer, blank_model
    from .words import END, pack, read_stories, word_tokenizer
    recipe = Recipe(steps=steps, batch=batch, rate=rate, skip=skip, kv=check_kv(kv), seed=seed)
    target = Path(output)
    routers_target = target.with_name(f"{target.stem}-{kv}.safetensors")
    if not target.absolute().parent.is_dir():
        raise RequestError(f"{target}: there is no folder {target.parent} to write it to")
    for name, width in (("hidden", hidden), ("heads x head-dim", heads * head_dim), ("mlp", mlp)):
        if width % GROUP:
            raise RequestError(f"--{name} must be a multiple of {GROUP} for 4-bit weights, not {width}")
    stories = [story for story, _ in tell(count, seed)] if text is None else read_stories(text)
    if not 1 <= held_out < len(stories):
        raise RequestError(f"--held-out must be 1..{len(stories) - 1} of the {len(stories)} stories, not {held_out}")
    tokenizer, metadata = word_tokenizer(stories, vocab)
    config = ModelConfig(layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim, mlp=mlp,
                         vocab=tokenizer.vocab, context=context, rope_theta=_ROPE_THETA,
                         rms_eps=float(np.float32(1e-5)), bos_id=END, eos_ids=(END,), name=target.stem)
    sequences = pack(stories, tokenizer, context)
    learned, unseen = sequences[:-held_out], sequences[-held_out:]
    model = replace(blank_model(config, seed), tokenizer=tokenizer)
    parameters = sum(int(np.prod(tensor.shape)) for tensor in model.tensors.values())
    note(f"training {parameters:,} parameters on {len(learned)} stories of {tokenizer.vocab} tokens, {held_out} more "
         "held out")
    trainer, begin, found = Trainer(model, learned, recipe), time.monotonic(), {}
    with progress("training", steps) as update:
        while trainer.step < steps:
            if trainer.step == recipe.routed_at:
                found["plain"] = trainer.measure(unseen, rounded=False, routed=False)
                note(f"float weights, all modules: {found['plain'].loss:.4f} nats per token held out")
            loss, skipped = trainer.advance()
            line = f"loss {loss:.4f} nats per token, skipping {skipped:.1%}"
            update(trainer.step, line)
            if trainer.step % _EVERY == 0 and not sys.stderr.isatty():
                note(f"step {trainer.step}/{steps}, {time.monotonic() - begin:.0f} s: {line}")
    found |= {"float": trainer.measure(unseen, rounded=False), "unrouted": trainer.measure(unseen, routed=False),
              "final": trainer.measure(unseen)}
    about = {"command": command_line(sys.argv), "recipe": json.dumps(asdict(recipe)),
             "held_out": json.dumps({name: asdict(value) for name, value in found.items()})}
    with whole_file(target) as partial:
        write_gguf(trainer.trainee.model(model), partial, metadata | {"general.description": json.dumps(about)})
    routers = replace(trainer.trainee.routers(about), base=load_gguf(target).identity)
    with whole_file(routers_target) as partial:
        save_routers(partial, routers)
    final = found["final"]
    print(f"{target}, {routers_target}: {parameters:,} parameters in 4 bits, {final.loss:.4f} nats per token held out; "
          f"they leave {final.skip:.1%} of weights unread, {final.skip_attention:.1%} of attention and "
          f"{final.skip_mlp:.1%} of MLP modules out. With all modules {found['unrouted'].loss:.4f}, with weights not "
          f"rounded {found['float'].loss:.4f} nats (all measured)")
