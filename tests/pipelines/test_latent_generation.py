"""Calls of the pipeline: classes, generators, batches, outputs, devices."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import LABEL_NAMES, seeded, tiny_pipeline, tiny_prior, tiny_tokenizer
from torch import Tensor
from torch.testing import assert_close

from pipelines.latent_generation import ImagePipelineOutput, LatentGenerationPipeline
from stage2_prior.prior import UNKNOWN
from training_harness.errors import SpecMismatchError, UserError


@pytest.fixture(scope="module")
def pipeline() -> LatentGenerationPipeline:
    return tiny_pipeline()


def sample_with_codes(pipeline: LatentGenerationPipeline, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """Sample images (N, C, H, W) in [0, 1]; return them with their codes (N, h, w)."""
    codes: list[Tensor] = []

    def record_codes(pipe: LatentGenerationPipeline, step: int, timestep: int, values: dict[str, Any]) -> None:
        if step == pipe.tokenizer.latent_spec().tokens - 1:
            codes.append(values["tokens"].clone())

    images = pipeline(*arguments, output_type="pt", callback_on_step_end=record_codes, **options).images
    return images, torch.cat(codes)


# -- randomness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 1.8])
def test_the_images_do_not_depend_on_the_batch_size(pipeline: LatentGenerationPipeline, guidance_scale: float) -> None:
    # The codes are equal. Rounding in a convolution can depend on the batch, so the pixels are equal to 1e-5.
    runs = [
        sample_with_codes(
            pipeline, [0, 1, 2, 0], 2, batch_size=size, generator=seeded(3), guidance_scale=guidance_scale
        )
        for size in (None, 1, 3, 8)
    ]
    images, codes = runs[0]
    assert images.shape == (8, 1, 14, 14)
    assert len({tuple(row.flatten().tolist()) for row in codes}) == 8
    for run_images, run_codes in runs[1:]:
        assert torch.equal(run_codes, codes)
        assert_close(run_images, images, rtol=0, atol=1e-5)


def test_one_generator_yields_the_seeds_of_all_images_before_sampling(pipeline: LatentGenerationPipeline) -> None:
    seeds = torch.randint(2**63 - 1, (4,), generator=seeded(5)).tolist()
    images, codes = sample_with_codes(pipeline, [0, 1], 2, generator=seeded(5))
    expected_images, expected_codes = sample_with_codes(
        pipeline, [0, 1], 2, generator=[seeded(seed) for seed in seeds], batch_size=3
    )
    assert torch.equal(codes, expected_codes)
    assert_close(images, expected_images, rtol=0, atol=1e-5)
    _, codes_of_five = sample_with_codes(pipeline, [0, 0, 1, 1, 2], generator=seeded(5))
    assert torch.equal(codes_of_five[:4], codes), "another image changed the first ones"
    _, single_code = sample_with_codes(pipeline, 1, generator=[seeded(seeds[2])])
    assert torch.equal(single_code[0], codes[2])


def test_the_same_seed_repeats_the_images_and_another_or_no_seed_does_not(pipeline: LatentGenerationPipeline) -> None:
    images, codes = sample_with_codes(pipeline, [0, 1], generator=seeded(0))
    repeated_images, _ = sample_with_codes(pipeline, [0, 1], generator=seeded(0))
    assert torch.equal(images, repeated_images)
    assert not torch.equal(codes, sample_with_codes(pipeline, [0, 1], generator=seeded(1))[1])
    torch.manual_seed(0)
    first = sample_with_codes(pipeline, [0, 1])[1]
    torch.manual_seed(0)
    assert not torch.equal(first, sample_with_codes(pipeline, [0, 1])[1]), (
        "without a generator the global seed was used"
    )


def test_a_wrong_number_of_generators_is_an_error(pipeline: LatentGenerationPipeline) -> None:
    with pytest.raises(
        UserError, match="3 generators were given for 4 images; expected one generator, or one for each image"
    ):
        pipeline([0, 1], 2, generator=[seeded(i) for i in range(3)])


# -- classes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("class_labels", "ids"),
    [
        (None, [-1]),
        (1, [1]),
        ("dog", [1]),
        ("1", [1]),
        ("7", [2]),  # a name of digits is a name, not an id
        (7 - 5, [2]),
        (["cat", 1, "2"], [0, 1, 2]),
        (("dog", "dog"), [1, 1]),
        (range(3), [0, 1, 2]),
        (np.array([2, 0]), [2, 0]),
        (torch.tensor([2, 0]), [2, 0]),
    ],
)
def test_one_or_several_classes_are_selected_by_id_name_or_digits(
    pipeline: LatentGenerationPipeline, class_labels: Any, ids: list[int]
) -> None:
    assert pipeline.label_ids(class_labels) == ids


def test_names_and_ids_give_the_same_images_label_after_label(
    pipeline: LatentGenerationPipeline,
) -> None:
    images, codes = sample_with_codes(pipeline, ["dog", "cat"], 2, generator=seeded(0))
    assert torch.equal(images, sample_with_codes(pipeline, [1, 1, 0, 0], generator=seeded(0))[0])
    assert not torch.equal(codes, sample_with_codes(pipeline, ["cat", "dog"], 2, generator=seeded(0))[1])


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("cta", "no class 'cta'; did you mean 'cat'"),
        ("zebra crossing", "no class 'zebra crossing'; expected one of: cat, dog, 7"),
        (3, "no class 3; expected an id from 0 to 2"),
        (-1, "no class -1; expected an id from 0 to 2"),
        ("12", "no class '12'; expected an id from 0 to 2"),
        (["cat", "og"], "no class 'og'; did you mean 'dog'"),
        ([], "class_labels is empty"),
    ],
)
def test_the_error_for_an_unknown_class_names_it_and_the_valid_classes(
    pipeline: LatentGenerationPipeline, label: Any, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pipeline(label)


def test_the_error_for_a_pipeline_without_names_or_classes_says_so() -> None:
    with pytest.raises(UserError, match="no class 'cat'; expected an id from 0 to 2"):
        tiny_pipeline(label_names=None)("cat")
    tokenizer = tiny_tokenizer()
    unlabelled = LatentGenerationPipeline(tokenizer, tiny_prior(num_classes=0, tokenizer_id=tokenizer.compute_id()))
    with pytest.raises(UserError, match="trained without classes; leave it out"):
        unlabelled(0)
    assert len(unlabelled(num_images_per_label=3).images) == 3


# -- options ----------------------------------------------------------------------------------------------------------


def test_an_option_of_another_prior_is_an_error_with_the_valid_options(
    pipeline: LatentGenerationPipeline,
) -> None:
    with pytest.raises(UserError) as caught:
        pipeline(0, num_inference_steps=25)
    assert str(caught.value) == (
        "num_inference_steps is no option of a AutoregressivePrior; "
        "expected any of: guidance_scale, guidance_schedule, temperature, top_k, top_p, min_p, weights, num_candidates"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_images_per_label": 0}, "num_images_per_label is 0; expected at least 1"),
        ({"num_images_per_label": -2}, "num_images_per_label is -2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"output_type": "jpg"}, "output_type is 'jpg'; expected 'pil', 'np' or 'pt'"),
        ({"top_p": 0}, "top_p is 0"),
    ],
)
def test_the_error_for_an_argument_out_of_range_names_it(
    pipeline: LatentGenerationPipeline, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pipeline(0, **arguments)


def test_options_reach_the_prior_and_none_means_the_default_of_the_pipeline(pipeline: LatentGenerationPipeline) -> None:
    default = sample_with_codes(pipeline, 0, 4, generator=seeded(0))[1]
    assert torch.equal(sample_with_codes(pipeline, 0, 4, generator=seeded(0), top_k=None)[1], default)
    greedy = sample_with_codes(pipeline, 0, 4, generator=seeded(0), top_k=1)[1]
    assert (greedy == greedy[:1]).all()
    assert not torch.equal(greedy, default)


# -- outputs ----------------------------------------------------------------------------------------------------------


def test_the_three_output_types_contain_the_same_images(pipeline: LatentGenerationPipeline) -> None:
    def images(output_type: Any) -> Any:
        output = pipeline([0, 1], 2, generator=seeded(0), output_type=output_type)
        assert isinstance(output, ImagePipelineOutput)
        return output.images

    pt, array, pil = images("pt"), images("np"), images("pil")
    assert (pt.shape, pt.dtype) == ((4, 1, 14, 14), torch.float32)
    assert (array.shape, array.dtype) == ((4, 14, 14, 1), np.float32)
    assert pt.min() >= 0
    assert pt.max() <= 1
    assert pt.std() > 0.01, "constant images would always be equal"
    assert np.array_equal(array, pt.permute(0, 2, 3, 1).numpy())
    assert all(isinstance(image, Image.Image) and image.mode == "L" for image in pil)
    pixels = np.stack([np.asarray(image) for image in pil])
    assert np.array_equal(pixels, np.round(array[..., 0] * 255).astype(np.uint8))


def test_colour_images_keep_the_order_of_their_channels() -> None:
    pipeline = tiny_pipeline(image_channels=3)
    array = pipeline(0, generator=seeded(0), output_type="np").images
    (image,) = pipeline(0, generator=seeded(0)).images
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), np.round(array[0] * 255).astype(np.uint8))
    assert not np.array_equal(array[..., 0], array[..., 2])


def test_without_return_dict_the_output_is_a_tuple_of_one(pipeline: LatentGenerationPipeline) -> None:
    output = pipeline(0, generator=seeded(0), output_type="pt", return_dict=False)
    assert type(output) is tuple
    assert torch.equal(output[0], pipeline(0, generator=seeded(0), output_type="pt")[0])
    assert len(output) == 1


def test_padding_is_cropped_evenly_from_all_sides() -> None:
    # 28×28 in 32×32: two pixels on each side
    padded = tiny_pipeline(image_size=(32, 32), content_size=(28, 28))
    images, codes = sample_with_codes(padded, 0, generator=seeded(0))
    assert images.shape == (1, 1, 28, 28)
    with torch.no_grad():
        padded_pixels = padded.tokenizer.decode_indices(codes.view(1, 8, 8))
    assert_close(images, ((padded_pixels + 1) / 2).clamp(0, 1)[:, :, 2:30, 2:30], rtol=0, atol=1e-6)


def test_rectangular_images_keep_height_and_width() -> None:
    wide = tiny_pipeline(image_size=(8, 24), content_size=(8, 24))
    assert wide(0, generator=seeded(0), output_type="pt").images.shape == (1, 1, 8, 24)
    assert wide(0, generator=seeded(0)).images[0].size == (24, 8)


def test_the_callback_is_called_once_for_each_token_with_the_codes_so_far(pipeline: LatentGenerationPipeline) -> None:
    calls: list[tuple[int, int, tuple[int, ...], int]] = []

    def record_call(pipe: LatentGenerationPipeline, step: int, timestep: int, values: dict[str, Any]) -> None:
        assert pipe is pipeline
        known = (values["tokens"] != UNKNOWN).flatten(1)
        assert known[:, : step + 1].all()
        calls.append((step, timestep, tuple(values["tokens"].shape), int(known.sum(1).unique())))

    pipeline([0, 1], 2, batch_size=3, callback_on_step_end=record_call)
    assert calls == [(i, i, (batch, 4, 4), i + 1) for batch in (3, 1) for i in range(16)]


def test_positions_without_a_code_are_decoded_from_the_mean_latent(
    pipeline: LatentGenerationPipeline,
) -> None:
    codes = torch.randint(16, (2, 4, 4), generator=seeded(0))
    partial = codes.clone()
    partial[:, 2:] = UNKNOWN
    tokenizer = pipeline.tokenizer
    mean = torch.tensor(tokenizer.config.latent_mean).view(-1, 1, 1)
    vectors = tokenizer.quantizer.lookup(codes)
    vectors[:, :, 2:] = mean
    expected = tokenizer.config.image_processor.to_unit_range(tokenizer.decoder(vectors))
    assert_close(pipeline.decode(partial), expected)
    assert not torch.equal(pipeline.decode(partial), pipeline.decode(codes))


def test_images_can_be_changed_in_place_and_take_part_in_autograd(pipeline: LatentGenerationPipeline) -> None:
    images = pipeline(0, output_type="pt").images
    images += 1
    scale = torch.ones(1, requires_grad=True)
    (pipeline.decode(torch.zeros(1, 4, 4, dtype=torch.int64)) * scale).sum().backward()
    assert scale.grad is not None


def test_the_progress_bar_counts_every_token_and_can_be_turned_off(
    pipeline: LatentGenerationPipeline, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.set_progress_bar_config(disable=False, desc="sampling")
    pipeline([0, 1, 2], batch_size=2)
    output = capsys.readouterr().err
    assert "sampling" in output
    assert "32/32" in output
    pipeline.set_progress_bar_config(disable=True)
    pipeline(0)
    assert capsys.readouterr().err == ""


# -- devices and parts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_samples_finite_float32_images_with_other_rounding(dtype: torch.dtype) -> None:
    pipeline = tiny_pipeline()
    full = pipeline(0, 4, generator=seeded(0), output_type="pt").images
    assert pipeline.to(dtype=dtype) is pipeline
    half = pipeline(0, 4, generator=seeded(0), output_type="pt").images
    assert half.dtype == torch.float32
    assert half.isfinite().all()
    assert not torch.equal(half, full)
    codes = torch.arange(16).view(1, 4, 4)
    half_pixels = pipeline.decode(codes)
    assert_close(half_pixels, pipeline.to("cpu", torch.float32).decode(codes), rtol=0, atol=0.05)


def test_a_tokenizer_and_a_prior_that_do_not_match_are_an_error() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(SpecMismatchError, match=r"tokenizer_id .* ≠"):
        LatentGenerationPipeline(tiny_tokenizer(seed=1), tiny_prior(tokenizer_id=tokenizer.compute_id()))
    with pytest.raises(SpecMismatchError, match="codebook_size 16 ≠ 32"):
        LatentGenerationPipeline(tiny_tokenizer(codebook_size=32), tiny_prior())
    with pytest.raises(SpecMismatchError, match="2 label names were given for a prior of 3 classes"):
        LatentGenerationPipeline(tokenizer, tiny_prior(tokenizer_id=tokenizer.compute_id()), LABEL_NAMES[:2])


def test_both_parts_sample_in_evaluation_mode() -> None:
    tokenizer = tiny_tokenizer().train()
    prior = tiny_prior(tokenizer_id=tokenizer.compute_id(), dropout=0.5).train()
    LatentGenerationPipeline(tokenizer, prior)
    assert not tokenizer.training
    assert not prior.training
