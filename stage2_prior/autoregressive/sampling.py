r"""Decoding: one code after another, from the guided, tempered and truncated distribution.

    logits = null + s · (conditional − null)   →   / temperature   →   top-k   →   top-p   →   softmax   →   draw

in this order, in float32. A draw is one uniform number u an image and token, taken up front from the image's own generator:
the first code whose cumulated probability exceeds u. Image i so has the same draws at any batch size.
Top-p (nucleus) sampling: Holtzman et al. 2019, arXiv 1904.09751.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from stage2_prior.conditioning import guided
from training_harness.errors import UserError

if TYPE_CHECKING:
    from stage2_prior.autoregressive.model import AutoregressivePrior


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    guidance_scale: float = 1.0
    """1 is the conditional model; above it, samples are more typical of their class and less diverse."""
    temperature: float = 1.0
    top_k: int = 0
    """Keeps the k most probable codes; 0 keeps all."""
    top_p: float = 1.0
    """Keeps the most probable codes that together reach this probability."""

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_scale < math.inf:  # not a number fails too
            raise UserError(f"guidance_scale is {self.guidance_scale}; expected 0 or more; 1 is without guidance")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; expected a positive number; 1 leaves the distribution")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; expected a number of codes, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; expected a probability in (0, 1]; 1 keeps all codes")


@torch.no_grad()
def decode(
    prior: AutoregressivePrior,
    conditioning: Tensor,
    options: SamplingOptions,
    generators: Sequence[torch.Generator],
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Codes (B, tokens) int64 for class ids (B,).

    With guidance both halves run in one batch of 2 B rows; at scale 1 the null half is left out. `on_step(i, tokens)` is
    called after each token with the codes so far, (B, i + 1).
    """
    batch, length = len(conditioning), prior.config.height * prior.config.width
    guidance = options.guidance_scale != 1.0
    draws = torch.stack([torch.rand(length, generator=g, device=g.device).cpu() for g in generators])
    draws = draws.to(conditioning.device)  # (B, tokens)
    if guidance:
        null = torch.full_like(conditioning, prior.class_embedding.null_class)
        conditioning = torch.cat([conditioning, null])
    caches = prior.new_caches(len(conditioning))
    inputs = prior.class_embedding(conditioning)[:, None]
    tokens = torch.empty(batch, length, dtype=torch.int64, device=conditioning.device)
    for i in range(length):
        logits = prior.head(prior.hidden_states(inputs, caches)[:, -1]).float()
        if guidance:
            conditional, without = logits.chunk(2)
            logits = guided(conditional, without, options.guidance_scale)
        tokens[:, i] = draw(truncated(logits / options.temperature, options.top_k, options.top_p), draws[:, i])
        chosen = tokens[:, i].repeat(2) if guidance else tokens[:, i]
        inputs = prior.code_embedding(chosen)[:, None]
        if on_step is not None:
            on_step(i, tokens[:, : i + 1])
    return tokens


def truncated(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """(B, K) logits with −∞ where top-k, and then top-p, leave a code out; the most probable code always stays."""
    if 0 < top_k < logits.shape[1]:
        threshold = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=1, descending=True)
        probabilities = ordered.softmax(1)
        outside = probabilities.cumsum(1) - probabilities >= top_p  # what came before suffices
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The code (B,) at which the cumulated probabilities of (B, K) logits pass uniform numbers (B,) in [0, 1)."""
    cumulated = logits.double().softmax(1).cumsum(1)
    place = torch.searchsorted(cumulated, uniform.double()[:, None] * cumulated[:, -1:], right=True).squeeze(1)
    last = (
        logits.shape[1] - 1 - logits.flip(1).isfinite().int().argmax(1)
    )  # rounding never passes the last allowed code
    return torch.minimum(place, last)
