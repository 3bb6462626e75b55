r"""Orders in which the codes of a grid are predicted.

    p(k | y) = Π_i p(k_{π(i)} | y, k_{π(1)} … k_{π(i−1)}),     π(i) is the i-th position to predict

A prior trained with random orders predicts a code from codes at any positions. It can fill a masked region from its whole
surroundings. Training that starts with random orders and ends with raster order gives a better raster-order prior on large data
sets (RAR, Yu et al. 2024, arXiv 2411.00776).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from training_harness.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    random: float = 0.0
    """Share of sequences in random order at the start of the run; the others are in raster order."""
    final: float = 0.0
    """Share of sequences in random order at the end of the run."""
    anneal: tuple[float, float] = (0.5, 0.75)
    """Start and end of the change from random to final, as shares of the run."""

    def __post_init__(self) -> None:
        for name in ("random", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"order.{name} is {getattr(self, name)}; expected a share in [0, 1], such as 0.5")
        begin, end = self.anneal
        if not 0 <= begin <= end <= 1:
            raise ConfigError(
                f"order.anneal is {self.anneal}; expected two rising shares of the run, such as (0.5, 0.75)"
            )

    @property
    def uses_random_orders(self) -> bool:
        return max(self.random, self.final) > 0

    def random_share_at(self, step: int, max_steps: int) -> float:
        """Return the share of random orders at optimizer step `step` in [1, max_steps]."""
        begin, end = (share * max_steps for share in self.anneal)
        progress = min(max((step - begin) / max(end - begin, 1), 0.0), 1.0)
        return self.random + progress * (self.final - self.random)


def random_orders(uniform: Tensor, share: float) -> Tensor | None:
    """Choose a random order for a share of the sequences, and raster order for the others.

    Args:
        uniform: (B, 1 + h·w) in [0, 1). A sequence gets a random order where its first number is below `share`.
        share: Share of random orders in [0, 1].

    Returns:
        (B, h·w) int64, or None (raster order) when the share is 0.
    """
    if share == 0:
        return None
    raster = torch.arange(uniform.shape[1] - 1, device=uniform.device)
    return torch.where(uniform[:, :1] < share, uniform[:, 1:].argsort(1), raster)


def order_known_first(known_mask: Tensor) -> Tensor:
    """Order the known positions before the others, both in raster order: (B, h·w) bool → (B, h·w) int64."""
    return (~known_mask).int().argsort(dim=1, stable=True)


def invert_order(order: Tensor) -> Tensor:
    """Return the step at which each position is predicted: `invert_order(order)[b, order[b, i]] == i`."""
    return order.argsort(dim=-1)
