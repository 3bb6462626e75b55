"""The Fréchet distance equals closed forms, scipy and torch-fidelity; its interval equals the theory of large samples."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_sets import normal, set_slice_size, stored_features
from scipy.linalg import sqrtm
from small_parts import error_message
from torch import Tensor
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric

from pipelines.evaluation import frechet
from pipelines.evaluation.feature_files import SLICE
from pipelines.evaluation.frechet import (
    Gaussian,
    bootstrap_interval,
    distance_between,
    fit_gaussian,
    frechet_distance,
    gaussian_from_moments,
)
from training_harness.errors import UserError


def points_with_moments(mean: Tensor, covariance: Tensor, seed: int = 0, count: int = 50) -> Tensor:
    """Create (count, F) points with exactly this mean and this unbiased covariance."""
    centred = normal(count, len(mean), seed=seed)
    orthonormal = torch.linalg.qr(centred - centred.mean(dim=0)).Q * (count - 1) ** 0.5
    return mean + orthonormal @ torch.linalg.cholesky(covariance).T


def correlated_points(count: int, width: int, seed: int) -> Tensor:
    return normal(count, width, seed=seed) @ normal(width, width, seed=100 + seed)


def scipy_frechet(a: Tensor, b: Tensor) -> float:
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    means = (a.mean(dim=0) - b.mean(dim=0)).square().sum().item()
    return means + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)


def torch_fidelity_frechet(a: Tensor, b: Tensor) -> float:
    statistics = fid_features_to_statistics(a), fid_features_to_statistics(b)
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def covariance_of(gaussian: Gaussian) -> Tensor:
    return gaussian.root.T @ gaussian.root


# -- the distance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("other_frechet", [scipy_frechet, torch_fidelity_frechet])
def test_the_distance_equals_the_distances_of_scipy_and_torch_fidelity(other_frechet):
    for seed in range(3):
        a, b = correlated_points(300, 24, seed), correlated_points(200, 24, 10 + seed) + 0.5
        assert frechet_distance(a, b) == pytest.approx(other_frechet(a, b), rel=1e-8)


def test_the_distance_of_axis_aligned_gaussians_is_the_distance_of_means_and_standard_deviations():
    mean_a, mean_b = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([3.0, 1.0, -2.0]).double()
    stds_a, stds_b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([4.0, 2.0, 1.5]).double()
    a = points_with_moments(mean_a, stds_a.square().diag(), seed=1, count=40)
    b = points_with_moments(mean_b, stds_b.square().diag(), seed=2, count=60)
    assert frechet_distance(a, b) == pytest.approx(25 + 10, rel=1e-10)  # Σ (μ_a − μ_b)² + Σ (σ_a − σ_b)²


def test_the_distance_of_gaussians_with_different_axes_equals_the_closed_form_in_two_dimensions():
    cov_a, cov_b = torch.tensor([[2.0, 1.2], [1.2, 1.0]]).double(), torch.tensor([[1.0, -0.8], [-0.8, 3.0]]).double()
    zero = torch.zeros(2, dtype=torch.float64)
    root_trace = ((cov_a @ cov_b).trace() + 2 * (cov_a.det() * cov_b.det()).sqrt()).sqrt()  # tr √M of a 2 × 2 matrix
    expected = (cov_a.trace() + cov_b.trace() - 2 * root_trace).item()
    a, b = points_with_moments(zero, cov_a, seed=1), points_with_moments(zero, cov_b, seed=2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("count", [2, 10, 500])  # fewer images than features, and more
def test_the_distance_is_zero_between_equal_sets_and_positive_between_different_sets(count: int, tmp_path: Path):
    features = 100 * normal(count, 64).relu().float()
    file, reversed_file = stored_features(tmp_path / "a", features), stored_features(tmp_path / "b", features.flip(0))
    assert frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(file, file) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(file, reversed_file) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(file, features + 1) == pytest.approx(64, abs=1e-3)  # float32 sums are rounded


def test_the_distance_of_rank_deficient_sets_on_orthogonal_axes_is_exact():
    # Two images in each set, F = 50: Σ_a and Σ_b share no direction, so the trace of the root is 0.
    a, b = torch.zeros(2, 50), torch.zeros(2, 50)
    a[0, 3], a[1, 3], b[0, 7], b[1, 7] = 1, -1, 2, -2
    assert frechet_distance(a, b) == pytest.approx(2 + 8, rel=1e-12)


def test_the_distance_of_two_pairs_of_images_is_the_distance_of_two_lines():
    # Σ = v vᵀ with v = (x₀ − x₁) / √2, and the trace of the root of Σ_a Σ_b is |v_a · v_b|.
    a, b = normal(2, 40, seed=1), normal(2, 40, seed=2) + 1
    v_a, v_b = (a[0] - a[1]) / 2**0.5, (b[0] - b[1]) / 2**0.5
    means = (a.mean(0) - b.mean(0)).square().sum()
    expected = means + v_a.square().sum() + v_b.square().sum() - 2 * (v_a @ v_b).abs()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-12)


def test_the_distance_of_fewer_images_than_features_is_the_distance_in_their_subspace():
    # 9 and 7 points in a subspace of 6 of 200 dimensions: a rotation into these 6 dimensions changes no distance.
    axes = torch.linalg.qr(normal(200, 6, seed=5)).Q
    a, b = correlated_points(9, 6, 1), correlated_points(7, 6, 2) + 1
    assert frechet_distance(a @ axes.T, b @ axes.T) == pytest.approx(scipy_frechet(a, b), rel=1e-9)


# -- the fit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 44, 1000])
def test_the_distance_does_not_depend_on_the_size_of_the_slices(rows: int, tmp_path: Path, monkeypatch):
    a, b = correlated_points(61, 12, 1).float(), (correlated_points(45, 12, 2) + 1).float()
    files = stored_features(tmp_path / "a", a), stored_features(tmp_path / "b", b)
    set_slice_size(rows, frechet, monkeypatch)
    expected = scipy_frechet(a.double(), b.double())
    assert frechet_distance(*files) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_a_file_of_more_than_two_slices_has_the_moments_of_all_rows(tmp_path: Path):
    features = (
        correlated_points(2 * SLICE + 37, 5, 1) + torch.arange(2 * SLICE + 37)[:, None] / 500
    ).float()  # drifting means
    fitted, all_rows = fit_gaussian(stored_features(tmp_path / "a", features)), features.double()
    torch.testing.assert_close(fitted.mean, all_rows.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(covariance_of(fitted), all_rows.T.cov(), rtol=1e-11, atol=1e-11)
    assert not torch.allclose(fitted.mean, all_rows[:SLICE].mean(0), rtol=0.1)  # the first slice has another mean


@pytest.mark.parametrize(("count", "width"), [(30, 8), (5, 8), (2, 8)])
def test_the_root_has_the_unbiased_covariance_and_no_more_rows_than_features(count: int, width: int):
    features = correlated_points(count, width, 3) + 10
    fitted = fit_gaussian(features)
    torch.testing.assert_close(fitted.mean, features.mean(0))
    torch.testing.assert_close(covariance_of(fitted), features.T.cov())
    assert fitted.root.shape[0] <= width
    assert fitted.root.dtype == fitted.mean.dtype == torch.float64


@pytest.mark.parametrize("rows", [3, 1000])
def test_a_weight_is_the_number_of_times_an_image_counts(rows: int, monkeypatch):
    features, weights = (
        correlated_points(12, 4, 1),
        torch.tensor([0, 0, 0, 2, 1, 0, 5, 1, 1, 0, 3, 1]),
    )  # one slice has only zero weights
    set_slice_size(rows, frechet, monkeypatch)
    weighted, repeated = fit_gaussian(features, weights), fit_gaussian(features.repeat_interleave(weights, 0))
    torch.testing.assert_close(weighted.mean, repeated.mean)
    torch.testing.assert_close(covariance_of(weighted), covariance_of(repeated))
    assert not torch.allclose(weighted.mean, fit_gaussian(features).mean)


def test_stored_moments_give_the_distance_of_the_features_they_were_computed_from():
    a, b = correlated_points(50, 10, 1), correlated_points(40, 10, 2) + 1
    four_images = normal(4, 10, seed=3)  # a covariance of rank 3
    for reference in (a, four_images):
        moments = gaussian_from_moments(reference.mean(0), reference.T.cov())
        assert distance_between(moments, fit_gaussian(b)) == pytest.approx(frechet_distance(reference, b), rel=1e-6)
        torch.testing.assert_close(covariance_of(moments), reference.T.cov())
    float32_moments = gaussian_from_moments(a.mean(0).float(), a.T.cov().float())  # as in some files
    assert distance_between(float32_moments, fit_gaussian(b)) == pytest.approx(frechet_distance(a, b), rel=1e-4)


UNIT = torch.eye(4, dtype=torch.float64)
NOT_FINITE = torch.tensor([1.0, math.nan, 0.0, 0.0])


@pytest.mark.parametrize(
    ("mean", "covariance", "message"),
    [
        (NOT_FINITE, UNIT, "(4,) and (4, 4)"),
        (torch.zeros(4), UNIT * math.inf, "(4,) and (4, 4)"),
        (torch.zeros(3), UNIT, "(3,) and (4, 4)"),
        (torch.zeros(4), UNIT[:3], "(4,) and (3, 4)"),
        (torch.zeros(4), UNIT[0], "(4,) and (4,)"),
        (torch.zeros(4, 1), UNIT, "(4, 1) and (4, 4)"),
        (torch.zeros(4), torch.tensor([4.0, 3.0, 2.0, -1.0]).diag(), "eigenvalues from -1 to 4"),
        (torch.zeros(4), -UNIT, "eigenvalues from -1 to -1"),
    ],
)
def test_invalid_moments_are_an_error_that_describes_them(mean: Tensor, covariance: Tensor, message: str):
    with pytest.raises(UserError) as error:
        gaussian_from_moments(mean, covariance)
    assert message in error_message(error)


def test_an_eigenvalue_that_is_negative_by_rounding_counts_as_zero():
    rotation = torch.linalg.qr(normal(4, 4)).Q
    moments = gaussian_from_moments(
        torch.zeros(4), rotation @ torch.tensor([4.0, 3.0, 2.0, -3e-3]).double().diag() @ rotation.T
    )
    assert torch.linalg.eigvalsh(covariance_of(moments)) == pytest.approx([0, 2, 3, 4], abs=1e-9)


# -- the interval -----------------------------------------------------------------------------------------------------


def half_width(interval: tuple[float, float], distance: float) -> float:
    return interval[1] - distance  # the lower limit can be 0


def test_the_interval_contains_the_distance_and_depends_on_the_seed(tmp_path: Path):
    a, b = correlated_points(80, 3, 1).float(), (correlated_points(70, 3, 2) + 1).float()
    low, high = bootstrap_interval(a, b, seed=4)
    assert 0 < low < frechet_distance(a, b) < high
    files = stored_features(tmp_path / "a", a), stored_features(tmp_path / "b", b)
    assert bootstrap_interval(*files, seed=4) == pytest.approx((low, high), rel=1e-9)
    assert bootstrap_interval(a, b, seed=5) != (low, high)


def test_the_interval_of_two_samples_of_one_distribution_starts_at_zero():
    low, high = bootstrap_interval(normal(40, 3, seed=1), normal(40, 3, seed=2))
    assert low == 0 < high


def test_the_interval_equals_the_theory_of_large_samples_and_shrinks_with_the_root_of_their_size():
    # One feature: d = δ² + (σ_a − σ_b)² with δ = 3, so its standard deviation is 2 δ √(2 / N) to first order. The standard
    # deviation over 200 resamples is precise to 5 %.
    widths = []
    for count in (100, 1600):
        a, b = normal(count, 1, seed=1), normal(count, 1, seed=2) + 3
        widths.append(half_width(bootstrap_interval(a, b, resamples=200), frechet_distance(a, b)))
        assert widths[-1] == pytest.approx(1.96 * 2 * 3 * (2 / count) ** 0.5, rel=0.25)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.25)


def test_pairs_resampled_together_have_a_narrower_interval_only_if_they_are_similar():
    a = normal(200, 3, seed=1)
    for b, is_narrower in ((a + 0.05 * normal(200, 3, seed=2), True), (normal(200, 3, seed=3) + 1, False)):
        distance = frechet_distance(a, b)
        paired_width, unpaired_width = (
            half_width(bootstrap_interval(a, b, paired=paired, resamples=100), distance) for paired in (True, False)
        )
        widths = (paired_width, unpaired_width)
        assert (paired_width < 0.2 * unpaired_width) if is_narrower else (0.6 < paired_width / unpaired_width < 1.6), (
            widths
        )


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [frechet_distance, bootstrap_interval])
def test_each_set_needs_two_images(metric):
    for sets in ((normal(1, 4), normal(5, 4)), (normal(5, 4), normal(1, 4))):
        with pytest.raises(UserError, match=r"1 images.* 2 or more"):
            metric(*sets)
    assert np.isfinite(metric(normal(2, 4, seed=1), normal(2, 4, seed=2))).all()


def test_the_error_for_non_finite_rows_has_their_count():
    non_finite = normal(10, 4)
    non_finite[2, 1], non_finite[5], non_finite[7, 0] = math.nan, math.inf, -math.inf
    for sets in ((non_finite, normal(10, 4)), (normal(10, 4), non_finite)):
        with pytest.raises(UserError, match="3 of 10 rows") as error:
            frechet_distance(*sets)
        error_message(error)


def test_sets_with_different_features_are_an_error_with_both_shapes():
    with pytest.raises(UserError, match=r"\(5, 4\) and \(5, 3\)") as error:
        frechet_distance(normal(5, 4), normal(5, 3))
    error_message(error)
    with pytest.raises(UserError, match="reference has 3 features and the images 4") as error:
        distance_between(fit_gaussian(normal(5, 4)), fit_gaussian(normal(5, 3)))
    error_message(error)
