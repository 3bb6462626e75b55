r"""Euler: a step along the straight line given by the estimates at t.

    dx = x̂ dα + ε̂ dσ    →    x_s = x_t + (α_s − α_t) x̂ + (σ_s − σ_t) ε̂ = α_s x̂ + σ_s ε̂

The step is the same for every schedule. For a flow it is x_s = x_t + (s − t) û. In x / α and σ / α it is the Euler step of Karras
et al. 2022, arXiv 2206.00364. It is also DDIM at η = 0.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from stage2_prior.diffusion.process import NoiseLevel, add_noise
from stage2_prior.diffusion.samplers.protocol import DenoiseFunction, SampleNoise


def euler(
    denoise: DenoiseFunction, x: Tensor, levels: Sequence[NoiseLevel[float]], sample_noise: SampleNoise
) -> Iterator[Tensor]:
    for t, s in pairwise(levels):
        x = add_noise(*denoise(x, t), s)
        yield x
