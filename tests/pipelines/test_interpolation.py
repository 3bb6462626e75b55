"""Interpolation between the images of two seeds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import latentloom
from tiny_models import diffusion_pipeline, seeded, tiny_pipeline
from torch import Tensor

from pipelines.latent_generation import LatentGenerationPipeline
from training_harness.errors import UserError


def sample_image(pipeline: LatentGenerationPipeline, seed: int) -> Tensor:
    images = pipeline("cat", generator=seeded(seed), output_type="pt").images
    assert isinstance(images, Tensor)
    return images[0]


@pytest.mark.parametrize("sampler", ["euler", "ddpm"])
def test_the_first_and_last_image_are_the_images_of_the_seeds(sampler: Any) -> None:
    pipeline = diffusion_pipeline(sampler=sampler)
    images = pipeline.interpolate(3, 8, 5, ["dog", "cat"], output_type="pt", batch_size=3)[0]
    assert isinstance(images, Tensor)
    assert len(images) == 10
    torch.testing.assert_close(images[5], sample_image(pipeline, 3))
    if sampler == "euler":  # ddpm adds more noise, and the last image uses the noise of the first
        torch.testing.assert_close(images[9], sample_image(pipeline, 8))
        assert (images[6] - images[5]).abs().mean() < (images[9] - images[5]).abs().mean()
        assert (images[0] - images[5]).abs().max() > 0.01  # another class


def test_interpolated_noise_has_mean_zero_and_variance_one() -> None:
    pipeline, noises = diffusion_pipeline(), list[Tensor]()
    sample = pipeline.prior.sample

    def record_noise(*arguments: Any, **options: Any) -> Tensor:
        noises.append(arguments[-1])
        return sample(*arguments, **options)

    pipeline.prior.sample = record_noise  # type: ignore[method-assign]
    for seed in range(100):
        pipeline.interpolate(seed, 1000 + seed, 3, num_inference_steps=1)
    # at 45° between the two noises: more than 8,000 numbers, so the std is precise to 1 %
    middle = torch.stack([noise[1] for noise in noises])
    assert middle.std().item() == pytest.approx(1, abs=0.05)
    assert middle.mean().item() == pytest.approx(0, abs=0.05)


def test_latents_of_another_shape_are_an_error() -> None:
    with pytest.raises(UserError, match=r"latents are \(1, 2, 3, 3\); expected \(1, "):
        diffusion_pipeline()("cat", latents=torch.zeros(1, 2, 3, 3))


def test_interpolation_with_a_prior_of_codes_is_an_error() -> None:
    with pytest.raises(UserError, match="does not start from noise"):
        tiny_pipeline().interpolate(0, 1)


def test_the_command_writes_a_row_of_images_for_each_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diffusion_pipeline().save_pretrained(tmp_path / "pipeline")
    arguments = [
        "sample",
        "--pipeline",
        str(tmp_path / "pipeline"),
        "--interpolate-to",
        "5",
        "--output",
        str(tmp_path / "interpolation"),
    ]
    assert latentloom(*arguments, "--classes", "cat", "dog", "--num-images", "6") == 0
    names = sorted(path.name for path in (tmp_path / "interpolation").iterdir())
    assert names == [
        "00000-cat.png",
        "00001-cat.png",
        "00002-cat.png",
        "00003-dog.png",
        "00004-dog.png",
        "00005-dog.png",
        "grid.png",
        "samples.json",
    ]
    assert latentloom(*arguments, "--overwrite", "--classes", "cat", "dog", "--num-images", "5") == 2
    assert "expected the same number of each" in capsys.readouterr().err
