"""Samplers against exact denoisers, whose samples are known, and against diffusers' schedulers, step by step."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from tiny_models import diffusers_scheduler, seeded
from torch import Tensor
from torch.testing import assert_close

from stage2_prior.diffusion.process import Estimate, Level, Prediction, estimate, prediction_of
from stage2_prior.diffusion.samplers.adams_bashforth import adams_bashforth
from stage2_prior.diffusion.samplers.ddim import ddim
from stage2_prior.diffusion.samplers.ddpm import ddpm
from stage2_prior.diffusion.samplers.dpm_solver import dpm_solver
from stage2_prior.diffusion.samplers.euler import euler
from stage2_prior.diffusion.samplers.heun import heun
from stage2_prior.diffusion.samplers.protocol import Sampler
from stage2_prior.diffusion.schedule import LEVELS, NoiseSchedule, Schedule

MEAN, STD = -2.0, 0.5
DETERMINISTIC: dict[str, Sampler] = {
    "euler": euler,
    "ddim": ddim,
    "dpm-solver++": dpm_solver,
    "heun": heun,
    "adams-bashforth": adams_bashforth,
}
STOCHASTIC: dict[str, Sampler] = {
    "ddpm": ddpm,
    "ddim, eta 1": partial(ddim, eta=1.0),
    "sde-dpm-solver++": partial(dpm_solver, stochastic=True),
}
EVERY = DETERMINISTIC | STOCHASTIC


def levels_of(schedule: Schedule, steps: int) -> list[Level[float]]:
    noise = NoiseSchedule(schedule)
    times = noise.sampling_times(steps)
    return [Level(*level) for level in torch.stack(noise.levels(times), 1).tolist()]


def gaussian(x: Tensor, level: Level[float]) -> Estimate:
    """E[data | x] where the data are N(MEAN, STD²)."""
    gain = level.alpha * STD**2 / (level.alpha**2 * STD**2 + level.sigma**2)
    sample = MEAN + gain * (x - level.alpha * MEAN)
    return Estimate(sample, (x - level.alpha * sample) / level.sigma)


def two_points(x: Tensor, level: Level[float]) -> Estimate:
    """E[data | x] where the data are 1 three times in four, and −1."""
    weight = torch.sigmoid(2 * level.alpha * x / level.sigma**2 + math.log(3))
    sample = 2 * weight - 1
    return Estimate(sample, (x - level.alpha * sample) / level.sigma)


def end(sampler: Sampler, denoise: Callable[..., Estimate], x: Tensor, levels: Sequence[Level[float]]) -> Tensor:
    generator = seeded(7)

    def draw() -> Tensor:
        return torch.randn(x.shape, dtype=x.dtype, generator=generator)

    *_, last = sampler(denoise, x, levels, draw)
    return last


def noise(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dtype=torch.float64, generator=seeded(seed))


def start(count: int, levels: Sequence[Level[float]]) -> Tensor:
    """Draws from the exact distribution at the first level, which a schedule may end short of noise alone."""
    return levels[0].alpha * (MEAN + STD * noise(count, 1)) + levels[0].sigma * noise(count)


@pytest.mark.parametrize("schedule", ["flow", "cosine", "linear"])
@pytest.mark.parametrize("name", EVERY)
def test_the_exact_denoiser_of_a_gaussian_gives_its_mean_and_variance(name: str, schedule: Schedule) -> None:
    levels = levels_of(schedule, 500)
    found = end(EVERY[name], gaussian, start(20_000, levels), levels)
    assert abs(found.mean() - MEAN) < 0.021  # six standard errors
    assert abs(found.std() / STD - 1) < 0.03


@pytest.mark.parametrize("schedule", ["flow", "cosine"])
@pytest.mark.parametrize("name", EVERY)
def test_the_exact_denoiser_of_a_correlated_gaussian_gives_its_covariance(name: str, schedule: Schedule) -> None:
    wanted = torch.tensor([[1.0, -0.6], [-0.6, 0.5]], dtype=torch.float64)

    def denoise(x: Tensor, level: Level[float]) -> Estimate:
        spread = level.alpha**2 * wanted + level.sigma**2 * torch.eye(2, dtype=torch.float64)
        sample = MEAN + (x - level.alpha * MEAN) @ (level.alpha * torch.linalg.solve(spread, wanted))
        return Estimate(sample, (x - level.alpha * sample) / level.sigma)

    levels, count = levels_of(schedule, 500), 20_000
    data = MEAN + noise(2 * count, 1).view(-1, 2) @ torch.linalg.cholesky(wanted).T
    found = end(EVERY[name], denoise, levels[0].alpha * data + levels[0].sigma * noise(2 * count).view(-1, 2), levels)
    assert (found.mean(0) - MEAN).abs().max() < 0.05
    assert (found.T.cov() - wanted).abs().max() < 0.06  # of entries up to 1, whose standard error is 0.01


def error_of_width(sampler: Sampler, steps: int, schedule: Schedule) -> float:
    """From t = 0.9 to 0.1, where nothing is infinite; of a flow, whose times are no thousandths, in long and short steps by turns.
    With a linear denoiser a deterministic sampler is affine: two points give by what it widens a distribution, without luck, and
    the exact flow keeps x in the same place of its distribution."""
    places = torch.arange(steps + 1, dtype=torch.float64)
    if schedule == "flow":
        places += 0.3 * (places % 2)
    times = 0.9 - 0.8 * places / steps
    levels = [Level(*level) for level in torch.stack(NoiseSchedule(schedule).levels(times), 1).tolist()]
    low, high = end(sampler, gaussian, torch.tensor([-1.0, 1.0], dtype=torch.float64), levels)
    first, last = (math.hypot(level.alpha * STD, level.sigma) for level in (levels[0], levels[-1]))
    return abs(float(high - low) / 2 - last / first)


@pytest.mark.parametrize("schedule", ["flow", "cosine"])
@pytest.mark.parametrize(
    ("name", "order"), [("euler", 1), ("ddim", 1), ("dpm-solver++", 2), ("heun", 2), ("adams-bashforth", 2)]
)
def test_the_error_falls_at_the_order_of_the_solver(name: str, order: int, schedule: Schedule) -> None:
    errors = [error_of_width(DETERMINISTIC[name], steps, schedule) for steps in (50, 100, 200)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("schedule", ["flow", "cosine"])
@pytest.mark.parametrize("name", EVERY)
def test_a_mixture_of_two_points_is_hit_in_proportion(name: str, schedule: Schedule) -> None:
    levels = levels_of(schedule, 200)
    found = end(EVERY[name], two_points, noise(20_000), levels)
    assert (found.abs() - 1).abs().quantile(0.99) < 0.05
    assert abs((found > 0).double().mean() - 0.75) < 0.02  # the finest step and six standard errors


def network(x: Tensor, time: float) -> Tensor:
    """Some function of x and time, as a network is before it is trained."""
    return torch.sin(3 * x + time) + 0.3 * x


def ours(sampler: Sampler, levels: Sequence[Level[float]], kind: Prediction, x: Tensor) -> list[Tensor]:
    def denoise(noisy: Tensor, level: Level[float]) -> Estimate:
        return estimate(noisy, network(noisy, level.time), level, kind)

    generator = seeded(3)
    return list(sampler(denoise, x, levels, lambda: torch.randn(x.shape, generator=generator)))


def steps_of(scheduler: Any, times: Sequence[float], x: Tensor, **options: Any) -> list[Tensor]:
    found, generator = [], seeded(3)
    for time, step in zip(times, scheduler.timesteps, strict=False):
        x = scheduler.step(network(x, time), step, x, generator=generator, **options).prev_sample
        found.append(x)
    return found


KINDS: list[Prediction] = ["epsilon", "sample", "v_prediction"]
SETTINGS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_steps_of_ddim_are_those_of_diffusers(kind: Prediction, eta: float) -> None:
    fields = SETTINGS | {"clip_sample": False, "timestep_spacing": "trailing", "prediction_type": kind}
    scheduler = diffusers_scheduler("DDIMScheduler", **fields)
    scheduler.set_timesteps(10)
    levels, x = levels_of("scaled-linear", 10), torch.randn(2, 3, generator=seeded(0))
    found = ours(partial(ddim, eta=eta), levels, kind, x)
    for mine, his in zip(found, steps_of(scheduler, [level.time for level in levels], x, eta=eta), strict=True):
        assert_close(mine, his, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_ddpm_are_those_of_diffusers(kind: Prediction) -> None:
    fields = SETTINGS | {"clip_sample": False, "timestep_spacing": "trailing", "prediction_type": kind}
    scheduler = diffusers_scheduler("DDPMScheduler", **fields)
    scheduler.set_timesteps(20)
    levels, x = levels_of("scaled-linear", 20), torch.randn(2, 3, generator=seeded(0))
    mine, his = ours(ddpm, levels, kind, x), steps_of(scheduler, [level.time for level in levels], x)
    assert len(mine) == len(his) == 20
    for a, b in zip(mine, his, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_steps_of_dpm_solver_are_those_of_diffusers(algorithm: str, kind: Prediction) -> None:
    fields = SETTINGS | {"timestep_spacing": "trailing", "prediction_type": kind, "algorithm_type": algorithm}
    scheduler = diffusers_scheduler("DPMSolverMultistepScheduler", **fields, final_sigmas_type="zero")
    scheduler.set_timesteps(12)
    levels, x = levels_of("scaled-linear", 12), torch.randn(2, 3, generator=seeded(0))
    assert [round(level.time * LEVELS) - 1 for level in levels[:-1]] == scheduler.timesteps.tolist()
    found = ours(partial(dpm_solver, stochastic=algorithm.startswith("sde")), levels, kind, x)
    for mine, his in zip(found, steps_of(scheduler, [level.time for level in levels], x), strict=True):
        assert_close(mine, his, rtol=1e-3, atol=1e-3)


def test_steps_of_euler_are_those_of_diffusers_for_a_flow() -> None:
    scheduler = diffusers_scheduler("FlowMatchEulerDiscreteScheduler")
    levels, x = levels_of("flow", 8), torch.randn(2, 3, generator=seeded(0))
    scheduler.set_timesteps(sigmas=[level.sigma for level in levels[:-1]])
    found = ours(euler, levels, "flow", x)
    for mine, his in zip(found, steps_of(scheduler, [level.time for level in levels], x), strict=True):
        assert_close(mine, his, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_euler_are_those_of_diffusers_in_its_own_scale(kind: Prediction) -> None:
    fields = SETTINGS | {"timestep_spacing": "trailing", "prediction_type": kind, "final_sigmas_type": "zero"}
    scheduler = diffusers_scheduler("EulerDiscreteScheduler", **fields)
    scheduler.set_timesteps(10)
    levels, x = levels_of("scaled-linear", 10), torch.randn(2, 3, dtype=torch.float64, generator=seeded(0))
    found, scaled = ours(euler, levels, kind, x), x / levels[0].alpha
    for t, s, step, mine in zip(levels, levels[1:], scheduler.timesteps, found, strict=False):
        prediction = network(scaled * t.alpha, t.time)
        if kind == "sample":  # what diffusers calls a sample there is in its own scale, as the data are in ours
            prediction = prediction_of(*estimate(scaled * t.alpha, prediction, t, kind), t, kind)
        scaled = scheduler.step(prediction, step, scaled).prev_sample
        assert_close(mine, scaled * s.alpha, rtol=1e-3, atol=1e-3)
