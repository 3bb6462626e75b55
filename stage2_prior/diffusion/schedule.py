r"""Noise schedules: α_t and σ_t for t in [0, 1].

    flow            α = 1 − t,  σ = t: the straight path of rectified flow
    linear          β_i from 1e-4 to 0.02 in equal steps: Ho, Jain, Abbeel 2020, arXiv 2006.11239
    scaled-linear   √β_i from √0.00085 to √0.012 in equal steps: Rombach et al. 2021, arXiv 2112.10752
    cosine          ᾱ_i = f(i) / f(0), f(i) = cos²((i/T + 0.008) / 1.008 · π/2), β_i at most 0.999: Nichol, Dhariwal 2021, arXiv
                    2102.09672

The last three have T = 1,000 levels: t = i / T, α = √ᾱ_i, σ = √(1 − ᾱ_i), ᾱ_i = Π_{j ≤ i} (1 − β_j). Level 0 is data without noise,
and level i is timestep i − 1 of diffusers. Zero terminal SNR shifts and scales α so that the last level is pure noise (Lin et al.
2023, arXiv 2305.08891, algorithm 1).
"""

import math
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from stage2_prior.diffusion.process import NoiseLevel

Schedule = Literal["flow", "linear", "scaled-linear", "cosine"]
Spacing = Literal["trailing", "leading", "linspace"]
NUM_LEVELS = 1000


class NoiseSchedule:
    def __init__(self, schedule: Schedule, zero_terminal_snr: bool = False) -> None:
        self._levels = None  # (2, T + 1) float64, α and σ
        if schedule != "flow":
            alphas = _alphas(schedule, zero_terminal_snr)
            self._levels = torch.stack([alphas, (1 - alphas.square()).clamp(min=0).sqrt()])

    @property
    def is_flow(self) -> bool:
        return self._levels is None

    def level(self, time: float) -> NoiseLevel[float]:
        """Return α and σ of one time in [0, 1], as floats."""
        return NoiseLevel(*torch.stack(self.levels(torch.tensor(time, dtype=torch.float64))).tolist())

    def levels(self, times: Tensor) -> NoiseLevel[Tensor]:
        """Return α and σ of times in [0, 1], in the dtype of the times; a schedule of T levels uses the nearest level."""
        if self._levels is None:
            return NoiseLevel(times, 1 - times, times)
        levels = self._levels.to(times.dtype).to(times.device)  # in this order, since MPS has no float64
        return NoiseLevel(times, *levels[:, (times * NUM_LEVELS).round().long()])

    def training_times(self, shares: Tensor) -> Tensor:
        """Convert shares of the time range, in (0, 1], to training times; t = 0 has no noise and never occurs."""
        return shares if self._levels is None else (shares * NUM_LEVELS).ceil() / NUM_LEVELS

    def sampling_times(self, steps: int, spacing: Spacing = "trailing") -> Tensor:
        """Return (steps + 1,) float64 times, falling from the start of sampling to 0.

        `trailing` starts at t = 1 with equal steps, `leading` ends with a full step to 0, and `linspace` includes the first and
        the last level. A flow always uses `trailing`, since it has no levels.
        """
        if self._levels is None or spacing == "trailing":
            times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
            return times if self._levels is None else (times * NUM_LEVELS).round() / NUM_LEVELS
        if spacing == "leading":
            first = torch.arange(steps, dtype=torch.float64).flip(0) * (NUM_LEVELS // steps)
        else:
            first = torch.linspace(0, NUM_LEVELS - 1, steps, dtype=torch.float64).flip(0).round()
        return torch.cat([first + 1, first.new_zeros(1)]) / NUM_LEVELS


def _alphas(schedule: Schedule, zero_terminal_snr: bool) -> Tensor:
    """Return (T + 1,) float64 on the CPU, even when models are created on the meta device."""
    cpu: Any = {"dtype": torch.float64, "device": "cpu"}
    if schedule == "cosine":
        bars = [math.cos((i / NUM_LEVELS + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(NUM_LEVELS + 1)]
        betas = torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(bars)], **cpu)
    elif schedule == "linear":
        betas = torch.linspace(1e-4, 0.02, NUM_LEVELS, **cpu)
    else:
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, NUM_LEVELS, **cpu).square()
    alphas = (1 - betas).cumprod(0).sqrt()
    if zero_terminal_snr:
        first, last = alphas[0].clone(), alphas[-1].clone()
        alphas = (alphas - last) * first / (first - last)
    return torch.cat([alphas.new_ones(1), alphas])
