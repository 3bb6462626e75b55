"""Class conditioning: a class label, or the learned null class.

The id of the null class is `num_classes`. A data set without labels has only the null class. Training replaces a label by the null
class with the probability `class_dropout`, so that one model computes both halves of classifier-free guidance (Ho, Salimans 2022,
arXiv 2207.12598): logits = null + scale · (conditional − null).
"""

import torch
from torch import Tensor, nn


class ClassEmbedding(nn.Embedding):
    """Embeds labels: (B,) int64 in [0, num_classes] → (B, hidden). −1 (no label) becomes the null class."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__(num_classes + 1, hidden_size)

    @property
    def null_class(self) -> int:
        return self.num_embeddings - 1

    def forward(self, labels: Tensor) -> Tensor:
        return super().forward(torch.where(labels < 0, self.null_class, labels))


def has_class(labels: Tensor, null_class: int) -> Tensor:
    """Return (B,) bool, false for labels −1 and the null class. Guidance has no effect for these."""
    return (labels >= 0) & (labels != null_class)


def drop_classes(labels: Tensor, uniform: Tensor, rate: float) -> Tensor:
    """Replace labels (B,) by −1 where `uniform` (B,) in [0, 1) is below `rate`."""
    return torch.where(uniform.to(labels.device) < rate, -1, labels)


def apply_guidance(conditional: Tensor, null: Tensor, scale: float | Tensor) -> Tensor:
    """Apply classifier-free guidance to logits or predictions. Scale 1 is the conditional model."""
    return null + scale * (conditional - null)
