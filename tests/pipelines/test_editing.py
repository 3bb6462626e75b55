"""Editing through the pipeline: what stays stays exactly, and what does not fit is refused."""

import io
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from command_line import latentloom
from PIL import ExifTags, Image
from tiny_models import LABEL_NAMES, diffusion_pipeline, seeded, tiny_pipeline, tiny_prior, tiny_tokenizer

from pipelines.editing import Edit, filled
from pipelines.latent_generation import LatentGenerationPipeline
from stage1_tokenizer.data.image_processor import to_pil
from stage1_tokenizer.vqgan import VQGAN
from stage2_prior.diffusion.sampling import SamplerName
from training_harness.errors import UserError

LEFT = np.zeros((14, 14), dtype=np.uint8)
LEFT[:, :7] = 255  # white: drawn


def pictures(count: int, size: int = 14) -> list[Image.Image]:
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


@pytest.mark.parametrize("make", [tiny_pipeline, any_order_pipeline, residual_pipeline, diffusion_pipeline])
def test_kept_pixels_of_an_inpainting_are_byte_for_byte_the_picture_s(make: Any) -> None:
    originals = pictures(3)
    mask = Image.fromarray(LEFT)
    images = make()(["cat", "dog", "7"], image=originals, mask_image=mask, generator=seeded(0)).images
    for original, image in zip(originals, images, strict=True):
        before, after = np.asarray(original), np.asarray(image)
        assert np.array_equal(before[:, 7:], after[:, 7:])
        assert not np.array_equal(before[:, :7], after[:, :7])


def test_codes_that_the_hole_does_not_touch_are_those_of_the_picture() -> None:
    pipeline, seen = tiny_pipeline(), []
    image, mask = pictures(1)[0], Image.fromarray(LEFT)
    pipeline(
        0,
        image=image,
        mask_image=mask,
        generator=seeded(0),
        callback_on_step_end=lambda p, i, t, k: seen.append(k["tokens"]),
    )
    edit = Edit.of(pipeline.tokenizer, image, mask)
    # Padded by one on each side, 16 pixels in fours: columns 0 to 6 of 14 are places 0 and 1.
    assert edit.masked_region[0].all(0).tolist() == [True, True, False, False]
    assert torch.equal(seen[-1][0][~edit.masked_region[0]], edit.codes[0][~edit.masked_region[0]])


@pytest.mark.parametrize("sampler", get_args(SamplerName))
def test_latents_that_the_hole_does_not_touch_are_those_of_the_picture(sampler: SamplerName) -> None:
    pipeline, seen = diffusion_pipeline(sampler=sampler), []
    image, mask = pictures(1)[0], Image.fromarray(LEFT)
    pipeline(
        0,
        image=image,
        mask_image=mask,
        generator=seeded(0),
        callback_on_step_end=lambda p, i, t, k: seen.append(k["latents"]),
    )
    edit = Edit.of(pipeline.tokenizer, image, mask, latents=True)
    known_mask = ~edit.masked_region.expand(1, 4, 4, 4)
    torch.testing.assert_close(seen[-1][known_mask], edit.codes[known_mask], rtol=0, atol=1e-5)
    assert not torch.allclose(seen[-1][~known_mask], edit.codes[~known_mask], atol=0.1)


def test_a_variation_goes_on_from_as_much_of_the_picture_as_its_strength_leaves() -> None:
    pipeline, image = diffusion_pipeline(num_inference_steps=50), pictures(1)[0]
    own = Edit.of(pipeline.tokenizer, image, None, latents=True).codes

    def drawn(**edited: Any) -> torch.Tensor:
        steps = list[torch.Tensor]()
        pipeline(0, generator=seeded(0), callback_on_step_end=lambda p, i, t, k: steps.append(k["latents"]), **edited)
        assert len(steps) == round(50 * edited.get("strength", 1))
        return steps[-1]

    whole = drawn()
    torch.testing.assert_close(
        drawn(image=image, strength=1.0), whole, rtol=0, atol=1e-3
    )  # nothing of the picture is left
    far, near = ((drawn(image=image, strength=s) - own).square().mean() for s in (0.9, 0.02))
    assert near < far


@pytest.mark.parametrize("make", [tiny_pipeline, diffusion_pipeline])
def test_what_stands_in_the_hole_changes_nothing(make: Any) -> None:
    pipeline, mask = make(), Image.fromarray(LEFT)
    one = np.asarray(pictures(1)[0])
    other = np.where(LEFT == 255, 255 - one, one)
    drawn = [
        pipeline(0, image=Image.fromarray(x), mask_image=mask, generator=seeded(0), output_type="np").images
        for x in (one, other)
    ]
    assert np.array_equal(*drawn)


def test_a_hole_is_filled_with_the_mean_of_what_is_nearest() -> None:
    ramp = torch.arange(8).repeat(8, 1).mul(10).to(torch.uint8)[None, None]
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    mask[..., 3, 3] = True
    assert torch.equal(filled(ramp, mask), ramp)  # around one pixel of a ramp the mean is its own value
    everything = torch.ones_like(mask)
    assert (filled(ramp, everything) == 127).all()
    mask[..., :, 2:] = True
    found = filled(ramp, mask)
    assert torch.equal(found[..., :2], ramp[..., :2])
    assert (found[..., 2:] <= 10).all()


@pytest.mark.parametrize("make", [tiny_pipeline, any_order_pipeline])
@pytest.mark.parametrize("strength", [0.25, 0.75])
def test_strength_is_the_share_of_codes_that_are_drawn(make: Any, strength: float) -> None:
    pipeline = make()
    edit = Edit.of(pipeline.tokenizer, pictures(2), None)
    known = edit.known(strength, pipeline.prior.supports_any_order, [seeded(0), seeded(1)])
    assert (~known.known_mask).flatten(1).sum(1).tolist() == [16 * strength] * 2
    if pipeline.prior.supports_any_order:
        assert not torch.equal(known.known_mask[0], known.known_mask[1])
    else:
        assert known.known_mask.flatten(1)[:, : round(16 * (1 - strength))].all(), "a prefix"


def test_a_variation_of_full_strength_is_a_sample_and_a_weak_one_is_near_the_picture() -> None:
    pipeline, image = tiny_pipeline(), pictures(1)[0]
    plain = pipeline("dog", generator=seeded(3), output_type="np").images
    assert np.array_equal(
        pipeline("dog", image=image, strength=1.0, generator=seeded(3), output_type="np").images, plain
    )
    rebuilt = pipeline.decode(Edit.of(pipeline.tokenizer, image, None).codes)
    weak = pipeline("dog", image=image, strength=0.05, generator=seeded(3), output_type="pt").images
    assert (weak - rebuilt).abs().mean() < (torch.from_numpy(plain).permute(0, 3, 1, 2) - rebuilt).abs().mean()


def test_one_picture_serves_several_labels_and_one_label_several_pictures() -> None:
    pipeline = tiny_pipeline()
    assert len(pipeline(["cat", "dog"], 2, image=pictures(1), generator=seeded(0)).images) == 4
    assert len(pipeline("cat", image=pictures(3), generator=seeded(0)).images) == 3
    with pytest.raises(UserError, match="3 images were given for 2 class labels"):
        pipeline(["cat", "dog"], image=pictures(3))


def test_a_photograph_stored_on_its_side_is_edited_as_it_is_seen() -> None:
    upright = np.arange(14 * 10, dtype=np.uint8).reshape(14, 10)
    stored = Image.fromarray(np.rot90(upright).copy())
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # to be turned clockwise
    file = io.BytesIO()
    stored.save(file, format="PNG", exif=exif)
    mask = np.zeros((14, 10), dtype=np.uint8)
    mask[:7] = 255
    tokenizer = tiny_tokenizer()
    turned = Edit.of(tokenizer, Image.open(file), Image.fromarray(mask))
    plain = Edit.of(tokenizer, Image.fromarray(upright), Image.fromarray(mask))
    assert torch.equal(turned.originals, plain.originals)
    assert torch.equal(turned.mask, plain.mask)
    with pytest.raises(UserError, match="the mask is 10×14 and its image 14×10"):
        Edit.of(tokenizer, Image.open(file), Image.fromarray(mask.T))


def test_pictures_are_encoded_in_batches_of_the_size_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, sizes = tiny_pipeline(), list[int]()
    encode = VQGAN.encode_indices
    monkeypatch.setattr(VQGAN, "encode_indices", lambda self, x: (sizes.append(len(x)), encode(self, x))[1])
    pipeline("cat", image=pictures(5), batch_size=2, generator=seeded(0))
    assert sizes == [2, 2, 1]
    with pytest.raises(UserError, match="image is empty; expected a picture"):
        pipeline("cat", image=[])


def test_the_label_decides_what_is_drawn_in_a_hole() -> None:
    pipeline, mask = tiny_pipeline(), Image.fromarray(LEFT)
    one, other = (
        pipeline(name, image=pictures(4), mask_image=mask, generator=seeded(0), output_type="np").images
        for name in ("cat", "dog")
    )
    assert np.array_equal(one[:, :, 7:], other[:, :, 7:])
    assert not np.array_equal(one[:, :, :7], other[:, :, :7])


def test_a_picture_is_continued_beyond_its_edge() -> None:
    picture = np.asarray(pictures(1)[0])[:, :7]
    canvas = np.full((14, 14), 255, dtype=np.uint8)
    canvas[:, 7:] = picture
    for make in (tiny_pipeline, diffusion_pipeline):
        (image,) = make()(
            "cat", image=Image.fromarray(canvas), mask_image=Image.fromarray(LEFT), generator=seeded(0)
        ).images
        assert np.array_equal(np.asarray(image)[:, 7:], picture)
        assert len(np.unique(np.asarray(image)[:, :7])) > 10


def test_pictures_come_as_pil_arrays_or_tensors_alike() -> None:
    tokenizer, picture = tiny_tokenizer(), pictures(1)[0]
    array = np.asarray(picture)
    ways = [picture, array, array / 255, torch.from_numpy(array.copy())[None], array[None, :, :, None]]
    found = [Edit.of(tokenizer, way, None).originals for way in ways]
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_picture_of_another_size_is_fitted_with_its_mask() -> None:
    mask = np.zeros((28, 28), dtype=np.uint8)
    mask[:, :14] = 255
    edit = Edit.of(tiny_tokenizer(), pictures(1, 28)[0], mask)
    assert edit.originals.shape == (1, 1, 14, 14)
    assert edit.mask[0, 0].all(0).tolist() == [True] * 7 + [False] * 7


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mask_image": LEFT}, "mask_image was given without image"),
        ({"strength": 0.5}, "strength was given without image"),
        ({"image": pictures(1), "strength": 1.5}, r"strength is 1.5; expected a share in \(0, 1\]"),
        ({"image": pictures(1), "strength": 0.0}, "strength is 0.0"),
        (
            {"image": pictures(1), "mask_image": LEFT[:7]},
            "the mask is 7×14 and its image 14×14; expected the same size",
        ),
        ({"image": pictures(3), "mask_image": [LEFT, LEFT]}, "2 masks were given for 3 images"),
        ({"image": np.full((14, 14), 3.0)}, r"values from 3 to 3; expected \[0, 1\], or uint8"),
    ],
)
def test_what_does_not_fit_is_one_line(given: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        tiny_pipeline()(0, **given)
    assert "\n" not in str(caught.value)


def test_the_command_inpaints_and_refuses_a_mask_without_a_picture(tmp_path: Path, capsys: Any) -> None:
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    picture, mask = pictures(1)[0], tmp_path / "mask.png"
    picture.save(tmp_path / "picture.png")
    Image.fromarray(LEFT).save(mask)
    words = [
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
    assert latentloom(*words, "--image", tmp_path / "picture.png", "--mask-image", mask) == 0
    files = sorted((tmp_path / "out").glob("0*.png"))
    assert len(files) == 2
    for file in files:
        assert np.array_equal(np.asarray(Image.open(file))[:, 7:], np.asarray(picture)[:, 7:])
    assert latentloom(*words, "--overwrite", "--mask-image", mask) == 2
    assert latentloom(*words, "--overwrite", "--image", tmp_path / "pipeline" / "model_index.json") == 2
    said = capsys.readouterr().err.splitlines()
    assert "mask_image was given without image" in said[-2]
    assert "model_index.json could not be read" in said[-1]
