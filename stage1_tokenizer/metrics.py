"""Metrics of a tokenizer: reconstruction quality and codebook usage."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.data.image_processor import as_rgb
from stage1_tokenizer.losses.perceptual import load_lpips_network, lpips_unavailable_reason
from stage1_tokenizer.quantizers.protocol import all_reduce_sum

SSIM_WINDOW, SSIM_SIGMA = 11, 1.5  # pixels
LPIPS_MIN_SIDE = 31  # pixels; AlexNet's pooling layers reduce smaller images to nothing


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Compute the peak signal-to-noise ratio of each image, 10 log₁₀(255² / mean squared error).

    Args:     images, references (B, C, H, W) uint8.
    Returns:  (B,) float64 in dB; at most 100 dB, the value of two equal images.
    """
    error = (images.double() - references.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(255**2 / error.clamp(min=1e-30))).clamp(max=100.0)


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Compute the structural similarity of each image.

    Means, variances and the covariance use a Gaussian window of 11×11 pixels (σ = 1.5). The result is averaged over channels
    and over all positions where the window lies inside the image.

    Args:     images, references (B, C, H, W) uint8, H and W at least 11.
    Returns:  (B,) float64 in [-1, 1]; 1 for equal images.
    Source:   Wang et al. 2004, IEEE Transactions on Image Processing 13(4), eq. 13.
    """
    x, y = (batch.double().flatten(0, 1)[:, None] for batch in (images, references))
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=x.device) - SSIM_WINDOW // 2
    kernel = torch.exp(-offsets.square() / (2 * SSIM_SIGMA**2))
    kernel = kernel / kernel.sum()

    def blur(channels: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(channels, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.flatten(1).mean(1).view(len(images), -1).mean(1)


def load_lpips_distance(device: torch.device | str = "cpu") -> Callable[[Tensor, Tensor], Tensor] | None:
    """Load LPIPS v0.1 with AlexNet, or return None when the package or the backbone's weights are missing.

    Returns:  a function from two batches (B, C, H, W) uint8, H and W at least 31, to their distances (B,) float32.
    Source:   Zhang et al. 2018, arXiv 1801.03924.
    """
    if lpips_unavailable_reason("alex") is not None:
        return None
    network = load_lpips_network("alex").to(device)

    @torch.inference_mode()
    def distance(images: Tensor, references: Tensor) -> Tensor:
        inputs = (as_rgb(batch).to(device).float() / 127.5 - 1 for batch in (images, references))
        return network(*inputs).flatten()

    return distance


class CodebookUsage(NamedTuple):
    codes_used: int  # number of codes that occur at least once
    perplexity: float  # exp of the entropy of the code frequencies; K when all codes are equally frequent


def codebook_usage(counts: Tensor) -> CodebookUsage:
    """Compute the codebook usage from the counts (K,) of each code over a whole dataset; one batch is not enough."""
    shares = counts.double() / counts.sum().clamp(min=1)
    entropy = -(shares * shares.clamp(min=1e-30).log()).sum()
    return CodebookUsage(int((counts > 0).sum()), math.exp(float(entropy)))


class CodeUsage:
    """Counts of each code during training, over all processes, since the last reset."""

    def __init__(self, codebook_size: int | None, levels: int = 1) -> None:
        self.counts = torch.zeros(levels, codebook_size or 0)

    def update(self, indices: Tensor) -> None:
        """Count the codes of int64 indices (B, h, w) or (B, levels, h, w)."""
        levels, size = self.counts.shape
        offsets = size * torch.arange(levels, device=indices.device)[:, None]
        bins = (indices.reshape(len(indices), levels, -1) + offsets).flatten()
        self.counts += all_reduce_sum(torch.bincount(bins, minlength=levels * size)).view(levels, size).cpu()

    @property
    def assignments(self) -> int:
        """Number of positions that were counted since the last reset."""
        return int(self.counts[0].sum())

    def compute_and_reset(self) -> dict[str, float]:
        """Compute `codes_used` and `perplexity` over all levels, and set the counts to zero.

        With several levels, `codes_used_at_fewest_level` is the smallest number of codes that one level used. Without a
        codebook the result is empty.
        """
        if not self.counts.numel():
            return {}
        metrics: dict[str, float] = codebook_usage(self.counts.sum(0))._asdict()
        if len(self.counts) > 1:
            metrics["codes_used_at_fewest_level"] = int((self.counts > 0).sum(1).min())
        self.counts.zero_()
        return metrics

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts.copy_(state["counts"])
