"""The shipped story model on the simulated board: words over a noisy line, those of the functional level."""

import numpy as np
from skipopu.bitstream.ulx3s import MEMORY_BYTES
from skipopu.host.compiler import compile_model
from skipopu.host.devices import open_device
from skipopu.host.load import load_model
from skipopu.host.routers import find_routers
from skipopu.host.runtime import Accelerator
from skipopu.host.serial_device import SerialDevice
from skipopu.hw.config import preset
from skipopu.sim.serial_line import NoisyLine, SimulatedBoard

CONFIG = preset("ulx3s")


def test_a_story_begins_on_the_board_as_on_the_functional_level():
    """Whole stories, and more noise, are in benchmarks/story.py: loading alone takes half a minute here."""
    model = load_model("story")
    compiled = compile_model(model, CONFIG, routers=find_routers("story:reuse", model))
    prompt = model.tokenizer.encode("Once upon a time")
    functional = Accelerator(open_device("functional", CONFIG, MEMORY_BYTES), compiled)
    expected = list(functional.generate(prompt, 5))
    board = SimulatedBoard(CONFIG, MEMORY_BYTES)
    line = NoisyLine(board, drop=2e-5, corrupt=2e-5, seed=3)
    with SerialDevice(CONFIG, compiled.map.memory * CONFIG.port_bits // 8, line=line) as device:
        accelerator = Accelerator(device, compiled)
        assert list(accelerator.generate(prompt, 5)) == expected
        np.testing.assert_array_equal(accelerator.logits(), functional.logits())
        np.testing.assert_array_equal(accelerator.decisions, functional.decisions)
        assert line.lost and line.changed and device.repeated
        assert all(run.counters["cycles"] < 5_000_000 for run in accelerator.stats)  # 5 tokens/s at 25 MHz
