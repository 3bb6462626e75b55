"""Samplers with exact denoisers, and compared step by step with the schedulers of diffusers."""

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

from stage2_prior.diffusion.process import Estimate, NoiseLevel, Prediction, compute_estimate, compute_prediction
from stage2_prior.diffusion.samplers.adams_bashforth import adams_bashforth
from stage2_prior.diffusion.samplers.ddim import ddim
from stage2_prior.diffusion.samplers.ddpm import ddpm
from stage2_prior.diffusion.samplers.dpm_solver import dpm_solver
from stage2_prior.diffusion.samplers.euler import euler
from stage2_prior.diffusion.samplers.heun import heun
from stage2_prior.diffusion.samplers.protocol import Sampler
from stage2_prior.diffusion.schedule import NUM_LEVELS, NoiseSchedule, Schedule

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
SAMPLERS = DETERMINISTIC | STOCHASTIC


def make_levels(schedule: Schedule, steps: int) -> list[NoiseLevel[float]]:
    noise = NoiseSchedule(schedule)
    times = noise.sampling_times(steps)
    return [NoiseLevel(*level) for level in torch.stack(noise.levels(times), 1).tolist()]


def denoise_gaussian(x: Tensor, level: NoiseLevel[float]) -> Estimate:
    """Return the exact estimate E[data | x] for data ~ N(MEAN, STD²)."""
    gain = level.alpha * STD**2 / (level.alpha**2 * STD**2 + level.sigma**2)
    sample = MEAN + gain * (x - level.alpha * MEAN)
    return Estimate(sample, (x - level.alpha * sample) / level.sigma)


def denoise_two_points(x: Tensor, level: NoiseLevel[float]) -> Estimate:
    """Return the exact estimate E[data | x] for data that are 1 with probability 3 / 4, and else −1."""
    weight = torch.sigmoid(2 * level.alpha * x / level.sigma**2 + math.log(3))
    sample = 2 * weight - 1
    return Estimate(sample, (x - level.alpha * sample) / level.sigma)


def run_sampler(
    sampler: Sampler, denoise: Callable[..., Estimate], x: Tensor, levels: Sequence[NoiseLevel[float]]
) -> Tensor:
    generator = seeded(7)

    def sample_noise() -> Tensor:
        return torch.randn(x.shape, dtype=x.dtype, generator=generator)

    *_, last = sampler(denoise, x, levels, sample_noise)
    return last


def make_noise(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, dtype=torch.float64, generator=seeded(seed))


def make_start(count: int, levels: Sequence[NoiseLevel[float]]) -> Tensor:
    """Sample from the exact distribution at the first level, which may not be pure noise."""
    return levels[0].alpha * (MEAN + STD * make_noise(count, 1)) + levels[0].sigma * make_noise(count)


@pytest.mark.parametrize("schedule", ["flow", "cosine", "linear"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_exact_denoiser_of_a_gaussian_gives_its_mean_and_variance(name: str, schedule: Schedule) -> None:
    levels = make_levels(schedule, 500)
    actual = run_sampler(SAMPLERS[name], denoise_gaussian, make_start(20_000, levels), levels)
    assert abs(actual.mean() - MEAN) < 0.021  # six standard errors
    assert abs(actual.std() / STD - 1) < 0.03


@pytest.mark.parametrize("schedule", ["flow", "cosine"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_exact_denoiser_of_a_correlated_gaussian_gives_its_covariance(name: str, schedule: Schedule) -> None:
    covariance = torch.tensor([[1.0, -0.6], [-0.6, 0.5]], dtype=torch.float64)

    def denoise(x: Tensor, level: NoiseLevel[float]) -> Estimate:
        spread = level.alpha**2 * covariance + level.sigma**2 * torch.eye(2, dtype=torch.float64)
        sample = MEAN + (x - level.alpha * MEAN) @ (level.alpha * torch.linalg.solve(spread, covariance))
        return Estimate(sample, (x - level.alpha * sample) / level.sigma)

    levels, count = make_levels(schedule, 500), 20_000
    data = MEAN + make_noise(2 * count, 1).view(-1, 2) @ torch.linalg.cholesky(covariance).T
    actual = run_sampler(
        SAMPLERS[name], denoise, levels[0].alpha * data + levels[0].sigma * make_noise(2 * count).view(-1, 2), levels
    )
    assert (actual.mean(0) - MEAN).abs().max() < 0.05
    assert (actual.T.cov() - covariance).abs().max() < 0.06  # the standard error is 0.01 for entries up to 1


def width_error(sampler: Sampler, steps: int, schedule: Schedule) -> float:
    """Compute the error of the width of a Gaussian after sampling from t = 0.9 to 0.1, where all values are finite.

    A flow takes long and short steps in turn, since its times are not limited to thousandths. A deterministic sampler with a linear
    denoiser is affine, so two points give the exact width.
    """
    positions = torch.arange(steps + 1, dtype=torch.float64)
    if schedule == "flow":
        positions += 0.3 * (positions % 2)
    times = 0.9 - 0.8 * positions / steps
    levels = [NoiseLevel(*level) for level in torch.stack(NoiseSchedule(schedule).levels(times), 1).tolist()]
    low, high = run_sampler(sampler, denoise_gaussian, torch.tensor([-1.0, 1.0], dtype=torch.float64), levels)
    first, last = (math.hypot(level.alpha * STD, level.sigma) for level in (levels[0], levels[-1]))
    return abs(float(high - low) / 2 - last / first)


@pytest.mark.parametrize("schedule", ["flow", "cosine"])
@pytest.mark.parametrize(
    ("name", "order"), [("euler", 1), ("ddim", 1), ("dpm-solver++", 2), ("heun", 2), ("adams-bashforth", 2)]
)
def test_the_error_falls_with_the_order_of_the_solver(name: str, order: int, schedule: Schedule) -> None:
    errors = [width_error(DETERMINISTIC[name], steps, schedule) for steps in (50, 100, 200)]
    for coarse, fine in pairwise(errors):
        assert math.log2(coarse / fine) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("schedule", ["flow", "cosine"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_mixture_of_two_points_is_sampled_in_proportion(name: str, schedule: Schedule) -> None:
    levels = make_levels(schedule, 200)
    actual = run_sampler(SAMPLERS[name], denoise_two_points, make_noise(20_000), levels)
    assert (actual.abs() - 1).abs().quantile(0.99) < 0.05
    assert abs((actual > 0).double().mean() - 0.75) < 0.02  # six standard errors and the error of the last step


def network(x: Tensor, time: float) -> Tensor:
    """Return an arbitrary function of x and time, as an untrained network does."""
    return torch.sin(3 * x + time) + 0.3 * x


def sampler_steps(sampler: Sampler, levels: Sequence[NoiseLevel[float]], kind: Prediction, x: Tensor) -> list[Tensor]:
    def denoise(noisy: Tensor, level: NoiseLevel[float]) -> Estimate:
        return compute_estimate(noisy, network(noisy, level.time), level, kind)

    generator = seeded(3)
    return list(sampler(denoise, x, levels, lambda: torch.randn(x.shape, generator=generator)))


def scheduler_steps(scheduler: Any, times: Sequence[float], x: Tensor, **options: Any) -> list[Tensor]:
    actual, generator = [], seeded(3)
    for time, step in zip(times, scheduler.timesteps, strict=False):
        x = scheduler.step(network(x, time), step, x, generator=generator, **options).prev_sample
        actual.append(x)
    return actual


KINDS: list[Prediction] = ["epsilon", "sample", "v_prediction"]
SETTINGS: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_steps_of_ddim_equal_the_steps_of_diffusers(kind: Prediction, eta: float) -> None:
    fields = SETTINGS | {"clip_sample": False, "timestep_spacing": "trailing", "prediction_type": kind}
    scheduler = diffusers_scheduler("DDIMScheduler", **fields)
    scheduler.set_timesteps(10)
    levels, x = make_levels("scaled-linear", 10), torch.randn(2, 3, generator=seeded(0))
    actual = sampler_steps(partial(ddim, eta=eta), levels, kind, x)
    for ours, theirs in zip(
        actual, scheduler_steps(scheduler, [level.time for level in levels], x, eta=eta), strict=True
    ):
        assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_ddpm_equal_the_steps_of_diffusers(kind: Prediction) -> None:
    fields = SETTINGS | {"clip_sample": False, "timestep_spacing": "trailing", "prediction_type": kind}
    scheduler = diffusers_scheduler("DDPMScheduler", **fields)
    scheduler.set_timesteps(20)
    levels, x = make_levels("scaled-linear", 20), torch.randn(2, 3, generator=seeded(0))
    ours, theirs = sampler_steps(ddpm, levels, kind, x), scheduler_steps(scheduler, [level.time for level in levels], x)
    assert len(ours) == len(theirs) == 20
    for a, b in zip(ours, theirs, strict=True):
        assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("algorithm", ["dpmsolver++", "sde-dpmsolver++"])
def test_steps_of_dpm_solver_equal_the_steps_of_diffusers(algorithm: str, kind: Prediction) -> None:
    fields = SETTINGS | {"timestep_spacing": "trailing", "prediction_type": kind, "algorithm_type": algorithm}
    scheduler = diffusers_scheduler("DPMSolverMultistepScheduler", **fields, final_sigmas_type="zero")
    scheduler.set_timesteps(12)
    levels, x = make_levels("scaled-linear", 12), torch.randn(2, 3, generator=seeded(0))
    assert [round(level.time * NUM_LEVELS) - 1 for level in levels[:-1]] == scheduler.timesteps.tolist()
    actual = sampler_steps(partial(dpm_solver, stochastic=algorithm.startswith("sde")), levels, kind, x)
    for ours, theirs in zip(actual, scheduler_steps(scheduler, [level.time for level in levels], x), strict=True):
        assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_steps_of_euler_equal_the_steps_of_diffusers_for_a_flow() -> None:
    scheduler = diffusers_scheduler("FlowMatchEulerDiscreteScheduler")
    levels, x = make_levels("flow", 8), torch.randn(2, 3, generator=seeded(0))
    scheduler.set_timesteps(sigmas=[level.sigma for level in levels[:-1]])
    actual = sampler_steps(euler, levels, "flow", x)
    for ours, theirs in zip(actual, scheduler_steps(scheduler, [level.time for level in levels], x), strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_euler_equal_the_steps_of_diffusers_in_the_scale_of_diffusers(kind: Prediction) -> None:
    fields = SETTINGS | {"timestep_spacing": "trailing", "prediction_type": kind, "final_sigmas_type": "zero"}
    scheduler = diffusers_scheduler("EulerDiscreteScheduler", **fields)
    scheduler.set_timesteps(10)
    levels, x = make_levels("scaled-linear", 10), torch.randn(2, 3, dtype=torch.float64, generator=seeded(0))
    actual, scaled = sampler_steps(euler, levels, kind, x), x / levels[0].alpha
    for t, s, step, ours in zip(levels, levels[1:], scheduler.timesteps, actual, strict=False):
        prediction = network(scaled * t.alpha, t.time)
        if kind == "sample":  # diffusers' sample is in the scale of diffusers, ours in the scale of the data
            prediction = compute_prediction(*compute_estimate(scaled * t.alpha, prediction, t, kind), t, kind)
        scaled = scheduler.step(prediction, step, scaled).prev_sample
        assert_close(ours, scaled * s.alpha, rtol=1e-3, atol=1e-3)
