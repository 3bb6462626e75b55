r"""DDIM: from deterministic (η = 0) to ancestral (η = 1) steps with one network.

    x_s = α_s x̂ + √(σ_s² − κ²) ε̂ + κ z,     κ² = η² σ_s² (1 − α_t² σ_s² / (α_s² σ_t²))

Song, Meng, Ermon 2021, arXiv 2010.02502, eq. 12 and 16.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from stage2_prior.diffusion.process import NoiseLevel
from stage2_prior.diffusion.samplers.protocol import DenoiseFunction, SampleNoise


def ddim(
    denoise: DenoiseFunction,
    x: Tensor,
    levels: Sequence[NoiseLevel[float]],
    sample_noise: SampleNoise,
    eta: float = 0.0,
) -> Iterator[Tensor]:
    for t, s in pairwise(levels):
        estimate = denoise(x, t)
        kappa = eta * s.sigma * math.sqrt(max(1 - (t.alpha * s.sigma / (s.alpha * t.sigma)) ** 2, 0))
        x = s.alpha * estimate.sample + math.sqrt(max(s.sigma**2 - kappa**2, 0)) * estimate.noise
        if kappa > 0:
            x = x + kappa * sample_noise()
        yield x
