"""The kernel distance: squared maximum mean discrepancy under a cubic kernel, without bias. On Inception's features, the KID.

    k(x, y) = (x·y / F + 1)³,     MMD² = mean_{i≠j} k(x_i, x_j) + mean_{i≠j} k(y_i, y_j) − 2 mean_{i,j} k(x_i, y_j)

Averaged over random subsets, whose spread says how sure the figure is. Unlike the Fréchet distance it does not depend on N
but for noise, and can be negative. Bińkowski et al. 2018, arXiv 1801.01401.
"""

import statistics
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.evaluation.feature_files import Rows, check_pair, chosen, slices


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
    kernel = torch.empty(size, size, dtype=torch.float64)  # one for all: large blocks that come and go scatter the heap
    values = []
    for _ in range(subsets):
        a, b = (_subset(features, size, generator) for features in (features_a, features_b))
        values.append(_mmd2(a, b, kernel))
        if size == len(features_a) == len(features_b):  # every draw is the whole of both
            break
    return KernelDistance(statistics.fmean(values), statistics.pstdev(values))


def _subset(features: Rows, size: int, generator: torch.Generator) -> Tensor:
    positions = torch.randperm(len(features), generator=generator)[:size].sort().values
    return torch.cat(list(slices(chosen(features, positions))))


def _mmd2(a: Tensor, b: Tensor, kernel: Tensor) -> float:
    """Of (n, F) and (n, F) float64; `kernel` (n, n) is written over."""
    n, within = len(a), 0.0
    for rows in (a, b):
        _fill(kernel, rows, rows)
        within += (kernel.sum() - kernel.trace()).item() / (n * (n - 1))
    _fill(kernel, a, b)
    return within - 2 * kernel.mean().item()


def _fill(kernel: Tensor, a: Tensor, b: Tensor) -> None:
    torch.mm(a, b.T, out=kernel).div_(a.shape[1]).add_(1).pow_(3)
