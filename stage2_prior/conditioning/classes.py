"""What a prior is conditioned on: a class label, or the learned null class.

The null class has the id `num_classes`, which follows from the data; a data set without labels has it alone. In training
a label is left out at the rate `class_dropout`, so that one model gives both halves of classifier-free guidance
(Ho, Salimans 2022, arXiv 2207.12598): logits = null + scale · (conditional − null).
"""

import torch
from torch import Tensor, nn


class ClassEmbedding(nn.Embedding):
    """(B,) int64 labels in [0, num_classes] → (B, hidden); −1 (no label) counts as the null class."""

    def __init__(self, num_classes: int, hidden_size: int) -> None:
        super().__init__(num_classes + 1, hidden_size)

    @property
    def null_class(self) -> int:
        return self.num_embeddings - 1

    def forward(self, labels: Tensor) -> Tensor:
        return super().forward(torch.where(labels < 0, self.null_class, labels))


def has_class(labels: Tensor, null_class: int) -> Tensor:
    """(B,) bool: which labels (B,) are neither −1 nor the null class; without a class there is nothing to guide towards."""
    return (labels >= 0) & (labels != null_class)


def drop_classes(labels: Tensor, uniform: Tensor, rate: float) -> Tensor:
    """Labels (B,), −1 where the draw (B,) in [0, 1) is below `rate`."""
    return torch.where(uniform.to(labels.device) < rate, -1, labels)


def apply_guidance(conditional: Tensor, null: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance on logits or predictions; scale 1 is the conditional model, above 1 sharpens."""
    return null + scale * (conditional - null)
