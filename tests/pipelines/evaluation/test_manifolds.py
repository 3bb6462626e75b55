"""Precision, recall, density, coverage and nearest distances equal slow loops, formulas of the papers and torch-fidelity."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_sets import normal, set_slice_size, stored_features
from small_parts import error_message
from torch import Tensor
from torch_fidelity.metric_prc import KEY_METRIC_PRECISION, KEY_METRIC_RECALL, prc_features_to_metric

from pipelines.evaluation import manifolds
from pipelines.evaluation.feature_files import SLICE
from pipelines.evaluation.manifolds import density_coverage, nearest_distances, precision_recall
from training_harness.errors import UserError


def slow_recall(real: Tensor, generated: Tensor, k: int) -> float:
    def is_inside(point: Tensor) -> bool:
        return any((point - g).norm() <= sorted((g - h).norm() for h in generated)[k] for g in generated)

    return sum(is_inside(point) for point in real) / len(real)


def torch_fidelity_precision_recall(real: Tensor, generated: Tensor) -> tuple[float, float]:
    """Compute precision and recall with torch-fidelity.

    It takes the generated set first. Its default of 3 neighbours means the fourth smallest distance in a set, including the
    distance 0 of a point to itself, so it equals our k = 3. Both count a point on the surface of a ball as inside.
    """
    metrics = prc_features_to_metric(generated, real, verbose=False)
    return metrics[KEY_METRIC_PRECISION], metrics[KEY_METRIC_RECALL]


def formula_density_coverage(real: Tensor, generated: Tensor, k: int) -> tuple[float, float]:
    """Compute eq. 5 and 6 of arXiv 2002.09797; NND_k is the distance to the k-th nearest of the other real images."""
    x, y = real.double().numpy(), generated.double().numpy()
    real_distances = np.linalg.norm(x[:, None] - x[None], axis=-1)
    np.fill_diagonal(real_distances, np.inf)
    nnd = np.sort(real_distances, axis=1)[:, k - 1]
    inside = np.linalg.norm(y[None] - x[:, None], axis=-1) <= nnd[:, None]  # (N, M): Y_j ∈ B(X_i, NND_k(X_i))
    return inside.sum() / (k * len(y)), inside.any(axis=1).mean()


# -- precision and recall ---------------------------------------------------------------------------------------------


def test_precision_and_recall_equal_a_slow_double_loop():
    real, generated = normal(40, 3, seed=1), 1.2 * normal(30, 3, seed=2) + 1
    for k in (1, 3, 5):
        metrics = precision_recall(real, generated, k=k)
        assert metrics.recall == pytest.approx(slow_recall(real, generated, k))
        assert metrics.precision == pytest.approx(slow_recall(generated, real, k))
        assert 0 < metrics.recall < 1  # 0 and 1 would be too easy to reach
        assert 0 < metrics.precision < 1


@pytest.mark.parametrize("width", [3, 64])
def test_precision_and_recall_equal_torch_fidelity(width: int):
    real, generated = normal(150, width, seed=1), 0.9 * normal(110, width, seed=2) + 0.2
    expected = torch_fidelity_precision_recall(real, generated)
    assert precision_recall(real, generated) == pytest.approx(expected, abs=1e-6)  # torch-fidelity averages in float32
    assert expected[0] != expected[1]  # so that swapped sets would fail the test


def test_files_of_more_than_one_slice_have_the_precision_and_recall_of_torch_fidelity(tmp_path: Path):
    real, generated = normal(SLICE + 300, 4, seed=1).float(), (0.7 * normal(SLICE + 100, 4, seed=2) + 0.7).float()
    files = stored_features(tmp_path / "real", real), stored_features(tmp_path / "generated", generated)
    expected = torch_fidelity_precision_recall(real.double(), generated.double())
    assert precision_recall(*files) == pytest.approx(expected, abs=1e-6)
    assert max(expected) < 0.99


@pytest.mark.parametrize("metric", [precision_recall, density_coverage])
def test_no_metric_depends_on_the_size_of_the_slices_or_on_the_origin(metric, monkeypatch):
    real, generated = normal(101, 8, seed=1), normal(57, 8, seed=2)
    expected = metric(real, generated)
    # Without centring, distances from a matrix product would have no correct digits here.
    assert metric(real + 1e8, generated + 1e8) == expected
    for rows in (1, 7, 57):
        set_slice_size(rows, manifolds, monkeypatch)
        assert metric(real, generated) == expected


def test_precision_and_recall_of_a_set_against_itself_are_one_even_with_repeated_images():
    features = torch.cat([normal(50, 16), normal(1, 16, seed=1).expand(10, 16)])  # ten equal images with radius 0
    assert precision_recall(features, features.flip(0)) == (1, 1)
    assert precision_recall(features, features[50:57]).precision == 1


def test_recall_falls_to_one_half_when_one_of_two_modes_is_dropped_and_precision_does_not():
    left, right = normal(400, 2, seed=1), normal(400, 2, seed=2) + 100
    precision, recall = precision_recall(real=torch.cat([left, right]), generated=normal(800, 2, seed=3))
    assert recall == pytest.approx(0.5, abs=0.02)
    assert precision > 0.95


def test_precision_falls_to_one_half_when_half_the_images_are_far_from_real_images_and_recall_does_not():
    real, far_away = normal(400, 2, seed=1), normal(400, 2, seed=2) + 100
    precision, recall = precision_recall(real, generated=torch.cat([normal(400, 2, seed=3), far_away]))
    assert precision == pytest.approx(0.5, abs=0.02)
    assert recall > 0.95


# -- density and coverage ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 3, 5])
def test_density_and_coverage_equal_the_formulas_of_the_paper(k: int):
    real, generated = normal(70, 3, seed=1), 0.8 * normal(50, 3, seed=2) + 0.7
    metrics = density_coverage(real, generated, k=k)
    assert metrics == pytest.approx(formula_density_coverage(real, generated, k), rel=1e-12)
    assert 0 < metrics.coverage < 1
    assert 0 < metrics.density != metrics.coverage


def test_five_neighbours_are_the_default_of_density_and_coverage():
    real, generated = normal(70, 3, seed=1), normal(50, 3, seed=2)
    assert density_coverage(real, generated) == density_coverage(real, generated, k=5)
    assert density_coverage(real, generated) != density_coverage(real, generated, k=3)


def test_files_of_more_than_one_slice_have_the_density_and_coverage_of_the_formulas(tmp_path: Path):
    real, generated = normal(SLICE + 80, 2, seed=1).float(), (0.5 * normal(SLICE + 50, 2, seed=2) + 1).float()
    files = stored_features(tmp_path / "real", real), stored_features(tmp_path / "generated", generated)
    assert density_coverage(*files) == pytest.approx(formula_density_coverage(real, generated, 5), rel=1e-12)


def test_a_second_sample_of_real_images_has_the_expected_density_and_coverage():
    # All points have one distribution, so each is equally likely to be among the k nearest of another: the density is 1. A
    # ball is not covered if the k nearest of N + M − 1 points are all real: the coverage is
    # 1 − (N − 1) … (N − k) / ((N + M − 1) … (N + M − k)). The means of 10 pairs had standard deviations of 0.01 and 0.002.
    n, m, k = 200, 300, 5
    pairs = [density_coverage(normal(n, 4, seed=2 * i), normal(m, 4, seed=2 * i + 1), k) for i in range(10)]
    uncovered = math.prod((n - i) / (n + m - i) for i in range(1, k + 1))
    assert np.mean([pair.density for pair in pairs]) == pytest.approx(1, abs=0.05)
    assert np.mean([pair.coverage for pair in pairs]) == pytest.approx(1 - uncovered, abs=0.01)


def test_one_real_outlier_raises_precision_to_one_and_density_to_only_one_ball():
    real, far_away = normal(200, 2, seed=1), normal(100, 2, seed=2) + 50
    assert precision_recall(real, far_away).precision == density_coverage(real, far_away).density == 0
    with_outlier = torch.cat([real, torch.tensor([[80.0, 80.0]]).double()])  # its ball contains the other points
    assert precision_recall(with_outlier, far_away).precision == 1
    assert density_coverage(with_outlier, far_away, k=5).density == pytest.approx(1 / 5)
    assert density_coverage(with_outlier, far_away, k=5).coverage == pytest.approx(1 / 201)


# -- nearest distances ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1e3, -1e6])
def test_only_copies_have_distance_zero(offset: float):
    support = (normal(300, 64, seed=1) + offset).float()
    points = torch.cat([support[17:60], (normal(5, 64, seed=2) + offset).float()])
    distances = nearest_distances(points, support)
    assert distances[:43].tolist() == [0] * 43
    assert (distances[43:] > 5).all(), distances[43:]  # the expected distance of two samples is √64 · √2


@pytest.mark.parametrize(("rows", "offset"), [(9, 0), (1000, 0), (1000, 1e4)])
def test_the_nearest_distance_is_the_smallest_distance(rows: int, offset: float, tmp_path: Path, monkeypatch):
    points, support = (normal(40, 10, seed=1) + offset).float(), (normal(70, 10, seed=2) + offset).float()
    expected = torch.cdist(points.double(), support.double(), compute_mode="donot_use_mm_for_euclid_dist").min(1).values
    set_slice_size(rows, manifolds, monkeypatch)
    for distances in (
        nearest_distances(points, support),
        nearest_distances(stored_features(tmp_path / "points", points), stored_features(tmp_path / "support", support)),
    ):
        torch.testing.assert_close(distances, expected, rtol=1e-9, atol=0)


def test_copies_are_found_in_any_slice_of_a_file(tmp_path: Path):
    support = normal(2 * SLICE + 5, 6, seed=1).float()
    order = torch.randperm(len(support), generator=torch.Generator().manual_seed(2))
    distances = nearest_distances(
        stored_features(tmp_path / "points", support[order]), stored_features(tmp_path / "support", support)
    )
    assert distances.count_nonzero() == 0
    assert nearest_distances(support[-1:], support[:-1]) > 0


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [precision_recall, density_coverage])
def test_too_few_images_for_k_are_an_error_with_the_number_needed(metric):
    for sets in ((normal(9, 4), normal(3, 4)), (normal(3, 4), normal(9, 4))):
        with pytest.raises(UserError, match=r"3 images.* k = 3 needs 4 or more"):
            metric(*sets, k=3)
    assert metric(normal(4, 4), normal(4, 4), k=3)[1] == 1  # k + 1 images are enough
    with pytest.raises(UserError, match="k is 0") as error:
        metric(normal(9, 4), normal(9, 4), k=0)
    error_message(error)


@pytest.mark.parametrize("metric", [precision_recall, density_coverage, nearest_distances])
def test_non_finite_rows_and_different_features_are_errors(metric):
    non_finite = normal(10, 4)
    non_finite[2, 1], non_finite[5], non_finite[7, 0] = math.nan, math.inf, -math.inf
    for sets in ((non_finite, normal(10, 4)), (normal(10, 4), non_finite)):
        with pytest.raises(UserError, match="3 of 10 rows"):
            metric(*sets)
    with pytest.raises(UserError, match=r"\(7, 4\) and \(7, 2, 2\)"):
        metric(normal(7, 4), normal(7, 2, 2))
    with pytest.raises(UserError, match="0 images"):
        metric(normal(7, 4), normal(0, 4))
