r"""From logits to a code: guidance, temperature, truncation, and one uniform random number.

    logits = null + s_i · (conditional − null)   →   / temperature   →   top-k   →   top-p   →   min-p   →   softmax   →   sample

The operations run in this order, in float32. Sampling takes one uniform number u and selects the first code at which the
cumulative probabilities, summed in float64, exceed u. Top-p (nucleus) sampling: Holtzman et al. 2019, arXiv 1904.09751. Min-p:
Nguyen et al. 2024, arXiv 2407.01082. A guidance scale that grows from 1 during sampling keeps the first codes of an image diverse
(Chang et al. 2023, arXiv 2301.00704).
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from training_harness.errors import UserError

GuidanceSchedule = Literal["constant", "linear", "cosine"]
Weights = Literal["full", "int8"]


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    guidance_scale: float = 1.0
    """1 is the conditional model; above 1, samples are more typical of their class and less diverse."""
    guidance_schedule: GuidanceSchedule = "constant"
    """How the scale grows from 1 to `guidance_scale` during sampling; `constant` uses `guidance_scale` for all codes."""
    temperature: float = 1.0
    """Divides the logits: below 1 samples are more typical, above 1 more diverse."""
    top_k: int = 0
    """Keeps the k most probable codes; 0 keeps all."""
    top_p: float = 1.0
    """Keeps the smallest set of most probable codes with at least this total probability."""
    min_p: float = 0.0
    """Keeps codes with at least this share of the highest probability."""
    weights: Weights = "full"
    """`int8` samples with 8-bit weights on a CPU. It is faster for one or a few images and slightly less accurate."""
    num_candidates: int = 8
    """Candidates for a masked region in raster order, weighted by the known codes after it; 1 ignores these codes."""

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_scale < math.inf:  # not a number fails too
            raise UserError(f"guidance_scale is {self.guidance_scale}; expected 0 or more. Pass 1 for no guidance.")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; expected a positive number. Pass 1 for no change.")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; expected a number of codes, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; expected a probability in (0, 1]. Pass 1 to keep all codes.")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}; expected a share in [0, 1]. Pass 0 to keep all codes.")
        if self.num_candidates < 1:
            raise UserError(f"num_candidates is {self.num_candidates}; expected at least 1")

    def guidance_scale_at(self, step: int, num_steps: int) -> float:
        """Return the guidance scale at step `step` in [0, num_steps)."""
        progress = (step + 1) / num_steps
        shape = {"constant": 1.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}
        return 1 + (self.guidance_scale - 1) * shape[self.guidance_schedule]


# The largest float32 below 1. It is further from 1 than the rounding error of float64 sums, so no removed code is sampled.
BELOW_ONE = 1 - 2**-24


def truncate_logits(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Set logits (B, K) to −∞ for codes that top-k, then top-p, then min-p remove.

    The most probable code is never removed.
    """
    if 0 < top_k < logits.shape[1]:
        threshold = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1:
        sorted_logits, order = logits.sort(dim=1, descending=True)
        probabilities = sorted_logits.softmax(1)
        removed = probabilities.cumsum(1) - probabilities >= top_p  # the codes before it reach top_p
        logits = logits.masked_fill(torch.zeros_like(removed).scatter(1, order, removed), -torch.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def sample_codes(logits: Tensor, uniform: Tensor) -> Tensor:
    """Select the code (B,) at which the cumulative probabilities of logits (B, K) exceed `uniform` (B,) in [0, 1)."""
    probabilities = logits.softmax(1)
    if logits.device.type == "mps":  # MPS has no float64
        probabilities = probabilities.cpu()
    cumulative = probabilities.cumsum(1, dtype=torch.float64)
    points = uniform.to(cumulative).clamp(max=BELOW_ONE)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, points, right=True).squeeze(1).to(logits.device)
