"""Predictions, conversions and schedules, compared with their definitions and with diffusers."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from tiny_models import diffusers_scheduler, seeded
from torch.testing import assert_close

from stage2_prior.diffusion.process import (
    NoiseLevel,
    Prediction,
    add_noise,
    compute_estimate,
    compute_prediction,
    sample_error_factor,
)
from stage2_prior.diffusion.schedule import NUM_LEVELS, NoiseSchedule, Schedule, Spacing

PREDICTIONS, SCHEDULES = get_args(Prediction), get_args(Schedule)
LEVEL_SCHEDULES = [name for name in SCHEDULES if name != "flow"]
DIFFUSERS_NAMES = {"linear": "linear", "scaled-linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
BETAS = {"linear": (1e-4, 0.02), "scaled-linear": (0.00085, 0.012), "cosine": (1e-4, 0.02)}


def make_ddim_scheduler(name: str, **fields: Any) -> Any:
    first, last = BETAS[name]
    return diffusers_scheduler(
        "DDIMScheduler", beta_start=first, beta_end=last, beta_schedule=DIFFUSERS_NAMES[name], **fields
    )


def make_batch(
    schedule: Schedule, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, NoiseLevel[torch.Tensor]]:
    sample, noise = (torch.randn(5, 2, 3, 3, dtype=dtype, generator=seeded(i)) for i in range(2))
    times = torch.tensor([0.002, 0.25, 0.5, 0.75, 0.98], dtype=dtype).view(-1, 1, 1, 1)
    return sample, noise, NoiseSchedule(schedule).levels(times)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_sample_and_noise_are_recovered_from_the_exact_prediction(kind: Prediction, schedule: Schedule) -> None:
    sample, noise, level = make_batch(schedule)
    actual = compute_estimate(
        add_noise(sample, noise, level), compute_prediction(sample, noise, level, kind), level, kind
    )
    assert_close(actual.sample, sample)
    assert_close(actual.noise, noise)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("first", PREDICTIONS)
@pytest.mark.parametrize("second", PREDICTIONS)
def test_any_prediction_converts_to_any_other_and_back(
    first: Prediction, second: Prediction, schedule: Schedule
) -> None:
    sample, noise, level = make_batch(schedule)
    noisy, prediction = (
        add_noise(sample, noise, level),
        torch.randn(sample.shape, dtype=torch.float64, generator=seeded(2)),
    )
    converted = compute_prediction(*compute_estimate(noisy, prediction, level, first), level, second)
    assert_close(compute_prediction(*compute_estimate(noisy, converted, level, second), level, first), prediction)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_error_of_the_sample_is_the_error_of_the_prediction_times_its_factor(kind: Prediction) -> None:
    sample, noise, level = make_batch("cosine")
    noisy, exact = add_noise(sample, noise, level), compute_prediction(sample, noise, level, kind)
    error = compute_estimate(noisy, exact + 1, level, kind).sample - sample
    assert_close(error.abs(), sample_error_factor(level, kind).expand_as(error))


def test_the_flow_is_the_velocity_of_the_straight_path() -> None:
    sample, noise = (torch.randn(3, generator=seeded(i), dtype=torch.float64) for i in range(2))
    schedule = NoiseSchedule("flow")
    states = [add_noise(sample, noise, schedule.levels(torch.tensor(t, dtype=torch.float64))) for t in (0.3, 0.4)]
    assert_close((states[1] - states[0]) / 0.1, compute_prediction(sample, noise, NoiseLevel(0.3, 0.7, 0.3), "flow"))


@pytest.mark.parametrize("name", LEVEL_SCHEDULES)
@pytest.mark.parametrize("zero", [False, True])
def test_schedules_equal_the_schedules_of_diffusers(name: Schedule, zero: bool) -> None:
    theirs = make_ddim_scheduler(name, rescale_betas_zero_snr=zero, prediction_type="v_prediction")
    actual = NoiseSchedule(name, zero).levels(torch.arange(1, NUM_LEVELS + 1, dtype=torch.float64) / NUM_LEVELS)
    assert_close(actual.alpha.float().square(), theirs.alphas_cumprod, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_first_level_is_data_and_squares_sum_to_one_except_in_a_flow(name: Schedule) -> None:
    _, alpha, sigma = NoiseSchedule(name).levels(torch.linspace(0, 1, 11, dtype=torch.float64))
    assert (float(alpha[0]), float(sigma[0])) == (1, 0)
    assert torch.all(alpha.diff() < 0)
    assert torch.all(sigma.diff() > 0)
    size = alpha + sigma if name == "flow" else alpha.square() + sigma.square()
    assert_close(size, torch.ones_like(size))


@pytest.mark.parametrize("name", LEVEL_SCHEDULES)
def test_only_zero_terminal_snr_ends_with_pure_noise(name: Schedule) -> None:
    last = torch.ones(1, dtype=torch.float64)
    assert float(NoiseSchedule(name, zero_terminal_snr=True).levels(last).alpha) == 0
    assert float(NoiseSchedule(name).levels(last).alpha) > 0


@pytest.mark.parametrize("spacing", get_args(Spacing))
@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_spacings_equal_the_spacings_of_diffusers(spacing: Spacing, steps: int) -> None:
    theirs = make_ddim_scheduler("linear", timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    actual = NoiseSchedule("linear").sampling_times(steps, spacing) * NUM_LEVELS
    assert actual[-1] == 0
    assert np.array_equal(actual[:-1].numpy() - 1, theirs.timesteps.numpy())


@pytest.mark.parametrize("name", SCHEDULES)
def test_training_times_are_all_levels_except_data(name: Schedule) -> None:
    times = NoiseSchedule(name).training_times(1 - torch.rand(100_000, generator=seeded(0), dtype=torch.float64))
    assert times.min() > 0
    assert times.max() <= 1
    if name != "flow":
        counts = torch.bincount((times * NUM_LEVELS).round().long(), minlength=NUM_LEVELS + 1)
        assert counts[0] == 0
        assert counts[1:].min() > 50  # 100 expected; five standard deviations below has a probability of 3e-4
    assert math.isclose(times.mean(), 0.5, abs_tol=0.01)
