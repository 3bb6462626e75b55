r"""What a prior needs to write down the codes of images: its surprise at each code, and how near codes are to those it has seen.

    s_i = −log₂ p(k_i | y, k_1 … k_{i−1})  bits,     log₂ K  of a prior that has learnt nothing

Bits a pixel divide an image's sum by the pixels of its content; with the reconstruction's error they are what a lossy coder
would pay. Two grids are near when few of their codes differ (Hamming distance).
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
    """Bits of each code, float64 of the shape of `codes` (N, h, w) or (N, levels, h, w), given class ids (N,), on the CPU."""
    found, grid = [], codes[0].numel() * prior.config.codebook_size
    size = max(1, min(BATCH, LOGITS_AT_ONCE // grid))
    for part, labels in zip(codes.split(size), conditioning.split(size), strict=True):
        tokens = prior.codes_to_tokens(part.long().to(prior.device))
        logits = prior.logits(tokens, labels.to(prior.device)).float()
        nats = F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), reduction="none").view_as(tokens)
        found.append(prior.tokens_to_codes(nats.double() / math.log(2)).cpu())
    return torch.cat(found)


def likelihood_metrics(
    bits: Tensor, conditioning: Tensor, names: tuple[str, ...], codebook_size: int, pixels: int
) -> dict[str, Any]:
    """Means over codes of `surprise`: overall, by pixel, by class and by position.

    Args:
        bits: (N, h, w) or (N, levels, h, w); conditioning: (N,) class ids.
        pixels: of an image's content.
    """
    by_image = bits.flatten(1)
    of_class = {name: by_image[conditioning == i] for i, name in enumerate(names)}
    return {
        "bits_per_token": by_image.mean().item(),
        "bits_per_token_uniform": math.log2(codebook_size),
        "prior_bits_per_image": by_image.sum(1).mean().item(),
        "prior_bits_per_pixel": by_image.sum(1).mean().item() / pixels,
        "bits_per_token_by_class": {name: rows.mean().item() for name, rows in of_class.items() if len(rows)},
        "bits_per_token_by_position": bits.mean(0).tolist(),
    }


def nearest_grids(codes: Tensor, training: Iterator[Tensor]) -> tuple[Tensor, Tensor]:
    """For each grid the training grid that shares the most codes with it at the same places.

    Args:     codes (N, …); training yields (M, …) of the same shape, batch after batch.
    Returns:  shares in [0, 1] (N,) and positions (N,) among all training grids.
    """
    own = codes.flatten(1)
    best, where, start = torch.zeros(len(own)), torch.zeros(len(own), dtype=torch.int64), 0
    for batch in training:
        other = batch.flatten(1)
        for rows in torch.arange(len(own)).split(BATCH):
            shares = (own[rows, None] == other[None]).float().mean(2)  # (rows, M)
            share, position = shares.max(1)
            better = share > best[rows]
            where[rows[better]] = start + position[better]
            best[rows] = torch.maximum(best[rows], share)
        start += len(other)
    return best, where
