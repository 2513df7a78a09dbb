"""Sample the text that the shipped routers were tuned on: a model's own, begun as given sequences begin.

Half of the sequences start with the first tokens of a sequence of the seed file, the others with an empty user turn,
whose question the model then asks itself. The last sequences of the seed file give no beginnings and stay last, for
measurements on text unseen in tuning.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from skipopu.host.errors import RequestError, SkipopuError
from skipopu.host.evaluate import load_sequences
from skipopu.host.model import Model
from skipopu.host.session import open_source
from skipopu.host.tuning.selftext import self_text

USER = (1, 4093, 198)  # "<|im_start|>user\n" in SmolLM2's vocabulary


def main() -> None:
    """Sample in batches; the file grows with each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("seeds", type=Path, help=".npz file whose sequences give the beginnings")
    parser.add_argument("output", type=Path, help=".npz file to write: `tokens`, seeds and new, held-out seeds last")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--held-out", type=int, default=32, help="sequences at the seed file's end that stay unseen")
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--batch", type=int, default=128, help="sequences sampled at once")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    model = open_source(options.model)
    if not isinstance(model, Model):
        raise RequestError("sampling needs the model itself, not a bundle")
    seeds = load_sequences(options.seeds)
    kept, held_out = seeds[:-options.held_out], seeds[-options.held_out:]
    rng = np.random.default_rng(options.seed)
    written = [kept]
    for batch in range(options.batches):
        count = 3 + batch % 4  # prompts of one batch have one length
        begun = kept[rng.integers(len(kept), size=options.batch // 2), :count]
        asked = np.array([USER] * (options.batch - len(begun)))
        if count > len(USER):  # whole questions start in many ways: take the first words of some
            questions = kept[(kept[:, :len(USER)] == USER).all(1)]
            asked = questions[rng.integers(len(questions), size=len(asked)), :count]
        prompts = np.concatenate((begun, asked))
        sampled = [token.numpy() for token in self_text(model, prompts.tolist(), kept.shape[1],
                                                        seed=options.seed + batch)]
        written.append(np.concatenate((prompts, np.stack(sampled, 1)), 1))
        np.savez_compressed(options.output, tokens=np.concatenate((*written, held_out)).astype(np.uint16))
        print(f"{sum(map(len, written))} sequences")


if __name__ == "__main__":
    try:
        main()
    except SkipopuError as error:
        sys.exit(f"selftext: {error}")
