r"""Heun: an Euler step, repeated with the mean of the estimates at both ends; two evaluations per step, one in the last.

    x' = α_s x̂ + σ_s ε̂,     x_s = x_t + (α_s − α_t) (x̂ + x̂') / 2 + (σ_s − σ_t) (ε̂ + ε̂') / 2

x̂' and ε̂' are the estimates at x' and s. This is the trapezoidal rule for dx = x̂ dα + ε̂ dσ, of second order. It never divides by α,
which is 0 at the start of a flow. At σ_s = 0 the step is an Euler step. After Karras et al. 2022, arXiv 2206.00364, algorithm 1,
written there in x / α.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from stage2_prior.diffusion.process import NoiseLevel, add_noise
from stage2_prior.diffusion.samplers.protocol import DenoiseFunction, SampleNoise


def heun(
    denoise: DenoiseFunction, x: Tensor, levels: Sequence[NoiseLevel[float]], sample_noise: SampleNoise
) -> Iterator[Tensor]:
    for t, s in pairwise(levels):
        first = denoise(x, t)
        end = add_noise(*first, s)
        if s.sigma > 0:
            second = denoise(end, s)
            sample_factor, noise_factor = (s.alpha - t.alpha) / 2, (s.sigma - t.sigma) / 2
            end = x + sample_factor * (first.sample + second.sample) + noise_factor * (first.noise + second.noise)
        x = end
        yield x
