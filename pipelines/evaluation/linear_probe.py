"""A linear probe: multinomial logistic regression from features to classes, trained on real images only.

    p(y | x) = softmax(W z + b),   z = (x − mean) / std,   loss = mean negative log-likelihood + λ/2 ‖W‖²

L-BFGS minimises the loss from W = 0, b = 0, so the probe depends only on the features. Its accuracy on held-out real images
shows how reliable its predictions for samples are. Alain, Bengio 2016, arXiv 1610.01644.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.evaluation.feature_files import Rows, check_finite, iterate_slices, random_positions, select_rows
from training_harness.errors import UserError

MAX_IMAGES = 10_000
PENALTY = 1e-2  # λ; features are standardised, so one value works for features of any scale
ITERATIONS = 100


class LinearProbe(NamedTuple):
    """Statistics for standardisation, and the weights of the logistic regression."""

    mean: Tensor  # (F,)
    std: Tensor  # (F,)
    weight: Tensor  # (classes, F)
    bias: Tensor  # (classes,)

    def logits(self, features: Tensor) -> Tensor:
        """Compute the logits (N, classes) of features (N, F)."""
        return (features.float() - self.mean) / self.std @ self.weight.T + self.bias


def fit_probe(features: Rows, labels: Tensor, num_classes: int, seed: int = 0) -> LinearProbe:
    """Train a probe on at most 10,000 random images.

    Args:
        features: (N, F).
        labels: (N,) int64.
        seed: of the random selection.
    """
    positions = random_positions(len(features), MAX_IMAGES, seed)
    x, y = torch.cat(list(iterate_slices(select_rows(features, positions)))).float(), labels[positions]
    mean, std = x.mean(0), x.std(0)
    std = std.clamp(min=1e-6 * std.max().item() or 1.0)  # constant columns carry no information
    x = (x - mean) / std
    weight = torch.zeros(num_classes, x.shape[1], requires_grad=True)
    bias = torch.zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(x @ weight.T + bias, y) + PENALTY / 2 * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return LinearProbe(mean, std, weight.detach(), bias.detach())


def class_agreement(logits: Tensor, labels: Tensor) -> float:
    """Compute the share of images with the largest logit at their label.

    Args:
        logits: (N, classes) float.
        labels: (N,) int64.

    Raises:
        UserError: if there are no images, if the number of labels differs, or if a logit is not finite.
    """
    if len(logits) == 0 or len(logits) != len(labels):
        raise UserError(
            f"class agreement was computed for {len(logits)} images and {len(labels)} labels; expected one label for each image"
        )
    check_finite(logits)
    return (logits.argmax(dim=1).cpu() == labels.cpu()).double().mean().item()
