r"""Schedulers of diffusers as samplers: `prior.scheduler = UniPCMultistepScheduler(…)` replaces the option `sampler`.

A scheduler has its own state, steps and spacing. It gets the network's estimate as its kind of prediction, at its own timesteps.
Timestep n of a schedule of 1,000 levels is t = (n + 1) / 1,000 here, and timestep n of a flow is t = n / 1,000.
"""

import inspect
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from stage2_prior.diffusion.process import Prediction, compute_prediction
from stage2_prior.diffusion.samplers.protocol import DenoiseFunction
from stage2_prior.diffusion.schedule import NUM_LEVELS, NoiseSchedule
from training_harness.errors import UserError

ALPHAS_TOLERANCE = 1e-4  # for ᾱ, which is float32 in diffusers


def sample_with_scheduler(
    scheduler: Any,
    schedule: NoiseSchedule,
    denoise: DenoiseFunction,
    noise: Tensor,
    steps: int,
    generators: Sequence[torch.Generator],
) -> Iterator[Tensor]:
    """Yield the state after each step of a scheduler, in the scheduler's scale.

    Args:
        scheduler: A scheduler of diffusers.
        schedule: Noise schedule of the prior.
        denoise: Estimates sample and noise with the network.
        noise: (B, c, h, w) ~ N(0, I).
        steps: Number of inference steps.
        generators: One generator for each image.

    Raises:
        UserError: The scheduler has another noise schedule than the prior.
    """
    check_scheduler(scheduler, schedule)
    flow = schedule.is_flow
    scheduler.set_timesteps(steps)
    kind = cast("Prediction", "flow" if flow else scheduler.config.prediction_type)
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    options = {"generator": list(generators)} if takes_generator else {}
    x = noise if flow else noise * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        time = float(step) / NUM_LEVELS if flow else (float(step) + 1) / NUM_LEVELS
        level = schedule.level(time)
        model_input = x if flow else scheduler.scale_model_input(x, step)
        prediction = compute_prediction(*denoise(model_input, level), level, kind)
        x = scheduler.step(prediction, step, x, **options).prev_sample
        yield x


def check_scheduler(scheduler: Any, schedule: NoiseSchedule) -> None:
    """Raise UserError when a scheduler of diffusers has another noise schedule than the prior."""
    scheduler_alphas = getattr(scheduler, "alphas_cumprod", None)
    name = type(scheduler).__name__
    is_flow_scheduler = name.startswith("FlowMatch") or getattr(scheduler.config, "use_flow_sigmas", False)
    if schedule.is_flow and not is_flow_scheduler:
        raise UserError(
            f"the scheduler is a {name} and the prior was trained as a flow; expected a flow scheduler, such as "
            "FlowMatchEulerDiscreteScheduler() or UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type='flow_prediction')"
        )
    if not schedule.is_flow and (is_flow_scheduler or scheduler_alphas is None):
        raise UserError(
            f"the scheduler is a {name} and the prior was trained with a schedule of {NUM_LEVELS} levels; expected a scheduler "
            "with levels, such as DDIMScheduler"
        )
    if scheduler_alphas is not None and not schedule.is_flow:
        times = torch.arange(1, NUM_LEVELS + 1, dtype=torch.float64) / NUM_LEVELS
        alphas = schedule.levels(times).alpha.square()
        if len(scheduler_alphas) != NUM_LEVELS or not torch.allclose(
            scheduler_alphas.double(), alphas, rtol=0, atol=ALPHAS_TOLERANCE
        ):
            raise UserError(
                f"the betas of the {name} differ from the betas in the prior's training; expected the same beta_schedule, "
                "beta_start, beta_end and rescale_betas_zero_snr"
            )
