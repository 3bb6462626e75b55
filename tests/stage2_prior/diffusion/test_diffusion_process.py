"""Conventions: what is predicted, converted and scheduled, against definitions and diffusers."""

import math
from typing import Any, get_args

import numpy as np
import pytest
import torch
from tiny_models import diffusers_scheduler, seeded
from torch.testing import assert_close

from stage2_prior.diffusion.process import (
    Level,
    Prediction,
    error_of_sample,
    estimate,
    noised,
    prediction_of,
)
from stage2_prior.diffusion.schedule import LEVELS, NoiseSchedule, Schedule, Spacing

PREDICTIONS, SCHEDULES = get_args(Prediction), get_args(Schedule)
TABLES = [name for name in SCHEDULES if name != "flow"]
THEIRS = {"linear": "linear", "scaled-linear": "scaled_linear", "cosine": "squaredcos_cap_v2"}
BETAS = {"linear": (1e-4, 0.02), "scaled-linear": (0.00085, 0.012), "cosine": (1e-4, 0.02)}


def their_schedule(name: str, **fields: Any) -> Any:
    first, last = BETAS[name]
    return diffusers_scheduler("DDIMScheduler", beta_start=first, beta_end=last, beta_schedule=THEIRS[name], **fields)


def some(
    schedule: Schedule, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor, Level[torch.Tensor]]:
    sample, noise = (torch.randn(5, 2, 3, 3, dtype=dtype, generator=seeded(i)) for i in range(2))
    times = torch.tensor([0.002, 0.25, 0.5, 0.75, 0.98], dtype=dtype).view(-1, 1, 1, 1)
    return sample, noise, NoiseSchedule(schedule).levels(times)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kind", PREDICTIONS)
def test_data_and_noise_come_back_from_what_is_predicted(kind: Prediction, schedule: Schedule) -> None:
    sample, noise, level = some(schedule)
    found = estimate(noised(sample, noise, level), prediction_of(sample, noise, level, kind), level, kind)
    assert_close(found.sample, sample)
    assert_close(found.noise, noise)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("first", PREDICTIONS)
@pytest.mark.parametrize("second", PREDICTIONS)
def test_any_prediction_converts_to_any_other_and_back(
    first: Prediction, second: Prediction, schedule: Schedule
) -> None:
    sample, noise, level = some(schedule)
    noisy, wrong = noised(sample, noise, level), torch.randn(sample.shape, dtype=torch.float64, generator=seeded(2))
    through = prediction_of(*estimate(noisy, wrong, level, first), level, second)
    assert_close(prediction_of(*estimate(noisy, through, level, second), level, first), wrong)


@pytest.mark.parametrize("kind", PREDICTIONS)
def test_the_latents_err_by_the_stated_multiple_of_the_prediction(kind: Prediction) -> None:
    sample, noise, level = some("cosine")
    noisy, right = noised(sample, noise, level), prediction_of(sample, noise, level, kind)
    error = estimate(noisy, right + 1, level, kind).sample - sample
    assert_close(error.abs(), error_of_sample(level, kind).expand_as(error))


def test_the_flow_is_the_velocity_of_the_straight_path() -> None:
    sample, noise = (torch.randn(3, generator=seeded(i), dtype=torch.float64) for i in range(2))
    schedule = NoiseSchedule("flow")
    at = [noised(sample, noise, schedule.levels(torch.tensor(t, dtype=torch.float64))) for t in (0.3, 0.4)]
    assert_close((at[1] - at[0]) / 0.1, prediction_of(sample, noise, Level(0.3, 0.7, 0.3), "flow"))


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("zero", [False, True])
def test_schedules_are_those_of_diffusers(name: Schedule, zero: bool) -> None:
    theirs = their_schedule(name, rescale_betas_zero_snr=zero, prediction_type="v_prediction")
    found = NoiseSchedule(name, zero).levels(torch.arange(1, LEVELS + 1, dtype=torch.float64) / LEVELS)
    assert_close(found.alpha.float().square(), theirs.alphas_cumprod, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_first_level_is_data_and_squares_add_up_to_one_but_for_a_flow(name: Schedule) -> None:
    _, alpha, sigma = NoiseSchedule(name).levels(torch.linspace(0, 1, 11, dtype=torch.float64))
    assert (float(alpha[0]), float(sigma[0])) == (1, 0)
    assert torch.all(alpha.diff() < 0)
    assert torch.all(sigma.diff() > 0)
    size = alpha + sigma if name == "flow" else alpha.square() + sigma.square()
    assert_close(size, torch.ones_like(size))


@pytest.mark.parametrize("name", TABLES)
def test_only_zero_terminal_snr_ends_with_noise_alone(name: Schedule) -> None:
    last = torch.ones(1, dtype=torch.float64)
    assert float(NoiseSchedule(name, zero_terminal_snr=True).levels(last).alpha) == 0
    assert float(NoiseSchedule(name).levels(last).alpha) > 0


@pytest.mark.parametrize("spacing", get_args(Spacing))
@pytest.mark.parametrize("steps", [1, 7, 50, 1000])
def test_spacings_are_those_of_diffusers(spacing: Spacing, steps: int) -> None:
    theirs = their_schedule("linear", timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    found = NoiseSchedule("linear").sampling_times(steps, spacing) * LEVELS
    assert found[-1] == 0
    assert np.array_equal(found[:-1].numpy() - 1, theirs.timesteps.numpy())


@pytest.mark.parametrize("name", SCHEDULES)
def test_times_to_learn_at_are_all_levels_but_data(name: Schedule) -> None:
    times = NoiseSchedule(name).training_times(1 - torch.rand(100_000, generator=seeded(0), dtype=torch.float64))
    assert times.min() > 0
    assert times.max() <= 1
    if name != "flow":
        counts = torch.bincount((times * LEVELS).round().long(), minlength=LEVELS + 1)
        assert counts[0] == 0
        assert counts[1:].min() > 50  # 100 expected: less by five standard deviations is 3e-4 likely
    assert math.isclose(times.mean(), 0.5, abs_tol=0.01)
