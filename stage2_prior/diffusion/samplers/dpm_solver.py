r"""DPM-Solver++ (2M): a straight line through this estimate and the last one, in λ; one evaluation a step, of second order.

    D = x̂ + (h / 2 h') (x̂ − x̂')                               h' the step before, x̂' its estimate; D = x̂ at the ends
    x_s = (σ_s / σ_t) x_t + α_s (1 − e^(−h)) D                                          ODE
    x_s = (σ_s / σ_t) e^(−h) x_t + α_s (1 − e^(−2h)) D + σ_s √(1 − e^(−2h)) z           SDE

Lu et al. 2022, arXiv 2211.01095, algorithm 2, and its section on SDEs.
"""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from stage2_prior.diffusion.process import NoiseLevel
from stage2_prior.diffusion.samplers.protocol import DenoiseFunction, SampleNoise


def dpm_solver(
    denoise: DenoiseFunction,
    x: Tensor,
    levels: Sequence[NoiseLevel[float]],
    sample_noise: SampleNoise,
    stochastic: bool = False,
) -> Iterator[Tensor]:
    last: Tensor | None = None
    step_before = math.inf
    for t, s in pairwise(levels):
        step, sample = _log_snr(s) - _log_snr(t), denoise(x, t).sample
        direction = sample
        if last is not None and step < math.inf:
            direction = sample + (step / (2 * step_before)) * (sample - last)
        left = math.exp(-step)  # 0 from noise alone, and to data alone
        kept = s.sigma / t.sigma
        if stochastic:
            x = (kept * left) * x + (s.alpha * (1 - left**2)) * direction
            if s.sigma > 0:
                x = x + s.sigma * math.sqrt(1 - left**2) * sample_noise()
        else:
            x = kept * x + (s.alpha * (1 - left)) * direction
        last, step_before = sample, step
        yield x


def _log_snr(level: NoiseLevel[float]) -> float:
    """λ, −∞ of noise alone and ∞ of data alone."""
    if level.sigma == 0:
        return math.inf
    return math.log(level.alpha / level.sigma) if level.alpha > 0 else -math.inf
