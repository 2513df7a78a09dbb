"""The shipped story model on the simulated ULX3S: a whole story over a line that loses and changes bytes, token for
token that of the functional level, and how fast and how good the model is.

The board's RTL runs behind the real serial driver. Fails if a token, a logit or the memory differs, if the prediction
is below 5 tokens/s, or if fewer sampled stories are such as the grammar tells than ``--least``.
"""

from __future__ import annotations

import argparse
import sys
import time

import numpy as np
from skipopu.host.compiled import Compiled
from skipopu.host.compiler import compile_model
from skipopu.host.devices import open_device
from skipopu.host.load import load_model
from skipopu.host.model import Model
from skipopu.host.routers import find_routers
from skipopu.host.runtime import Accelerator
from skipopu.host.sampling import Sampling
from skipopu.host.serial_device import SerialDevice
from skipopu.host.tuning.stories import can_tell, tell
from skipopu.hw.config import preset
from skipopu.sim.serial_line import NoisyLine, SimulatedBoard

MEMORY, CLOCK_HZ, BAUD = 1 << 18, 25_000_000, 1_000_000  # of the board
ROUND_TRIP = 1e-3  # seconds that a request takes besides its bytes: the USB chip's low latency mode
UNSEEN = 77  # seed of stories that no training used
TARGET = 5.0  # tokens/s


class Counted(NoisyLine):
    """A noisy line that counts: bytes in both directions, and requests."""

    bytes = requests = 0

    def write(self, data: bytes) -> int:
        """Of the line."""
        self.bytes += len(data)
        self.requests += 1
        return super().write(data)

    def read(self, size: int) -> bytes:
        """Of the line."""
        data = super().read(size)
        self.bytes += len(data)
        return data


def functional(compiled: Compiled) -> Accelerator:
    """The model at the bit-exact level."""
    return Accelerator(open_device("functional", compiled.config, MEMORY), compiled)


def quality(model: Model, compiled: Compiled, count: int) -> tuple[float, float, int, int]:
    """Nats per token on unseen stories, the grammar's own, sampled stories, and how many of them it tells."""
    accelerator, nats, known, tokens = functional(compiled), 0.0, 0.0, 0
    for text, information in tell(count, UNSEEN):
        words = [*model.tokenizer.encode(text, bos=True), model.config.eos_ids[0]]
        accelerator.clear()
        rows = np.concatenate(list(accelerator.evaluate(words[:-1]))).astype(np.float64)
        chosen = rows[np.arange(len(rows)), words[1:]]
        peak = rows.max(1)
        nats += float((peak + np.log(np.exp(rows - peak[:, None]).sum(1)) - chosen).sum())
        known += information
        tokens += len(rows)
    told = 0
    for seed in range(count):
        accelerator.clear()
        words = accelerator.generate([model.config.bos_id], compiled.map.context, Sampling(seed=seed))
        told += can_tell(model.tokenizer.decode(list(words)))
    return nats / tokens, known / tokens, count, told


def main() -> None:
    """Print the table; exit with 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--tokens", type=int, default=100, help="at most; the story ends by itself")
    parser.add_argument("--noise", type=float, default=2e-4, help="probability per byte to be lost, and to be changed")
    parser.add_argument("--stories", type=int, default=20, help="unseen and sampled ones that measure quality")
    parser.add_argument("--least", type=float, default=0.8, help="share of sampled stories that the grammar must tell")
    options = parser.parse_args()
    model = load_model("story")
    config = preset("ulx3s")
    compiled = compile_model(model, config, routers=find_routers("story:reuse", model))
    prompt, wrong = model.tokenizer.encode(options.prompt), []

    loss, entropy, sampled, told = quality(model, compiled, options.stories)
    right = functional(compiled)
    expected = list(right.generate(prompt, options.tokens))

    begin = time.perf_counter()
    board = SimulatedBoard(config, MEMORY, clock_hz=CLOCK_HZ, timeout=1e-3)
    line = Counted(board, drop=options.noise, corrupt=options.noise, seed=6)
    with SerialDevice(config, compiled.map.memory * config.port_bits // 8, line=line, retries=30,
                      frame_words=64) as device:
        tested = Accelerator(device, compiled)
        loaded = time.perf_counter() - begin
        got: list[int] = []
        print(options.prompt, end="", flush=True)
        text = model.tokenizer.stream()
        for token in tested.generate(prompt, options.tokens):
            if not got:
                before = line.bytes, line.requests
            got.append(token)
            print(text.feed(token), end="", flush=True)
        print(text.finish())
        carried, asked = line.bytes - before[0], line.requests - before[1]
        if got != expected:
            wrong.append("the board's tokens differ from the functional level's")
        if not np.array_equal(tested.logits(), right.logits()):
            wrong.append("the board's last logits differ")
        for port in range(config.ports):
            if not np.array_equal(device.read_memory(port, 0, MEMORY), right.device.memory(port)):
                wrong.append(f"the memory behind port {port} differs")
        noise = f"{line.lost} bytes lost, {line.changed} changed, {device.repeated} requests repeated"
    told_in = time.perf_counter() - begin - loaded
    cycles = [run.counters["cycles"] for run in tested.stats if run.tokens == 1]
    per_token = sum(cycles) / len(cycles)
    seconds = per_token / CLOCK_HZ + (carried * 10 / BAUD + asked * ROUND_TRIP) / (len(got) - 1)
    skipped = 1 - tested.decisions.mean((0, 2))
    if 1 / seconds < TARGET:
        wrong.append(f"{1 / seconds:.1f} tokens/s are below the target of {TARGET:g}")
    if told < options.least * sampled:
        wrong.append(f"the grammar tells only {told} of {sampled} sampled stories")
    parameters = sum(int(np.prod(tensor.shape)) for tensor in model.tensors.values())
    for name, value, kind in [
        ("parameters", f"{parameters:,}", ""),
        ("memory behind each port, bytes", f"{compiled.map.memory * config.port_bits // 8:,} of {MEMORY:,}", ""),
        ("nats per token, unseen stories", f"{loss:.4f}", "simulated"),
        ("nats per token, the grammar's own", f"{entropy:.4f}", "computed"),
        ("sampled stories that the grammar tells", f"{told} of {sampled}", "simulated"),
        ("tokens equal to the functional level's", f"{len(got)} of {len(expected)}", "simulated"),
        ("noise on the line", noise, "simulated"),
        ("skipped attention, MLP modules", f"{skipped[0]:.1%}, {skipped[1]:.1%}", "simulated"),
        ("cycles per decoded token", f"{per_token:,.0f} ({min(cycles):,}..{max(cycles):,})", "simulated"),
        (f"tokens/s at {CLOCK_HZ / 1e6:g} MHz, without the link", f"{CLOCK_HZ / per_token:,.0f}", "predicted"),
        ("tokens/s with the link at 1 Mbaud", f"{1 / seconds:,.1f}", "predicted"),
        ("loading and story on this machine, s", f"{loaded:.0f}, {told_in:.0f}", "measured"),
    ]:
        print(f"{name:42} {value:>28}  {kind}")
    if wrong:
        sys.exit("\n".join(f"story: {item}" for item in wrong))


if __name__ == "__main__":
    main()
