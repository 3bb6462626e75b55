"""A variational autoencoder samples through the same pipeline, without a stage two: its latents come from N(0, I)."""

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
from pipelines.evaluation.pipeline_metrics import balanced_labels, pipeline_metrics, sampled_batches
from pipelines.latent_generation import LatentGenerationPipeline
from stage1_tokenizer.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from stage1_tokenizer.data.image_loader import ImageLoader
from stage2_prior.standard_normal import StandardNormalOptions, StandardNormalPrior
from training_harness.errors import SpecMismatchError, UserError


def vae(**fields: Any) -> AutoencoderKL:
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
    tokenizer = vae()
    made = LatentGenerationPipeline(tokenizer, StandardNormalPrior.for_spec(tokenizer.latent_spec()))
    made.set_progress_bar_config(disable=True)
    return made


def test_image_i_is_its_own_generator_s_draw_decoded(pipeline):
    images = pipeline(generator=[seeded(3), seeded(4)], num_images_per_label=2, output_type="pt").images
    assert images.shape == (2, 1, 14, 14)
    latents = torch.stack([torch.randn(3, 8, 8, generator=seeded(i)) for i in (3, 4)])
    assert torch.equal(images, pipeline.decode(latents))
    alone = pipeline(generator=[seeded(4)], output_type="pt").images[0]
    torch.testing.assert_close(alone, images[1])
    assert not torch.allclose(alone, images[0], atol=1e-2)


def test_the_temperature_scales_the_draws_and_other_options_are_one_line(pipeline):
    seen: list[torch.Tensor] = []

    def look(_: Any, step: int, timestep: int, state: dict[str, Any]) -> None:
        seen.append(state["latents"])

    for temperature in (1.0, 0.5):
        pipeline(generator=seeded(0), temperature=temperature, callback_on_step_end=look)
    torch.testing.assert_close(seen[1], 0.5 * seen[0])
    with pytest.raises(
        UserError, match="guidance_scale is no option of a StandardNormalPrior; expected any of: temperature"
    ):
        pipeline(guidance_scale=2.0)
    with pytest.raises(UserError) as caught:
        StandardNormalOptions(temperature=0.0)
    error_message(caught)


def test_it_saves_and_loads_whole(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "pipeline")
    loaded = LatentGenerationPipeline.from_pretrained(tmp_path / "pipeline")
    loaded.set_progress_bar_config(disable=True)
    same = [made(generator=seeded(1), output_type="pt").images for made in (pipeline, loaded)]
    assert torch.equal(*same)
    card = (tmp_path / "pipeline" / "README.md").read_text()
    assert "8×8 latents of 3 channels are drawn from a standard normal distribution" in card


def test_a_prior_of_another_tokenizer_s_latents_is_refused_with_what_differs():
    prior = StandardNormalPrior.for_spec(vae().latent_spec())
    with pytest.raises(SpecMismatchError, match="channels 3 ≠ 4"):
        LatentGenerationPipeline(vae(latent_channels=4, latent_mean=[0.0] * 4, latent_std=[1.0] * 4), prior)
    with pytest.raises(SpecMismatchError):
        LatentGenerationPipeline(vae(), tiny_prior())
    with pytest.raises(SpecMismatchError):
        LatentGenerationPipeline(tiny_tokenizer(), prior)


def test_one_recipe_trains_it_and_leaves_a_pipeline_that_samples_and_is_measured(tmp_path, capsys):
    data, output = write_images(tmp_path / "pictures"), tmp_path / "vae"
    words = f"train-tokenizer --data {data} --output {output} --recipe vae --resolution 32 --max-steps 2 --batch-size 4"
    assert main(words.split()) == 0
    shutil.rmtree(output / "pipeline")  # as after a kill between model and pipeline
    assert main(words.split()) == 0
    words = f"sample --pipeline {output} --num-images 3 --output {tmp_path / 'samples'} --temperature 0.8"
    assert main(words.split()) == 0
    assert len(list((tmp_path / "samples").glob("0*.png"))) == 3
    capsys.readouterr()
    assert main(f"sample --pipeline {output} --output {tmp_path / 'none'} --top-k 3".split()) == 2
    assert "top_k is no option of a StandardNormalPrior" in capsys.readouterr().err
    figures = figures_of(output, data)
    assert figures["psnr"] > 0
    assert figures["codes_used"] is figures["bits_per_pixel"] is figures["bits_per_token"] is None


def figures_of(run: Path, data: Path) -> dict[str, Any]:
    pipeline, source = LatentGenerationPipeline.from_pretrained(run), load_source(str(data))
    pipeline.set_progress_bar_config(disable=True)
    processor = pipeline.tokenizer.config.image_processor
    held_out, train = (ImageLoader(split, processor) for split in (source.train, source.train))
    with Evaluator(feature_extractor("pixels-8x8"), run.parent / "features") as evaluator:
        labels = balanced_labels(pipeline, 8)
        samples = evaluator.measure_stream(sampled_batches(pipeline, labels, 0), labels, "samples")
        return pipeline_metrics(evaluator, pipeline, samples, held_out, train, ())
