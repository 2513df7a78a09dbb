"""Images of random models: the layout that programs read, the same from the same seed, shared by all who map them."""

from collections import namedtuple

import numpy as np
import pytest
from skipopu.golden import random_image as module
from skipopu.golden.device import FunctionalDevice
from skipopu.golden.operands import linear, unpack_weights
from skipopu.golden.random_image import random_image
from skipopu.host.errors import RequestError
from skipopu.host.model import ModelConfig
from skipopu.host.routes import RandomRoutes
from skipopu.host.runtime import Accelerator
from skipopu.hw.config import preset
from skipopu.hw.isa import MatmulMode

TINY = preset("tiny")
MODEL = ModelConfig(name="small", layers=3, hidden=64, heads=4, kv_heads=2, head_dim=32, mlp=96, vocab=120, context=64)
CONTEXT, TOKENS = 40, [3, 77, 5]


def files(image):
    return [path.read_bytes() for path in image.files]


def accelerator(image, compiled, memories, force=None):
    return Accelerator(FunctionalDevice(TINY, len(memories[0]), memories=memories), compiled, force=force)


@pytest.mark.parametrize("kv", ["", "dense", "reuse"])
def test_a_seed_decides_every_byte(tmp_path, kv):
    first = files(random_image(MODEL, TINY, CONTEXT, tmp_path, kv=kv, seed=4, tokens=TOKENS))
    assert files(random_image(MODEL, TINY, CONTEXT, tmp_path, kv=kv, seed=4, tokens=TOKENS)) == first
    assert files(random_image(MODEL, TINY, CONTEXT, tmp_path, kv=kv, seed=5, tokens=TOKENS)) != first


@pytest.mark.parametrize("kind", ["q4_0", "q4_g128"])
def test_weights_are_any_code_with_scales_of_one_exponent(tmp_path, kind):
    image = random_image(MODEL, TINY, CONTEXT, tmp_path, kind=kind)
    memories = image.memories()
    for name, inner, outer in (("layers.1.o", 128, 64), ("layers.2.gate_up", 64, 192), ("head", 64, 120)):
        stream = image.outline.weights[name]
        tiles, = unpack_weights(TINY, MatmulMode.W4, linear(TINY, memories, stream.address, stream.count), 1,
                                -(-outer // TINY.columns), inner // TINY.lanes, stream.group,
                                stream.scale_exponent)
        codes, scales = np.concatenate(tiles.codes, 2), np.concatenate(tiles.scale, 1)
        assert set(np.unique(codes)) == set(range(-8, 8)), name
        assert scales.min() >= 1024 and scales.max() < 2048, name  # significands, all of the largest exponent
        deviation = codes.std() * scales.mean() / 1024 * 2.0 ** (stream.scale_exponent - 15) * inner ** 0.5
        assert 0.4 < deviation / module.GAIN.get(name.rpartition(".")[2], 1) < 2.5, name


@pytest.mark.parametrize("kv", ["", "reuse"])
def test_runs_behind_a_random_context(tmp_path, kv):
    image = random_image(MODEL, TINY, CONTEXT, tmp_path, kv=kv, tokens=TOKENS)
    before, memories = files(image), image.memories()
    force = RandomRoutes(0.3, 2) if kv else None
    position = CONTEXT - 1
    if kv:
        storing = accelerator(image, image.history, memories, force)
        for first in range(0, position, storing.map.chunk):
            storing.run([0] * min(storing.map.chunk, position - first))
    running = accelerator(image, image.compiled, memories, force)
    if kv:  # the history is on chip
        running.device.machine.kv = storing.device.machine.kv
    running.position = position
    running.run([TOKENS[1]], 0, 1)
    logits, counters = running.logits(), running.stats[-1].counters
    assert np.isfinite(logits).all() and 0.5 < logits.std() < 10
    attends = force.bits(MODEL.layers, position, 1)[:, 0, 0] if kv else np.ones(MODEL.layers, bool)
    record = image.outline.plan.record
    assert counters["kv_read"] + counters["kv_buffered"] == attends.sum() * CONTEXT * record
    assert files(image) == before, "what runs write stays with their own mapping"
    for first, size in image.records():
        assert all(len(np.unique(memory[first:first + size])) > 100 for memory in image.memories())


def test_refuses_weights_that_it_does_not_draw(tmp_path):
    with pytest.raises(RequestError, match="4-bit codes without minima, layers.0.k would be W8"):
        random_image(MODEL, TINY, CONTEXT, tmp_path, kind="q8_0")


def test_refuses_a_disk_that_is_too_small(tmp_path, monkeypatch):
    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: namedtuple("usage", "free")(1000))
    message = r"memory image of small needs 0\.\d GB in .*, there are 0\.0; name a folder"
    with pytest.raises(RequestError, match=message):
        random_image(MODEL, TINY, CONTEXT, tmp_path)
    assert not list(tmp_path.iterdir())
