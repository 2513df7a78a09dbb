"""Run two devices side by side on one program, and show that they agree bit for bit, or where they first do not.

    python examples/compare.py                                      # the bit-exact model and the RTL
    python examples/compare.py --devices functional,serial --config ulx3s
"""

import argparse
import sys

from skipopu.host.compare import compare
from skipopu.host.compiler import compile_model
from skipopu.host.errors import SkipopuError
from skipopu.host.load import load_model
from skipopu.host.routers import find_routers
from skipopu.host.session import open_accelerator, parse_devices
from skipopu.hw.config import ConfigError, preset


def main() -> None:
    """Compare after every run of the program; exit with 1 at a difference."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--devices", default="functional,rtl", help="what is right, and what is tested; default: "
                                                                    "%(default)s")
    parser.add_argument("--config", default="tiny", help="configuration of the overlay; default: %(default)s")
    parser.add_argument("--prompt", default="Tom was a brave little boy.")
    parser.add_argument("--tokens", type=int, default=12, help="to generate; default: %(default)s")
    options = parser.parse_args()

    model = load_model("story")
    compiled = compile_model(model, preset(options.config), routers=find_routers("story:reuse", model))
    names = parse_devices(options.devices)
    first, second = (open_accelerator(name, compiled) for name in names)
    with first.device, second.device:
        result = None
        for result in compare(first, second, model.tokenizer.encode(options.prompt), options.tokens):
            print(f"run {result.runs}: {result.logits} logits, keys, values and routes are equal"
                  if result.difference is None else result.difference)
        if result is None or result.difference is not None:
            sys.exit(1)
        print(f"{options.prompt}{model.tokenizer.decode(result.generated)}")


if __name__ == "__main__":
    try:
        main()
    except (SkipopuError, ConfigError) as error:
        sys.exit(f"compare: {error}")
