r"""What a denoiser is told beside the noisy latents, as one vector.

    c = SiLU(time(t) + class(y)),    of a mean flow SiLU(time(t) + class(y) + span(t − r) + guidance(ω))       (`mean_flow`)

A number becomes waves of s times it, at 128 frequencies from 1 to 1e-4, and goes through two layers, as in DDPM (arXiv 2006.11239).
s is 1,000; of a mean flow, whose network is differentiated in t, it is 16, since the derivative of a wave grows with s.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior.conditioning.classes import ClassEmbedding
from stage2_prior.diffusion.config import DiffusionPriorConfig
from training_harness.precision import upcast

FREQUENCIES = 256
SCALE, MEAN_FLOW_SCALE = 1000.0, 16.0
STD = 0.02


class Condition(nn.Module):
    def __init__(self, config: DiffusionPriorConfig, width: int) -> None:
        super().__init__()
        self.mean_flow = config.model.mean_flow is not None
        scale = MEAN_FLOW_SCALE if self.mean_flow else SCALE
        self.time_embedding = NumberEmbedding(width, scale)
        self.class_embedding = ClassEmbedding(config.num_classes, width)
        nn.init.normal_(self.class_embedding.weight, std=STD)
        if self.mean_flow:
            self.span_embedding, self.guidance_embedding = (NumberEmbedding(width, scale) for _ in range(2))

    def forward(self, times: Tensor, classes: Tensor, ends: Tensor | None, guidance: Tensor | None) -> Tensor:
        """(B,) times t in [0, 1], int64 class ids, of a mean flow r in [0, t] and ω, by default t and 1 → (B, hidden)."""
        told = self.time_embedding(times) + self.class_embedding(classes)
        if self.mean_flow:
            span = torch.zeros_like(times) if ends is None else times - ends
            told = told + self.span_embedding(span)
            told = told + self.guidance_embedding(torch.ones_like(times) if guidance is None else guidance)
        return F.silu(told)


class NumberEmbedding(nn.Module):
    """Numbers (B,) → (B, hidden)."""

    def __init__(self, hidden_size: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.first, self.second = nn.Linear(FREQUENCIES, hidden_size), nn.Linear(hidden_size, hidden_size)
        for linear in (self.first, self.second):
            nn.init.normal_(linear.weight, std=STD)
            nn.init.zeros_(linear.bias)

    def forward(self, numbers: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=numbers.device) / half)
        angles = self.scale * upcast(numbers)[:, None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(waves)))
