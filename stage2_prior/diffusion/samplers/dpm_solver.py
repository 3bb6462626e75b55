r"""DPM-Solver++ (2M): linear extrapolation in λ from the previous estimate; second order, one evaluation per step.

    D = x̂ + (h / 2 h') (x̂ − x̂')                               h', x̂': the previous step and its estimate; D = x̂ at the ends
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
    previous: Tensor | None = None
    previous_step = math.inf
    for t, s in pairwise(levels):
        step, sample = _log_snr(s) - _log_snr(t), denoise(x, t).sample
        direction = sample
        if previous is not None and step < math.inf:
            direction = sample + (step / (2 * previous_step)) * (sample - previous)
        decay = math.exp(-step)  # 0 from pure noise, and to data without noise
        ratio = s.sigma / t.sigma
        if stochastic:
            x = (ratio * decay) * x + (s.alpha * (1 - decay**2)) * direction
            if s.sigma > 0:
                x = x + s.sigma * math.sqrt(1 - decay**2) * sample_noise()
        else:
            x = ratio * x + (s.alpha * (1 - decay)) * direction
        previous, previous_step = sample, step
        yield x


def _log_snr(level: NoiseLevel[float]) -> float:
    """Return λ: −∞ for pure noise, ∞ for data without noise."""
    if level.sigma == 0:
        return math.inf
    return math.log(level.alpha / level.sigma) if level.alpha > 0 else -math.inf
