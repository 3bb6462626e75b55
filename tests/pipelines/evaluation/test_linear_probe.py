"""The linear probe reaches the optimum of its objective; class agreement."""

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


def clusters(count: int, separation: float, seed: int, width: int = 12) -> tuple[Tensor, Tensor]:
    """Create (count, width) points around a centre for each class; `separation` is the std of centres over that of points."""
    labels = torch.randint(CLASSES, (count,), generator=seeded(1000 + seed))
    centres = separation * normal(CLASSES, width, seed=77)
    return centres[labels] + normal(count, width, seed=seed), labels


def accuracy(probe: LinearProbe, features: Tensor, labels: Tensor) -> float:
    return class_agreement(probe.logits(features), labels)


def test_separated_classes_are_classified_correctly_on_held_out_points():
    probe = fit_probe(*clusters(400, separation=3, seed=1), CLASSES)
    assert accuracy(probe, *clusters(400, separation=3, seed=2)) > 0.99
    assert accuracy(probe, *clusters(400, separation=0.1, seed=2)) < 0.6  # overlapping classes are not


def test_a_probe_of_shuffled_labels_has_chance_accuracy():
    features, labels = clusters(1000, separation=3, seed=1)
    probe = fit_probe(features, labels[torch.randperm(1000, generator=seeded(3))], CLASSES)
    accuracies = [accuracy(probe, *clusters(4000, separation=3, seed=seed)) for seed in range(10, 14)]
    assert np.mean(accuracies) == pytest.approx(
        1 / CLASSES, abs=0.15
    )  # all points of a cluster get one prediction, so this is a mean over four
    assert accuracy(fit_probe(features, labels, CLASSES), *clusters(1000, separation=3, seed=10)) > 0.99


@pytest.mark.parametrize("separation", [0.3, 3])
def test_the_gradient_of_the_objective_is_zero_at_the_probe(separation: float):
    features, labels = clusters(300, separation, seed=1)
    probe = fit_probe(features, labels, CLASSES)
    z = (features.numpy() - features.mean(0).numpy()) / features.std(0).numpy()
    w, b = probe.weight.double().numpy(), probe.bias.double().numpy()

    def largest_gradient(w: np.ndarray, b: np.ndarray) -> float:
        """Compute the largest entry of the largest_gradient of the mean negative log-likelihood of softmax(W z + b) + λ/2 ‖W‖²."""
        logits = z @ w.T + b
        p = np.exp(logits - logits.max(1, keepdims=True))
        error = (p / p.sum(1, keepdims=True) - np.eye(CLASSES)[labels.numpy()]) / len(z)
        return max(np.abs(error.T @ z + PENALTY * w).max(), np.abs(error.sum(0)).max())

    assert largest_gradient(w, b) < 1e-4
    assert largest_gradient(0 * w, 0 * b) > 0.02
    assert largest_gradient(1.05 * w, b) > 5e-4  # the objective is convex, so the optimum is unique


@pytest.mark.parametrize("scale", [1000, 1e-3])
def test_the_predictions_do_not_depend_on_scale_and_origin_of_the_features(scale: float):
    features, labels = clusters(300, separation=0.5, seed=1)
    held_out, _ = clusters(500, separation=0.5, seed=2)
    expected = fit_probe(features, labels, CLASSES).logits(held_out)
    logits = fit_probe((features + 10) * scale, labels, CLASSES).logits((held_out + 10) * scale)
    torch.testing.assert_close(
        logits, expected, rtol=0, atol=5e-3
    )  # float32 precision for features ten standard deviations from 0
    assert (logits.argmax(1) == expected.argmax(1)).double().mean() > 0.995


def test_a_constant_feature_changes_no_prediction():
    features, labels = clusters(300, separation=0.5, seed=1)
    held_out, _ = clusters(100, separation=0.5, seed=2)
    expected = fit_probe(features, labels, CLASSES).logits(held_out)
    with_constant = [torch.cat([x, torch.full((len(x), 1), 7.0)], 1) for x in (features, held_out)]
    logits = fit_probe(with_constant[0], labels, CLASSES).logits(with_constant[1])
    torch.testing.assert_close(logits, expected, rtol=0, atol=2e-3)


def test_a_class_without_images_is_never_predicted():
    features, labels = clusters(300, separation=2, seed=1)
    probe = fit_probe(features, labels, CLASSES + 1)
    assert probe.logits(features).shape == (300, CLASSES + 1)
    assert (probe.logits(features).argmax(1) < CLASSES).all()


def test_it_is_fitted_to_a_random_selection_of_images_up_to_the_limit(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(linear_probe, "MAX_IMAGES", 15)
    features, labels = torch.eye(40), torch.arange(40) % CLASSES
    is_used = fit_probe(features, labels, CLASSES, seed=1).mean > 0  # each image has its own feature
    assert is_used.sum() == 15
    expected = fit_probe(features[is_used], labels[is_used], CLASSES)
    from_file = fit_probe(stored_features(tmp_path / "a", features), labels, CLASSES, seed=1)
    for actual_tensor, expected_tensor in zip(from_file, expected, strict=True):
        torch.testing.assert_close(actual_tensor, expected_tensor)
    assert not torch.equal(fit_probe(features, labels, CLASSES, seed=2).mean > 0, is_used)


def test_all_images_are_used_within_the_limit():
    features, labels = clusters(300, separation=1, seed=1)
    torch.testing.assert_close(fit_probe(features, labels, CLASSES, seed=5).mean, features.mean(0).float())
    assert linear_probe.MAX_IMAGES == 10_000


# -- class agreement --------------------------------------------------------------------------------------------------


def test_class_agreement_is_the_share_of_images_with_the_largest_logit_at_the_label():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 5.0, 1.0], [3.0, 1.0, 2.0], [0.0, 0.0, 9.0]])
    assert class_agreement(logits, torch.tensor([0, 1, 2, 2])) == 0.75
    assert class_agreement(logits, torch.tensor([1, 0, 1, 0])) == 0


def test_no_images_a_wrong_number_of_labels_and_non_finite_logits_are_errors():
    with pytest.raises(UserError, match="0 images"):
        class_agreement(torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(UserError, match="3 images and 2 labels"):
        class_agreement(torch.zeros(3, 10), torch.zeros(2, dtype=torch.int64))
    non_finite = normal(10, 4)
    non_finite[2, 1], non_finite[5], non_finite[7, 0] = math.nan, math.inf, -math.inf
    with pytest.raises(UserError, match="3 of 10 rows"):
        class_agreement(non_finite, torch.zeros(10, dtype=torch.int64))
