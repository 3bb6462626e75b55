"""How two sets lie in one another: precision, recall, density, coverage, and the nearest real image of each.

A set's manifold is the union of balls around its images, each reaching to the image's k-th nearest neighbour in the set.

    precision   share of generated images inside a real image's ball                 fidelity
    recall      share of real images inside a generated image's ball                 variety
    density     mean number of real balls around a generated image, over k           fidelity, not swayed by one outlier
    coverage    share of real balls with a generated image inside                    variety, not swayed by one outlier

Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2 (k = 3); Naeem et al. 2020, arXiv 2002.09797, eq. 5 and 6 (k = 5).
Distances come from matrix products in float64 of centred features, in blocks: memory does not grow with N.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from pipelines.evaluation.feature_files import SLICE, Rows, check_pair, iterate_slices
from training_harness.errors import UserError

NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
SAME = 1e-12  # of the squared norms: what rounding of the products may leave of a distance of 0


class PrecisionRecall(NamedTuple):
    precision: float  # in [0, 1]
    recall: float  # in [0, 1]


class DensityCoverage(NamedTuple):
    density: float  # ≥ 0; 1 is expected of a second draw of the real images
    coverage: float  # in [0, 1]


def precision_recall(real: Rows, generated: Rows, k: int = NEIGHBOURS) -> PrecisionRecall:
    """Share of generated images inside the real ones' manifold, and the reverse.

    Raises:   UserError for k < 1, for no more than k images in a set, non-finite features, or another F.
    """
    _check(real, generated, k, "precision and recall")
    centre = _centre(real)
    real_radii, radii = _radii(real, k, centre), _radii(generated, k, centre)
    inside_real = torch.zeros(len(generated), dtype=torch.bool)
    inside_generated = torch.zeros(len(real), dtype=torch.bool)
    for rows, columns, distances in _pairs(generated, real, centre):
        inside_real[rows] |= (distances <= real_radii[columns]).any(1)
        inside_generated[columns] |= (distances <= radii[rows, None]).any(0)
    return PrecisionRecall(inside_real.double().mean().item(), inside_generated.double().mean().item())


def density_coverage(real: Rows, generated: Rows, k: int = DENSITY_NEIGHBOURS) -> DensityCoverage:
    """Raises UserError as `precision_recall` does."""
    _check(real, generated, k, "density and coverage")
    centre = _centre(real)
    radii = _radii(real, k, centre)
    balls, covered = 0, torch.zeros(len(real), dtype=torch.bool)
    for _, columns, distances in _pairs(generated, real, centre):
        inside = distances <= radii[columns]
        balls += int(inside.sum())
        covered[columns] |= inside.any(0)
    return DensityCoverage(balls / (k * len(generated)), covered.double().mean().item())


def nearest_distances(points: Rows, support: Rows) -> Tensor:
    """(N,) float64 distance of each point to the nearest of `support`; 0 where it is among them."""
    check_pair(points, support, at_least=1, needed_for="a nearest distance")
    nearest = torch.full((len(points),), torch.inf, dtype=torch.float64)
    for rows, _, distances in _pairs(points, support, _centre(support)):
        nearest[rows] = torch.minimum(nearest[rows], distances.min(1).values)
    return nearest.sqrt()


def _radii(features: Rows, k: int, centre: Tensor) -> Tensor:
    """(N,) squared distance of each row to its k-th nearest other row."""
    best = torch.full((len(features), k + 1), torch.inf, dtype=torch.float64)  # k + 1: each row is its own nearest
    for rows, columns, distances in _pairs(features, features, centre, half=True):
        for mine, theirs in [(rows, distances)] + ([(columns, distances.T)] if rows != columns else []):
            near = theirs.topk(min(k + 1, theirs.shape[1]), dim=1, largest=False).values
            best[mine] = torch.cat([best[mine], near], 1).topk(k + 1, dim=1, largest=False).values
    return best[:, k]


def _pairs(points: Rows, support: Rows, centre: Tensor, half: bool = False) -> Iterator[tuple[slice, slice, Tensor]]:
    """(rows of points, rows of support, their squared distances), one slice of each after another.

    `half`: of a set with itself, each two slices meet once. The distances are written over by the next ones: large blocks
    that come and go scatter the heap.
    """
    room = torch.empty(2, SLICE * SLICE, dtype=torch.float64)
    row = 0
    for part in iterate_slices(points):
        part = part - centre
        norms = part.square().sum(1, keepdim=True)
        column = row if half else 0
        for other in iterate_slices(support, first=column):
            other = other - centre
            shape = len(part), len(other)
            both, distances = (block[: shape[0] * shape[1]].view(shape) for block in room)
            torch.add(norms, other.square().sum(1), out=both)
            torch.addmm(both, part, other.T, alpha=-2, out=distances)
            distances.masked_fill_(distances < both.mul_(SAME), 0.0)
            yield slice(row, row + len(part)), slice(column, column + len(other)), distances
            column += len(other)
        row += len(part)


def _centre(rows: Rows) -> Tensor:
    """A point among the rows: products of what is far from the origin would lose the small distances."""
    return next(iterate_slices(rows)).mean(0)


def _check(real: Rows, generated: Rows, k: int, needed_for: str) -> None:
    if k < 1:
        raise UserError(f"k is {k}; expected the number of a neighbour, 1 or more")
    check_pair(real, generated, at_least=k + 1, needed_for=f"{needed_for} with k = {k}")
