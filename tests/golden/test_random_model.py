"""Random models: reproducible from their seed, and lively enough that an error anywhere shows."""

import numpy as np
import pytest
import torch
from skipopu.golden.random_model import random_model
from skipopu.golden.reference import ReferenceModel
from skipopu.host.errors import ModelError


def test_the_seed_decides_everything():
    first, same, other = (random_model(seed).tensors["layers.1.up"].dequantise() for seed in (4, 4, 5))
    assert np.array_equal(first, same)
    assert not np.array_equal(first, other)


def test_geometry_and_kinds_can_be_chosen():
    model = random_model(1, kinds=["q4_0"], embedding="q8_0", heads=6, kv_heads=3, head_dim=32, tied_head=False)
    assert {tensor.kind for tensor in model.tensors.values()} == {"q4_0", "q8_0", "f32"}
    assert model.tensors["layers.0.o"].shape == (64, 192)
    with pytest.raises(ModelError, match="kv_heads must divide"):
        random_model(1, heads=4, kv_heads=3)


@pytest.mark.parametrize("seed", range(6))
def test_logits_are_not_degenerate(seed):
    tokens = torch.randint(0, 96, (48,), generator=torch.Generator().manual_seed(seed))
    logits = ReferenceModel(random_model(seed)).forward(tokens)
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean()
    assert 1.5 < logits.std() < 6
    assert 1 < entropy < 4                           # neither certain nor uniform (ln 96 = 4.6)
    assert logits.argmax(-1).unique().numel() > 12   # the prediction follows the input ...
    assert (logits.argmax(-1) == tokens).float().mean() < 0.3  # ... without copying it
