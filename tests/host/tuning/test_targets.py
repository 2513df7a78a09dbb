"""The teacher's outcomes: a true divergence, computed once, kept for their model and sequences only."""

import numpy as np
import pytest
import torch
from skipopu.golden.random_model import random_model
from skipopu.golden.reference import ReferenceModel
from skipopu.host.tuning.targets import Targets, divergence, sample_vocabulary

MODEL = random_model(0)
SEQUENCES = np.random.default_rng(0).integers(0, MODEL.config.vocab, (5, 12))


def test_divergence_is_zero_for_the_teacher_itself_and_positive_otherwise():
    logits = torch.randn(7, 40, generator=torch.Generator().manual_seed(0))
    log_probs, tokens = logits.log_softmax(-1).topk(8)
    assert divergence(logits, tokens, log_probs).abs().max() < 1e-5
    assert (divergence(logits + torch.linspace(0, 1, 40), tokens, log_probs) > 0).all()


def test_divergence_over_all_tokens_is_that_of_the_distributions():
    generator = torch.Generator().manual_seed(1)
    teacher, student = (torch.randn(7, 20, generator=generator).log_softmax(-1) for _ in range(2))
    tokens = torch.arange(20).expand(7, -1)
    expected = (teacher.exp() * (teacher - student)).sum(-1)
    assert torch.allclose(divergence(student, tokens, teacher), expected, atol=1e-4)


def test_a_sampled_vocabulary_keeps_the_sum_of_exponentials_on_average():
    logits = torch.randn(300, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([[3, 7], [7, 250]])
    found = []
    for seed in range(400):
        rows, offset, places = sample_vocabulary(tokens, 300, 60, torch.Generator().manual_seed(seed))
        assert len(rows) == len(rows.unique()) == 63
        assert torch.equal(rows[places], tokens)
        assert not offset[places].any()
        found.append((logits[rows] + offset).exp().sum())
    assert float(torch.stack(found).mean()) == pytest.approx(float(logits.exp().sum()), rel=0.02)


def test_a_sample_of_everything_is_exact():
    tokens = torch.tensor([5, 1])
    rows, offset, places = sample_vocabulary(tokens, 30, 4096, torch.Generator().manual_seed(0))
    assert sorted(rows.tolist()) == list(range(30))
    assert not offset.any()


def test_outcomes_are_the_likeliest_of_the_unrouted_model(tmp_path):
    tokens, log_probs = Targets(MODEL, SEQUENCES, tmp_path)(np.array([3, 1]))
    expected = ReferenceModel(MODEL).forward(SEQUENCES[3]).log_softmax(-1).topk(tokens.shape[-1])
    assert tokens.shape == (2, 12, 64)
    assert torch.allclose(log_probs[0], expected.values, atol=5e-3)
    assert (tokens[0] == expected.indices)[..., :8].all()


def test_outcomes_are_computed_once_for_a_model_and_its_sequences(tmp_path, monkeypatch):
    first = Targets(MODEL, SEQUENCES, tmp_path)(np.arange(5))
    other_model, other_text = random_model(2), SEQUENCES[::-1].copy()
    for model, text in ((other_model, SEQUENCES), (MODEL, other_text)):
        assert not torch.equal(Targets(model, text, tmp_path)(np.arange(5))[1], first[1])
    monkeypatch.setattr(ReferenceModel, "forward", None)  # a second run asks the disk, not the teacher
    again = Targets(MODEL, SEQUENCES, tmp_path)(np.arange(5))
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_a_file_of_the_wrong_size_is_made_anew(tmp_path):
    Targets(MODEL, SEQUENCES, tmp_path)(np.arange(5))
    (path,) = tmp_path.glob("*.log_probs")
    path.write_bytes(b"\0" * 10)
    _, log_probs = Targets(MODEL, SEQUENCES, tmp_path)(np.arange(5))
    assert (log_probs < 0).all()
