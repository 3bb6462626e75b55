"""Class conditioning: the null class, class dropout, guidance."""

import pytest
import torch
from tiny_models import seeded, tiny_prior
from torch.testing import assert_close

from stage2_prior.conditioning.classes import ClassEmbedding, apply_guidance, drop_classes
from training_harness.batch_order import BatchOrder


def test_a_missing_label_is_the_null_class_with_the_id_num_classes() -> None:
    for classes in (0, 3):
        embedding = ClassEmbedding(classes, 8)
        assert embedding.null_class == classes
        assert torch.equal(embedding(torch.tensor([-1])), embedding(torch.tensor([classes])))
    prior, tokens = tiny_prior(), torch.randint(16, (1, 16), generator=seeded(0))
    unlabelled, null, first = (prior.logits(tokens, torch.tensor([label])) for label in (-1, 3, 0))
    assert torch.equal(unlabelled, null)
    assert not torch.equal(unlabelled, first)


def test_labels_are_dropped_at_the_given_rate() -> None:
    labels = torch.arange(3).repeat(10_000)
    uniform = torch.from_numpy(BatchOrder(10, len(labels), seed=0).random_numbers(0))[:, 0]
    dropped = drop_classes(labels, uniform, 0.2) == -1
    # For 30,000 labels six standard deviations are 0.014. Chance exceeds this for one seed in 5 · 10⁸.
    assert float(dropped.float().mean()) == pytest.approx(0.2, abs=0.014)
    assert torch.equal(drop_classes(labels, uniform, 0.2)[~dropped], labels[~dropped])
    assert torch.equal(drop_classes(labels, uniform, 0.0), labels)
    assert drop_classes(labels, uniform, 1.0).eq(-1).all()


def test_guidance_1_is_the_conditional_prediction_0_the_null_prediction_and_2_extrapolates() -> None:
    conditional, null = torch.randn(2, 5, 16, generator=seeded(0))
    assert_close(apply_guidance(conditional, null, 1.0), conditional)
    assert torch.equal(apply_guidance(conditional, null, 0.0), null)
    assert_close(apply_guidance(conditional, null, 2.0) - conditional, conditional - null)
