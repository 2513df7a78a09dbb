"""Accuracy of the overlay's number formats: the functional level against the float reference on the same tensors.

The functional level defines every bit of the RTL, so these numbers are the RTL's too. By default on the paragraphs in
`data/paragraphs.txt`; give an .npz file with an array `tokens` [sequences, length], or a text file with one paragraph
between blank lines.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from common import Row, at_least, at_most, machine, peak_memory, show
from skipopu.golden.random_model import random_model
from skipopu.host.errors import RequestError, SkipopuError
from skipopu.host.evaluate import evaluate, load_sequences
from skipopu.host.model import Model
from skipopu.host.session import ReferenceGenerator, compile_source, open_accelerator, open_source

PARAGRAPHS = Path(__file__).parent / "data" / "paragraphs.txt"
TARGETS = {
    "kl": at_most(1e-3),
    "top1": at_least(0.985, "{:.1%}"),
    "perplexity": at_most(0.003, "{:.1%}"),
}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("tokens", nargs="?", type=Path, default=PARAGRAPHS, help="an .npz file with token ids, or text")
    parser.add_argument("--model", default="smollm2", help="as for `skipopu eval`, or random (default: %(default)s)")
    parser.add_argument("--config", default="sim", help="overlay configuration (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="sequences to read at most")
    return parser.parse_args()


def sequences_of(path: Path, model: Model, limit: int | None) -> list[list[int]]:
    """Token sequences of an .npz file, or one for each paragraph of a text. Raises RequestError if there are none."""
    if path.suffix == ".npz":
        return load_sequences(path, limit).tolist()
    if model.tokenizer is None:
        raise RequestError(f"model {model.config.name} has no tokenizer for {path.name}; give an .npz file of tokens")
    try:
        paragraphs = [" ".join(part.split()) for part in path.read_text(encoding="utf-8").split("\n\n") if part.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot be read as text ({error})") from None
    if not paragraphs:
        raise RequestError(f"{path}: holds no text")
    return [model.tokenizer.encode(text) for text in paragraphs[:limit]]


def main() -> None:
    """Evaluate and print."""
    options = arguments()
    model = random_model(1) if options.model == "random" else open_source(options.model)
    if not isinstance(model, Model):
        raise RequestError("the reference needs the model itself, not a bundle; give its file or name")
    sequences = sequences_of(options.tokens, model, options.limit)
    longest = max(len(tokens) for tokens in sequences)
    compiled = compile_source(model, options.config, longest)
    print(f"{compiled.map.model} on configuration {compiled.config.name}: {len(sequences)} sequences of up to "
          f"{longest} tokens; {machine()}", flush=True)
    begin = time.perf_counter()
    *_, result = evaluate(ReferenceGenerator(model, longest), open_accelerator("functional", compiled), sequences)
    seconds, found = time.perf_counter() - begin, result.as_json()
    difference = abs(found["perplexity"] / found["reference_perplexity"] - 1)
    show("functional level against the float reference", [
        Row("predictions", found["tokens"], form="{:,}"),
        Row("KL divergence, nats per token", found["kl"], "simulated", "{:.2e}", TARGETS["kl"]),
        Row("same likeliest token", found["top1"], "simulated", "{:.2%}", TARGETS["top1"]),
        Row("perplexity", found["perplexity"], "simulated", "{:.4f}"),
        Row("perplexity of the reference", found["reference_perplexity"], form="{:.4f}"),
        Row("difference of the two", difference, "simulated", "{:.3%}", TARGETS["perplexity"]),
    ])
    show("this machine", [
        Row("both levels, tokens/s", sum(map(len, sequences)) / seconds, form="{:.3g}"),
        Row("peak memory, GiB", peak_memory() / 2**30, form="{:.2f}"),
    ])


if __name__ == "__main__":
    try:
        main()
    except SkipopuError as error:
        sys.exit(f"error: {error}")
