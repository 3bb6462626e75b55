"""From one seed's picture to another's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import latentloom
from tiny_models import diffusion_pipeline, seeded, tiny_pipeline
from torch import Tensor

from pipelines.latent_generation import LatentGenerationPipeline
from training_harness.errors import UserError


def drawn(pipeline: LatentGenerationPipeline, seed: int) -> Tensor:
    images = pipeline("cat", generator=seeded(seed), output_type="pt").images
    assert isinstance(images, Tensor)
    return images[0]


@pytest.mark.parametrize("sampler", ["euler", "ddpm"])
def test_the_ends_are_the_seeds_own_pictures(sampler: Any) -> None:
    pipeline = diffusion_pipeline(sampler=sampler)
    images = pipeline.interpolate(3, 8, 5, ["dog", "cat"], output_type="pt", batch_size=3)[0]
    assert isinstance(images, Tensor)
    assert len(images) == 10
    torch.testing.assert_close(images[5], drawn(pipeline, 3))
    if sampler == "euler":  # ddpm draws more, and the last image as the first does
        torch.testing.assert_close(images[9], drawn(pipeline, 8))
        assert (images[6] - images[5]).abs().mean() < (images[9] - images[5]).abs().mean()
        assert (images[0] - images[5]).abs().max() > 0.01  # another class


def test_noise_on_the_way_is_as_noise_is() -> None:
    pipeline, seen = diffusion_pipeline(), list[Tensor]()
    sample = pipeline.prior.sample

    def noted(*given: Any, **named: Any) -> Tensor:
        seen.append(given[-1])
        return sample(*given, **named)

    pipeline.prior.sample = noted  # type: ignore[method-assign]
    for seed in range(100):
        pipeline.interpolate(seed, 1000 + seed, 3, num_inference_steps=1)
    middle = torch.stack(
        [noise[1] for noise in seen]
    )  # 45° between: more than 8,000 numbers, whose spread is known to 1 %
    assert middle.std().item() == pytest.approx(1, abs=0.05)
    assert middle.mean().item() == pytest.approx(0, abs=0.05)


def test_given_noise_of_another_size_is_refused() -> None:
    with pytest.raises(UserError, match=r"latents are \(1, 2, 3, 3\); expected \(1, "):
        diffusion_pipeline()("cat", latents=torch.zeros(1, 2, 3, 3))


def test_a_prior_of_codes_begins_with_no_noise() -> None:
    with pytest.raises(UserError, match="begin with given noise"):
        tiny_pipeline().interpolate(0, 1)


def test_the_command_writes_a_row_of_each_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    diffusion_pipeline().save_pretrained(tmp_path / "pipeline")
    given = [
        "sample",
        "--pipeline",
        str(tmp_path / "pipeline"),
        "--interpolate-to",
        "5",
        "--output",
        str(tmp_path / "way"),
    ]
    assert latentloom(*given, "--classes", "cat", "dog", "--num-images", "6") == 0
    names = sorted(path.name for path in (tmp_path / "way").iterdir())
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
    assert latentloom(*given, "--overwrite", "--classes", "cat", "dog", "--num-images", "5") == 2
    assert "expected the same number of each" in capsys.readouterr().err
