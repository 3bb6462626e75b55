"""How far a set of generated images is from a set of real ones, in the features of a judge.

    Fréchet distance   ‖μ_a − μ_b‖² + tr Σ_a + tr Σ_b − 2 tr (Σ_a^½ Σ_b Σ_a^½)^½     fidelity and variety in one number
    precision          share of generated images that lie among the real ones        fidelity
    recall             share of real images that lie among the generated ones        variety: modes dropped lower it
    class agreement    share of images that show the class they were asked for

All of them are computed in float64 on the CPU. They depend on the number of images: compare only figures with equal N.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from training_harness.errors import UserError


class PrecisionRecall(NamedTuple):
    precision: float  # in [0, 1]
    recall: float  # in [0, 1]


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Fréchet distance between the Gaussians fitted to two sets of features.

    With centred features X/√(N−1) = Q R, so that Σ = RᵀR, the last trace is the sum of the singular values of R_a R_bᵀ.
    No covariance is formed and no matrix root taken: exact also where N is smaller than the number of features.

    Args:     features_a, features_b: (N_a, F) and (N_b, F) float.
    Raises:   UserError for fewer than two images, non-finite features, or another F.
    Source:   Dowson and Landau 1982, J. Multivariate Analysis 12(3); Heusel et al. 2017, arXiv 1706.08500.
    """
    features_a, features_b = _checked(features_a, features_b, at_least=2, needed_for="a Fréchet distance")
    root_a, root_b = _covariance_root(features_a), _covariance_root(features_b)
    means = (features_a.mean(dim=0) - features_b.mean(dim=0)).square().sum()
    traces = root_a.square().sum() + root_b.square().sum()
    cross = torch.linalg.svdvals(root_a @ root_b.T).sum()
    return max((means + traces - 2 * cross).item(), 0.0)  # rounding can bring equal sets below zero


def precision_recall(real: Tensor, generated: Tensor, k: int = 3, chunk_size: int = 1000) -> PrecisionRecall:
    """Share of generated images inside the real ones' manifold, and the reverse.

    A set's manifold is the union of balls around its images, each reaching to the image's k-th nearest neighbour.

    Args:     real, generated: (N, F) and (M, F) float; chunk_size bounds the memory, which is O(chunk_size × N).
    Raises:   UserError for k < 1, for no more than k images in a set, non-finite features, or another F.
    Source:   Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1 and 2.
    """
    if k < 1:
        raise UserError(f"k is {k}; expected the number of a neighbour, 1 or more (3 in the paper)")
    real, generated = _checked(real, generated, at_least=k + 1, needed_for=f"precision and recall with k = {k}")
    return PrecisionRecall(
        precision=_share_inside(generated, real, k, chunk_size),
        recall=_share_inside(real, generated, k, chunk_size),
    )


def class_agreement(logits: Tensor, labels: Tensor) -> float:
    """Share of images whose largest logit is that of their label.

    Args:     logits: (N, number of classes) float; labels: (N,) int64.
    Raises:   UserError for no images, another number of labels, or non-finite logits.
    """
    if len(logits) == 0 or len(logits) != len(labels):
        raise UserError(f"class agreement was given {len(logits)} images and {len(labels)} labels; expected one each")
    _check_finite(logits)
    return (logits.argmax(dim=1).cpu() == labels.cpu()).double().mean().item()


def _covariance_root(features: Tensor) -> Tensor:
    """(min(N, F), F) matrix R with RᵀR = the unbiased covariance of (N, F) features."""
    centred = features - features.mean(dim=0)
    return torch.linalg.qr(centred, mode="r").R / (len(features) - 1) ** 0.5


def _share_inside(points: Tensor, support: Tensor, k: int, chunk_size: int) -> float:
    """Share of `points` (M, F) within reach of one of `support` (N, F)."""
    # k + 1, because each image is its own nearest neighbour
    radii = torch.cat([_distances(part, support).kthvalue(k + 1).values for part in support.split(chunk_size)])  # (N,)
    inside = [(_distances(part, support) <= radii).any(dim=1) for part in points.split(chunk_size)]
    return torch.cat(inside).double().mean().item()


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) Euclidean distances, summed directly: a matrix product would lose the small ones far from the origin."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def _checked(a: Tensor, b: Tensor, at_least: int, needed_for: str) -> tuple[Tensor, Tensor]:
    """Both sets as float64 on the CPU, once they are fit for a comparison."""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise UserError(
            f"two sets have features of shapes {tuple(a.shape)} and {tuple(b.shape)}; expected (N, F), F equal"
        )
    for features in (a, b):
        if len(features) < at_least:
            raise UserError(
                f"a set has {len(features)} images; {needed_for} needs {at_least} or more. Give more images"
            )
        _check_finite(features)
    return a.detach().to("cpu", torch.float64), b.detach().to("cpu", torch.float64)


def _check_finite(rows: Tensor) -> None:
    if broken := int((~rows.isfinite().all(dim=1)).sum()):
        raise UserError(
            f"{broken} of {len(rows)} rows hold NaN or inf; expected finite numbers. "
            "Look at the images and the judge that they come from"
        )
