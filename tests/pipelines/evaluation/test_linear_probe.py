"""The linear probe against the optimum that it states, and class agreement."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_sets import normal, stored_features
from tiny_models import seeded
from torch import Tensor

from pipelines.evaluation import linear_probe
from pipelines.evaluation.linear_probe import PENALTY, LinearProbe, class_agreement, fit_probe
from training_harness.errors import UserError

CLASSES = 4


def clouds(count: int, apart: float, seed: int, width: int = 12) -> tuple[Tensor, Tensor]:
    """(count, width) points around one centre for each class, `apart` times further from one another than they are wide."""
    labels = torch.randint(CLASSES, (count,), generator=seeded(1000 + seed))
    centres = apart * normal(CLASSES, width, seed=77)
    return centres[labels] + normal(count, width, seed=seed), labels


def accuracy(probe: LinearProbe, features: Tensor, labels: Tensor) -> float:
    return class_agreement(probe.logits(features), labels)


def test_classes_that_can_be_told_apart_are_told_apart_on_held_out_points():
    probe = fit_probe(*clouds(400, apart=3, seed=1), CLASSES)
    assert accuracy(probe, *clouds(400, apart=3, seed=2)) > 0.99
    assert accuracy(probe, *clouds(400, apart=0.1, seed=2)) < 0.6  # or any probe would do


def test_a_probe_of_shuffled_labels_is_right_by_chance_alone():
    features, labels = clouds(1000, apart=3, seed=1)
    probe = fit_probe(features, labels[torch.randperm(1000, generator=seeded(3))], CLASSES)
    held_out = [accuracy(probe, *clouds(4000, apart=3, seed=seed)) for seed in range(10, 14)]
    assert np.mean(held_out) == pytest.approx(
        1 / CLASSES, abs=0.15
    )  # four clouds, each of one verdict: not 4,000 draws
    assert accuracy(fit_probe(features, labels, CLASSES), *clouds(1000, apart=3, seed=10)) > 0.99


@pytest.mark.parametrize("apart", [0.3, 3])
def test_the_gradient_of_the_stated_objective_vanishes_at_the_probe(apart: float):
    features, labels = clouds(300, apart, seed=1)
    probe = fit_probe(features, labels, CLASSES)
    z = (features.numpy() - features.mean(0).numpy()) / features.std(0).numpy()
    w, b = probe.weight.double().numpy(), probe.bias.double().numpy()

    def gradient(w: np.ndarray, b: np.ndarray) -> float:
        """Largest entry of it: of the mean negative log likelihood of softmax(W z + b) and λ/2 ‖W‖²."""
        logits = z @ w.T + b
        p = np.exp(logits - logits.max(1, keepdims=True))
        error = (p / p.sum(1, keepdims=True) - np.eye(CLASSES)[labels.numpy()]) / len(z)
        return max(np.abs(error.T @ z + PENALTY * w).max(), np.abs(error.sum(0)).max())

    assert gradient(w, b) < 1e-4
    assert gradient(0 * w, 0 * b) > 0.02
    assert gradient(1.05 * w, b) > 5e-4  # the objective is convex: there is no second such point


@pytest.mark.parametrize("scale", [1000, 1e-3])
def test_the_verdicts_do_not_depend_on_the_scale_of_the_features_or_their_origin(scale: float):
    features, labels = clouds(300, apart=0.5, seed=1)
    held_out, _ = clouds(500, apart=0.5, seed=2)
    expected = fit_probe(features, labels, CLASSES).logits(held_out)
    found = fit_probe((features + 10) * scale, labels, CLASSES).logits((held_out + 10) * scale)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)  # what float32 keeps of features ten deviations away
    assert (found.argmax(1) == expected.argmax(1)).double().mean() > 0.995


def test_a_feature_that_never_varies_changes_no_verdict():
    features, labels = clouds(300, apart=0.5, seed=1)
    held_out, _ = clouds(100, apart=0.5, seed=2)
    expected = fit_probe(features, labels, CLASSES).logits(held_out)
    with_dead = [torch.cat([part, torch.full((len(part), 1), 7.0)], 1) for part in (features, held_out)]
    found = fit_probe(with_dead[0], labels, CLASSES).logits(with_dead[1])
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-3)


def test_a_class_without_an_image_is_seen_in_none():
    features, labels = clouds(300, apart=2, seed=1)
    probe = fit_probe(features, labels, CLASSES + 1)
    assert probe.logits(features).shape == (300, CLASSES + 1)
    assert (probe.logits(features).argmax(1) < CLASSES).all()


def test_it_is_fitted_to_no_more_images_than_the_limit_drawn_by_its_seed(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(linear_probe, "MOST_IMAGES", 15)
    features, labels = torch.eye(40), torch.arange(40) % CLASSES
    used = fit_probe(features, labels, CLASSES, seed=1).mean > 0  # each image has a feature of its own
    assert used.sum() == 15
    alone = fit_probe(features[used], labels[used], CLASSES)
    again = fit_probe(stored_features(tmp_path / "a", features), labels, CLASSES, seed=1)
    for ours, theirs in zip(again, alone, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert not torch.equal(fit_probe(features, labels, CLASSES, seed=2).mean > 0, used)


def test_a_set_within_the_limit_is_used_whole():
    features, labels = clouds(300, apart=1, seed=1)
    torch.testing.assert_close(fit_probe(features, labels, CLASSES, seed=5).mean, features.mean(0).float())
    assert linear_probe.MOST_IMAGES == 10_000


# -- class agreement --------------------------------------------------------------------------------------------------


def test_class_agreement_is_the_share_of_largest_logits_at_the_label():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 5.0, 1.0], [3.0, 1.0, 2.0], [0.0, 0.0, 9.0]])
    assert class_agreement(logits, torch.tensor([0, 1, 2, 2])) == 0.75
    assert class_agreement(logits, torch.tensor([1, 0, 1, 0])) == 0


def test_no_images_other_labels_and_logits_that_are_not_finite_are_errors():
    with pytest.raises(UserError, match="0 images"):
        class_agreement(torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(UserError, match="3 images and 2 labels"):
        class_agreement(torch.zeros(3, 10), torch.zeros(2, dtype=torch.int64))
    broken = normal(10, 4)
    broken[2, 1], broken[5], broken[7, 0] = math.nan, math.inf, -math.inf
    with pytest.raises(UserError, match="3 of 10 rows"):
        class_agreement(broken, torch.zeros(10, dtype=torch.int64))
