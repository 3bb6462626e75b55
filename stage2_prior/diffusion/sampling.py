r"""How a diffusion prior samples: options, and the estimates with guidance that a sampler asks for.

    û = null + s (conditional − null)                              while t is within the interval, conditional elsewhere
    û ← φ û std(conditional) / std(û) + (1 − φ) û                  guidance rescale, std over an image

Guidance: Ho, Salimans 2022, arXiv 2207.12598, on all channels; within an interval: Kynkäänniemi et al. 2024, arXiv 2404.07724;
rescale: Lin et al. 2023, arXiv 2305.08891.
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
    """Steps from noise to latents, each an evaluation of the network; of `heun` two but for the last."""
    sampler: SamplerName = "euler"
    """Sampler that computes each step."""
    guidance_scale: float = 1.0
    """1 is the conditional model; above it, samples are more typical of their class and less diverse."""
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    """Times, of which 0 is data and 1 is noise, between which guidance is used; elsewhere it costs nothing."""
    guidance_rescale: float = 0.0
    """How far a guided prediction is brought back to the spread of the one without, in [0, 1]."""
    eta: float = 0.0
    """Of `ddim`: 0 is deterministic, 1 as random as `ddpm`."""
    timestep_spacing: Spacing = "trailing"
    """Where the steps are, in schedules of 1,000 levels."""

    def __post_init__(self) -> None:
        if self.num_inference_steps < 1:
            raise UserError(f"num_inference_steps is {self.num_inference_steps}; expected at least 1")
        if not 0 <= self.guidance_scale < math.inf:  # not a number fails too
            raise UserError(f"guidance_scale is {self.guidance_scale}; expected 0 or more; 1 is without guidance")
        begin, end = self.guidance_interval
        if not 0 <= begin <= end <= 1:
            raise UserError(
                f"guidance_interval is {begin}, {end}; expected two rising times in [0, 1], of which 0 is data and 1 is noise"
            )
        for name in ("guidance_rescale", "eta"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}; expected a number in [0, 1]")
        if self.eta > 0 and self.sampler != "ddim":
            raise UserError(
                f"eta is {self.eta} and the sampler {self.sampler}; expected eta with ddim alone; give eta 0"
            )

    def guides_at(self, time: float) -> bool:
        begin, end = self.guidance_interval
        return self.guidance_scale != 1 and begin <= time <= end

    def chosen_sampler(self) -> Sampler:
        every: dict[SamplerName, Sampler] = {
            "euler": euler,
            "heun": heun,
            "adams-bashforth": adams_bashforth,
            "dpm-solver++": dpm_solver,
            "sde-dpm-solver++": partial(dpm_solver, stochastic=True),
            "ddim": partial(ddim, eta=self.eta),
            "ddpm": ddpm,
        }
        return every[self.sampler]


def rescaled(guided: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Predictions (B, c, h, w), brought back to the conditional one's standard deviation by `share` in [0, 1]."""
    if share == 0:
        return guided
    wanted, found = (x.flatten(1).std(1).view(-1, 1, 1, 1) for x in (conditional, guided))
    return guided * (1 + share * (wanted / found.clamp(min=1e-12) - 1))
