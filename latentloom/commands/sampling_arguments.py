"""The sampling options of all kinds of priors on the command line. Each kind refuses the options of the others."""

from dataclasses import dataclass, fields
from typing import Any

from stage2_prior.autoregressive.sampling import GuidanceSchedule, Weights
from stage2_prior.diffusion.sampling import SamplerName
from stage2_prior.diffusion.schedule import Spacing


@dataclass(frozen=True, kw_only=True)
class SamplingArguments:
    guidance_scale: float | None = None
    """Scale of classifier-free guidance: 1 is no guidance; more makes samples more typical and less diverse.
    (default: the pipeline's)"""
    guidance_schedule: GuidanceSchedule | None = None
    """How the guidance scale grows from 1 over the codes of an image; `constant` does not grow. (default: the pipeline's)"""
    temperature: float | None = None
    """Temperature of the distribution over codes: less than 1 makes samples more typical. (default: the pipeline's)"""
    top_k: int | None = None
    """Sample from the k most probable codes; 0 is all codes. (default: the pipeline's)"""
    top_p: float | None = None
    """Sample from the most probable codes that together reach this probability. (default: the pipeline's)"""
    min_p: float | None = None
    """Sample from codes with at least this share of the highest probability. (default: the pipeline's)"""
    weights: Weights | None = None
    """`int8` generates one or a few images faster on a CPU, with 8-bit weights. (default: the pipeline's)"""
    num_inference_steps: int | None = None
    """Steps from noise to latents. (default: the pipeline's)"""
    sampler: SamplerName | None = None
    """Sampler that computes each step. (default: the pipeline's)"""
    guidance_interval: tuple[float, float] | None = None
    """Times between which guidance is used; 0 is data and 1 is noise. (default: the pipeline's)"""
    guidance_rescale: float | None = None
    """How far a guided prediction is rescaled to the standard deviation of the conditional one, in [0, 1].
    (default: the pipeline's)"""
    eta: float | None = None
    """Noise of the sampler `ddim`: 0 is deterministic, 1 is as random as `ddpm`. (default: the pipeline's)"""
    timestep_spacing: Spacing | None = None
    """Where the steps lie in a schedule of 1,000 noise levels. (default: the pipeline's)"""

    def sampling_options(self) -> dict[str, Any]:
        """Return the options as a pipeline takes them. None means that an option was not given."""
        return {field.name: getattr(self, field.name) for field in fields(SamplingArguments)}


SAMPLING_GROUPS = {
    "sampling": ("guidance_scale",),
    "sampling of an autoregressive prior": (
        *("guidance_schedule", "temperature", "top_k", "top_p", "min_p", "weights"),
    ),
    "sampling of a diffusion prior": (
        *("num_inference_steps", "sampler", "guidance_interval", "guidance_rescale", "eta", "timestep_spacing"),
    ),
}
