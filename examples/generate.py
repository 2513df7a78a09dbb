"""Tell a story on a device: from a model's name to text.

    python examples/generate.py                                     # on the bit-exact model
    python examples/generate.py --device rtl --config tiny          # on the overlay's RTL, simulated
    python examples/generate.py --device serial --config ulx3s      # on a board
"""

import argparse
import sys

from skipopu.host.compiler import compile_model
from skipopu.host.errors import SkipopuError
from skipopu.host.load import load_model
from skipopu.host.routers import find_routers
from skipopu.host.sampling import Sampling
from skipopu.host.session import open_accelerator
from skipopu.hw.config import ConfigError, preset


def main() -> None:
    """Parse the options, tell the story token by token."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompt", nargs="?", default="Once upon a time")
    parser.add_argument("--device", default="functional", help="default: %(default)s")
    parser.add_argument("--config", default="tiny", help="configuration of the overlay; default: %(default)s")
    parser.add_argument("--tokens", type=int, default=100, help="at most; default: %(default)s")
    parser.add_argument("--seed", type=int, help="sample with this seed instead of taking the likeliest word")
    options = parser.parse_args()

    model = load_model("story")
    compiled = compile_model(model, preset(options.config), routers=find_routers("story:reuse", model))
    accelerator = open_accelerator(options.device, compiled)  # loads program, weights and tables
    with accelerator.device:
        sampling = None if options.seed is None else Sampling(temperature=1.0, seed=options.seed)
        print(options.prompt, end="")
        text = model.tokenizer.stream()
        for token in accelerator.generate(model.tokenizer.encode(options.prompt), options.tokens, sampling):
            print(text.feed(token), end="", flush=True)
        print(text.finish())
        attention, mlp = 1 - accelerator.decisions.mean((0, 2))
        print(f"{accelerator.position} tokens skipped {attention:.0%} of attention and {mlp:.0%} of MLP modules")


if __name__ == "__main__":
    try:
        main()
    except (SkipopuError, ConfigError) as error:
        sys.exit(f"generate: {error}")
