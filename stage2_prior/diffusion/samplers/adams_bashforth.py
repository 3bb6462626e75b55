r"""Adams-Bashforth: Euler's step, with a straight line through this estimate and the last one; one evaluation a step.

    X = x̂ + (τ / 2 τ') (x̂ − x̂')                          τ = t − s, τ' the step before, x̂' its estimate; X = x̂ in the first
    E likewise of ε̂                   x_s = x_t + (α_s − α_t) X + (σ_s − σ_t) E

Of second order where the estimates are those at t: the middle of the step is what the line is followed to. A mean flow tells the
mean over the step, where a line would have nothing to add; it adds what few steps of training have left out of long spans.
Liu et al. 2022, arXiv 2202.09778, and Zhang, Chen 2022, arXiv 2204.13902, sample by it at higher orders (PNDM, iPNDM).
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from stage2_prior.diffusion.process import Estimate, NoiseLevel
from stage2_prior.diffusion.samplers.protocol import DenoiseFunction, SampleNoise


def adams_bashforth(
    denoise: DenoiseFunction, x: Tensor, levels: Sequence[NoiseLevel[float]], sample_noise: SampleNoise
) -> Iterator[Tensor]:
    last: Estimate | None = None
    step_before = 0.0
    for t, s in pairwise(levels):
        found, step = denoise(x, t), t.time - s.time
        ahead = 0.0 if last is None else step / (2 * step_before)
        sample, noise = (now + ahead * (now - then) for now, then in zip(found, last or found, strict=True))
        x = x + (s.alpha - t.alpha) * sample + (s.sigma - t.sigma) * noise
        last, step_before = found, step
        yield x
