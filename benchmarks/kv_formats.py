"""What narrower KV records cost in quality, on the functional level.

A record keeps one exponent for every head's key and value, and a mantissa of so many bits for every element. 12 and 8
bits are formats of the overlay (`--kv-format`); for others FP16 records are rounded before they are stored. 13 bits
are what the array multiplies anyway (`docs/numerics.md`), so that they change nothing; the check of that is exact.
Prints the distance to the float reference, as `skipopu eval` does; exits with 1 if 13 bits change a logit or 8 bits
cost more than the target.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from common import Row, at_most, machine, show
from skipopu.golden.arithmetic import half_parts
from skipopu.golden.device import FunctionalDevice
from skipopu.golden.state import rows_of
from skipopu.host.compiled import Compiled
from skipopu.host.errors import RequestError, SkipopuError
from skipopu.host.evaluate import evaluate, load_sequences
from skipopu.host.model import Model, ModelConfig
from skipopu.host.plan import KV_FORMATS, KvSizes, make_plan
from skipopu.host.runtime import Accelerator
from skipopu.host.session import ReferenceGenerator, compile_source, open_source

KL_TARGET = 0.01  #: nats per token that 8 bits may add


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sequences", type=Path, help=".npz file with `tokens`, integers [n, length]; the last are used")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--limit", type=int, default=4, help="sequences (default: %(default)s)")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--config", default="sim")
    parser.add_argument("--formats", default="16,13,12,8,8k,8v", help="mantissa bits with the sign, of keys and values "
                                                                     "or of one of them (default: %(default)s)")
    return parser.parse_args()


def rounded(bits: np.ndarray, width: int) -> np.ndarray:
    """FP16 bits (uint16) [..., dims] with one exponent for the last axis and mantissas of ``width`` bits, as FP16."""
    significand, field = half_parts(bits)
    top = field.max(-1, keepdims=True)
    dropped = np.minimum(top - field + (14 - width), 30)  # beyond 13 nothing is left
    magnitude = np.minimum((4 * np.abs(significand) + (1 << dropped >> 1)) >> dropped, (1 << width - 1) - 1)
    value = np.where(significand < 0, -1.0, 1.0) * np.ldexp(magnitude.astype(float), top - 27 + (14 - width))
    return value.astype(np.float16).view(np.uint16)


class RoundedDevice(FunctionalDevice):
    """Rounds every record before it is stored. formats : bits of keys and of values, 16 for none"""

    def narrow(self, model: ModelConfig, head: int, formats: tuple[int, int]) -> None:
        """Take effect on programs of a model whose heads are padded to ``head`` elements."""
        machine = self.machine
        store = machine._units["storekv"]

        def stored(values: dict[str, int]) -> Any:
            for t in rows_of(values["mask"]).tolist():
                record = machine.kvout[t * values["record"] : (t + 1) * values["record"]]
                parts = record.reshape(2, model.kv_heads, head)
                for part, width in zip(parts, formats):
                    if width < 16:
                        part[:] = rounded(part, width)
            return store(values)

        machine._units["storekv"] = stored


def opened(compiled: Compiled, model: ModelConfig, name: str) -> Accelerator:
    """The program, compiled for records of that name if the overlay has them, on a device that rounds otherwise."""
    config, width = compiled.config, 16 if name in KV_FORMATS else int(name.rstrip("kv"))
    formats = (16 if name.endswith("v") else width, 16 if name.endswith("k") else width)
    device = RoundedDevice(config, compiled.map.memory * config.port_bits // 8)
    if formats != (16, 16):
        device.narrow(model, make_plan(config, model, compiled.map.context).head_dim, formats)
    return Accelerator(device, compiled)


def main() -> int:
    """Evaluate each format and print the table."""
    options = arguments()
    model = open_source(options.model)
    if not isinstance(model, Model):
        raise RequestError("the reference needs the model itself, not a bundle")
    sequences = load_sequences(options.sequences)[-options.limit:, :options.length]
    print(f"{machine()}\n{model.config.name}, {sequences.size - len(sequences)} tokens", flush=True)
    found: dict[str, Any] = {}
    logits: dict[str, np.ndarray] = {}
    for name in options.formats.split(","):
        sizes = KvSizes(format=name) if name in KV_FORMATS else None
        accelerator = opened(compile_source(model, options.config, sequences.shape[1], kv=sizes), model.config, name)
        for total in evaluate(ReferenceGenerator(model), accelerator, sequences):
            found[name] = total
        logits[name] = accelerator.logits()
        print(f"  {name}: perplexity {found[name].as_json()['perplexity']:.4f}, KL {found[name].as_json()['kl']:.3e}, "
              f"top-1 {found[name].as_json()['top1']:.2%}", flush=True)
    base = found["16"].as_json() if "16" in found else None
    rows = []
    for name, total in found.items():
        report = total.as_json()
        added = None if base is None else report["kl"] - base["kl"]
        rows += [Row(f"{name} bits: perplexity", report["perplexity"], "simulated", "{:.4f}"),
                 Row(f"{name} bits: KL to the reference, nats", report["kl"], "simulated", "{:.3e}"),
                 Row(f"{name} bits: KL added", added, "simulated", "{:+.3e}",
                     at_most(KL_TARGET, "{:g}") if name == "8" else at_most(0.0) if name == "13" else None),
                 Row(f"{name} bits: top-1 agreement", report["top1"], "simulated", "{:.2%}")]
    show(f"KV records with one exponent a head vector ({sequences.size - len(sequences)} tokens)", rows)
    changed = "13" in logits and "16" in logits and not np.array_equal(logits["13"], logits["16"])
    if changed:
        print("13 bits CHANGE logits, which must stay the same bit for bit")
    return int(changed or any(row.cells()[3] == "MISSED" for row in rows))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except SkipopuError as error:
        sys.exit(f"kv_formats: {error}")
