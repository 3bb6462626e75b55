r"""Latent statistics by channel for tokenizers without a codebook: mean, standard deviation, histogram, collapsed share.

    μ, σ² of the images' posteriors:   std² = E[μ² + σ²] − E[μ]²,      collapsed:  Var(μ) < 0.01 (Var(μ) + E[σ²])

A latent dimension is one channel at one position. It is collapsed when less than 1 % of its variance comes from the image: its
posterior is then nearly the same for all images. This is the measure of active units of Burda, Grosse, Salakhutdinov 2016
(arXiv 1509.00519, section 5.2), made relative, so that it does not depend on the scale of the latents. Latents without a
posterior have σ = 0.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

COLLAPSED_THRESHOLD = 0.01
MAX_POSITIONS = 256  # positions of an image that enter a channel's histogram
BINS = 40
TAIL_SHARE = 0.001  # of all values beyond each end of the histograms; they count in the last bin


@dataclass(frozen=True, kw_only=True)
class LatentStatistics:
    """Statistics of raw latents, before normalization."""

    mean: Tensor
    """(c,) float64."""
    std: Tensor
    """(c,) float64; includes the posterior variance."""
    collapsed_share: Tensor | None
    """(c,) share of the positions in [0, 1] that are collapsed; None for latents without a posterior."""
    histograms: Tensor
    """(c, BINS) int64, counts of posterior means."""
    histogram_range: tuple[float, float]
    """Lower and upper end of all histograms."""


class LatentSums:
    """Sums of moments over batches, by position; (c, h, w) float64 each."""

    def __init__(self, has_posterior: bool) -> None:
        self.has_posterior = has_posterior
        self.num_images = 0
        self.mean = self.mean_squared = self.second = torch.zeros((), dtype=torch.float64)
        self.values: list[Tensor] = []

    def add(self, mean: Tensor, second: Tensor) -> None:
        """Add a batch.

        Args:
            mean: (B, c, h, w) first moments E[z] of the posteriors.
            second: (B, c, h, w) second moments E[z²].
        """
        mean, second = (moment.double().cpu() for moment in (mean, second))
        self.num_images += len(mean)
        self.mean = self.mean + mean.sum(0)
        self.mean_squared = self.mean_squared + mean.square().sum(0)
        self.second = self.second + second.sum(0)
        flat = mean.flatten(2)
        self.values.append(flat[:, :, :: -(-flat.shape[2] // MAX_POSITIONS)].float())

    def compute_statistics(self) -> LatentStatistics:
        mean, mean_squared, second = (
            total / self.num_images for total in (self.mean, self.mean_squared, self.second)
        )  # (c, h, w)
        channel_mean = mean.flatten(1).mean(1)
        variance = (second.flatten(1).mean(1) - channel_mean.square()).clamp(min=0)
        image_variance = (mean_squared - mean.square()).clamp(min=0)
        posterior_variance = (second - mean_squared).clamp(min=0)
        is_collapsed = image_variance < COLLAPSED_THRESHOLD * (image_variance + posterior_variance)
        histograms, histogram_range = channel_histograms(torch.cat(self.values))
        return LatentStatistics(
            mean=channel_mean,
            std=variance.sqrt(),
            collapsed_share=is_collapsed.double().flatten(1).mean(1) if self.has_posterior else None,
            histograms=histograms,
            histogram_range=histogram_range,
        )


def channel_histograms(values: Tensor) -> tuple[Tensor, tuple[float, float]]:
    """Count the values of each channel in bins over a common range.

    Args:
        values: (N, c, positions).

    Returns:
        Counts (c, BINS) int64, and the range.
    """
    low, high = (float(end) for end in np.quantile(values.numpy(), (TAIL_SHARE, 1 - TAIL_SHARE)))
    if high <= low:
        low, high = low - 0.5, high + 0.5
    channels = values.clamp(low, high).transpose(0, 1).flatten(1)
    counts = [torch.histc(channel, bins=BINS, min=low, max=high) for channel in channels]
    return torch.stack(counts).long(), (low, high)
