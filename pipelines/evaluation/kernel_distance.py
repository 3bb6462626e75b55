"""The kernel distance: squared maximum mean discrepancy under a cubic kernel, without bias. On Inception's features, the KID.

    k(x, y) = (x·y / F + 1)³,     MMD² = mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) − 2 mean_{i,j} k(x_i, y_j)

Averaged over random subsets, whose spread says how sure the figure is. Unlike the Fréchet distance it does not depend on N
but for noise, and can be negative. Bińkowski et al. 2018, arXiv 1801.01401.
"""

import statistics
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.evaluation.feature_files import Rows, block, check_pair, chosen

BLOCK = 500  # rows multiplied at once


class KernelDistance(NamedTuple):
    mean: float
    std: float  # over the subsets


def kernel_distance(
    features_a: Rows, features_b: Rows, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> KernelDistance:
    """Mean and standard deviation over `subsets` draws of `subset_size` images from each set, fewer where a set is smaller.

    Raises:   UserError for fewer than two images, non-finite features, or another F.
    """
    check_pair(features_a, features_b, at_least=2, needed_for="a kernel distance")
    size = min(subset_size, len(features_a), len(features_b))
    generator = torch.Generator().manual_seed(seed)
    values = []
    for _ in range(subsets):
        a, b = (_subset(features, size, generator) for features in (features_a, features_b))
        values.append(_within(a) + _within(b) - 2 * _sum(a, b) / size**2)
        if size == len(features_a) == len(features_b):  # every draw is the whole of both
            break
    return KernelDistance(statistics.fmean(values), statistics.pstdev(values))


def _subset(features: Rows, size: int, generator: torch.Generator) -> Tensor:
    positions = torch.randperm(len(features), generator=generator)[:size].sort().values
    return block(chosen(features, positions), 0, size).float()


def _within(rows: Tensor) -> float:
    """Mean kernel over the pairs of different rows (n, F), each pair multiplied once."""
    total = 0.0
    for start in range(0, len(rows), BLOCK):
        part = rows[start : start + BLOCK]
        total += _sum(part, part) - _power(part.square().sum(1) / part.shape[1]).sum(dtype=torch.float64).item()
        total += 2 * _sum(part, rows[start + BLOCK :])
    return total / (len(rows) * (len(rows) - 1))


def _sum(a: Tensor, b: Tensor) -> float:
    """Σ k(a_i, b_j): float32 products, whose rounding is far below the kernel's 1, summed in float64."""
    parts = (_power(part @ b.T / a.shape[1]) for part in a.split(BLOCK))
    return sum(part.sum(dtype=torch.float64).item() for part in parts)


def _power(products: Tensor) -> Tensor:
    return products.add_(1).pow_(3)
