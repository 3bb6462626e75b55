r"""Negative log-likelihood of codes under a prior, and the nearest training grid of a grid of codes.

    s_i = −log₂ p(k_i | y, k_1 … k_{i−1})  bits,     log₂ K  for a uniform prior

Bits per pixel are the sum over an image divided by the pixels of its content. Together with the reconstruction error, they
are the rate of a lossy coder. The distance between two grids is the number of differing codes (Hamming distance).
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.autoregressive.model import AutoregressivePrior

BATCH, LOGITS_AT_ONCE = 100, 1 << 24


@torch.no_grad()
def negative_log_likelihood(prior: AutoregressivePrior, codes: Tensor, conditioning: Tensor) -> Tensor:
    """Compute the negative log-likelihood of each code in bits.

    Args:
        codes: (N, h, w) or (N, levels, h, w).
        conditioning: (N,) class ids.

    Returns:
        float64 of the shape of `codes`, on the CPU.
    """
    bits, logits_per_image = [], codes[0].numel() * prior.config.codebook_size
    size = max(1, min(BATCH, LOGITS_AT_ONCE // logits_per_image))
    for batch, labels in zip(codes.split(size), conditioning.split(size), strict=True):
        tokens = prior.codes_to_tokens(batch.long().to(prior.device))
        logits = prior.logits(tokens, labels.to(prior.device)).float()
        nats = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
        bits.append(prior.tokens_to_codes(nats.double() / math.log(2)).cpu())
    return torch.cat(bits)


def likelihood_metrics(
    bits: Tensor, conditioning: Tensor, names: tuple[str, ...], codebook_size: int, pixels: int
) -> dict[str, Any]:
    """Average the output of `negative_log_likelihood`: per token, image and pixel, by class and by position.

    Args:
        bits: (N, h, w) or (N, levels, h, w).
        conditioning: (N,) class ids.
        names: names of the classes by id.
        pixels: number of pixels of an image's content.
    """
    by_image = bits.flatten(1)
    by_class = {name: by_image[conditioning == i] for i, name in enumerate(names)}
    return {
        "bits_per_token": by_image.mean().item(),
        "bits_per_token_uniform": math.log2(codebook_size),
        "prior_bits_per_image": by_image.sum(1).mean().item(),
        "prior_bits_per_pixel": by_image.sum(1).mean().item() / pixels,
        "bits_per_token_by_class": {name: rows.mean().item() for name, rows in by_class.items() if len(rows)},
        "bits_per_token_by_position": bits.mean(0).tolist(),
    }


def nearest_grids(codes: Tensor, training: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """Find the training grid that shares the most codes with each grid at equal positions.

    Args:
        codes: (N, …).
        training: batches (M, …) of training grids of the same shape.

    Returns:
        The shares of equal codes in [0, 1], (N,), and the positions among all training grids, (N,) int64.
    """
    tokens = codes.flatten(1)
    best_shares, best_positions = torch.zeros(len(tokens)), torch.zeros(len(tokens), dtype=torch.int64)
    start = 0
    for batch in training:
        training_tokens = batch.flatten(1)
        for rows in torch.arange(len(tokens)).split(BATCH):
            shares = (tokens[rows, None] == training_tokens[None]).float().mean(2)  # (rows, M)
            share, position = shares.max(1)
            is_better = share > best_shares[rows]
            best_positions[rows[is_better]] = start + position[is_better]
            best_shares[rows] = torch.maximum(best_shares[rows], share)
        start += len(training_tokens)
    return best_shares, best_positions
