"""Image restoration: a user's image is encoded like the training images, and invalid arguments are errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import LABEL_NAMES, seeded, tiny_diffusion, tiny_source, tiny_tokenizer
from torch import Tensor

from pipelines.editing import Edit
from pipelines.evaluation.restoration import Restorations
from pipelines.latent_generation import LatentGenerationPipeline
from stage1_tokenizer.codes.reader import CodeCache
from stage1_tokenizer.codes.writer import write_code_cache
from stage1_tokenizer.data.degradation import Degradation, degrade_images, downscale_image
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.data.image_processor import ImageProcessor
from stage2_prior.diffusion.config import DiTModel
from stage2_prior.diffusion.model import DiffusionPrior
from stage2_prior.diffusion.objective import DiffusionObjective
from stage2_prior.diffusion.sampling import DiffusionOptions
from stage2_prior.prior import KnownCodes
from stage2_prior.training_config import DiffusionTraining
from training_harness.errors import UserError

PROCESSOR = ImageProcessor(channels=1, content_size=(14, 14), image_size=(16, 16))
MODEL = DiTModel(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=48)


def restoring_pipeline(degradation: Degradation = "downscale-2x") -> LatentGenerationPipeline:
    tokenizer = tiny_tokenizer()
    prior = tiny_diffusion(tokenizer_id=tokenizer.config.tokenizer_id, degradation=degradation)
    pipeline = LatentGenerationPipeline(tokenizer, prior, LABEL_NAMES, DiffusionOptions(num_inference_steps=4))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> CodeCache:
    folder, tokenizer = tmp_path_factory.mktemp("restoration"), tiny_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    cache = write_code_cache(
        tokenizer,
        folder / "tokenizer",
        tiny_source(),
        folder / "codes",
        degradation="downscale-2x",
        views=("original", "flip"),
    )
    return CodeCache(cache)


def random_images(count: int, channels: int = 1) -> Tensor:
    return torch.randint(256, (count, channels, 14, 14), generator=seeded(0), dtype=torch.uint8)


def test_the_noise_depends_on_the_seed_and_has_the_documented_strengths() -> None:
    grey = torch.full((200, 1, 14, 14), 127, dtype=torch.uint8)
    noisy = degrade_images(grey, "noise", PROCESSOR, range(200))
    assert torch.equal(degrade_images(grey[50:60], "noise", PROCESSOR, range(50, 60)), noisy[50:60])
    deviations = noisy.float().flatten(1).std(1)
    assert 8 < deviations.min() < 20  # the std of 196 pixels is precise to 5 %
    assert 60 < deviations.max() < 90
    assert noisy.float().mean().item() == pytest.approx(127, abs=1)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_downscaled_image_loses_only_detail_finer_than_its_pixels(channels: int) -> None:
    processor = ImageProcessor(channels=channels, content_size=(16, 16), image_size=(16, 16))
    rows = torch.arange(16)
    checkerboard = ((rows[:, None] + rows) % 2 * 255).to(torch.uint8).expand(1, channels, 16, 16)
    gradient = (rows * 15).to(torch.uint8).expand(1, channels, 16, 16)
    kinds: list[Degradation] = ["downscale-2x", "downscale-4x"]
    for kind in kinds:
        centre = (..., slice(6, 10), slice(6, 10))  # the edges are padded
        assert (degrade_images(checkerboard, kind, processor, [0]).float()[centre] - 127.5).abs().max() < 20
        assert (degrade_images(gradient, kind, processor, [0]).float() - gradient.float())[centre].abs().max() <= 4
    assert downscale_image(gradient[0], 4) is not None


def test_a_small_image_of_the_user_has_the_latents_of_the_training_images(codes: CodeCache) -> None:
    tokenizer, source = tiny_tokenizer(), tiny_source()
    originals = ImageLoader(source.train, tokenizer.config.image_processor)[range(5)]
    small_images = [downscale_image(image, 2) for image in originals]
    user_latents = Edit.from_images(tokenizer, small_images, None, latents=True).codes
    first_batch = len(source.train)  # all images fit into one batch; its mirror images follow
    cached_latents = codes.train.latents(np.arange(5), "degraded")
    torch.testing.assert_close(cached_latents, user_latents, rtol=1e-3, atol=1e-3)  # float16
    assert (cached_latents - codes.train.latents(np.arange(5))).abs().max() > 0.1
    small_mirror_images = [downscale_image(image.flip(-1), 2) for image in originals]
    mirror_latents = Edit.from_images(tokenizer, small_mirror_images, None, latents=True).codes
    torch.testing.assert_close(
        codes.train.latents(np.arange(5) + first_batch, "degraded"), mirror_latents, rtol=1e-3, atol=1e-3
    )


def test_the_network_receives_the_degraded_latents(codes: CodeCache, tmp_path: Path) -> None:
    config = DiffusionTraining(
        output=tmp_path / "run", codes=codes.path, model=MODEL, degradation="downscale-2x", batch_size=8
    )
    objective = DiffusionObjective(config, codes)
    prior = objective.new_prior()
    torch.nn.init.normal_(prior.denoiser.final.weight, std=0.2, generator=seeded(0))
    inputs = list(objective.prepare_inputs(np.arange(8), torch.full((8, 2), 0.5, dtype=torch.float64), 1))
    assert torch.equal(inputs[5], codes.train.latents(np.arange(8), "degraded"))  # type: ignore[arg-type]
    loss = prior(*inputs).total
    inputs[5] = inputs[5].flip(0)  # type: ignore[union-attr]
    assert prior(*inputs).total != loss
    assert objective.validate(prior.eval())["validation_squared_error"] > 0


def test_codes_of_another_degradation_are_an_error(codes: CodeCache, tmp_path: Path) -> None:
    config = DiffusionTraining(output=tmp_path / "run", codes=codes.path, model=MODEL, degradation="noise")
    with pytest.raises(UserError, match="has the degradation downscale-2x and the configuration noise"):
        DiffusionObjective(config, codes)


def test_a_pipeline_restores_the_images_of_the_user() -> None:
    pipeline, originals, latents = restoring_pipeline(), random_images(3), list[Tensor]()

    def record_latents(pipeline: LatentGenerationPipeline, step: int, time: int, values: dict[str, Any]) -> None:
        latents.append(values["latents"])

    small_images = [downscale_image(image, 2) for image in originals]
    images = pipeline(image=small_images, generator=seeded(0), output_type="pt").images
    assert isinstance(images, Tensor)
    assert images.shape == (3, 1, 14, 14)
    edit = Edit.from_images(pipeline.tokenizer, small_images, None, latents=True)
    expected = pipeline.sample_pixels(torch.tensor([-1] * 3), seeded(0), known=KnownCodes.for_restoration(edit.codes))
    torch.testing.assert_close(images, expected)
    # compare latents, because a codebook hides small changes of latents
    for input_images in (small_images, small_images[::-1]):
        pipeline(image=input_images, generator=seeded(0), callback_on_step_end=record_latents)
    torch.testing.assert_close(latents[3][1], latents[7][1], rtol=0, atol=1e-4)
    assert (latents[3][0] - latents[7][0]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no image was passed; expected one"),
        ({"image": 0, "mask_image": 0}, "expected image alone"),
        ({"image": 0, "strength": 0.5}, "expected image alone"),
    ],
)
def test_invalid_arguments_of_a_restoring_pipeline_are_errors(arguments: dict[str, Any], message: str) -> None:
    image = np.zeros((14, 14), np.uint8)
    with pytest.raises(UserError, match=message):
        restoring_pipeline()("cat", **{name: image if value == 0 else value for name, value in arguments.items()})


def test_restoration_metrics_are_the_psnr_of_degraded_and_restored_images() -> None:
    pipeline, source = restoring_pipeline("noise"), tiny_source()
    images = ImageLoader(source.validation, pipeline.tokenizer.config.image_processor)
    assert isinstance(pipeline.prior, DiffusionPrior)
    restorations = Restorations(pipeline, images, 7, seed=0)
    restored = torch.cat(list(restorations.batches()))
    assert len(restored) == len(restorations.labels) == 7
    labels = images.labels()
    assert labels is not None
    assert restorations.labels.tolist() == labels[:7]
    degraded_images = degrade_images(images[range(7)], "noise", pipeline.tokenizer.config.image_processor, range(7))
    errors = [(x.float() - images[range(7)].float()).square().flatten(1).mean(1) for x in (degraded_images, restored)]
    expected = [float((10 * (255**2 / error).log10()).mean()) for error in errors]
    assert list(restorations.metrics().values()) == pytest.approx(expected, rel=1e-4)
