"""The shipped story model: made by the recipe in its file, small enough for the ULX3S, and as good as it says."""

import json

import numpy as np
import pytest
import torch
from skipopu.bitstream.ulx3s import MEMORY_BYTES
from skipopu.golden.routed import RoutedReference
from skipopu.host.compiler import compile_model
from skipopu.host.devices import open_device
from skipopu.host.gguf_file import GgufFile
from skipopu.host.load import list_models, load_model
from skipopu.host.routers import find_routers
from skipopu.host.runtime import Accelerator
from skipopu.host.tuning.stories import can_tell, tell
from skipopu.hw.config import preset

CONFIG = preset("ulx3s")


@pytest.fixture(scope="module")
def model():
    return load_model("story")


@pytest.fixture(scope="module")
def routers(model):
    return find_routers("story:reuse", model)


@pytest.fixture(scope="module")
def compiled(model, routers):
    return compile_model(model, CONFIG, routers=routers)


def test_it_fits_the_board(compiled):
    assert compiled.map.memory * CONFIG.port_bits // 8 <= MEMORY_BYTES
    assert not compiled.notes  # nothing was requantised


def test_both_files_hold_one_recipe(model, routers):
    path = next(item.path for item in list_models() if item.name == "story")
    about = json.loads(GgufFile(path).metadata["general.description"])
    assert about == {name: routers.notes[name] for name in about}
    assert about["command"].startswith("skipopu train ") and json.loads(about["held_out"])["final"]["loss"] < 0.25


def test_its_loss_on_new_stories_is_near_what_the_grammar_allows(model, routers):
    reference, nats, least, tokens = RoutedReference(model, routers), 0.0, 0.0, 0
    for text, information in tell(40, 5):
        words = torch.tensor([*model.tokenizer.encode(text), *model.config.eos_ids])
        rows = reference.forward(words[:-1]).log_softmax(-1)
        nats -= float(rows.gather(1, words[1:, None]).sum())
        least += information
        tokens += len(rows)
    assert least / tokens <= nats / tokens < least / tokens + 0.01


def test_it_tells_a_story_of_its_own_on_the_board_s_configuration(model, compiled):
    accelerator = Accelerator(open_device("functional", CONFIG, MEMORY_BYTES), compiled)
    prompt = model.tokenizer.encode("Once upon a time")
    text = "Once upon a time" + model.tokenizer.decode(list(accelerator.generate(prompt, 100)))
    assert accelerator.finish == "stop" and can_tell(text)
    skipped = 1 - accelerator.decisions.mean()
    assert 0.2 < skipped < 0.6 and np.ptp(accelerator.decisions.sum((0, 1))) > 0
