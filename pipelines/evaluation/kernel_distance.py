"""The kernel distance: unbiased squared maximum mean discrepancy with a cubic kernel. On Inception features it is the KID.

    k(x, y) = (x·y / F + 1)³,     MMD² = mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) − 2 mean_{i,j} k(x_i, y_j)

The distance is the mean over random subsets, and their standard deviation measures its uncertainty. Unlike the expected
Fréchet distance, the expected kernel distance does not depend on N. It can be negative. Bińkowski et al. 2018,
arXiv 1801.01401.
"""

import statistics
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.evaluation.feature_files import Rows, check_pair, read_rows, select_rows

BLOCK = 500  # rows in one matrix product


class KernelDistance(NamedTuple):
    mean: float
    std: float  # over the subsets


def kernel_distance(
    features_a: Rows, features_b: Rows, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Compute the kernel distance between two sets of features, (N_a, F) and (N_b, F).

    Args:
        subsets: number of random subsets.
        subset_size: images of each set in a subset; fewer if a set is smaller.

    Raises:
        UserError: for fewer than two images, non-finite features, or different F.
    """
    check_pair(features_a, features_b, min_rows=2, metric="a kernel distance")
    size = min(subset_size, len(features_a), len(features_b))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        a, b = (_random_subset(features, size, generator) for features in (features_a, features_b))
        values.append(_mean_kernel(a) + _mean_kernel(b) - 2 * _sum_kernel(a, b) / size**2)
        if size == len(features_a) == len(features_b):  # every subset would be the whole set
            break
    return KernelDistance(statistics.fmean(values), statistics.pstdev(values))


def _random_subset(features: Rows, size: int, generator: torch.Generator) -> Tensor:
    positions = torch.randperm(len(features), generator=generator)[:size].sort().values
    return read_rows(select_rows(features, positions), 0, size).float()


def _mean_kernel(rows: Tensor) -> float:
    """Average the kernel over all pairs of different rows (n, F); each pair is multiplied once."""
    total = 0.0
    for start in range(0, len(rows), BLOCK):
        block = rows[start : start + BLOCK]
        diagonal = _kernel_of_products(block.square().sum(1) / block.shape[1]).sum(dtype=torch.float64).item()
        total += _sum_kernel(block, block) - diagonal
        total += 2 * _sum_kernel(block, rows[start + BLOCK :])
    return total / (len(rows) * (len(rows) - 1))


def _sum_kernel(a: Tensor, b: Tensor) -> float:
    """Compute Σ k(a_i, b_j).

    The products are float32, and their rounding errors are far below the 1 in the kernel. The sum is float64.
    """
    kernels = (_kernel_of_products(block @ b.T / a.shape[1]) for block in a.split(BLOCK))
    return sum(kernel.sum(dtype=torch.float64).item() for kernel in kernels)


def _kernel_of_products(products: Tensor) -> Tensor:
    """Compute (x·y / F + 1)³ from x·y / F, in place."""
    return products.add_(1).pow_(3)
