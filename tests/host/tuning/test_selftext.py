"""Text a model writes itself: greedy text is the reference's, seeds repeat, prompts must be of one length."""

import pytest
import torch
from skipopu.golden.random_model import random_model
from skipopu.golden.reference import ReferenceModel
from skipopu.host.errors import RequestError
from skipopu.host.tuning.selftext import self_text

MODEL = random_model(0)
PROMPTS = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


def sample(**options):
    return torch.stack(list(self_text(MODEL, PROMPTS, 14, **options)), 1)


def test_the_likeliest_tokens_are_those_of_the_reference():
    reference = ReferenceModel(MODEL)
    for prompt, found in zip(PROMPTS, sample(top_k=1).tolist()):
        tokens = list(prompt)
        while len(tokens) < 14:
            tokens.append(int(reference.forward(tokens)[-1].argmax()))
        assert prompt + found == tokens


def test_a_seed_repeats_its_text():
    assert torch.equal(sample(seed=1), sample(seed=1))
    assert not torch.equal(sample(seed=1), sample(seed=2))


@pytest.mark.parametrize(["prompts", "length"], [([[1], [1, 2]], 8), ([], 8), ([[]], 8), ([[1, 2]], 2), ([[1]], 129)])
def test_unfit_prompts_are_refused(prompts, length):
    with pytest.raises(RequestError, match="prompts must be of one length, shorter than the .* context of 128"):
        list(self_text(MODEL, prompts, length))
