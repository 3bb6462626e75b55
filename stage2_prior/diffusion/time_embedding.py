"""Times as vectors: waves of 1,000 t at 128 frequencies from 1 to 1e-4, and two layers. As in DDPM: arXiv 2006.11239."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES, SCALE = 256, 1000.0
STD = 0.02


class TimeEmbedding(nn.Module):
    """Times (B,) in [0, 1] → (B, hidden)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FREQUENCIES, hidden_size), nn.Linear(hidden_size, hidden_size)
        for linear in (self.first, self.second):
            nn.init.normal_(linear.weight, std=STD)
            nn.init.zeros_(linear.bias)

    def forward(self, times: Tensor) -> Tensor:
        half = FREQUENCIES // 2
        frequencies = torch.exp(-math.log(10_000) * torch.arange(half, device=times.device) / half)
        angles = SCALE * times.float()[:, None] * frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.first.weight.dtype)
        return self.second(F.silu(self.first(waves)))
