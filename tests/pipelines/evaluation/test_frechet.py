"""The Fréchet distance against closed forms, scipy and torch-fidelity; its interval against the theory of large samples."""

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
    gaussian_of_moments,
)
from training_harness.errors import UserError


def with_moments(mean: Tensor, covariance: Tensor, seed: int = 0, count: int = 50) -> Tensor:
    """(count, F) points whose mean and unbiased covariance are exactly those given."""
    centred = normal(count, len(mean), seed=seed)
    orthonormal = torch.linalg.qr(centred - centred.mean(dim=0)).Q * (count - 1) ** 0.5
    return mean + orthonormal @ torch.linalg.cholesky(covariance).T


def correlated(count: int, width: int, seed: int) -> Tensor:
    return normal(count, width, seed=seed) @ normal(width, width, seed=100 + seed)


def scipy_frechet(a: Tensor, b: Tensor) -> float:
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    means = (a.mean(dim=0) - b.mean(dim=0)).square().sum().item()
    return means + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)


def torch_fidelitys(a: Tensor, b: Tensor) -> float:
    statistics = fid_features_to_statistics(a), fid_features_to_statistics(b)
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def covariance_of(gaussian: Gaussian) -> Tensor:
    return gaussian.root.T @ gaussian.root


# -- the distance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", [scipy_frechet, torch_fidelitys])
def test_the_distance_equals_the_matrix_root_of_scipy_and_the_eigenvalues_of_torch_fidelity(reference):
    for seed in range(3):
        a, b = correlated(300, 24, seed), correlated(200, 24, 10 + seed) + 0.5
        assert frechet_distance(a, b) == pytest.approx(reference(a, b), rel=1e-8)


def test_the_distance_of_axis_aligned_gaussians_is_that_of_their_means_and_widths():
    mean_a, mean_b = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([3.0, 1.0, -2.0]).double()
    widths_a, widths_b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([4.0, 2.0, 1.5]).double()
    a = with_moments(mean_a, widths_a.square().diag(), seed=1, count=40)
    b = with_moments(mean_b, widths_b.square().diag(), seed=2, count=60)
    assert frechet_distance(a, b) == pytest.approx(25 + 10, rel=1e-10)  # Σ (μ_a − μ_b)² + Σ (σ_a − σ_b)²


def test_the_distance_of_gaussians_whose_axes_differ_has_the_closed_form_of_two_dimensions():
    cov_a, cov_b = torch.tensor([[2.0, 1.2], [1.2, 1.0]]).double(), torch.tensor([[1.0, -0.8], [-0.8, 3.0]]).double()
    zero = torch.zeros(2, dtype=torch.float64)
    root_trace = ((cov_a @ cov_b).trace() + 2 * (cov_a.det() * cov_b.det()).sqrt()).sqrt()  # tr √M of a 2 × 2 matrix
    expected = (cov_a.trace() + cov_b.trace() - 2 * root_trace).item()
    a, b = with_moments(zero, cov_a, seed=1), with_moments(zero, cov_b, seed=2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("count", [2, 10, 500])  # fewer images than features, and more
def test_a_set_is_at_distance_zero_from_itself_and_not_from_another(count: int, tmp_path: Path):
    features = 100 * normal(count, 64).relu().float()
    file, backwards = stored_features(tmp_path / "a", features), stored_features(tmp_path / "b", features.flip(0))
    assert frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(file, file) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(file, backwards) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(file, features + 1) == pytest.approx(64, abs=1e-3)  # the float32 sum rounds


def test_the_distance_of_rank_deficient_sets_on_orthogonal_axes_is_exact():
    # Two images each, F = 50: Σ_a and Σ_b share no direction, so that the root's trace is 0.
    a, b = torch.zeros(2, 50), torch.zeros(2, 50)
    a[0, 3], a[1, 3], b[0, 7], b[1, 7] = 1, -1, 2, -2
    assert frechet_distance(a, b) == pytest.approx(2 + 8, rel=1e-12)


def test_the_distance_of_two_pairs_of_images_is_that_of_two_lines():
    # Σ = v vᵀ with v = (x₀ − x₁) / √2, and the trace of the root of Σ_a Σ_b is |v_a · v_b|.
    a, b = normal(2, 40, seed=1), normal(2, 40, seed=2) + 1
    v_a, v_b = (a[0] - a[1]) / 2**0.5, (b[0] - b[1]) / 2**0.5
    means = (a.mean(0) - b.mean(0)).square().sum()
    expected = means + v_a.square().sum() + v_b.square().sum() - 2 * (v_a @ v_b).abs()
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-12)


def test_fewer_images_than_features_give_the_distance_in_the_subspace_that_they_span():
    # 9 and 7 points in 6 of 200 dimensions: turning them into those 6 leaves every distance as it was.
    axes = torch.linalg.qr(normal(200, 6, seed=5)).Q
    a, b = correlated(9, 6, 1), correlated(7, 6, 2) + 1
    assert frechet_distance(a @ axes.T, b @ axes.T) == pytest.approx(scipy_frechet(a, b), rel=1e-9)


# -- the fit ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 44, 1000])
def test_the_distance_does_not_depend_on_the_rows_in_memory_at_once(rows: int, tmp_path: Path, monkeypatch):
    a, b = correlated(61, 12, 1).float(), (correlated(45, 12, 2) + 1).float()
    files = stored_features(tmp_path / "a", a), stored_features(tmp_path / "b", b)
    set_slice_size(rows, frechet, monkeypatch)
    expected = scipy_frechet(a.double(), b.double())
    assert frechet_distance(*files) == pytest.approx(expected, rel=1e-8)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-8)


def test_a_file_of_more_rows_than_two_slices_has_the_moments_of_the_whole(tmp_path: Path):
    features = (
        correlated(2 * SLICE + 37, 5, 1) + torch.arange(2 * SLICE + 37)[:, None] / 500
    ).float()  # drifting means
    fitted, whole = fit_gaussian(stored_features(tmp_path / "a", features)), features.double()
    torch.testing.assert_close(fitted.mean, whole.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(covariance_of(fitted), whole.T.cov(), rtol=1e-11, atol=1e-11)
    assert not torch.allclose(fitted.mean, whole[:SLICE].mean(0), rtol=0.1)  # or the first slice alone would pass


@pytest.mark.parametrize(("count", "width"), [(30, 8), (5, 8), (2, 8)])
def test_the_root_has_the_unbiased_covariance_and_no_more_rows_than_features(count: int, width: int):
    features = correlated(count, width, 3) + 10
    fitted = fit_gaussian(features)
    torch.testing.assert_close(fitted.mean, features.mean(0))
    torch.testing.assert_close(covariance_of(fitted), features.T.cov())
    assert fitted.root.shape[0] <= width
    assert fitted.root.dtype == fitted.mean.dtype == torch.float64


@pytest.mark.parametrize("rows", [3, 1000])
def test_a_weight_counts_an_image_as_often_as_it_says(rows: int, monkeypatch):
    features, weights = correlated(12, 4, 1), torch.tensor([0, 0, 0, 2, 1, 0, 5, 1, 1, 0, 3, 1])  # a slice without any
    set_slice_size(rows, frechet, monkeypatch)
    weighted, repeated = fit_gaussian(features, weights), fit_gaussian(features.repeat_interleave(weights, 0))
    torch.testing.assert_close(weighted.mean, repeated.mean)
    torch.testing.assert_close(covariance_of(weighted), covariance_of(repeated))
    assert not torch.allclose(weighted.mean, fit_gaussian(features).mean)


def test_stored_moments_are_as_good_as_the_features_they_came_from():
    a, b = correlated(50, 10, 1), correlated(40, 10, 2) + 1
    few = normal(4, 10, seed=3)  # a covariance of rank 3
    for reference in (a, few):
        moments = gaussian_of_moments(reference.mean(0), reference.T.cov())
        assert distance_between(moments, fit_gaussian(b)) == pytest.approx(frechet_distance(reference, b), rel=1e-6)
        torch.testing.assert_close(covariance_of(moments), reference.T.cov())
    single = gaussian_of_moments(a.mean(0).float(), a.T.cov().float())  # as some files hold them
    assert distance_between(single, fit_gaussian(b)) == pytest.approx(frechet_distance(a, b), rel=1e-4)


UNIT = torch.eye(4, dtype=torch.float64)
NOT_FINITE = torch.tensor([1.0, math.nan, 0.0, 0.0])


@pytest.mark.parametrize(
    ("mean", "covariance", "found"),
    [
        (NOT_FINITE, UNIT, "(4,) and (4, 4)"),
        (torch.zeros(4), UNIT * math.inf, "(4,) and (4, 4)"),
        (torch.zeros(3), UNIT, "(3,) and (4, 4)"),
        (torch.zeros(4), UNIT[:3], "(4,) and (3, 4)"),
        (torch.zeros(4), UNIT[0], "(4,) and (4,)"),
        (torch.zeros(4, 1), UNIT, "(4, 1) and (4, 4)"),
        (torch.zeros(4), torch.tensor([4.0, 3.0, 2.0, -1.0]).diag(), "eigenvalue -1 beside 4"),
        (torch.zeros(4), -UNIT, "eigenvalue -1 beside -1"),
    ],
)
def test_moments_that_are_none_are_an_error_that_says_what_was_found(mean: Tensor, covariance: Tensor, found: str):
    with pytest.raises(UserError) as error:
        gaussian_of_moments(mean, covariance)
    assert found in error_message(error)


def test_an_eigenvalue_below_zero_by_rounding_is_taken_for_zero():
    turn = torch.linalg.qr(normal(4, 4)).Q
    moments = gaussian_of_moments(torch.zeros(4), turn @ torch.tensor([4.0, 3.0, 2.0, -3e-3]).double().diag() @ turn.T)
    assert torch.linalg.eigvalsh(covariance_of(moments)) == pytest.approx([0, 2, 3, 4], abs=1e-9)


# -- the interval -----------------------------------------------------------------------------------------------------


def width_of(interval: tuple[float, float], distance: float) -> float:
    return interval[1] - distance  # the lower side may be cut off at 0


def test_the_interval_contains_the_distance_and_repeats_with_its_seed(tmp_path: Path):
    a, b = correlated(80, 3, 1).float(), (correlated(70, 3, 2) + 1).float()
    low, high = bootstrap_interval(a, b, seed=4)
    assert 0 < low < frechet_distance(a, b) < high
    files = stored_features(tmp_path / "a", a), stored_features(tmp_path / "b", b)
    assert bootstrap_interval(*files, seed=4) == pytest.approx((low, high), rel=1e-9)
    assert bootstrap_interval(a, b, seed=5) != (low, high)


def test_the_interval_of_two_draws_of_one_distribution_ends_at_zero():
    low, high = bootstrap_interval(normal(40, 3, seed=1), normal(40, 3, seed=2))
    assert low == 0 < high


def test_the_interval_is_that_of_large_samples_and_shrinks_with_the_root_of_their_size():
    # One feature: d = δ² + (σ_a − σ_b)² with δ = 3, so its standard deviation is 2 δ √(2 / N) in the first order. 200
    # resamples know theirs to 5 %.
    widths = []
    for count in (100, 1600):
        a, b = normal(count, 1, seed=1), normal(count, 1, seed=2) + 3
        widths.append(width_of(bootstrap_interval(a, b, resamples=200), frechet_distance(a, b)))
        assert widths[-1] == pytest.approx(1.96 * 2 * 3 * (2 / count) ** 0.5, rel=0.25)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.25)


def test_pairs_drawn_together_have_a_narrower_interval_when_they_are_alike_and_only_then():
    a = normal(200, 3, seed=1)
    for b, narrower in ((a + 0.05 * normal(200, 3, seed=2), True), (normal(200, 3, seed=3) + 1, False)):
        distance = frechet_distance(a, b)
        together, apart = (
            width_of(bootstrap_interval(a, b, paired=paired, resamples=100), distance) for paired in (True, False)
        )
        assert (together < 0.2 * apart) if narrower else (0.6 < together / apart < 1.6), (together, apart)


# -- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metric", [frechet_distance, bootstrap_interval])
def test_one_image_is_too_few_and_two_are_enough(metric):
    for sets in ((normal(1, 4), normal(5, 4)), (normal(5, 4), normal(1, 4))):
        with pytest.raises(UserError, match=r"1 images.* 2 or more"):
            metric(*sets)
    assert np.isfinite(metric(normal(2, 4, seed=1), normal(2, 4, seed=2))).all()


def test_rows_that_are_not_finite_are_counted_in_the_error():
    broken = normal(10, 4)
    broken[2, 1], broken[5], broken[7, 0] = math.nan, math.inf, -math.inf
    for sets in ((broken, normal(10, 4)), (normal(10, 4), broken)):
        with pytest.raises(UserError, match="3 of 10 rows") as error:
            frechet_distance(*sets)
        error_message(error)


def test_sets_of_different_features_are_an_error_that_names_both():
    with pytest.raises(UserError, match=r"\(5, 4\) and \(5, 3\)") as error:
        frechet_distance(normal(5, 4), normal(5, 3))
    error_message(error)
    with pytest.raises(UserError, match="reference has 3 features and the images 4") as error:
        distance_between(fit_gaussian(normal(5, 4)), fit_gaussian(normal(5, 3)))
    error_message(error)
