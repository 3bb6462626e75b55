"""The Inception Score equals the score of torch-fidelity, and known values."""

from pathlib import Path

import numpy as np
import pytest
import torch
from feature_sets import normal, set_slice_size, stored_features
from tiny_models import seeded
from torch import Tensor
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric

from pipelines.evaluation import inception_score as module
from pipelines.evaluation.inception_score import inception_score


def one_hot_logits(count: int, classes: int, strength: float) -> Tensor:
    return strength * torch.eye(classes)[torch.arange(count) % classes]


@pytest.mark.parametrize("seed", [0, 3])
def test_the_score_equals_torch_fidelity_on_equal_parts(seed: int, tmp_path: Path):
    logits = (2 * normal(200, 30)).float()
    order = torch.randperm(200, generator=seeded(seed))  # torch-fidelity shuffles with numpy
    reference = isc_features_to_metric(logits[order], splits=10, shuffle=False)
    expected = {"inception_score": reference[KEY_METRIC_ISC_MEAN], "inception_score_std": reference[KEY_METRIC_ISC_STD]}
    assert inception_score(logits, seed) == pytest.approx(expected, rel=1e-10)
    assert inception_score(stored_features(tmp_path / "logits", logits), seed) == pytest.approx(expected, rel=1e-10)
    assert expected["inception_score_std"] > 0
    assert inception_score(logits, seed + 1) != inception_score(logits, seed)


def test_the_score_does_not_depend_on_the_size_of_the_slices(monkeypatch):
    logits = normal(60, 5)
    expected = inception_score(logits)
    set_slice_size(4, module, monkeypatch)
    assert inception_score(logits) == pytest.approx(expected, rel=1e-12)


def test_equal_predictions_score_one_at_any_confidence():
    for logits in (torch.zeros(100, 8), 30 * torch.eye(8)[[3]].expand(100, 8)):
        assert inception_score(logits) == pytest.approx({"inception_score": 1, "inception_score_std": 0}, abs=1e-9)


@pytest.mark.parametrize("strength", [50, 2000])  # with 2,000 the probability of the other classes is exactly 0
def test_confident_and_balanced_predictions_score_the_number_of_predicted_classes(strength: float, monkeypatch):
    monkeypatch.setattr(module, "PARTS", 1)
    score = inception_score(one_hot_logits(60, 6, strength))
    assert score == pytest.approx({"inception_score": 6, "inception_score_std": 0}, rel=1e-9)
    with_unused_classes = torch.cat(
        [one_hot_logits(60, 6, strength), torch.zeros(60, 4)], 1
    )  # ten classes, four of them never predicted
    assert inception_score(with_unused_classes)["inception_score"] == pytest.approx(6, rel=1e-9)


def test_ten_parts_score_slightly_less_than_the_number_of_classes():
    score = inception_score(one_hot_logits(5000, 6, 50))
    assert 5.9 < score["inception_score"] < 6
    assert 0 < score["inception_score_std"] < 0.1


def test_fewer_images_than_parts_give_parts_of_one_image():
    assert inception_score(normal(4, 5)) == pytest.approx({"inception_score": 1, "inception_score_std": 0}, abs=1e-9)
    assert np.isfinite(list(inception_score(normal(13, 5)).values())).all()
