"""Editing with the pipeline: unmasked pixels stay exactly equal, and invalid arguments are errors."""

import io
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from command_line import latentloom
from PIL import ExifTags, Image
from tiny_models import LABEL_NAMES, diffusion_pipeline, seeded, tiny_pipeline, tiny_prior, tiny_tokenizer

from pipelines.editing import Edit, fill_masked_pixels
from pipelines.latent_generation import LatentGenerationPipeline
from stage1_tokenizer.data.image_processor import to_pil
from stage1_tokenizer.vqgan import VQGAN
from stage2_prior.diffusion.sampling import SamplerName
from training_harness.errors import UserError

LEFT = np.zeros((14, 14), dtype=np.uint8)
LEFT[:, :7] = 255  # white: generated


def random_images(count: int, size: int = 14) -> list[Image.Image]:
    return to_pil(torch.randint(256, (count, 1, size, size), generator=seeded(7), dtype=torch.uint8))


def any_order_pipeline() -> LatentGenerationPipeline:
    tokenizer = tiny_tokenizer()
    spec = tokenizer.latent_spec()
    prior = tiny_prior(
        height=spec.height, width=spec.width, tokenizer_id=spec.tokenizer_id, learned_positions=True, random_order=1.0
    )
    pipeline = LatentGenerationPipeline(tokenizer, prior, LABEL_NAMES)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def residual_pipeline() -> LatentGenerationPipeline:
    tokenizer = tiny_tokenizer(quantizer={"name": "residual", "depth": 2})
    spec = tokenizer.latent_spec()
    prior = tiny_prior(height=spec.height, width=spec.width, levels=2, tokenizer_id=spec.tokenizer_id)
    return LatentGenerationPipeline(tokenizer, prior, LABEL_NAMES)


@pytest.mark.parametrize("make_pipeline", [tiny_pipeline, any_order_pipeline, residual_pipeline, diffusion_pipeline])
def test_unmasked_pixels_of_an_inpainting_equal_the_original_byte_for_byte(make_pipeline: Any) -> None:
    originals = random_images(3)
    mask = Image.fromarray(LEFT)
    images = make_pipeline()(["cat", "dog", "7"], image=originals, mask_image=mask, generator=seeded(0)).images
    for original, image in zip(originals, images, strict=True):
        before, after = np.asarray(original), np.asarray(image)
        assert np.array_equal(before[:, 7:], after[:, 7:])
        assert not np.array_equal(before[:, :7], after[:, :7])


def test_codes_outside_the_masked_region_stay_equal() -> None:
    pipeline, states = tiny_pipeline(), []
    image, mask = random_images(1)[0], Image.fromarray(LEFT)
    pipeline(
        0,
        image=image,
        mask_image=mask,
        generator=seeded(0),
        callback_on_step_end=lambda p, i, t, k: states.append(k["tokens"]),
    )
    edit = Edit.from_images(pipeline.tokenizer, image, mask)
    # Padding adds one pixel on each side, and a position covers four pixels: columns 0 to 6 of 14 are positions 0 and 1.
    assert edit.masked_region[0].all(0).tolist() == [True, True, False, False]
    assert torch.equal(states[-1][0][~edit.masked_region[0]], edit.codes[0][~edit.masked_region[0]])


@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_latents_outside_the_masked_region_stay_equal(sampler: SamplerName) -> None:
    pipeline, states = diffusion_pipeline(sampler=sampler), []
    image, mask = random_images(1)[0], Image.fromarray(LEFT)
    pipeline(
        0,
        image=image,
        mask_image=mask,
        generator=seeded(0),
        callback_on_step_end=lambda p, i, t, k: states.append(k["latents"]),
    )
    edit = Edit.from_images(pipeline.tokenizer, image, mask, latents=True)
    known_mask = ~edit.masked_region.expand(1, 4, 4, 4)
    torch.testing.assert_close(states[-1][known_mask], edit.codes[known_mask], rtol=0, atol=1e-5)
    assert not torch.allclose(states[-1][~known_mask], edit.codes[~known_mask], atol=0.1)


def test_a_variation_of_low_strength_is_nearer_to_the_original_latents() -> None:
    pipeline, image = diffusion_pipeline(num_inference_steps=50), random_images(1)[0]
    original_latents = Edit.from_images(pipeline.tokenizer, image, None, latents=True).codes

    def sample_latents(**arguments: Any) -> torch.Tensor:
        steps = list[torch.Tensor]()
        pipeline(
            0, generator=seeded(0), callback_on_step_end=lambda p, i, t, k: steps.append(k["latents"]), **arguments
        )
        assert len(steps) == round(50 * arguments.get("strength", 1))
        return steps[-1]

    # at strength 1 nothing of the image is left
    torch.testing.assert_close(sample_latents(image=image, strength=1.0), sample_latents(), rtol=0, atol=1e-3)
    far, near = ((sample_latents(image=image, strength=s) - original_latents).square().mean() for s in (0.9, 0.02))
    assert near < far


@pytest.mark.parametrize("make_pipeline", [tiny_pipeline, diffusion_pipeline])
def test_pixels_in_the_masked_region_change_nothing(make_pipeline: Any) -> None:
    pipeline, mask = make_pipeline(), Image.fromarray(LEFT)
    image = np.asarray(random_images(1)[0])
    changed_image = np.where(LEFT == 255, 255 - image, image)
    edited = [
        pipeline(0, image=Image.fromarray(x), mask_image=mask, generator=seeded(0), output_type="np").images
        for x in (image, changed_image)
    ]
    assert np.array_equal(*edited)


def test_masked_pixels_are_filled_with_the_mean_of_the_nearest_pixels() -> None:
    ramp = torch.arange(8).repeat(8, 1).mul(10).to(torch.uint8)[None, None]
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 3, 3] = True
    assert torch.equal(fill_masked_pixels(ramp, mask), ramp)  # the mean around one pixel of a ramp is its own value
    full_mask = torch.ones_like(mask)
    assert (fill_masked_pixels(ramp, full_mask) == 127).all()
    mask[..., :, 2:] = True
    filled = fill_masked_pixels(ramp, mask)
    assert torch.equal(filled[..., :2], ramp[..., :2])
    assert (filled[..., 2:] <= 10).all()


@pytest.mark.parametrize("make_pipeline", [tiny_pipeline, any_order_pipeline])
@pytest.mark.parametrize("strength", [0.25, 0.75])
def test_strength_is_the_share_of_codes_that_are_generated(make_pipeline: Any, strength: float) -> None:
    pipeline = make_pipeline()
    edit = Edit.from_images(pipeline.tokenizer, random_images(2), None)
    known = edit.select_known_codes(strength, pipeline.prior.supports_any_order, [seeded(0), seeded(1)])
    assert (~known.known_mask).flatten(1).sum(1).tolist() == [16 * strength] * 2
    if pipeline.prior.supports_any_order:
        assert not torch.equal(known.known_mask[0], known.known_mask[1])
    else:
        assert known.known_mask.flatten(1)[:, : round(16 * (1 - strength))].all(), "a prefix"


def test_a_variation_of_strength_one_is_a_sample_and_one_of_low_strength_is_near_the_image() -> None:
    pipeline, image = tiny_pipeline(), random_images(1)[0]
    sample = pipeline("dog", generator=seeded(3), output_type="np").images
    assert np.array_equal(
        pipeline("dog", image=image, strength=1.0, generator=seeded(3), output_type="np").images, sample
    )
    reconstruction = pipeline.decode(Edit.from_images(pipeline.tokenizer, image, None).codes)
    variation = pipeline("dog", image=image, strength=0.05, generator=seeded(3), output_type="pt").images
    assert (variation - reconstruction).abs().mean() < (
        torch.from_numpy(sample).permute(0, 3, 1, 2) - reconstruction
    ).abs().mean()


def test_one_image_is_used_for_several_labels_and_one_label_for_several_images() -> None:
    pipeline = tiny_pipeline()
    assert len(pipeline(["cat", "dog"], 2, image=random_images(1), generator=seeded(0)).images) == 4
    assert len(pipeline("cat", image=random_images(3), generator=seeded(0)).images) == 3
    with pytest.raises(UserError, match="3 images were given for 2 class labels"):
        pipeline(["cat", "dog"], image=random_images(3))


def test_a_photograph_with_an_exif_rotation_is_edited_upright() -> None:
    upright = np.arange(14 * 10, dtype=np.uint8).reshape(14, 10)
    stored = Image.fromarray(np.rot90(upright).copy())
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # display it rotated clockwise
    file = io.BytesIO()
    stored.save(file, format="PNG", exif=exif)
    mask = np.zeros((14, 10), dtype=np.uint8)
    mask[:7] = 255
    tokenizer = tiny_tokenizer()
    from_rotated_file = Edit.from_images(tokenizer, Image.open(file), Image.fromarray(mask))
    expected = Edit.from_images(tokenizer, Image.fromarray(upright), Image.fromarray(mask))
    assert torch.equal(from_rotated_file.originals, expected.originals)
    assert torch.equal(from_rotated_file.mask, expected.mask)
    with pytest.raises(UserError, match="the mask is 10×14 and its image 14×10"):
        Edit.from_images(tokenizer, Image.open(file), Image.fromarray(mask.T))


def test_images_are_encoded_in_batches_of_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, sizes = tiny_pipeline(), list[int]()
    encode = VQGAN.encode_indices
    monkeypatch.setattr(VQGAN, "encode_indices", lambda self, x: (sizes.append(len(x)), encode(self, x))[1])
    pipeline("cat", image=random_images(5), batch_size=2, generator=seeded(0))
    assert sizes == [2, 2, 1]
    with pytest.raises(UserError, match="image is empty; expected one image"):
        pipeline("cat", image=[])


def test_the_label_changes_what_is_generated_in_the_masked_region() -> None:
    pipeline, mask = tiny_pipeline(), Image.fromarray(LEFT)
    cats, dogs = (
        pipeline(name, image=random_images(4), mask_image=mask, generator=seeded(0), output_type="np").images
        for name in ("cat", "dog")
    )
    assert np.array_equal(cats[:, :, 7:], dogs[:, :, 7:])
    assert not np.array_equal(cats[:, :, :7], dogs[:, :, :7])


def test_an_image_is_extended_beyond_its_edge() -> None:
    original = np.asarray(random_images(1)[0])[:, :7]
    canvas = np.full((14, 14), 255, dtype=np.uint8)
    canvas[:, 7:] = original
    for make_pipeline in (tiny_pipeline, diffusion_pipeline):
        (image,) = make_pipeline()(
            "cat", image=Image.fromarray(canvas), mask_image=Image.fromarray(LEFT), generator=seeded(0)
        ).images
        assert np.array_equal(np.asarray(image)[:, 7:], original)
        assert len(np.unique(np.asarray(image)[:, :7])) > 10


def test_pil_images_arrays_and_tensors_are_read_alike() -> None:
    tokenizer, image = tiny_tokenizer(), random_images(1)[0]
    array = np.asarray(image)
    inputs = [image, array, array / 255, torch.from_numpy(array.copy())[None], array[None, :, :, None]]
    originals = [Edit.from_images(tokenizer, x, None).originals for x in inputs]
    assert all(torch.equal(originals[0], x) for x in originals[1:])


def test_an_image_of_another_size_is_resized_together_with_its_mask() -> None:
    mask = np.zeros((28, 28), dtype=np.uint8)
    mask[:, :14] = 255
    edit = Edit.from_images(tiny_tokenizer(), random_images(1, 28)[0], mask)
    assert edit.originals.shape == (1, 1, 14, 14)
    assert edit.mask[0, 0].all(0).tolist() == [True] * 7 + [False] * 7


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_image": LEFT}, "mask_image was given without image"),
        ({"strength": 0.5}, "strength was given without image"),
        ({"image": random_images(1), "strength": 1.5}, r"strength is 1.5; expected a share in \(0, 1\]"),
        ({"image": random_images(1), "strength": 0.0}, "strength is 0.0"),
        (
            {"image": random_images(1), "mask_image": LEFT[:7]},
            "the mask is 7×14 and its image 14×14; expected the same size",
        ),
        ({"image": random_images(3), "mask_image": [LEFT, LEFT]}, "2 masks were given for 3 images"),
        ({"image": np.full((14, 14), 3.0)}, r"values from 3 to 3; expected values in \[0, 1\], or dtype uint8"),
    ],
)
def test_invalid_arguments_are_a_one_line_error(arguments: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        tiny_pipeline()(0, **arguments)
    assert "\n" not in str(caught.value)


def test_the_command_inpaints_and_a_mask_without_an_image_is_an_error(tmp_path: Path, capsys: Any) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    image, mask = random_images(1)[0], tmp_path / "mask.png"
    image.save(tmp_path / "image.png")
    Image.fromarray(LEFT).save(mask)
    arguments = [
        "sample",
        "--pipeline",
        tmp_path / "pipeline",
        "--output",
        tmp_path / "out",
        "--num-images",
        2,
        "--classes",
        "cat",
    ]
    assert latentloom(*arguments, "--image", tmp_path / "image.png", "--mask-image", mask) == 0
    files = sorted((tmp_path / "out").glob("0*.png"))
    assert len(files) == 2
    for file in files:
        assert np.array_equal(np.asarray(Image.open(file))[:, 7:], np.asarray(image)[:, 7:])
    assert latentloom(*arguments, "--overwrite", "--mask-image", mask) == 2
    assert latentloom(*arguments, "--overwrite", "--image", tmp_path / "pipeline" / "model_index.json") == 2
    errors = capsys.readouterr().err.splitlines()
    assert "mask_image was given without image" in errors[-2]
    assert "model_index.json could not be read" in errors[-1]
