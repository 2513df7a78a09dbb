"""Read a device's counters after every token: cycles, bytes, and what skipping saved.

    python examples/counters.py                                     # the overlay's RTL, simulated
    python examples/counters.py --device serial --config ulx3s      # a board
"""

import argparse
import sys

from skipopu.host.compiler import compile_model
from skipopu.host.errors import SkipopuError
from skipopu.host.load import load_model
from skipopu.host.routers import find_routers
from skipopu.host.session import open_accelerator
from skipopu.hw.config import ConfigError, preset


def main() -> None:
    """Print a line for every run of the program, and what they make together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="rtl", help="default: %(default)s")
    parser.add_argument("--config", default="tiny", help="configuration of the overlay; default: %(default)s")
    parser.add_argument("--prompt", default="Lily was a good little girl.")
    parser.add_argument("--tokens", type=int, default=8, help="to generate; default: %(default)s")
    parser.add_argument("--clock", type=float, default=25.0, help="MHz, for the prediction; default: %(default)s")
    options = parser.parse_args()

    model = load_model("story")
    compiled = compile_model(model, preset(options.config), routers=find_routers("story:reuse", model))
    accelerator = open_accelerator(options.device, compiled)
    with accelerator.device:
        words = model.tokenizer.encode(options.prompt)
        words += accelerator.generate(words, options.tokens)
    print(f"{'token':>12} {'cycles':>8} {'array busy':>10} {'bytes read':>10} {'of weights':>10} {'skipped':>8}")
    for run in accelerator.stats:
        shown = "".join(model.tokenizer.piece(word) for word in words[run.position:run.position + run.tokens])
        counters = run.counters
        busy = counters["array_active"] / counters["cycles"] if counters["cycles"] else 0.0
        weights = counters["weights_read"] * compiled.config.superbeat_bytes
        print(f"{shown.replace('Ġ', ' ')[-12:]:>12} {counters['cycles']:8,} {busy:10.1%} "
              f"{counters['bytes_read']:10,} {weights:10,} {1 - run.routes.mean():8.0%}")
    decode = [run.counters["cycles"] for run in accelerator.stats if run.tokens == 1]
    if decode and all(decode):
        mean = sum(decode) / len(decode)
        print(f"{mean:,.0f} cycles a token (simulated) are {options.clock * 1e6 / mean:,.0f} tokens/s at "
              f"{options.clock:g} MHz (predicted)")


if __name__ == "__main__":
    try:
        main()
    except (SkipopuError, ConfigError) as error:
        sys.exit(f"counters: {error}")
