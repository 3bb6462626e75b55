"""The protocol of a sampler: `sampler(denoise, noise, levels, sample_noise)` yields x at each level after the first.

In the headers of the samplers, s is the level after t, x̂ and ε̂ are the network's estimates at t, h = λ_s − λ_t with
λ = log(α / σ), and z ~ N(0, I).
"""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from stage2_prior.diffusion.process import Estimate, NoiseLevel

DenoiseFunction = Callable[[Tensor, NoiseLevel[float]], Estimate]
"""Estimates sample and noise in x (B, c, h, w) at a level."""
SampleNoise = Callable[[], Tensor]
"""Returns new noise (B, c, h, w) ~ N(0, I), with one generator for each image."""
Sampler = Callable[[DenoiseFunction, Tensor, Sequence[NoiseLevel[float]], SampleNoise], Iterator[Tensor]]
