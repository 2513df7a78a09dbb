"""Scores of a compiled program with routers on the functional machine: near ``difference . x + bias`` in floats."""

import numpy as np
import pytest
from skipopu.golden.device import FunctionalDevice
from skipopu.golden.random_model import random_model
from skipopu.host.compiler import compile_model
from skipopu.host.plan import make_plan
from skipopu.host.routers import KV_MODES, Routers
from skipopu.host.runtime import Accelerator
from skipopu.hw.config import preset

LAYERS = 3


@pytest.mark.parametrize("kv", KV_MODES)
@pytest.mark.parametrize("name", ["tiny", "sim"])
def test_every_route_takes_the_signs_of_the_scores_of_the_raw_rows(name, kv):
    """Whichever instruction has left a row, it decides on a layer as it stands before it."""
    config, model, rng = preset(name), random_model(5, layers=LAYERS), np.random.default_rng(6)
    hidden = model.config.hidden
    difference = rng.standard_normal((LAYERS, 2, hidden)).astype(np.float32)
    bias = rng.standard_normal((LAYERS, 2)).astype(np.float32)
    routers = Routers(kv=kv, base=model.identity, difference=difference, bias=bias)
    compiled = compile_model(model, config, routers=routers)
    device = FunctionalDevice(config, compiled.map.memory * config.port_bits // 8)
    machine, plan, decided = device.machine, make_plan(config, model.config, None, kv), []

    def check(pc, item, fields, writes):
        if item.mnemonic != "route":
            return
        layer, rows = fields["layer"], fields["rows"]
        first, beats = plan.addresses()["x"], plan.beats(hidden)
        x = machine.abuf[first : first + rows * beats].reshape(rows, -1)[:, :hidden].astype(float)
        products = difference[layer, :, None].astype(float) * x  # [2, rows, hidden]
        error = machine.scores[:, :rows] * 2.0**-24 - (products.sum(-1) + bias[layer][:, None])
        # FP16 weights, each term to half a unit of 2^-24, and the bias to half a unit.
        assert (np.abs(error) <= 2.0**-11 * np.abs(products).sum(-1) + (hidden + 1) * 2.0**-25).all(), f"layer {layer}"
        words = [sum(1 << t for t in range(rows) if score[t] >= 0) for score in machine.scores]
        assert machine.routes[layer] == tuple(words)
        decided.append(machine.scores[:, :rows] >= 0)

    machine.observer = check
    accelerator = Accelerator(device, compiled)
    accelerator.prefill(rng.integers(0, model.config.vocab, 2 * plan.chunk + 1).tolist())
    accelerator.step(7)
    assert len(decided) == 4 * LAYERS and 0.1 < np.concatenate(decided, 1).mean() < 0.9
