"""The kernel distance equals the distance of torch-fidelity, and has the properties of an unbiased estimate."""

import math
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from feature_sets import normal, stored_features
from torch import Tensor
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kernel_mmd, kid_features_to_metric

from pipelines.evaluation.kernel_distance import kernel_distance
from training_harness.errors import UserError


def slow_mmd2(a: Tensor, b: Tensor) -> float:
    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    def mean_kernel(points: Tensor) -> float:
        count = len(points)
        pairs = [kernel(points[i], points[j]) for i in range(count) for j in range(count) if i != j]
        return sum(pairs) / len(pairs)

    return mean_kernel(a) + mean_kernel(b) - 2 * float(np.mean([[kernel(x, y) for y in b] for x in a]))


def test_the_distance_of_whole_sets_is_the_mean_over_all_pairs():
    a, b = normal(12, 3, seed=1), normal(12, 3, seed=2) + 0.5
    assert kernel_distance(a, b) == (pytest.approx(slow_mmd2(a, b), rel=1e-6), 0)


@pytest.mark.parametrize("width", [5, 40])
def test_the_distance_of_whole_sets_equals_torch_fidelity(width: int):
    a, b = normal(80, width, seed=1), 1.1 * normal(80, width, seed=2) + 0.1
    distance = kernel_distance(a, b)
    assert distance.mean == pytest.approx(kernel_mmd(a.numpy(), b.numpy()), rel=1e-6)  # float32 products
    reference = kid_features_to_metric(a, b, kid_subsets=1, kid_subset_size=80, verbose=False)
    assert distance.mean == pytest.approx(reference[KEY_METRIC_KID_MEAN], rel=1e-6)  # float32 products


def test_the_mean_over_subsets_equals_the_distance_of_whole_sets_up_to_noise():
    # The mean over all subsets equals the distance of the whole sets. The standard error over 100 subsets is std / 10.
    a, b = normal(300, 6, seed=1), normal(300, 6, seed=2) + 0.3
    full, subsets = kernel_distance(a, b), kernel_distance(a, b, subset_size=60)
    assert subsets.std > 0 == full.std
    assert abs(subsets.mean - full.mean) < 4 * subsets.std / 10
    # a subset of a quarter of the size has more than 1.5 times the std: it is the std of subsets, not of their mean
    assert kernel_distance(a, b, subset_size=15).std > 1.5 * subsets.std


def test_mean_and_std_are_over_subsets_of_the_requested_size():
    # Three images in each set give nine equally likely pairs of subsets of two: 2,000 subsets are precise to a few percent.
    a, b = normal(3, 2, seed=1), normal(3, 2, seed=2) + 1
    pairs = list(combinations(range(3), 2))
    all_distances = [slow_mmd2(a[list(i)], b[list(j)]) for i in pairs for j in pairs]
    distance = kernel_distance(a, b, subsets=2000, subset_size=2)
    assert distance == pytest.approx((np.mean(all_distances), np.std(all_distances)), rel=0.1)
    assert kernel_distance(a, b, subsets=1, subset_size=2).mean in [pytest.approx(value) for value in all_distances]


def test_sets_of_different_sizes_are_compared_by_subsets_of_the_smaller_size(tmp_path: Path):
    a, b = normal(30, 4, seed=1), normal(200, 4, seed=2)
    distance = kernel_distance(a, b, seed=3)
    assert distance == kernel_distance(a, b, subset_size=30, seed=3)
    assert distance.std > 0  # the subsets of the larger set differ


def test_two_samples_of_one_distribution_have_mean_distance_zero_and_often_a_negative_distance():
    values = np.array([kernel_distance(normal(50, 8, seed=i), normal(50, 8, seed=100 + i)).mean for i in range(40)])
    assert abs(values.mean()) < 4 * values.std() / math.sqrt(40)  # one false alarm in 16,000 seeds
    assert 8 < (values < 0).sum() < 36
    shifted = kernel_distance(normal(50, 8, seed=1), normal(50, 8, seed=2) + 1).mean
    assert shifted > 5 * values.max()


def test_the_distance_depends_on_the_seed_and_is_the_same_for_files(tmp_path: Path):
    a, b = normal(60, 4, seed=1).float(), normal(60, 4, seed=2).float()
    first = kernel_distance(a, b, subset_size=20, seed=1)
    files = stored_features(tmp_path / "a", a), stored_features(tmp_path / "b", b)
    assert kernel_distance(*files, subset_size=20, seed=1) == pytest.approx(first, rel=1e-12)
    assert kernel_distance(a, b, subset_size=20, seed=2) != first


def test_one_image_non_finite_rows_and_different_features_are_errors():
    with pytest.raises(UserError, match=r"1 images.* 2 or more"):
        kernel_distance(normal(5, 4), normal(1, 4))
    non_finite = normal(5, 4)
    non_finite[3, 2] = math.nan
    with pytest.raises(UserError, match="1 of 5 rows"):
        kernel_distance(non_finite, normal(5, 4))
    with pytest.raises(UserError, match=r"\(5, 4\) and \(5, 3\)"):
        kernel_distance(normal(5, 4), normal(5, 3))
