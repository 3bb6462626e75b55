"""Schedulers of diffusers as samplers."""

from typing import Any

import pytest
import torch
from tiny_models import LABEL_NAMES, diffusers_scheduler, seeded, tiny_diffusion, tiny_tokenizer
from torch import Tensor
from torch.testing import assert_close

from pipelines.latent_generation import image_generators
from stage2_prior.diffusion.model import DiffusionPrior
from stage2_prior.diffusion.sampling import DiffusionOptions
from training_harness.errors import UserError

LINEAR: dict[str, Any] = {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}


def sample_latents(prior: DiffusionPrior, scheduler: Any = None, on_step: Any = None, **options: Any) -> Tensor:
    tokenizer = tiny_tokenizer()
    prior.config.tokenizer_id = tokenizer.config.tokenizer_id
    prior.scheduler = scheduler
    sampling_options = DiffusionOptions(**{"num_inference_steps": 5} | options)
    labels, generators = torch.arange(3) % len(LABEL_NAMES), image_generators(seeded(4), 3)
    return prior.sample(tokenizer.latent_spec(), labels, sampling_options, generators, on_step)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_schedulers_of_diffusers_sample_the_same_latents_as_our_samplers(kind: str) -> None:
    prior, trailing = tiny_diffusion(schedule="linear", prediction=kind), {"timestep_spacing": "trailing"}
    ddim = diffusers_scheduler("DDIMScheduler", **LINEAR, **trailing, clip_sample=False)
    assert_close(sample_latents(prior, ddim), sample_latents(prior, sampler="ddim"), rtol=1e-3, atol=1e-3)
    solver = diffusers_scheduler("DPMSolverMultistepScheduler", **LINEAR, **trailing, prediction_type="v_prediction")
    assert_close(sample_latents(prior, solver), sample_latents(prior, sampler="dpm-solver++"), rtol=1e-3, atol=1e-3)
    ancestral = diffusers_scheduler("DDPMScheduler", **LINEAR, **trailing, clip_sample=False)
    assert sample_latents(prior, ancestral).isfinite().all()


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
    ],
)
def test_flow_schedulers_of_diffusers_sample_the_same_latents_as_euler(name: str, fields: dict[str, Any]) -> None:
    prior = tiny_diffusion()
    scheduler = diffusers_scheduler(name, **fields)
    assert_close(
        sample_latents(prior, scheduler, num_inference_steps=200),
        sample_latents(prior, num_inference_steps=200),
        rtol=0,
        atol=0.05,
    )


@pytest.mark.parametrize(
    "name", ["UniPCMultistepScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler", "PNDMScheduler"]
)
def test_schedulers_without_a_counterpart_here_end_near_the_exact_solution(name: str) -> None:
    prior = tiny_diffusion(schedule="linear", prediction="epsilon")
    exact = sample_latents(prior, sampler="ddim", num_inference_steps=1000)
    scheduler = diffusers_scheduler(name, **LINEAR, prediction_type="epsilon")
    error = (sample_latents(prior, scheduler, num_inference_steps=200) - exact).abs().mean() / exact.abs().mean()
    assert error < 0.05


def test_num_steps_equals_the_number_of_steps_of_a_scheduler() -> None:
    prior, steps = tiny_diffusion(schedule="linear", prediction="epsilon"), list[int]()
    scheduler = diffusers_scheduler("HeunDiscreteScheduler", **LINEAR, prediction_type="epsilon")
    sample_latents(prior, scheduler, on_step=lambda step, latents: steps.append(step))
    announced = prior.num_steps(tiny_tokenizer().latent_spec(), DiffusionOptions(num_inference_steps=5))
    assert steps == list(range(announced)) == list(range(9))  # two evaluations in each of five steps, one in the last


@pytest.mark.parametrize(
    ("schedule", "scheduler", "message"),
    [
        ("flow", ("DDIMScheduler", LINEAR), "trained as a flow"),
        ("linear", ("FlowMatchEulerDiscreteScheduler", {}), "a schedule of 1000 levels"),
        ("flow", ("EDMEulerScheduler", {}), "trained as a flow"),
        ("linear", ("EDMEulerScheduler", {}), "a schedule of 1000 levels"),
        ("cosine", ("DDIMScheduler", LINEAR), "betas of the DDIMScheduler"),
    ],
)
def test_a_scheduler_with_another_noise_schedule_is_refused(
    schedule: str, scheduler: tuple[str, dict[str, Any]], message: str
) -> None:
    prior = tiny_diffusion(schedule=schedule, prediction="v_prediction")
    with pytest.raises(UserError, match=rf"{message}.*; expected"):
        sample_latents(prior, diffusers_scheduler(scheduler[0], **scheduler[1]))
