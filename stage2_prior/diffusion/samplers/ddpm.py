r"""Ancestral DDPM: each step samples from the posterior of x_s given x_t, with x̂ as the data.

    q(x_s | x_t, x) = N(μ, κ²),    μ = (r σ_s² / σ_t²) x_t + (α_s τ² / σ_t²) x̂,    κ² = τ² σ_s² / σ_t²
    r = α_t / α_s,     τ² = σ_t² − r² σ_s²     the noise that a step from s to t adds

Ho, Jain, Abbeel 2020, arXiv 2006.11239, eq. 6 and 7, with the smaller of its two variances. It needs many steps.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from stage2_prior.diffusion.process import NoiseLevel
from stage2_prior.diffusion.samplers.protocol import DenoiseFunction, SampleNoise


def ddpm(
    denoise: DenoiseFunction, x: Tensor, levels: Sequence[NoiseLevel[float]], sample_noise: SampleNoise
) -> Iterator[Tensor]:
    for t, s in pairwise(levels):
        ratio = t.alpha / s.alpha
        noise_share = max(t.sigma**2 - (ratio * s.sigma) ** 2, 0) / t.sigma**2
        sample = denoise(x, t).sample
        x = (ratio * (s.sigma / t.sigma) ** 2) * x + (s.alpha * noise_share) * sample
        if s.sigma > 0:
            x = x + math.sqrt(noise_share) * s.sigma * sample_noise()
        yield x
