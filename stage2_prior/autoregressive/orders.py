r"""Orders in which the codes of a grid are predicted.

    p(k | y) = Π_i p(k_{π(i)} | y, k_{π(1)} … k_{π(i−1)}),     π(i) the place that is predicted i-th

A prior that has met random orders predicts a code from codes at any places, so that it can fill a hole from all around it.
Random orders that give way to raster order train a better raster prior on large sets (RAR, Yu et al. 2024, arXiv 2411.00776).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from training_harness.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    random: float = 0.0
    """Share of sequences that are trained in random order, at first; the others are in raster order."""
    final: float = 0.0
    """That share at the end of the run."""
    anneal: tuple[float, float] = (0.5, 0.75)
    """Between which shares of the run it goes from one to the other."""

    def __post_init__(self) -> None:
        for name in ("random", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"order.{name} is {getattr(self, name)}; expected a share in [0, 1], such as 0.5")
        begin, end = self.anneal
        if not 0 <= begin <= end <= 1:
            raise ConfigError(
                f"order.anneal is {self.anneal}; expected two rising shares of the run such as (0.5, 0.75)"
            )

    @property
    def uses_random_orders(self) -> bool:
        return max(self.random, self.final) > 0

    def random_share_at(self, step: int, max_steps: int) -> float:
        """Share of random orders at optimiser step `step` in [1, max_steps]."""
        begin, end = (share * max_steps for share in self.anneal)
        progress = min(max((step - begin) / max(end - begin, 1), 0.0), 1.0)
        return self.random + progress * (self.final - self.random)


def random_orders(uniform: Tensor, share: float) -> Tensor | None:
    """(B, 1 + places) numbers in [0, 1) → (B, places) int64: random orders where the first number is below `share`.

    None, raster order for all, when the share is 0.
    """
    if share == 0:
        return None
    raster = torch.arange(uniform.shape[1] - 1, device=uniform.device)
    return torch.where(uniform[:, :1] < share, uniform[:, 1:].argsort(1), raster)


def order_known_first(kept: Tensor) -> Tensor:
    """(B, places) bool → (B, places) int64: the kept places, then the others, each in raster order."""
    return (~kept).int().argsort(dim=1, stable=True)


def invert_order(order: Tensor) -> Tensor:
    """When each place is predicted: `inverse(order)[b, order[b, i]] == i`."""
    return order.argsort(dim=-1)
