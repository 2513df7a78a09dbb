"""``skipopu tune``: from options to a router file, with checkpoints and progress on the way."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import typer

from ..console import note, progress, whole_file

__all__ = ["command_line", "tune"]

_GO_ON = {"ramp": 0.0, "routers_first": 0.0, "lora_last": 0.4}  # of runs from routers which skip already
EVERY = 25  # steps between two lines where the progress bar cannot be seen


def tune(model: Annotated[str, typer.Option("-m", "--model", help="GGUF file, Hugging Face folder, or a name.")],
         tokens: Annotated[str, typer.Option("--tokens", help=".npz file with `tokens`, integers [n, length].")],
         output: Annotated[str, typer.Option("-o", "--output", help="Router file to write.")],
         skip: Annotated[float, typer.Option("--skip", help="Share of the layers' weights to leave unread, 0..0.9.")]
         = 0.25,
         kv: Annotated[str, typer.Option("--kv", help="Keys and values of tokens that skip attention: reuse those of "
                                                      "an earlier layer, or dense.")] = "reuse",
         steps: Annotated[int, typer.Option("--steps", help="Steps in all.")] = 1000,
         batch: Annotated[int, typer.Option("--batch", help="Sequences a step.")] = 4,
         lora: Annotated[bool, typer.Option("--lora/--no-lora", help="Train LoRA factors too, or routers only.")]
         = True,
         seed: Annotated[int, typer.Option("--seed", min=0, help="Of the random numbers.")] = 0,
         router_rate: Annotated[float, typer.Option("--router-rate", help="Learning rate of the routers.")] = 3e-3,
         lora_rate: Annotated[float, typer.Option("--lora-rate", help="Learning rate of the LoRA factors.")] = 2e-3,
         protect: Annotated[float, typer.Option("--protect", help="Modules that cost more than this when left out, in "
                                                                  "nats per token, always execute.")] = 0.6,
         held_out: Annotated[int, typer.Option("--held-out", help="Sequences at the end of the file that only "
                                                                  "measure.")] = 32,
         start: Annotated[str | None, typer.Option("--from", help="Routers to start from instead of none.")] = None,
         resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint beside the output.")] = False,
         save_every: Annotated[int, typer.Option("--save-every", min=1, help="Steps between checkpoints.")] = 50,
         limit: Annotated[int, typer.Option("--limit", help="Held-out sequences to measure on along the way.")] = 8,
         ) -> None:
    """Train routers for a model, and LoRA factors, so that tokens skip modules they can do without."""
    import torch

    from ..errors import RequestError
    from ..evaluate import load_sequences
    from ..model import Model
    from ..routers import find_routers, save_routers
    from ..session import open_source
    from .checkpoint import restore, save
    from .tuner import Settings, Tuner, measure
    settings = Settings(kv=kv, skip=skip, steps=steps, seed=seed, batch=batch, lora=lora, router_rate=router_rate,
                        lora_rate=lora_rate, protect=protect, **({} if start is None else _GO_ON))
    target, checkpoint = Path(output), Path(f"{output}.checkpoint")
    if not target.absolute().parent.is_dir():
        raise RequestError(f"{target}: there is no folder {target.parent} to write it to")
    if resume != checkpoint.exists():
        raise RequestError(f"{checkpoint}: there is no checkpoint to resume from; leave out --resume" if resume else
                           f"{checkpoint} is there from another run; give --resume to go on with it, or remove it")
    sequences = load_sequences(tokens)
    source = open_source(model)
    if not isinstance(source, Model):
        raise RequestError("tuning needs the model itself; a bundle holds only its compiled form")
    if not 1 <= held_out < len(sequences):
        raise RequestError(f"--held-out must be 1..{len(sequences) - 1} of the {len(sequences)} sequences, "
                           f"not {held_out}")
    _check(sequences, source)
    first = None if start is None else find_routers(start, source)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    note(f"tuning on {device}: {len(sequences) - held_out} sequences of {sequences.shape[1]} tokens, {held_out} more "
         "held out")
    tuner = Tuner(source, sequences[:-held_out], settings, target.absolute().parent / "targets", device)
    unseen, teacher = sequences[-held_out:], dict[int, torch.Tensor]()
    if resume:
        restore(checkpoint, tuner)
    else:
        modules = 2 * source.config.layers
        with progress("leaving out one module at a time", modules) as update:
            for done in tuner.prepare(first):
                update(done, None)
        note(f"{int(tuner.student.protected.sum())} of {modules} modules are essential and always execute")
        save(checkpoint, tuner)
    begin, state = time.monotonic(), ""
    with progress("tuning", steps) as update:
        while tuner.step < steps:
            report = tuner.advance()
            line = (f"loss {report.loss:.3f}, KL {report.divergence:.3f}, skipping {report.skip:.1%} (attention "
                    f"{report.skip_attention:.1%}, MLP {report.skip_mlp:.1%})")
            update(report.step, f"{line}{state}")
            if report.step % EVERY == 0 and not sys.stderr.isatty():
                note(f"step {report.step}/{steps}, {time.monotonic() - begin:.0f} s: {line}{state}")
            if report.step % save_every == 0 or report.step == steps:
                save(checkpoint, tuner)
                found = measure(tuner.student, source, unseen[:limit], teacher=teacher)
                state = (f"; held out perplexity {found.perplexity:.3f} (unrouted {found.unrouted_perplexity:.3f}) at "
                         f"{found.skip:.1%}")
    tuner.shift_to_goal(unseen)  # training text is skipped at another rate
    final = asdict(measure(tuner.student, source, unseen))
    about = {"command": command_line(sys.argv), "settings": json.dumps(asdict(settings)),
             "held_out": json.dumps(final)}
    if first is not None:  # what was run before this, so that the file names every command that made it
        about["before"] = "; ".join(first.notes[key] for key in ("before", "command") if key in first.notes)
    routers = tuner.student.routers()
    about["points"] = json.dumps([[round(rate, 4), shift] for rate, shift in tuner.operating_points(routers, unseen)])
    with whole_file(output) as partial:
        save_routers(partial, replace(routers, notes=about))
    print(f"{output}: {kv} routers, held-out perplexity {final['perplexity']:.3f}, unrouted "
          f"{final['unrouted_perplexity']:.3f}; they leave {final['skip']:.1%} of weights unread, "
          f"{final['skip_attention']:.1%} of attention and {final['skip_mlp']:.1%} of MLP modules out (all measured)")


def _check(sequences, model) -> None:
    """Raises RequestError if the model cannot read the sequences."""
    from ..errors import RequestError
    if sequences.max() >= model.config.vocab or sequences.min() < 0:
        raise RequestError(f"tokens must be 0..{model.config.vocab - 1} for model {model.config.name}, not "
                           f"{sequences.min()}..{sequences.max()}")
    if sequences.shape[1] > model.config.context:
        raise RequestError(f"sequences must be at most {model.config.context} tokens long for model "
                           f"{model.config.name}, not {sequences.shape[1]}")


def command_line(arguments: Sequence[str]) -> str:
    """The command as typed, without the folders of its files: it goes into the files it writes."""
    return " ".join(["skipopu", *(Path(part).name if "/" in part else part for part in arguments[1:])])
