r"""Adams-Bashforth: an Euler step with linear extrapolation from the previous estimate; one evaluation per step.

    X = x̂ + (τ / 2 τ') (x̂ − x̂')             τ = t − s; τ', x̂' are the previous step and its estimate; X = x̂ in the first step
    E in the same way from ε̂
    x_s = x_t + (α_s − α_t) X + (σ_s − σ_t) E

The extrapolation estimates the middle of the step, so the sampler has second order. A mean flow predicts the mean over a step, and
needs no extrapolation once it is trained. After a short training, the extrapolation corrects its errors on long spans.
Higher orders (PNDM, iPNDM): Liu et al. 2022, arXiv 2202.09778, and Zhang, Chen 2022, arXiv 2204.13902.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from stage2_prior.diffusion.process import Estimate, NoiseLevel
from stage2_prior.diffusion.samplers.protocol import DenoiseFunction, SampleNoise


def adams_bashforth(
    denoise: DenoiseFunction, x: Tensor, levels: Sequence[NoiseLevel[float]], sample_noise: SampleNoise
) -> Iterator[Tensor]:
    previous: Estimate | None = None
    previous_step = 0.0
    for t, s in pairwise(levels):
        estimate, step = denoise(x, t), t.time - s.time
        factor = 0.0 if previous is None else step / (2 * previous_step)
        sample, noise = (new + factor * (new - old) for new, old in zip(estimate, previous or estimate, strict=True))
        x = x + (s.alpha - t.alpha) * sample + (s.sigma - t.sigma) * noise
        previous, previous_step = estimate, step
        yield x
