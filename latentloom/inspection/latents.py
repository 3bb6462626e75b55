r"""Latents by channel, of tokenizers without a codebook: mean, spread, distribution, and what carries nothing of the image.

    μ, σ² over the images' posteriors:   std² = E[μ² + σ²] − E[μ]²,      collapsed:  Var(μ) < 0.01 (Var(μ) + E[σ²])

A dimension of the latents, one channel at one position, is collapsed when less than a hundredth of its variance comes from
the image: its posterior is the same for all. It is the measure of active units of Burda, Grosse, Salakhutdinov 2016 (arXiv
1509.00519, section 5.2), relative, so that it does not depend on the latents' scale. Latents without a posterior have σ = 0.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

COLLAPSED = 0.01
PLACES = 256  # of an image's grid, at most, whose values are in a channel's histogram
BINS = 40
TAIL = 0.001  # of all values that lie beyond each end of the histograms, and count in the last bin there


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """Of raw latents, as the encoder gives them."""

    mean: Tensor
    """(c,) float64."""
    std: Tensor
    """(c,) float64, with the posteriors' own width."""
    collapsed: Tensor | None
    """(c,) share of a channel's positions that are collapsed; none of latents without a posterior."""
    histograms: Tensor
    """(c, BINS) counts of posterior means."""
    ends: tuple[float, float]
    """Values between which all histograms lie."""


class LatentSums:
    """Sums over batches, by position; (c, h, w) float64 each."""

    def __init__(self, has_posterior: bool) -> None:
        self.has_posterior = has_posterior
        self.images = 0
        self.mean = self.mean_squared = self.second = torch.zeros((), dtype=torch.float64)
        self.values: list[Tensor] = []

    def add(self, mean: Tensor, second: Tensor) -> None:
        """First and second moment of a batch's latents, (B, c, h, w) each."""
        mean, second = (moment.double().cpu() for moment in (mean, second))
        self.images += len(mean)
        self.mean = self.mean + mean.sum(0)
        self.mean_squared = self.mean_squared + mean.square().sum(0)
        self.second = self.second + second.sum(0)
        places = mean.flatten(2)
        self.values.append(places[:, :, :: -(-places.shape[2] // PLACES)].float())

    def statistics(self) -> LatentStatistics:
        mean, mean_squared, second = (
            total / self.images for total in (self.mean, self.mean_squared, self.second)
        )  # (c, h, w)
        by_channel = mean.flatten(1).mean(1)
        variance = (second.flatten(1).mean(1) - by_channel.square()).clamp(min=0)
        from_image, own = (mean_squared - mean.square()).clamp(min=0), (second - mean_squared).clamp(min=0)
        collapsed = from_image < COLLAPSED * (from_image + own)
        histograms, ends = histograms_of(torch.cat(self.values))
        return LatentStatistics(
            mean=by_channel,
            std=variance.sqrt(),
            collapsed=collapsed.double().flatten(1).mean(1) if self.has_posterior else None,
            histograms=histograms,
            ends=ends,
        )


def histograms_of(values: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """(N, c, places) → counts (c, BINS) between the same two ends for all channels."""
    low, high = (float(end) for end in np.quantile(values.numpy(), (TAIL, 1 - TAIL)))
    if high <= low:
        low, high = low - 0.5, high + 0.5
    channels = values.clamp(low, high).transpose(0, 1).flatten(1)
    counts = [torch.histc(channel, bins=BINS, min=low, max=high) for channel in channels]
    return torch.stack(counts).long(), (low, high)
