r"""Sampling options of a diffusion prior, and guidance rescale.

    û = null + s (conditional − null)                              when t is in the guidance interval, else conditional
    û ← φ û std(conditional) / std(û) + (1 − φ) û                  guidance rescale, std over an image

Guidance: Ho, Salimans 2022, arXiv 2207.12598, on all channels. Guidance interval: Kynkäänniemi et al. 2024, arXiv 2404.07724.
Rescale: Lin et al. 2023, arXiv 2305.08891.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from stage2_prior.diffusion.samplers.adams_bashforth import adams_bashforth
from stage2_prior.diffusion.samplers.ddim import ddim
from stage2_prior.diffusion.samplers.ddpm import ddpm
from stage2_prior.diffusion.samplers.dpm_solver import dpm_solver
from stage2_prior.diffusion.samplers.euler import euler
from stage2_prior.diffusion.samplers.heun import heun
from stage2_prior.diffusion.samplers.protocol import Sampler
from stage2_prior.diffusion.schedule import Spacing
from training_harness.errors import UserError

SamplerName = Literal["euler", "heun", "adams-bashforth", "dpm-solver++", "sde-dpm-solver++", "ddim", "ddpm"]


@dataclass(frozen=True, kw_only=True)
class DiffusionOptions:
    num_inference_steps: int = 25
    """Steps from noise to latents. Each takes one evaluation of the network; `heun` takes two, except in the last step."""
    sampler: SamplerName = "euler"
    """Sampler that computes each step."""
    guidance_scale: float = 1.0
    """1 is the conditional model; above 1, samples are more typical of their class and less diverse."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times between which guidance is used; 0 is data, 1 is noise. At other times it costs nothing."""
    guidance_rescale: float = 0.0
    """Share, in [0, 1], by which a prediction with guidance is rescaled to the standard deviation without guidance."""
    eta: float = 0.0
    """Randomness of `ddim`, in [0, 1]: 0 is deterministic, 1 is as random as `ddpm`."""
    timestep_spacing: Spacing = "trailing"
    """Spacing of the steps in schedules of 1,000 levels."""

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise UserError(f"num_inference_steps is {self.num_inference_steps}; expected at least 1")
        if not 0 <= self.guidance_scale < math.inf:  # NaN fails too
            raise UserError(f"guidance_scale is {self.guidance_scale}; expected 0 or more. Pass 1 for no guidance.")
        begin, end = self.guidance_interval
        if not 0 <= begin <= end <= 1:
            raise UserError(
                f"guidance_interval is {begin}, {end}; expected two rising times in [0, 1], where 0 is data and 1 is noise"
            )
        for name in ("guidance_rescale", "eta"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected a number in [0, 1]")
        if self.eta > 0 and self.sampler != "ddim":
            raise UserError(
                f"eta is {self.eta} and the sampler is {self.sampler}; expected the sampler ddim. Pass eta 0 for other samplers."
            )

    def uses_guidance_at(self, time: float) -> bool:
        """Return whether guidance is used at a time in [0, 1]."""
        begin, end = self.guidance_interval
        return self.guidance_scale != 1 and begin <= time <= end

    def make_sampler(self) -> Sampler:
        """Return the function of the sampler, with its options."""
        samplers: dict[SamplerName, Sampler] = {
            "euler": euler,
            "heun": heun,
            "adams-bashforth": adams_bashforth,
            "dpm-solver++": dpm_solver,
            "sde-dpm-solver++": partial(dpm_solver, stochastic=True),
            "ddim": partial(ddim, eta=self.eta),
            "ddpm": ddpm,
        }
        return samplers[self.sampler]


def rescale_guidance(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Rescale predictions (B, c, h, w) to the standard deviation of the conditional ones, by `share` in [0, 1]."""
    if share == 0:
        return guided
    conditional_std, guided_std = (x.flatten(1).std(1).view(-1, 1, 1, 1) for x in (conditional, guided))
    return guided * (1 + share * (conditional_std / guided_std.clamp(min=1e-12) - 1))
