"""The Fréchet distance between the Gaussians fitted to two sets of features, and how sure it is.

    d = ‖μ_a − μ_b‖² + tr Σ_a + tr Σ_b − 2 tr (Σ_a^½ Σ_b Σ_a^½)^½

A set is kept as a mean and a root R with RᵀR = Σ, from QR factors of one slice after another: no covariance is formed and no
matrix root taken, so the distance is exact to rounding also where N is smaller than the number of features. The last trace
is the sum of the singular values of R_a R_bᵀ. Everything is float64.

The distance depends on N, downwards to its limit: compare only figures with equal N, and with the noise floor, which is the
distance that as many real images have. On Inception's features, and on those alone, it is the FID.

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
    mean: Tensor  # (F,) float64
    root: Tensor  # (r, F) float64 with rootᵀ root = the unbiased covariance; r ≤ F


def fit_gaussian(features: Rows, weights: Tensor | None = None) -> Gaussian:
    """Mean and covariance root of (N, F) features, in O(slice × F + F²) memory; `weights` (N,) count rows several times."""
    count, mean, scatter, start = 0.0, torch.zeros(features.shape[1], dtype=torch.float64), None, 0
    for part in iterate_slices(features):
        w = part.new_ones(len(part)) if weights is None else weights[start : start + len(part)].double()
        start += len(part)
        n = w.sum().item()
        if n == 0:
            continue
        part_mean = (w[:, None] * part).sum(0) / n
        between = (count * n / (count + n)) ** 0.5 * (part_mean - mean)  # what joining two means adds to the scatter
        rows = [w.sqrt()[:, None] * (part - part_mean), between[None]]
        scatter = torch.linalg.qr(torch.cat(rows if scatter is None else [scatter, *rows]), mode="r").R
        count, mean = count + n, mean + (part_mean - mean) * (n / (count + n))
    assert scatter is not None
    return Gaussian(mean, scatter / (count - 1) ** 0.5)


def gaussian_of_moments(mean: Tensor, covariance: Tensor) -> Gaussian:
    """From a stored mean (F,) and covariance (F, F), such as those of ADM's reference files.

    Raises:   UserError for other shapes, numbers that are not finite, or a matrix that is no covariance.
    """
    mean, covariance = mean.double(), covariance.double()
    fits = mean.dim() == 1 and covariance.shape == (len(mean), len(mean))
    if not (fits and mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError(
            f"the stored moments have the shapes {tuple(mean.shape)} and {tuple(covariance.shape)}; expected (F,) and "
            "(F, F), all finite; write the file again"
        )
    values, vectors = torch.linalg.eigh(covariance)
    asymmetry = (covariance - covariance.T).abs().max()
    if values[0] < -1e-3 * values[-1] or asymmetry > 1e-3 * covariance.abs().max():
        raise UserError(
            f"the stored covariance has the eigenvalue {values[0]:.3g} beside {values[-1]:.3g} and is {asymmetry:.3g} from its "
            "transpose; expected a symmetric matrix without negative eigenvalues; write the file again"
        )
    return Gaussian(mean, values.clamp(min=0).sqrt()[:, None] * vectors.T)


def distance_between(a: Gaussian, b: Gaussian) -> float:
    if a.mean.shape != b.mean.shape:
        raise UserError(
            f"the reference has {len(b.mean)} features and the images {len(a.mean)}; expected as many; measure both "
            "with the same network"
        )
    means = (a.mean - b.mean).square().sum()
    traces = a.root.square().sum() + b.root.square().sum()
    cross = torch.linalg.svdvals(a.root @ b.root.T).sum()
    return max((means + traces - 2 * cross).item(), 0.0)  # rounding can bring equal sets below zero


def frechet_distance(features_a: Rows, features_b: Rows) -> float:
    """Fréchet distance between two sets of features, (N_a, F) and (N_b, F).

    Raises:   UserError for fewer than two images, non-finite features, or another F.
    """
    check_pair(features_a, features_b, at_least=2, needed_for="a Fréchet distance")
    return distance_between(fit_gaussian(features_a), fit_gaussian(features_b))


def bootstrap_interval(
    features_a: Rows, features_b: Rows, seed: int = 0, paired: bool = False, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """95 % interval of the distance, from both sets drawn anew with replacement.

    Resampled sets repeat images, which moves every distance up: so the interval is the distance of the whole sets ± 1.96
    standard deviations of the resampled ones, cut off at 0. `paired` sets, such as images and their reconstructions, are
    drawn together.
    """
    check_pair(features_a, features_b, at_least=2, needed_for="a Fréchet distance")
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(resamples):
        weights_a, weights_b = (_resampled(len(features), generator) for features in (features_a, features_b))
        if paired:
            weights_b = weights_a
        distances.append(distance_between(fit_gaussian(features_a, weights_a), fit_gaussian(features_b, weights_b)))
    centre, spread = frechet_distance(features_a, features_b), 1.96 * torch.tensor(distances).double().std().item()
    return max(0.0, centre - spread), centre + spread


def _resampled(count: int, generator: torch.Generator) -> Tensor:
    """How often each of `count` images was drawn in `count` draws."""
    drawn = torch.randint(count, (count,), generator=generator)
    return torch.bincount(drawn, minlength=count)
