r"""Condition of a denoiser: one vector for the time, the class and the guidance scale.

    c = SiLU(time(t) + class(y))
    c = SiLU(time(t) + class(y) + span(t − r) + guidance(ω))       for a mean flow (`mean_flow`)

A number is multiplied by s, becomes sines and cosines at 128 frequencies from 1 to 1e-4, and passes two layers, as in DDPM (arXiv
2006.11239). s is 1,000. For a mean flow it is 16: its network is differentiated in t, and the derivative of a wave grows with s.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior.conditioning.classes import ClassEmbedding
from stage2_prior.diffusion.config import DiffusionPriorConfig
from training_harness.precision import upcast

NUM_WAVES = 256
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
        """Compute the condition (B, hidden).

        Args:
            times: (B,) times t in [0, 1].
            classes: (B,) int64 class ids.
            ends: (B,) ends r of the spans in [0, t], for a mean flow; default: t.
            guidance: (B,) guidance scales ω, for a mean flow; default: 1.
        """
        condition = self.time_embedding(times) + self.class_embedding(classes)
        if self.mean_flow:
            span = torch.zeros_like(times) if ends is None else times - ends
            condition = condition + self.span_embedding(span)
            condition = condition + self.guidance_embedding(torch.ones_like(times) if guidance is None else guidance)
        return F.silu(condition)


class NumberEmbedding(nn.Module):
    """Sinusoidal embedding of numbers, (B,) → (B, hidden)."""

    def __init__(self, hidden_size: int, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.first, self.second = nn.Linear(NUM_WAVES, hidden_size), nn.Linear(hidden_size, hidden_size)
        for linear in (self.first, self.second):
            nn.init.normal_(linear.weight, std=STD)
            nn.init.zeros_(linear.bias)

    def forward(self, numbers: Tensor) -> Tensor:
        half = NUM_WAVES // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=numbers.device) / half)
        angles = self.scale * upcast(numbers)[:, None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(waves)))
