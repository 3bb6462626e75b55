"""Metrics of nearest neighbours between two sets: precision, recall, density, coverage, and nearest distances.

The manifold of a set is the union of balls around its images. The radius of a ball is the distance from its image to the
k-th nearest neighbour in the set.

    precision   share of generated images inside a ball of a real image              fidelity
    recall      share of real images inside a ball of a generated image              variety
    density     mean number of real balls around a generated image, divided by k     fidelity, robust to outliers
    coverage    share of real balls that contain a generated image                   variety, robust to outliers

Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2 (k = 3); Naeem et al. 2020, arXiv 2002.09797, eq. 5 and 6 (k = 5).
Distances come from float64 matrix products of centred features, in blocks: memory does not grow with N.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.evaluation.feature_files import SLICE, Rows, check_pair, iterate_slices
from training_harness.errors import UserError

NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
ZERO_TOLERANCE = 1e-12  # relative to the squared norms: smaller squared distances are rounding errors of 0


class PrecisionRecall(NamedTuple):
    precision: float  # in [0, 1]
    recall: float  # in [0, 1]


class DensityCoverage(NamedTuple):
    density: float  # ≥ 0; the expected value is 1 for a second sample of real images
    coverage: float  # in [0, 1]


def precision_recall(real: Rows, generated: Rows, k: int = NEIGHBOURS) -> PrecisionRecall:
    """Compute precision and recall of generated images.

    Raises:
        UserError: for k < 1, k or fewer images in a set, non-finite features, or different F.
    """
    _check(real, generated, k, "precision and recall")
    centre = _centre(real)
    real_radii, generated_radii = _squared_radii(real, k, centre), _squared_radii(generated, k, centre)
    inside_real = torch.zeros(len(generated), dtype=torch.bool)
    inside_generated = torch.zeros(len(real), dtype=torch.bool)
    for rows, columns, distances in _squared_distances(generated, real, centre):
        inside_real[rows] |= (distances <= real_radii[columns]).any(1)
        inside_generated[columns] |= (distances <= generated_radii[rows, None]).any(0)
    return PrecisionRecall(inside_real.double().mean().item(), inside_generated.double().mean().item())


def density_coverage(real: Rows, generated: Rows, k: int = DENSITY_NEIGHBOURS) -> DensityCoverage:
    """Compute density and coverage of generated images.

    Raises:
        UserError: for k < 1, k or fewer images in a set, non-finite features, or different F.
    """
    _check(real, generated, k, "density and coverage")
    centre = _centre(real)
    radii = _squared_radii(real, k, centre)
    num_inside, is_covered = 0, torch.zeros(len(real), dtype=torch.bool)
    for _, columns, distances in _squared_distances(generated, real, centre):
        inside = distances <= radii[columns]
        num_inside += int(inside.sum())
        is_covered[columns] |= inside.any(0)
    return DensityCoverage(num_inside / (k * len(generated)), is_covered.double().mean().item())


def nearest_distances(points: Rows, support: Rows) -> Tensor:
    """Compute the distance from each point to the nearest row of `support`.

    Returns:
        (N,) float64; 0 if the point is a row of `support`.
    """
    check_pair(points, support, min_rows=1, metric="a nearest distance")
    nearest = torch.full((len(points),), torch.inf, dtype=torch.float64)
    for rows, _, distances in _squared_distances(points, support, _centre(support)):
        nearest[rows] = torch.minimum(nearest[rows], distances.min(1).values)
    return nearest.sqrt()


def _squared_radii(features: Rows, k: int, centre: Tensor) -> Tensor:
    """Compute the squared distance (N,) from each row to its k-th nearest neighbour."""
    # k + 1, because each row is its own nearest neighbour
    nearest = torch.full((len(features), k + 1), torch.inf, dtype=torch.float64)
    for rows, columns, distances in _squared_distances(features, features, centre, symmetric=True):
        updates = [(rows, distances)] + ([(columns, distances.T)] if rows != columns else [])
        for positions, new_distances in updates:
            new_nearest = new_distances.topk(min(k + 1, new_distances.shape[1]), dim=1, largest=False).values
            candidates = torch.cat([nearest[positions], new_nearest], 1)
            nearest[positions] = candidates.topk(k + 1, dim=1, largest=False).values
    return nearest[:, k]


def _squared_distances(
    points: Rows, support: Rows, centre: Tensor, symmetric: bool = False
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (rows of points, rows of support, their squared distances) for each pair of slices.

    The memory of the distances is used again for the next pair: allocating large blocks again and again fragments the heap.

    Args:
        centre: (F,) subtracted from all rows.
        symmetric: `points` and `support` are one set; yield each pair of slices only once.
    """
    buffers = torch.empty(2, SLICE * SLICE, dtype=torch.float64)
    row = 0
    for point_rows in iterate_slices(points):
        point_rows = point_rows - centre
        point_norms = point_rows.square().sum(1, keepdim=True)
        column = row if symmetric else 0
        for support_rows in iterate_slices(support, first=column):
            support_rows = support_rows - centre
            shape = len(point_rows), len(support_rows)
            norms, distances = (buffer[: shape[0] * shape[1]].view(shape) for buffer in buffers)
            torch.add(point_norms, support_rows.square().sum(1), out=norms)
            torch.addmm(norms, point_rows, support_rows.T, alpha=-2, out=distances)
            distances.masked_fill_(distances < norms.mul_(ZERO_TOLERANCE), 0.0)
            yield slice(row, row + len(point_rows)), slice(column, column + len(support_rows)), distances
            column += len(support_rows)
        row += len(point_rows)


def _centre(rows: Rows) -> Tensor:
    """Return a point near the rows; without centring, products of large features lose small distances to rounding."""
    return next(iterate_slices(rows)).mean(0)


def _check(real: Rows, generated: Rows, k: int, metric: str) -> None:
    if k < 1:
        raise UserError(f"k is {k}; expected the number of a neighbour, 1 or more")
    check_pair(real, generated, min_rows=k + 1, metric=f"{metric} with k = {k}")
