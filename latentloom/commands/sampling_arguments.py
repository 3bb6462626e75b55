"""The options of sampling on the command line: those of every kind of prior, each kind refusing what it does not take."""

from dataclasses import dataclass, fields
from typing import Any

from stage2_prior.autoregressive.sampling import GuidanceSchedule, Weights
from stage2_prior.diffusion.sampling import SamplerName
from stage2_prior.diffusion.schedule import Spacing


@dataclass(frozen=True, kw_only=True)
class SamplingArguments:
    guidance_scale: float | None = None
    """1 is without guidance; by default what the pipeline was saved with, as for all options of sampling."""
    guidance_schedule: GuidanceSchedule | None = None
    """Of an autoregressive prior, as the next five: how the scale goes from 1 to --guidance-scale while an image is drawn."""
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    weights: Weights | None = None
    """int8 draws faster on a CPU, one or a few images at a time, from weights of eight bits."""
    num_inference_steps: int | None = None
    """Of a diffusion prior, as the next five: steps from noise to latents."""
    sampler: SamplerName | None = None
    guidance_interval: tuple[float, float] | None = None
    """Times, of which 0 is data and 1 is noise, between which guidance is used."""
    guidance_rescale: float | None = None
    """How far a guided prediction is brought back to the spread of the one without, in [0, 1]."""
    eta: float | None = None
    """Of the sampler ddim: 0 is deterministic, 1 as random as ddpm."""
    timestep_spacing: Spacing | None = None

    def sampling_options(self) -> dict[str, Any]:
        """As a pipeline takes them; those that are none are not given."""
        return {field.name: getattr(self, field.name) for field in fields(SamplingArguments)}
