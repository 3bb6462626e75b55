r"""diffusers' schedulers as samplers: `prior.scheduler = UniPCMultistepScheduler(…)` takes the place of `sampler`.

A scheduler keeps its own state, steps and spacing. It is shown the network's estimate in its own kind of prediction, at its own
timesteps: n of a schedule of 1,000 levels is t = (n + 1) / 1,000 here, n of a flow is t = n / 1,000.
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

ALPHAS_TOLERANCE = 1e-4  # between ᾱ of the two, which are float32 there


def sample_with_scheduler(
    scheduler: Any,
    schedule: NoiseSchedule,
    denoise: DenoiseFunction,
    noise: Tensor,
    steps: int,
    generators: Sequence[torch.Generator],
) -> Iterator[Tensor]:
    """States after each of `steps` steps of the scheduler, from noise (B, c, h, w) ~ N(0, I), in the scheduler's scale.

    Raises UserError for a scheduler of another noise schedule than the prior was trained with.
    """
    check_scheduler(scheduler, schedule)
    flow = schedule.is_flow
    scheduler.set_timesteps(steps)
    kind = cast("Prediction", "flow" if flow else scheduler.config.prediction_type)
    draws = {"generator": list(generators)} if "generator" in inspect.signature(scheduler.step).parameters else {}
    x = noise if flow else noise * scheduler.init_noise_sigma
    for step in scheduler.timesteps:
        time = float(step) / NUM_LEVELS if flow else (float(step) + 1) / NUM_LEVELS
        level = schedule.level(time)
        shown = x if flow else scheduler.scale_model_input(x, step)
        x = scheduler.step(compute_prediction(*denoise(shown, level), level, kind), step, x, **draws).prev_sample
        yield x


def check_scheduler(scheduler: Any, schedule: NoiseSchedule) -> None:
    theirs = getattr(scheduler, "alphas_cumprod", None)
    name = type(scheduler).__name__
    of_flows = name.startswith("FlowMatch") or getattr(scheduler.config, "use_flow_sigmas", False)
    if schedule.is_flow and not of_flows:
        raise UserError(
            f"the scheduler is a {name} and the prior was trained as a flow; expected a scheduler of flows, such as "
            "FlowMatchEulerDiscreteScheduler() or UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type='flow_prediction')"
        )
    if not schedule.is_flow and (of_flows or theirs is None):
        raise UserError(
            f"the scheduler is a {name} and the prior was trained with a schedule of {NUM_LEVELS} levels; expected a scheduler of "
            "such, as DDIMScheduler is"
        )
    if theirs is not None and not schedule.is_flow:
        times = torch.arange(1, NUM_LEVELS + 1, dtype=torch.float64) / NUM_LEVELS
        own = schedule.levels(times).alpha.square()
        if len(theirs) != NUM_LEVELS or not torch.allclose(theirs.double(), own, rtol=0, atol=ALPHAS_TOLERANCE):
            raise UserError(
                f"the betas of the {name} are not those that the prior was trained with; expected its beta_schedule, beta_start, "
                "beta_end and rescale_betas_zero_snr"
            )
