"""What routers cost in quality: skip rates against perplexity, KL divergence and top-1 agreement, flattering or not.

Everything is measured in float32 against the unrouted model, on the model as the overlay gets it: LoRA factors merged
into its quantised weights. By default on the last sequences of an .npz file, those that `skipopu tune` held out; a text
file gives text of another kind. `weights` is the share of the layers' weights that decode leaves unread; `random` skips
as many modules of each kind as the routers do, drawn for each token, essential ones executed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from skipopu.host.errors import RequestError, SkipopuError
from skipopu.host.evaluate import load_sequences
from skipopu.host.lora import merged
from skipopu.host.model import Model
from skipopu.host.routers import NAMED_ROUTERS, Routers, find_routers
from skipopu.host.session import open_source
from skipopu.host.tuning.student import Student
from skipopu.host.tuning.tuner import HeldOut, measure

COLUMNS = "perplexity", "KL", "top-1", "weights", "attention", "MLP"
SHIFTED = (0.10, 0.25, 0.40)  # shares of weights that one shift of all scores is searched for


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("routers", nargs="*", default=list(NAMED_ROUTERS), help="names or files (default: %(default)s)")
    parser.add_argument("--tokens", type=Path, required=True, help=".npz file with token ids, or text")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--last", type=int, default=32, help="sequences from the end (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--brief", action="store_true", help="the routers' own row and the random one only")
    return parser.parse_args()


def windows(path: Path, model: Model, length: int) -> np.ndarray:
    """int [n, length] tokens: sequences of an .npz file cut to ``length``, or a text cut in pieces of that length."""
    if path.suffix == ".npz":
        return load_sequences(path)[:, :length]
    if model.tokenizer is None:
        raise RequestError(f"model {model.config.name} has no tokenizer for {path.name}; give an .npz file of tokens")
    try:
        tokens = model.tokenizer.encode(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read as text ({error})") from None
    if len(tokens) < length:
        raise RequestError(f"{path}: holds {len(tokens)} tokens, fewer than --length {length}")
    return np.array(tokens[:len(tokens) // length * length]).reshape(-1, length)


def student_of(model: Model, routers: Routers) -> Student:
    """The model under its routers; modules whose router is the same for every input are essential."""
    essential = ~routers.difference.any(-1) & (routers.bias >= 0)
    student = Student(model, routers.kv, essential)
    student.adopt(replace(routers, lora=None))
    return student


def shifted(student: Student, model: Model, text: np.ndarray, share: float, teacher: dict) -> HeldOut:
    """The operating point nearest to ``share`` of weights, reached by adding one number to all scores."""
    bias, low, high = student.bias.detach().clone(), -12.0, 12.0
    found = None
    for _ in range(7):
        middle = (low + high) / 2
        student.bias.data.copy_(bias + middle)
        found = measure(student, model, text[:4], teacher=teacher)
        low, high = (middle, high) if found.skip > share else (low, middle)
    found = measure(student, model, text, teacher=teacher)
    student.bias.data.copy_(bias)
    return found


def rows(model: Model, name: str, text: np.ndarray, brief: bool, teacher: dict) -> Iterator[tuple[str, HeldOut]]:
    """Label and measurement of each line of one router file's table."""
    routers = find_routers(name, model)
    changed, plain = merged(model, routers)
    student = student_of(changed, plain)
    own = measure(student, model, text, teacher=teacher)
    yield f"{name}", own
    rng = np.random.default_rng(0)
    drawn = rng.random((model.config.layers, *text.shape, 2))
    essential = student.protected.numpy()
    parts = 1 - essential.mean(0)  # of the modules of a kind, those that may skip
    rate = np.array([own.skip_attention, own.skip_mlp]) / np.maximum(parts, 1e-9)
    gates = (drawn >= rate) | essential[:, None, None]
    yield "  random at these rates", measure(student, model, text, gates=gates, teacher=teacher)
    if brief:
        return
    yield "  nothing skipped", measure(student, model, text, gates=np.ones_like(gates), teacher=teacher)
    for share in SHIFTED:
        yield f"  shifted to {share:.0%}", shifted(student, model, text, share, teacher)
    if routers.lora:
        alone = student_of(model, replace(routers, lora=None))
        yield "  routers without LoRA", measure(alone, model, text, teacher=teacher)
        yield "  random, without LoRA", measure(alone, model, text, gates=gates, teacher=teacher)
        exact = Student(model, routers.kv, essential, lora=True)
        exact.adopt(routers)
        yield "  before merging (float32)", measure(exact, model, text, teacher=teacher)


def cells(found: HeldOut) -> tuple[str, ...]:
    """One line of the table."""
    return (f"{found.perplexity:.3f}", f"{found.divergence:.3f}", f"{found.top1:.1%}", f"{found.skip:.1%}",
            f"{found.skip_attention:.1%}", f"{found.skip_mlp:.1%}")


def main() -> None:
    """Measure and print, row by row."""
    options = arguments()
    torch.set_grad_enabled(False)
    model = open_source(options.model)
    if not isinstance(model, Model):
        raise RequestError("routers are measured on the model itself, not on a bundle; give its file or name")
    text, teacher = windows(options.tokens, model, options.length)[-options.last:], dict[int, torch.Tensor]()
    print(f"{model.config.name}: {len(text)} sequences of {text.shape[1]} tokens from {options.tokens.name}; "
          "all measured")
    print(f"{'':28}" + "".join(f"{column:>12}" for column in COLUMNS))
    first = True
    for name in options.routers:
        for label, found in rows(model, name, text, options.brief, teacher):
            if first:
                unrouted = f"{found.unrouted_perplexity:.3f}", "0.000", "100.0%", *["0.0%"] * 3
                print(f"{'unrouted':28}" + "".join(f"{cell:>12}" for cell in unrouted))
                first = False
            print(f"{label:28}" + "".join(f"{cell:>12}" for cell in cells(found)), flush=True)


if __name__ == "__main__":
    try:
        main()
    except SkipopuError as error:
        sys.exit(f"error: {error}")
