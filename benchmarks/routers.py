"""What routers cost in quality: skip rates against perplexity, KL divergence and top-1 agreement, flattering or not.

Everything is measured in float32 against the unrouted model, on the model as the overlay gets it: LoRA factors merged
into its quantised weights. By default on the last sequences of an .npz file, those that `skipopu tune` held out; a text
file gives text of another kind. `weights` is the share of the layers' weights that decode leaves unread. Next to the
routers stand three ways to skip as much without them: `random` skips as many modules of each kind, drawn for each
token, essential ones executed; `static` leaves the modules that the routers skip most out for every token; and `static,
base model` those whose absence costs least for their weights, one at a time, without any change of weights.
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
from skipopu.host.tuning.ablation import ablate
from skipopu.host.tuning.student import Student, read_share
from skipopu.host.tuning.tuner import ABLATION, HeldOut, measure, shift_to

SHIPPED = [name for name in NAMED_ROUTERS if name.startswith("smollm2:")]
COLUMNS = "perplexity", "KL", "top-1", "weights", "attention", "MLP"
SHIFTED = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30)  # shares of weights that one shift of all scores is searched for
SEARCHED = 8  # sequences that a shift is searched on


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("routers", nargs="*", default=[name for name in NAMED_ROUTERS if name.startswith("smollm2:")],
                        help="names or files (default: %(default)s)")
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
    """The model under its routers."""
    student = Student(model, routers.kv, routers.essential)
    student.adopt(replace(routers, lora=None))
    return student


def shifted(student: Student, model: Model, plain: Routers, text: np.ndarray, share: float,
            teacher: dict) -> HeldOut:
    """The operating point at about ``share`` of weights: one of those that the router file notes, if it does."""
    bias = student.bias.detach().clone()
    if "points" in plain.notes:
        student.adopt(plain.at(share))
    else:
        tokens = torch.tensor(text[:SEARCHED].astype(np.int64))
        shift_to(student, tokens, torch.tensor(read_share(model, student.kv), dtype=torch.float32), share)
    found = measure(student, model, text, teacher=teacher)
    student.bias.data.copy_(bias)
    return found


def static_gates(order: np.ndarray, share: np.ndarray, goal: float, text: np.ndarray) -> np.ndarray:
    """Gates bool [layers, n, length, 2] that leave out, for all tokens, the first modules (flat indices) of ``order``:
    as many as bring the skipped share of weights nearest to ``goal``."""
    totals = np.concatenate(([0.0], share.flatten()[order].cumsum()))
    gates = np.ones(share.size, bool)
    gates[order[:np.abs(totals - goal).argmin()]] = False
    return np.broadcast_to(gates.reshape(-1, 1, 1, 2), (len(share), *text.shape, 2)).copy()


def static_orders(model: Model, student: Student, kv: str, text: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flat indices of modules that are not essential: by how often the routers skip them, the most skipped first, and
    by what leaving each out alone costs the base model for each weight, the cheapest first."""
    free = ~student.protected.numpy().flatten()
    tokens = torch.tensor(text[:SEARCHED].astype(np.int64))
    runs = student(tokens)[1].mean((1, 2)).numpy().flatten()
    costs, share = np.zeros((model.config.layers, 2)), read_share(model, kv)
    for layer, module, cost in ablate(Student(model, kv, np.zeros_like(costs, bool)), tokens[:2, :ABLATION]):
        costs[layer, module] = cost / share[layer, module]
    by_skips, by_cost = (np.argsort(key, kind="stable") for key in (runs, costs.flatten()))
    return by_skips[free[by_skips]], by_cost[free[by_cost]]


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
    share = read_share(model, routers.kv)
    by_skips, by_cost = static_orders(model, student, routers.kv, text)
    yield "  static", measure(student, model, text, gates=static_gates(by_skips, share, own.skip, text),
                              teacher=teacher)
    base = student_of(model, replace(routers, lora=None))
    yield "  static, base model", measure(base, model, text, gates=static_gates(by_cost, share, own.skip, text),
                                          teacher=teacher)
    yield "  nothing skipped", measure(student, model, text, gates=np.ones_like(gates), teacher=teacher)
    for share in SHIFTED:
        yield f"  shifted to {share:.0%}", shifted(student, model, plain, text, share, teacher)
    if routers.lora:
        yield "  routers without LoRA", measure(base, model, text, teacher=teacher)
        yield "  random, without LoRA", measure(base, model, text, gates=gates, teacher=teacher)
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
