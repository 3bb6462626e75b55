"""The Fréchet distance between the Gaussians fitted to two sets of features, and its confidence interval.

    d = ‖μ_a − μ_b‖² + tr Σ_a + tr Σ_b − 2 tr (Σ_a^½ Σ_b Σ_a^½)^½

A set is represented by its mean and by a root R with RᵀR = Σ. The root comes from QR factors of one slice after another. No
covariance is formed and no matrix root is taken, so the distance is exact up to rounding, even if N is smaller than the
number of features. The last trace is the sum of the singular values of R_a R_bᵀ. Everything is float64.

The distance decreases to its limit as N grows. Compare only distances with equal N, and compare them with the noise floor,
the distance of an equal number of real images. On Inception features, and on no others, the distance is the FID.

Dowson and Landau 1982, J. Multivariate Analysis 12(3); Heusel et al. 2017, arXiv 1706.08500.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.evaluation.feature_files import Rows, check_pair, iterate_slices
from training_harness.errors import UserError

RESAMPLES = 20


class Gaussian(NamedTuple):
    """A Gaussian, represented by its mean and a root of its covariance."""

    mean: Tensor  # (F,) float64
    root: Tensor  # (r, F) float64 with rootᵀ root = the unbiased covariance; r ≤ F


def fit_gaussian(features: Rows, weights: Tensor | None = None) -> Gaussian:
    """Fit a Gaussian to (N, F) features, in O(slice × F + F²) memory.

    Args:
        weights: (N,) number of times that each row counts; by default once.
    """
    count, mean, scatter, start = 0.0, torch.zeros(features.shape[1], dtype=torch.float64), None, 0
    for rows in iterate_slices(features):
        w = rows.new_ones(len(rows)) if weights is None else weights[start : start + len(rows)].double()
        start += len(rows)
        n = w.sum().item()
        if n == 0:
            continue
        slice_mean = (w[:, None] * rows).sum(0) / n
        # the difference of the two means contributes one row to the joint scatter
        between = (count * n / (count + n)) ** 0.5 * (slice_mean - mean)
        new_rows = [w.sqrt()[:, None] * (rows - slice_mean), between[None]]
        scatter = torch.linalg.qr(torch.cat(new_rows if scatter is None else [scatter, *new_rows]), mode="r").R
        count, mean = count + n, mean + (slice_mean - mean) * (n / (count + n))
    assert scatter is not None
    return Gaussian(mean, scatter / (count - 1) ** 0.5)


def gaussian_from_moments(mean: Tensor, covariance: Tensor) -> Gaussian:
    """Create a Gaussian from a stored mean (F,) and covariance (F, F), such as those of ADM's reference files.

    Raises:
        UserError: if a shape is wrong, if a number is not finite, or if the matrix is no covariance.
    """
    mean, covariance = mean.double(), covariance.double()
    has_valid_shapes = mean.dim() == 1 and covariance.shape == (len(mean), len(mean))
    if not (has_valid_shapes and mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError(
            f"the stored moments have the shapes {tuple(mean.shape)} and {tuple(covariance.shape)}; expected (F,) and "
            "(F, F) with finite numbers; write the file again"
        )
    values, vectors = torch.linalg.eigh(covariance)
    asymmetry = (covariance - covariance.T).abs().max()
    if values[0] < -1e-3 * values[-1] or asymmetry > 1e-3 * covariance.abs().max():
        raise UserError(
            f"the stored covariance has eigenvalues from {values[0]:.3g} to {values[-1]:.3g} and differs from its transpose by "
            f"{asymmetry:.3g}; expected a symmetric matrix without negative eigenvalues; write the file again"
        )
    return Gaussian(mean, values.clamp(min=0).sqrt()[:, None] * vectors.T)


def distance_between(a: Gaussian, b: Gaussian) -> float:
    """Compute the Fréchet distance between two Gaussians.

    Raises:
        UserError: if they have different numbers of features.
    """
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"the reference has {len(b.mean)} features and the images {len(a.mean)}; expected equal numbers; measure both "
            "with the same network"
        )
    means = (a.mean - b.mean).square().sum()
    traces = a.root.square().sum() + b.root.square().sum()
    cross = torch.linalg.svdvals(a.root @ b.root.T).sum()
    return max((means + traces - 2 * cross).item(), 0.0)  # rounding can make the distance of equal sets negative


def frechet_distance(features_a: Rows, features_b: Rows) -> float:
    """Compute the Fréchet distance between two sets of features, (N_a, F) and (N_b, F).

    Raises:
        UserError: for fewer than two images, non-finite features, or different F.
    """
    check_pair(features_a, features_b, min_rows=2, metric="a Fréchet distance")
    return distance_between(fit_gaussian(features_a), fit_gaussian(features_b))


def bootstrap_interval(
    features_a: Rows, features_b: Rows, seed: int = 0, paired: bool = False, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Compute a 95 % interval of the Fréchet distance with the bootstrap.

    Resampled sets repeat images, which increases every distance. The interval is therefore the distance of the whole sets
    ± 1.96 standard deviations of the resampled distances, with a lower limit of 0.

    Args:
        paired: resample both sets together, for images and their reconstructions.
        resamples: number of resampled distances.
    """
    check_pair(features_a, features_b, min_rows=2, metric="a Fréchet distance")
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(resamples):
        weights_a, weights_b = (_resample_counts(len(features), generator) for features in (features_a, features_b))
        if paired:
            weights_b = weights_a
        distances.append(distance_between(fit_gaussian(features_a, weights_a), fit_gaussian(features_b, weights_b)))
    centre, spread = frechet_distance(features_a, features_b), 1.96 * torch.tensor(distances).double().std().item()
    return max(0.0, centre - spread), centre + spread


def _resample_counts(count: int, generator: torch.Generator) -> Tensor:
    """Draw `count` of `count` images with replacement; return how often each image was drawn."""
    positions = torch.randint(count, (count,), generator=generator)
    return torch.bincount(positions, minlength=count)
