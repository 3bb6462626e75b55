"""The metrics between two feature sets, held against closed forms, scipy, and slow loops."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from torch import Tensor

from pipelines.set_metrics import class_agreement, frechet_distance, precision_recall
from training_harness.errors import UserError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(mean: Tensor, covariance: Tensor, seed: int = 0, count: int = 50) -> Tensor:
    """(count, F) points whose mean and unbiased covariance are exactly those given."""
    centred = normal(count, len(mean), seed=seed)
    orthonormal = torch.linalg.qr(centred - centred.mean(dim=0)).Q * (count - 1) ** 0.5
    return mean + orthonormal @ torch.linalg.cholesky(covariance).T


def scipy_frechet(a: Tensor, b: Tensor) -> float:
    cov_a, cov_b = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    means = (a.mean(dim=0) - b.mean(dim=0)).square().sum().item()
    return means + np.trace(cov_a + cov_b - 2 * sqrtm(cov_a @ cov_b).real)


def slow_recall(real: Tensor, generated: Tensor, k: int) -> float:
    def reached(point: Tensor) -> bool:
        return any((point - g).norm() <= sorted((g - h).norm() for h in generated)[k] for g in generated)

    return sum(reached(point) for point in real) / len(real)


def test_the_frechet_distance_equals_the_matrix_root_of_scipy():
    for seed in range(3):
        a = normal(300, 24, seed=seed) @ normal(24, 24, seed=10 + seed)
        b = normal(200, 24, seed=20 + seed) @ normal(24, 24, seed=30 + seed) + 0.5
        assert frechet_distance(a, b) == pytest.approx(scipy_frechet(a, b), rel=1e-8)


def test_the_frechet_distance_of_axis_aligned_gaussians_is_that_of_their_means_and_widths():
    mean_a, mean_b = torch.tensor([0.0, 1.0, 2.0]).double(), torch.tensor([3.0, 1.0, -2.0]).double()
    widths_a, widths_b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([4.0, 2.0, 1.5]).double()
    a = with_moments(mean_a, widths_a.square().diag(), seed=1, count=40)
    b = with_moments(mean_b, widths_b.square().diag(), seed=2, count=60)
    assert frechet_distance(a, b) == pytest.approx(25 + 10, rel=1e-10)  # Σ (μ_a − μ_b)² + Σ (σ_a − σ_b)²


def test_the_frechet_distance_of_gaussians_whose_axes_differ_has_the_closed_form_of_two_dimensions():
    cov_a, cov_b = torch.tensor([[2.0, 1.2], [1.2, 1.0]]).double(), torch.tensor([[1.0, -0.8], [-0.8, 3.0]]).double()
    zero = torch.zeros(2, dtype=torch.float64)
    root_trace = ((cov_a @ cov_b).trace() + 2 * (cov_a.det() * cov_b.det()).sqrt()).sqrt()  # tr √M of a 2 × 2 matrix
    expected = (cov_a.trace() + cov_b.trace() - 2 * root_trace).item()
    a, b = with_moments(zero, cov_a, seed=1), with_moments(zero, cov_b, seed=2)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("count", [2, 10, 500])  # fewer images than features, and more
def test_a_set_is_at_frechet_distance_zero_from_itself_and_not_from_another(count: int):
    features = 100 * normal(count, 64).relu().float()
    assert frechet_distance(features, features.flip(0)) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features, features + 1) == pytest.approx(64, abs=1e-3)  # the float32 sum rounds


def test_the_frechet_distance_of_rank_deficient_sets_on_orthogonal_axes_is_exact():
    # Two images each, F = 50: Σ_a and Σ_b share no direction, so that the root's trace is 0.
    a, b = torch.zeros(2, 50), torch.zeros(2, 50)
    a[0, 3], a[1, 3], b[0, 7], b[1, 7] = 1, -1, 2, -2
    assert frechet_distance(a, b) == pytest.approx(2 + 8, rel=1e-12)


def test_precision_and_recall_equal_a_slow_double_loop():
    real, generated = normal(40, 3, seed=1), 1.2 * normal(30, 3, seed=2) + 1
    for k in (1, 3, 5):
        both = precision_recall(real, generated, k=k)
        assert both.recall == pytest.approx(slow_recall(real, generated, k))
        assert both.precision == pytest.approx(slow_recall(generated, real, k))
        assert 0 < both.recall < 1  # or the comparison would show nothing
        assert 0 < both.precision < 1


def test_precision_and_recall_do_not_depend_on_the_chunks_or_the_origin():
    real, generated = normal(101, 8, seed=1), normal(57, 8, seed=2)
    expected = precision_recall(real, generated)
    assert precision_recall(real, generated, chunk_size=7) == expected
    # Distances by way of a matrix product would lose all their digits here.
    assert precision_recall(real + 1e8, generated + 1e8) == expected


def test_a_set_has_full_precision_and_recall_against_itself_even_if_an_image_repeats():
    features = torch.cat([normal(50, 16), normal(1, 16, seed=1).expand(10, 16)])  # ten equal ones: their radius is 0
    assert precision_recall(features, features.flip(0)) == (1, 1)
    assert precision_recall(features, features[50:57]).precision == 1


def test_recall_falls_to_one_half_when_one_of_two_modes_is_dropped_and_precision_does_not():
    left, right = normal(400, 2, seed=1), normal(400, 2, seed=2) + 100
    precision, recall = precision_recall(real=torch.cat([left, right]), generated=normal(800, 2, seed=3))
    assert recall == pytest.approx(0.5, abs=0.02)
    assert precision > 0.95


def test_precision_falls_to_one_half_when_half_the_images_lie_off_the_real_ones_and_recall_does_not():
    real, off = normal(400, 2, seed=1), normal(400, 2, seed=2) + 100
    precision, recall = precision_recall(real, generated=torch.cat([normal(400, 2, seed=3), off]))
    assert precision == pytest.approx(0.5, abs=0.02)
    assert recall > 0.95


def test_class_agreement_is_the_share_of_largest_logits_at_the_label():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 5.0, 1.0], [3.0, 1.0, 2.0], [0.0, 0.0, 9.0]])
    assert class_agreement(logits, torch.tensor([0, 1, 2, 2])) == 0.75
    assert class_agreement(logits, torch.tensor([1, 0, 1, 0])) == 0


def test_too_few_images_are_an_error_that_says_how_many_are_needed():
    with pytest.raises(UserError, match=r"1 images.* 2 or more"):
        frechet_distance(normal(1, 4), normal(5, 4))
    with pytest.raises(UserError, match=r"3 images.* k = 3 needs 4 or more"):
        precision_recall(normal(9, 4), normal(3, 4))
    assert precision_recall(normal(4, 4), normal(4, 4)).recall == 1  # k + 1 are enough
    with pytest.raises(UserError, match="k is 0"):
        precision_recall(normal(9, 4), normal(9, 4), k=0)
    with pytest.raises(UserError, match="0 images"):
        class_agreement(torch.zeros(0, 10), torch.zeros(0, dtype=torch.int64))


def test_rows_that_are_not_finite_are_counted_in_the_error():
    broken = normal(10, 4)
    broken[2, 1], broken[5], broken[7, 0] = float("nan"), float("inf"), float("-inf")
    for metric in (frechet_distance, precision_recall):
        for sets in ((broken, normal(10, 4)), (normal(10, 4), broken)):
            with pytest.raises(UserError, match="3 of 10 rows"):
                metric(*sets)
    with pytest.raises(UserError, match="3 of 10 rows"):
        class_agreement(broken, torch.zeros(10, dtype=torch.int64))


def test_sets_of_different_features_are_an_error_that_names_both_shapes():
    with pytest.raises(UserError, match=r"\(5, 4\) and \(5, 3\)"):
        frechet_distance(normal(5, 4), normal(5, 3))
    with pytest.raises(UserError, match=r"\(5, 4\) and \(5, 2, 2\)"):
        precision_recall(normal(5, 4), normal(5, 2, 2))
