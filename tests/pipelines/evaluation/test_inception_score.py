"""The Inception Score against torch-fidelity's, and where it can be said without computing."""

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
def test_the_score_equals_torch_fidelitys_on_the_same_parts(seed: int, tmp_path: Path):
    logits = (2 * normal(200, 30)).float()
    order = torch.randperm(200, generator=seeded(seed))  # ours; theirs draws with numpy
    theirs = isc_features_to_metric(logits[order], splits=10, shuffle=False)
    expected = {"inception_score": theirs[KEY_METRIC_ISC_MEAN], "inception_score_std": theirs[KEY_METRIC_ISC_STD]}
    assert inception_score(logits, seed) == pytest.approx(expected, rel=1e-10)
    assert inception_score(stored_features(tmp_path / "logits", logits), seed) == pytest.approx(expected, rel=1e-10)
    assert expected["inception_score_std"] > 0
    assert inception_score(logits, seed + 1) != inception_score(logits, seed)


def test_the_score_does_not_depend_on_the_rows_in_memory_at_once(monkeypatch):
    logits = normal(60, 5)
    expected = inception_score(logits)
    set_slice_size(4, module, monkeypatch)
    assert inception_score(logits) == pytest.approx(expected, rel=1e-12)


def test_verdicts_that_are_all_alike_score_one_however_sure_they_are():
    for logits in (torch.zeros(100, 8), 30 * torch.eye(8)[[3]].expand(100, 8)):
        assert inception_score(logits) == pytest.approx({"inception_score": 1, "inception_score_std": 0}, abs=1e-9)


@pytest.mark.parametrize("strength", [50, 2000])  # 2,000 leaves a share of exactly 0 for the other classes
def test_sure_and_balanced_verdicts_score_the_number_of_classes_seen(strength: float, monkeypatch):
    monkeypatch.setattr(module, "PARTS", 1)
    found = inception_score(one_hot_logits(60, 6, strength))
    assert found == pytest.approx({"inception_score": 6, "inception_score_std": 0}, rel=1e-9)
    unseen = torch.cat(
        [one_hot_logits(60, 6, strength), torch.zeros(60, 4)], 1
    )  # ten classes, of which four never come
    assert inception_score(unseen)["inception_score"] == pytest.approx(6, rel=1e-9)


def test_ten_parts_score_near_the_number_of_classes_and_less_by_what_a_part_misses():
    found = inception_score(one_hot_logits(5000, 6, 50))
    assert 5.9 < found["inception_score"] < 6
    assert 0 < found["inception_score_std"] < 0.1


def test_fewer_images_than_parts_are_parts_of_one_image():
    assert inception_score(normal(4, 5)) == pytest.approx({"inception_score": 1, "inception_score_std": 0}, abs=1e-9)
    assert np.isfinite(list(inception_score(normal(13, 5)).values())).all()
