"""Figures of a tokenizer: how near its reconstructions are, and how much of its codebook it uses."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.data.image_processor import as_rgb
from stage1_tokenizer.losses.perceptual import lpips_network, lpips_obstacle
from stage1_tokenizer.quantizers.protocol import all_reduce_sum

SSIM_WINDOW, SIGMA = 11, 1.5  # of SSIM, in pixels
LPIPS_MIN_SIDE = 31  # pixels of the smallest image of which AlexNet's poolings leave something


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, in dB: 10 log₁₀(255² / mean squared error).

    Args:     images, references (B, C, H, W) uint8.
    Returns:  (B,) float64; images that are equal to the last bit get 100 dB in place of infinity.
    """
    error = (images.double() - references.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(255**2 / error.clamp(min=1e-30))).clamp(max=100.0)


def ssim(images: Tensor, references: Tensor) -> Tensor:
    """Structural similarity of each image, in [-1, 1]; 1 for equal ones.

    Means, variances and covariance under a Gaussian window of 11×11 (σ = 1.5) at each place where it fits, averaged over
    places and channels.

    Args:     images, references (B, C, H, W) uint8, H and W at least 11.
    Returns:  (B,) float64.
    Source:   Wang et al. 2004, IEEE Transactions on Image Processing 13(4), eq. 13.
    """
    x, y = (batch.double().flatten(0, 1)[:, None] for batch in (images, references))
    offsets = torch.arange(SSIM_WINDOW, dtype=torch.float64, device=x.device) - SSIM_WINDOW // 2
    line = torch.exp(-offsets.square() / (2 * SIGMA**2))
    line = line / line.sum()

    def blur(planes: Tensor) -> Tensor:
        return F.conv2d(F.conv2d(planes, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    mean_x, mean_y = blur(x), blur(y)
    var_x, var_y = blur(x * x) - mean_x**2, blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity = similarity / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    return similarity.flatten(1).mean(1).view(len(images), -1).mean(1)


def load_lpips_distance(device: torch.device | str = "cpu") -> Callable[[Tensor, Tensor], Tensor] | None:
    """LPIPS v0.1 on AlexNet, from (B, C, H, W) uint8 pairs to (B,); none unless `lpips` and the backbone's weights are here.

    H and W are at least 31. Source: Zhang et al. 2018, arXiv 1801.03924.
    """
    if lpips_obstacle("alex") is not None:
        return None
    network = lpips_network("alex").to(device)

    @torch.inference_mode()
    def distance(images: Tensor, references: Tensor) -> Tensor:
        pair = (as_rgb(batch).to(device).float() / 127.5 - 1 for batch in (images, references))
        return network(*pair).flatten()

    return distance


class CodebookUsage(NamedTuple):
    codes_used: int  # entries chosen at least once
    perplexity: float  # exp of the entropy of the entries' shares; K when all are chosen equally often


def codebook_usage(counts: Tensor) -> CodebookUsage:
    """counts: (K,) how often each entry was chosen over a whole set (a batch's perplexity misleads)."""
    shares = counts.double() / counts.sum().clamp(min=1)
    entropy = -(shares * shares.clamp(min=1e-30).log()).sum()
    return CodebookUsage(int((counts > 0).sum()), math.exp(float(entropy)))


class CodeUsage:
    """How often each entry was chosen in training since it was last looked at, over all processes; part of a checkpoint."""

    def __init__(self, codebook_size: int | None, levels: int = 1) -> None:
        """Without a codebook there is nothing to count."""
        self.counts = torch.zeros(levels, codebook_size or 0)

    def count(self, indices: Tensor) -> None:
        """indices: int64 (B, h, w), or (B, levels, h, w)."""
        levels, size = self.counts.shape
        own = indices.reshape(len(indices), levels, -1) + size * torch.arange(levels, device=indices.device)[:, None]
        self.counts += all_reduce_sum(torch.bincount(own.flatten(), minlength=levels * size)).view(levels, size).cpu()

    @property
    def choices(self) -> int:
        """Codes of a level chosen since the last look, each as often as it was."""
        return int(self.counts[0].sum())

    def since_last(self) -> dict[str, float]:
        """`codes_used` and `perplexity`, by name, of all levels as one, and of several the fewest that a level used;
        counting begins anew."""
        if not self.counts.numel():
            return {}
        found: dict[str, float] = codebook_usage(self.counts.sum(0))._asdict()
        if len(self.counts) > 1:
            found["codes_used_at_fewest_level"] = int((self.counts > 0).sum(1).min())
        self.counts.zero_()
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts.copy_(state["counts"])
