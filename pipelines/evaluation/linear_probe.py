"""A linear probe: multinomial logistic regression from features to classes, trained on real images alone.

    p(y | x) = softmax(W z + b),   z = (x − mean) / std,   minimising the mean negative log likelihood + λ/2 ‖W‖²

by L-BFGS from zero, so that it depends on nothing but the features. Its accuracy on held-out real images says how far its
verdicts on samples can be trusted. Alain, Bengio 2016, arXiv 1610.01644.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from pipelines.evaluation.feature_files import Rows, check_finite, chosen, iterate_slices, random_positions
from training_harness.errors import UserError

MOST_IMAGES = 10_000
PENALTY = 1e-2  # λ; features are standardised, so that one value serves networks of any scale
ITERATIONS = 100


class LinearProbe(NamedTuple):
    mean: Tensor  # (F,)
    std: Tensor  # (F,)
    weight: Tensor  # (classes, F)
    bias: Tensor  # (classes,)

    def logits(self, features: Tensor) -> Tensor:
        """(N, F) → (N, classes)."""
        return (features.float() - self.mean) / self.std @ self.weight.T + self.bias


def fit_probe(features: Rows, labels: Tensor, num_classes: int, seed: int = 0) -> LinearProbe:
    """A probe trained on at most 10,000 of (N, F) features with labels (N,) int64, drawn at random by `seed`."""
    rows = random_positions(len(features), MOST_IMAGES, seed)
    x, y = torch.cat(list(iterate_slices(chosen(features, rows)))).float(), labels[rows]
    mean, std = x.mean(0), x.std(0)
    std = std.clamp(min=1e-6 * std.max().item() or 1.0)  # columns that never change tell nothing
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
    """Share of images whose largest logit is that of their label.

    Args:     logits: (N, number of classes) float; labels: (N,) int64.
    Raises:   UserError for no images, another number of labels, or non-finite logits.
    """
    if len(logits) == 0 or len(logits) != len(labels):
        raise UserError(f"class agreement was given {len(logits)} images and {len(labels)} labels; expected one each")
    check_finite(logits)
    return (logits.argmax(dim=1).cpu() == labels.cpu()).double().mean().item()
