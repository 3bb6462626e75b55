"""Figures of a tokenizer: how near its reconstructions are, and how much of its codebook it uses."""

from typing import NamedTuple

import torch
from torch import Tensor


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image, in dB: 10 log₁₀(255² / mean squared error).

    Args:     images, references (B, C, H, W) uint8.
    Returns:  (B,) float64; images that are equal to the last bit get 100 dB in place of infinity.
    """
    error = (images.double() - references.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(255**2 / error.clamp(min=1e-30))).clamp(max=100.0)


class CodebookUsage(NamedTuple):
    codes_used: int  # entries chosen at least once
    perplexity: float  # exp of the entropy of the entries' shares; K when all are chosen equally often


def codebook_usage(counts: Tensor) -> CodebookUsage:
    """counts: (K,) how often each entry was chosen over a whole set (a batch's perplexity misleads)."""
    shares = counts.double() / counts.sum().clamp(min=1)
    entropy = -(shares * shares.clamp(min=1e-30).log()).sum()
    return CodebookUsage(int((counts > 0).sum()), float(entropy.exp()))
