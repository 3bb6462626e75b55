r"""Candidates for a masked region in raster order, weighted by the known codes after it: a particle filter.

    p(region | y, before, after)  ∝  p(region | y, before) · p(after | y, before, region)

Each candidate samples the region from the first factor. At each known code its weight is multiplied by the probability of that
code. When few candidates have most of the weight, all are resampled in proportion to their weights, with one uniform number for an
image (systematic resampling: Kitagawa 1996, doi 10.2307/1390750; Doucet, Johansen 2009). With many candidates the chosen one
follows p(region | …).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from stage2_prior.prior import rand_per_image

MIN_EFFECTIVE_SHARE = 0.5  # candidates are resampled when fewer than this share are effective, 1 / Σ w²


class Candidates:
    """Candidates for the masked regions of a batch; the candidates of an image are adjacent rows.

    Args:
        batch: Number of images.
        count: Candidates for each image.
        num_positions: Positions of an image.
        levels: Codes at each position.
        generators: One generator for each image. Candidate 0 has the random numbers of an image without candidates.
        device: Device of the prior.
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
        uniform = rand_per_image(count * num_positions * levels, generators)
        self.uniform = uniform.view(batch * count, num_positions, levels).to(device)
        self._resampling_uniform = rand_per_image(num_positions + 1 if count > 1 else 0, generators)
        self._log_weights = torch.zeros(batch, count, dtype=torch.float64)  # on the CPU, where rows are chosen

    def reweight(self, step: int, codes: Tensor, logits: Sequence[Tensor], known: Tensor) -> Tensor | None:
        """Update the weights with the codes of a position, and resample where few candidates are effective.

        Args:
            step: Step of the decode loop.
            codes: (batch · count, levels) int64.
            logits: (batch · count, K) for each level.
            known: (batch,) bool, true where the codes of the position were known.

        Returns:
            (batch · count,) int64: the row that each row continues from; None when every row continues itself.
        """
        level_log_probabilities = [
            level_logits.log_softmax(1).gather(1, codes[:, i : i + 1]) for i, level_logits in enumerate(logits)
        ]
        log_likelihood = torch.cat(level_log_probabilities, 1).sum(1).cpu().view_as(self._log_weights)
        self._log_weights += torch.where(known.cpu()[:, None], log_likelihood, 0.0)
        weights = self._log_weights.softmax(1)
        uneven = 1 / weights.square().sum(1) < MIN_EFFECTIVE_SHARE * self.count  # (batch,)
        if not uneven.any():
            return None
        self._log_weights[uneven] = 0.0
        resampled = self._resample(weights, self._resampling_uniform[:, step])
        return self._to_rows(torch.where(uneven[:, None], resampled, self._candidate_numbers()))

    def choose_rows(self, is_weighted: Tensor) -> Tensor:
        """Sample one candidate of each image by weight, and return its row (batch,).

        An image where `is_weighted` (batch,) bool is false gets its first candidate.
        """
        if self.count == 1:
            return self._to_rows(self._candidate_numbers())
        cumulative = self._log_weights.softmax(1).cumsum(1)
        numbers = torch.searchsorted(cumulative, self._resampling_uniform[:, -1:].double()).clamp(max=self.count - 1)
        return self._to_rows(numbers.masked_fill(~is_weighted.cpu()[:, None], 0))

    def _resample(self, weights: Tensor, uniform: Tensor) -> Tensor:
        points = (self._candidate_numbers() + uniform[:, None]) / self.count  # (batch, count)
        return torch.searchsorted(weights.cumsum(1), points.double()).clamp(max=self.count - 1)

    def _candidate_numbers(self) -> Tensor:
        return torch.arange(self.count).expand(len(self._log_weights), -1)

    def _to_rows(self, numbers: Tensor) -> Tensor:
        first_rows = torch.arange(len(numbers))[:, None] * self.count
        return (first_rows + numbers).flatten().to(self.uniform.device)
