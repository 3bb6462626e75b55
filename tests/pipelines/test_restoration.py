"""Restoring pictures: what a prior is trained on is what a user's picture becomes, and what does not fit is refused."""

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
from stage1_tokenizer.data.degradation import Degradation, degraded, shrunk
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


def pictures(count: int, channels: int = 1) -> Tensor:
    return torch.randint(256, (count, channels, 14, 14), generator=seeded(0), dtype=torch.uint8)


def test_noise_is_that_of_the_seed_and_of_the_strengths_that_are_stated() -> None:
    grey = torch.full((200, 1, 14, 14), 127, dtype=torch.uint8)
    worse = degraded(grey, "noise", PROCESSOR, range(200))
    assert torch.equal(degraded(grey[50:60], "noise", PROCESSOR, range(50, 60)), worse[50:60])
    deviations = worse.float().flatten(1).std(1)
    assert 8 < deviations.min() < 20  # of 196 pixels, a deviation is known to 5 %
    assert 60 < deviations.max() < 90
    assert worse.float().mean().item() == pytest.approx(127, abs=1)


@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_shrunk_picture_has_lost_what_is_finer_than_its_pixels_and_nothing_else(channels: int) -> None:
    processor = ImageProcessor(channels=channels, content_size=(16, 16), image_size=(16, 16))
    rows = torch.arange(16)
    board = ((rows[:, None] + rows) % 2 * 255).to(torch.uint8).expand(1, channels, 16, 16)
    slope = (rows * 15).to(torch.uint8).expand(1, channels, 16, 16)
    kinds: list[Degradation] = ["downscale-2x", "downscale-4x"]
    for kind in kinds:
        inside = (..., slice(6, 10), slice(6, 10))  # edges are repeated
        assert (degraded(board, kind, processor, [0]).float()[inside] - 127.5).abs().max() < 20
        assert (degraded(slope, kind, processor, [0]).float() - slope.float())[inside].abs().max() <= 4
    assert shrunk(slope[0], 4) is not None


def test_a_user_s_small_picture_has_the_latents_that_the_prior_was_trained_on(codes: CodeCache) -> None:
    tokenizer, source = tiny_tokenizer(), tiny_source()
    originals = ImageLoader(source.train, tokenizer.config.image_processor)[range(5)]
    small = [shrunk(picture, 2) for picture in originals]
    given = Edit.of(tokenizer, small, None, latents=True).codes
    first_batch = len(source.train)  # smaller than one, whose originals come before its mirror images
    kept = codes.train.latents(np.arange(5), "degraded")
    torch.testing.assert_close(kept, given, rtol=1e-3, atol=1e-3)  # float16
    assert (kept - codes.train.latents(np.arange(5))).abs().max() > 0.1
    mirrored = [shrunk(picture.flip(-1), 2) for picture in originals]
    flipped = Edit.of(tokenizer, mirrored, None, latents=True).codes
    torch.testing.assert_close(
        codes.train.latents(np.arange(5) + first_batch, "degraded"), flipped, rtol=1e-3, atol=1e-3
    )


def test_the_network_sees_what_it_restores_and_learns_from_it(codes: CodeCache, tmp_path: Path) -> None:
    config = DiffusionTraining(
        output=tmp_path / "run", codes=codes.path, model=MODEL, degradation="downscale-2x", batch_size=8
    )
    objective = DiffusionObjective(config, codes)
    prior = objective.new_prior()
    torch.nn.init.normal_(prior.denoiser.final.weight, std=0.2, generator=seeded(0))
    inputs = list(objective.inputs(np.arange(8), torch.full((8, 2), 0.5, dtype=torch.float64), 1))
    assert torch.equal(inputs[5], codes.train.latents(np.arange(8), "degraded"))  # type: ignore[arg-type]
    loss = prior(*inputs).total
    inputs[5] = inputs[5].flip(0)  # type: ignore[union-attr]
    assert prior(*inputs).total != loss
    assert objective.validation(prior.eval())["validation_squared_error"] > 0


def test_codes_of_another_degradation_are_refused(codes: CodeCache, tmp_path: Path) -> None:
    config = DiffusionTraining(output=tmp_path / "run", codes=codes.path, model=MODEL, degradation="noise")
    with pytest.raises(UserError, match="has the degradation downscale-2x and the prior is to undo noise"):
        DiffusionObjective(config, codes)


def test_a_pipeline_restores_the_pictures_it_is_given() -> None:
    pipeline, originals, latents = restoring_pipeline(), pictures(3), list[Tensor]()

    def note(pipeline: LatentGenerationPipeline, step: int, time: int, values: dict[str, Any]) -> None:
        latents.append(values["latents"])

    small = [shrunk(picture, 2) for picture in originals]
    images = pipeline(image=small, generator=seeded(0), output_type="pt").images
    assert isinstance(images, Tensor)
    assert images.shape == (3, 1, 14, 14)
    edit = Edit.of(pipeline.tokenizer, small, None, latents=True)
    again = pipeline.sample_pixels(torch.tensor([-1] * 3), seeded(0), known=KnownCodes.for_restoration(edit.codes))
    torch.testing.assert_close(images, again)
    for given in (small, small[::-1]):  # a codebook hides small changes of latents
        pipeline(image=given, generator=seeded(0), callback_on_step_end=note)
    torch.testing.assert_close(latents[3][1], latents[7][1], rtol=0, atol=1e-4)
    assert (latents[3][0] - latents[7][0]).abs().max() > 0.01


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "was given none; expected image="),
        ({"image": 0, "mask_image": 0}, "expected image alone"),
        ({"image": 0, "strength": 0.5}, "expected image alone"),
    ],
)
def test_what_a_restoring_pipeline_cannot_do_is_refused(given: dict[str, Any], words: str) -> None:
    picture = np.zeros((14, 14), np.uint8)
    with pytest.raises(UserError, match=words):
        restoring_pipeline()("cat", **{name: picture if value == 0 else value for name, value in given.items()})


def test_restorations_are_measured_beside_what_was_given() -> None:
    pipeline, source = restoring_pipeline("noise"), tiny_source()
    images = ImageLoader(source.validation, pipeline.tokenizer.config.image_processor)
    assert isinstance(pipeline.prior, DiffusionPrior)
    found = Restorations(pipeline, images, 7, seed=0)
    restored = torch.cat(list(found.batches()))
    assert len(restored) == len(found.labels) == 7
    labels = images.labels()
    assert labels is not None
    assert found.labels.tolist() == labels[:7]
    worse = degraded(images[range(7)], "noise", pipeline.tokenizer.config.image_processor, range(7))
    errors = [(x.float() - images[range(7)].float()).square().flatten(1).mean(1) for x in (worse, restored)]
    expected = [float((10 * (255**2 / error).log10()).mean()) for error in errors]
    assert list(found.figures().values()) == pytest.approx(expected, rel=1e-4)
