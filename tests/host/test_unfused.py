"""Programs whose reductions have passes of their own compute the same."""

import numpy as np
import pytest
from skipopu.golden.random_model import random_model
from skipopu.host.compiler import compile_model
from skipopu.host.devices import open_device
from skipopu.host.routers import KV_MODES, Routers
from skipopu.host.runtime import Accelerator
from skipopu.hw.config import preset
from skipopu.hw.isa import decode

TINY = preset("tiny")


@pytest.mark.parametrize("kv", [*KV_MODES, None])
def test_same_logits_from_more_passes(kv):
    model, rng = random_model(8, layers=2), np.random.default_rng(3)
    shape = (model.config.layers, 2)
    routers = kv and Routers(kv=kv, base=model.identity, bias=np.zeros(shape, np.float32),
                             difference=rng.normal(0, 1, (*shape, model.config.hidden)).astype(np.float32))
    logits, counts = [], []
    for fused in (True, False):
        compiled = compile_model(model, TINY, context=16, routers=routers, fused=fused)
        names = [decode(word)[0].mnemonic for word in compiled.program.words]
        counts.append([names.count(name) for name in ("vadd", "vnorm", "vscale")])
        with open_device("functional", TINY, compiled.map.memory * TINY.port_bits // 8) as device:
            accelerator = Accelerator(device, compiled)
            accelerator.run([1, 2, 3, 4])
            accelerator.run([5, 3], 0, 2)
            logits.append(accelerator.logits())
    np.testing.assert_array_equal(*logits)
    (adds, norms, scales), (adds_apart, norms_apart, scales_apart) = counts
    assert adds == adds_apart
    assert scales_apart == scales + 2 * model.config.layers  # maximum and sum of the softmax
    assert norms_apart > norms
