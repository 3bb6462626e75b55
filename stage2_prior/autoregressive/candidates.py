r"""Candidates for what a raster-order prior fills in, weighed by what is known after it: a particle filter.

    p(hole | y, before, after)  ∝  p(hole | y, before) · p(after | y, before, hole)

Each candidate draws the hole from the first factor; wherever a code is known, its weight is multiplied by that code's probability.
When few candidates carry most of the weight, they are drawn anew in proportion to it, with one number for all (systematic
resampling: Kitagawa 1996, doi 10.2307/1390750; Doucet, Johansen 2009). With many candidates the choice follows p(hole | …).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stage2_prior.prior import rand_per_image

MIN_EFFECTIVE_SHARE = 0.5  # share of effective candidates, 1 / Σ w², below which they are drawn anew


class Candidates:
    """`count` candidates for each of `batch` images, in rows image after image.

    Args:
        generators: one an image; candidate 0 of an image has the draws that the image has alone.
    """

    def __init__(
        self,
        batch: int,
        count: int,
        num_positions: int,
        levels: int,
        generators: Sequence[torch.Generator],
        device: torch.device,
    ) -> None:
        self.count = count
        drawn = rand_per_image(count * num_positions * levels, generators)
        self.uniform = drawn.view(batch * count, num_positions, levels).to(device)
        self._again = rand_per_image(num_positions + 1 if count > 1 else 0, generators)
        self._log_weights = torch.zeros(batch, count, dtype=torch.float64)  # on the CPU, which decides who goes on

    def reweight(self, position: int, codes: Tensor, logits: Sequence[Tensor], known: Tensor) -> Tensor | None:
        """Rows (batch · count,) that go on in each row's stead, or none when all go on as they are.

        Args:
            codes: (batch · count, levels) of a place, with logits (batch · count, K) of each level.
            known: (batch,), whether they were known.
        """
        of_levels = [of.log_softmax(1).gather(1, codes[:, i : i + 1]) for i, of in enumerate(logits)]
        likelihood = torch.cat(of_levels, 1).sum(1).cpu().view_as(self._log_weights)
        self._log_weights += torch.where(known.cpu()[:, None], likelihood, 0.0)
        weights = self._log_weights.softmax(1)
        uneven = 1 / weights.square().sum(1) < MIN_EFFECTIVE_SHARE * self.count  # (batch,)
        if not uneven.any():
            return None
        self._log_weights[uneven] = 0.0
        chosen = torch.where(uneven[:, None], self._systematic(weights, self._again[:, position]), self._each())
        return self._rows(chosen)

    def choose_rows(self, weighed: Tensor) -> Tensor:
        """Row (batch,) of one candidate of each image, drawn by weight; of an image not `weighed` (batch,) bool, the first."""
        if self.count == 1:
            return self._rows(self._each())
        cumulated = self._log_weights.softmax(1).cumsum(1)
        chosen = torch.searchsorted(cumulated, self._again[:, -1:].double()).clamp(max=self.count - 1)
        return self._rows(chosen.masked_fill(~weighed.cpu()[:, None], 0))

    def _systematic(self, weights: Tensor, uniform: Tensor) -> Tensor:
        points = (self._each() + uniform[:, None]) / self.count  # (batch, count)
        return torch.searchsorted(weights.cumsum(1), points.double()).clamp(max=self.count - 1)

    def _each(self) -> Tensor:
        return torch.arange(self.count).expand(len(self._log_weights), -1)

    def _rows(self, chosen: Tensor) -> Tensor:
        first = torch.arange(len(chosen))[:, None] * self.count
        return (first + chosen).flatten().to(self.uniform.device)
