"""A variational autoencoder samples with the same pipeline, without a second stage: its latents are ~ N(0, I)."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from small_parts import error_message, write_images
from tiny_models import seeded, tiny_prior, tiny_tokenizer

from latentloom.cli import main
from latentloom.jobs.stages import load_source
from pipelines.evaluation.evaluator import Evaluator
from pipelines.evaluation.features import feature_extractor
from pipelines.evaluation.pipeline_metrics import balanced_labels, pipeline_metrics, sample_batches
from pipelines.latent_generation import LatentGenerationPipeline
from stage1_tokenizer.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from stage1_tokenizer.data.image_loader import ImageLoader
from stage2_prior.standard_normal import StandardNormalOptions, StandardNormalPrior
from training_harness.errors import SpecMismatchError, UserError


def tiny_vae(**fields: Any) -> AutoencoderKL:
    shape = {
        "image_channels": 1,
        "image_size": (16, 16),
        "content_size": (14, 14),
        "channels": (8, 8),
        "blocks": (0, 1),
    }
    statistics = {"latent_mean": [0.5, -1.0, 0.0], "latent_std": [1.0, 2.0, 0.5]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = AutoencoderKL(AutoencoderKLConfig(**shape | statistics | {"latent_channels": 3} | fields)).eval()
    tokenizer.config.tokenizer_id = tokenizer.compute_id()
    return tokenizer


@pytest.fixture(scope="module")
def pipeline() -> LatentGenerationPipeline:
    tokenizer = tiny_vae()
    pipeline = LatentGenerationPipeline(tokenizer, StandardNormalPrior.for_spec(tokenizer.latent_spec()))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_image_i_is_decoded_from_the_noise_of_generator_i(pipeline):
    images = pipeline(generator=[seeded(3), seeded(4)], num_images_per_label=2, output_type="pt").images
    assert images.shape == (2, 1, 14, 14)
    latents = torch.stack([torch.randn(3, 8, 8, generator=seeded(i)) for i in (3, 4)])
    assert torch.equal(images, pipeline.decode(latents))
    single_image = pipeline(generator=[seeded(4)], output_type="pt").images[0]
    torch.testing.assert_close(single_image, images[1])
    assert not torch.allclose(single_image, images[0], atol=1e-2)


def test_the_temperature_scales_the_latents_and_other_options_are_a_one_line_error(pipeline):
    latents: list[torch.Tensor] = []

    def record_latents(_: Any, step: int, timestep: int, state: dict[str, Any]) -> None:
        latents.append(state["latents"])

    for temperature in (1.0, 0.5):
        pipeline(generator=seeded(0), temperature=temperature, callback_on_step_end=record_latents)
    torch.testing.assert_close(latents[1], 0.5 * latents[0])
    with pytest.raises(
        UserError, match="guidance_scale is no option of a StandardNormalPrior; expected any of: temperature"
    ):
        pipeline(guidance_scale=2.0)
    with pytest.raises(UserError) as caught:
        StandardNormalOptions(temperature=0.0)
    error_message(caught)


def test_a_loaded_pipeline_samples_the_same_images(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = LatentGenerationPipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    images = [source(generator=seeded(1), output_type="pt").images for source in (pipeline, loaded)]
    assert torch.equal(*images)
    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert "8×8 latents of 3 channels are sampled from a standard normal distribution" in card


def test_a_prior_for_latents_of_another_tokenizer_is_an_error_with_the_difference():
    prior = StandardNormalPrior.for_spec(tiny_vae().latent_spec())
    with pytest.raises(SpecMismatchError, match="channels 3 ≠ 4"):
        LatentGenerationPipeline(tiny_vae(latent_channels=4, latent_mean=[0.0] * 4, latent_std=[1.0] * 4), prior)
    with pytest.raises(SpecMismatchError):
        LatentGenerationPipeline(tiny_vae(), tiny_prior())
    with pytest.raises(SpecMismatchError):
        LatentGenerationPipeline(tiny_tokenizer(), prior)


def test_one_recipe_trains_a_pipeline_that_samples_and_is_evaluated(tmp_path, capsys):
    data, output = write_images(tmp_path / "pictures"), tmp_path / "vae"
    command = (
        f"train-tokenizer --data {data} --output {output} --recipe vae --resolution 32 --max-steps 2 --batch-size 4"
    )
    assert main(command.split()) == 0
    shutil.rmtree(output / "pipeline")  # as after a kill between model and pipeline
    assert main(command.split()) == 0
    command = f"sample --pipeline {output} --num-images 3 --output {tmp_path / 'samples'} --temperature 0.8"
    assert main(command.split()) == 0
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 3
    capsys.readouterr()
    assert main(f"sample --pipeline {output} --output {tmp_path / 'none'} --top-k 3".split()) == 2
    assert "top_k is no option of a StandardNormalPrior" in capsys.readouterr().err
    metrics = compute_metrics(output, data)
    assert metrics["psnr"] > 0
    assert metrics["codes_used"] is metrics["bits_per_pixel"] is metrics["bits_per_token"] is None


def compute_metrics(run: Path, data: Path) -> dict[str, Any]:
    pipeline, source = LatentGenerationPipeline.from_pretrained(run), load_source(str(data))
    pipeline.set_progress_bar_config(disable=True)
    processor = pipeline.tokenizer.config.image_processor
    held_out, train = (ImageLoader(split, processor) for split in (source.train, source.train))
    with Evaluator(feature_extractor("pixels-8x8"), run.parent / "features") as evaluator:
        labels = balanced_labels(pipeline, 8)
        samples = evaluator.measure_stream(sample_batches(pipeline, labels, 0), labels, "samples")
        return pipeline_metrics(evaluator, pipeline, samples, held_out, train, ())
