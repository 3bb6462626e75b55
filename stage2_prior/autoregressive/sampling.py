r"""From logits to a code: guidance, temperature, truncation, and one uniform number.

    logits = null + s_i · (conditional − null)   →   / temperature   →   top-k   →   top-p   →   min-p   →   softmax   →   draw

in this order, in float32. A draw is one uniform number u: the first code whose probabilities, summed in float64, exceed it. Top-p
(nucleus) sampling: Holtzman et al. 2019, arXiv 1904.09751; min-p: Nguyen et al. 2024, arXiv 2407.01082. A guidance scale that grows
from 1 while an image is drawn keeps its first codes diverse (Chang et al. 2023, arXiv 2301.00704).
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
    """1 is the conditional model; above it, samples are more typical of their class and less diverse."""
    guidance_schedule: GuidanceSchedule = "constant"
    """How the scale goes from 1 to `guidance_scale` while an image is drawn; `constant` has it from the first code."""
    temperature: float = 1.0
    """Divides the logits: below 1 samples are more typical, above 1 more diverse."""
    top_k: int = 0
    """Keeps the k most probable codes; 0 keeps all."""
    top_p: float = 1.0
    """Keeps the most probable codes that together reach this probability."""
    min_p: float = 0.0
    """Keeps codes at least this many times as probable as the most probable one."""
    weights: Weights = "full"
    """`int8`, on a CPU: weights of eight bits, faster for one or a few images at a time and a little less likely samples."""
    num_candidates: int = 8
    """How many candidates for a hole a raster-order prior weighs by what is known after it; 1 ignores that."""

    def __post_init__(self) -> None:
        if not 0 <= self.guidance_scale < math.inf:  # not a number fails too
            raise UserError(f"guidance_scale is {self.guidance_scale}; expected 0 or more; 1 is without guidance")
        if not 0 < self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; expected a positive number; 1 leaves the distribution")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}; expected a number of codes, or 0 for all")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; expected a probability in (0, 1]; 1 keeps all codes")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}; expected a share in [0, 1]; 0 keeps all codes")
        if self.num_candidates < 1:
            raise UserError(f"num_candidates is {self.num_candidates}; expected at least 1")

    def scale_at(self, place: int, places: int) -> float:
        """Guidance scale for the codes of the `place`-th place, from 0, of `places`."""
        progress = (place + 1) / places
        shape = {"constant": 1.0, "linear": progress, "cosine": (1 - math.cos(math.pi * progress)) / 2}
        return 1 + (self.guidance_scale - 1) * shape[self.guidance_schedule]


BELOW_ONE = 1 - 2**-24  # the next number of float32: further off than sums of float64 err, so no code left out is drawn


def truncated(logits: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """(B, K) logits with −∞ where top-k, then top-p, then min-p leave a code out; the most probable code always stays."""
    if 0 < top_k < logits.shape[1]:
        threshold = logits.topk(top_k, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=1, descending=True)
        probabilities = ordered.softmax(1)
        outside = probabilities.cumsum(1) - probabilities >= top_p  # what came before suffices
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), -torch.inf)
    if min_p > 0:
        logits = logits.masked_fill(logits < logits.amax(1, keepdim=True) + math.log(min_p), -torch.inf)
    return logits


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The code (B,) at which the cumulated probabilities of (B, K) logits pass uniform numbers (B,) in [0, 1)."""
    probabilities = logits.softmax(1)
    if logits.device.type == "mps":  # which knows no float64
        probabilities = probabilities.cpu()
    cumulated = probabilities.cumsum(1, dtype=torch.float64)
    points = uniform.to(cumulated).clamp(max=BELOW_ONE)[:, None] * cumulated[:, -1:]
    return torch.searchsorted(cumulated, points, right=True).squeeze(1).to(logits.device)
