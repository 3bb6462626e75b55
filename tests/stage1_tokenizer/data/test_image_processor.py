"""Images of any kind get the configured channels and size, and pixel values are restored exactly."""

import io

import numpy as np
import PIL.Image
import PIL.ImageOps
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stage1_tokenizer.data.image_processor import ImageProcessor, make_upright, padded_size, to_pil
from training_harness.errors import ConfigError


def make_processor(channels=3, content=(8, 12), image=None) -> ImageProcessor:
    return ImageProcessor(channels=channels, content_size=content, image_size=image or content)


def random_image(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def save_and_reopen(image: PIL.Image.Image, kind: str = "PNG", **options) -> PIL.Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return PIL.Image.open(io.BytesIO(buffer.getvalue()))


# uint8 and [-1, 1]


def test_every_value_is_restored_and_the_range_is_minus_one_to_one():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    grey = make_processor(1, (16, 16), (20, 32))
    pixel_values = grey.preprocess(values)
    assert pixel_values.dtype == torch.float32
    assert (pixel_values.min(), pixel_values.max()) == (-1, 1)
    assert torch.equal(grey.postprocess(pixel_values), values)
    torch.testing.assert_close(grey.to_unit_range(pixel_values), values / 255, rtol=0, atol=1e-7)


@given(st.integers(1, 4), st.tuples(*[st.integers(1, 9)] * 2), st.tuples(*[st.integers(0, 9)] * 2), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_postprocess_undoes_preprocess_for_any_channels_sizes_and_padding(channels, content, padding, seed):
    processor = make_processor(channels, content, (content[0] + padding[0], content[1] + padding[1]))
    images = torch.from_numpy(random_image(2, channels, *content, seed=seed))
    pixel_values = processor.preprocess(images)
    assert pixel_values.shape == (2, channels, *processor.image_size)
    assert torch.equal(processor.postprocess(pixel_values), images)


def test_padding_28_to_32_repeats_the_edges_by_two_pixels_a_side():
    images = torch.from_numpy(random_image(1, 1, 28, 28))
    padded = make_processor(1, (28, 28), (32, 32)).preprocess(images)
    assert torch.equal(padded[:, :, 2:30, 2:30], images / 127.5 - 1)
    assert torch.equal(padded[:, :, 2:30, :2], padded[:, :, 2:30, 2:3].expand(-1, -1, -1, 2))
    assert torch.equal(padded[:, :, 30:], padded[:, :, 29:30].expand(-1, -1, 2, -1))


def test_values_outside_the_range_are_clamped_in_any_precision():
    values = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).view(1, 1, 1, 5)
    grey = make_processor(1, (1, 5))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert grey.postprocess(values.to(dtype)).flatten().tolist() == [0, 0, 128, 255, 255]
        assert grey.to_unit_range(values.to(dtype)).dtype == torch.float32


def test_the_error_for_another_dtype_or_size_states_the_expected_one():
    with pytest.raises(ValueError, match=r"float32; expected torch.uint8"):
        make_processor().preprocess(torch.zeros(1, 3, 8, 12))
    with pytest.raises(ValueError, match=r"\(1, 3, 12, 8\); expected \(B, 3, 8, 12\)"):
        make_processor().preprocess(torch.zeros(1, 3, 12, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"expected \(B, 3, 16, 16\)"):
        make_processor(image=(16, 16)).postprocess(torch.zeros(1, 3, 8, 12))
    with pytest.raises(ValueError, match="float32"):
        to_pil(torch.zeros(1, 3, 8, 12))


# Reading


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
@pytest.mark.parametrize("size", [(8, 12), (12, 8), (64, 96)])
def test_an_image_of_the_content_size_is_read_and_written_without_a_change(channels, mode, size):
    pixels = random_image(*size, channels)
    image = save_and_reopen(PIL.Image.fromarray(pixels[..., 0] if channels == 1 else pixels))
    assert image.mode == mode
    tensor = make_processor(channels, size).read(image)
    assert tensor.dtype == torch.uint8
    assert torch.equal(tensor, torch.from_numpy(pixels).permute(2, 0, 1))
    (restored,) = to_pil(tensor[None])
    assert (restored.mode, restored.tobytes()) == (mode, image.tobytes())


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "mode",
    ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "LA", "PA", "RGBX", "RGBa", "La", "I;16B"],
)
def test_every_mode_of_pillow_can_be_read(channels, mode):
    assert make_processor(channels).read(PIL.Image.new(mode, (30, 20))).shape == (channels, 8, 12)


def test_a_colour_is_the_same_in_every_mode():
    red = PIL.Image.new("RGB", (12, 8), (255, 0, 0))
    for image in (
        red,
        red.convert("P"),
        red.convert("RGBA"),
        red.convert("CMYK"),
        save_and_reopen(red.quantize(2), "GIF"),
    ):
        assert make_processor(3).read(image)[:, 3, 3].tolist() == [255, 0, 0], image.mode
        assert make_processor(1).read(image)[0, 3, 3] == 76, image.mode  # ITU-R 601: 0.299 of 255
        assert make_processor(4).read(image)[:, 3, 3].tolist() == [255, 0, 0, 255], image.mode


def test_grey_is_repeated_in_rgb_and_one_bit_is_black_and_white():
    pixels = random_image(8, 12)
    assert torch.equal(make_processor(3).read(PIL.Image.fromarray(pixels)), torch.from_numpy(pixels).expand(3, 8, 12))
    bits = PIL.Image.fromarray(pixels > 127)
    assert bits.mode == "1"
    assert torch.equal(make_processor(1).read(bits)[0], torch.from_numpy(pixels > 127) * torch.tensor(255).byte())


@pytest.mark.parametrize("mode", ["I;16", "I"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_scaled_and_not_clipped(mode, kind):
    values = np.linspace(0, 65_535, 96).round().astype(np.uint16).reshape(8, 12)
    image = PIL.Image.fromarray(values)
    image = save_and_reopen(image, kind) if mode == "I;16" else PIL.Image.fromarray(values.astype(np.int32))
    assert image.mode == mode
    expected = torch.from_numpy((values / 257).round().astype(np.uint8))
    assert torch.equal(make_processor(1).read(image)[0], expected)
    assert torch.equal(make_processor(3).read(image), expected.expand(3, 8, 12))


def test_transparent_images_become_white_without_alpha_channel_and_stay_transparent_with_it():
    translucent_red = PIL.Image.new("RGBA", (12, 8), (255, 0, 0, 51))  # 20 % opaque
    assert make_processor(3).read(translucent_red)[:, 0, 0].tolist() == [255, 204, 204]
    assert make_processor(4).read(translucent_red)[:, 0, 0].tolist() == [255, 0, 0, 51]
    assert make_processor(1).read(PIL.Image.new("LA", (12, 8), (0, 51)))[0, 0, 0] == 204
    assert make_processor(2).read(PIL.Image.new("LA", (12, 8), (7, 51)))[:, 0, 0].tolist() == [7, 51]


@pytest.mark.parametrize("mode", ["P", "L", "RGB"])
def test_a_transparent_colour_of_a_palette_or_of_a_plain_png_is_transparent(mode):
    black = PIL.Image.new("RGB", (12, 8)).convert(mode)
    transparent = save_and_reopen(black, transparency=(0, 0, 0) if mode == "RGB" else black.getpixel((0, 0)))
    assert make_processor(3).read(transparent)[:, 0, 0].tolist() == [255, 255, 255]
    assert make_processor(4).read(transparent)[3, 0, 0] == 0
    assert make_processor(3).read(save_and_reopen(black))[:, 0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF"])
def test_exif_orientation_is_applied_as_pillow_applies_it(orientation, kind):
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    stored = save_and_reopen(PIL.Image.fromarray(random_image(8, 12, 3)), kind, exif=exif)
    expected = PIL.ImageOps.exif_transpose(stored)
    assert make_upright(stored).tobytes() == expected.tobytes()
    assert (
        make_processor(3, (expected.height, expected.width)).read(stored).permute(1, 2, 0).numpy().tobytes()
        == expected.tobytes()
    )


def test_an_image_with_broken_exif_is_read_unchanged():
    image = save_and_reopen(PIL.Image.fromarray(random_image(8, 12, 3)), "JPEG", exif=b"Exif\x00\x00nonsense")
    assert torch.equal(make_processor().read(image), torch.from_numpy(np.array(image)).permute(2, 0, 1))


def test_a_wide_image_is_cropped_at_the_centre_and_keeps_its_aspect_ratio():
    wide = PIL.Image.fromarray(random_image(40, 120, 3))
    full, centre = make_processor(3, (10, 30)).read(wide), make_processor(3, (10, 10)).read(wide)
    assert torch.equal(centre, full[:, :, 10:20])
    tall = wide.transpose(PIL.Image.Transpose.TRANSPOSE)
    transposed = make_processor(3, (10, 10)).read(tall).mT  # Pillow resizes along one axis first and rounds in between
    assert (transposed.int() - centre.int()).abs().max() <= 1


def test_resizing_averages_a_fine_pattern_instead_of_sampling_it():
    checkerboard = PIL.Image.fromarray(np.indices((256, 256)).sum(0).astype(np.uint8) % 2 * 255)
    small, sampled = (
        make_processor(1, (32, 32)).read(image).float()
        for image in (checkerboard, checkerboard.resize((32, 32), PIL.Image.Resampling.NEAREST))
    )
    assert (small - 127.5).abs().max() < 2
    assert (sampled - 127.5).abs().min() > 100


@given(st.tuples(*[st.integers(1, 80)] * 2), st.tuples(*[st.integers(1, 40)] * 2), st.sampled_from(["L", "RGBA", "P"]))
@settings(deadline=None, max_examples=40)
def test_any_size_is_resized_to_any_other(size, content, mode):
    assert make_processor(3, content).read(PIL.Image.new(mode, size)).shape == (3, *content)


def test_a_jpeg_decoded_at_the_draft_size_looks_the_same(tmp_path):
    smooth = PIL.Image.fromarray(random_image(6, 8, 3)).resize((800, 600), PIL.Image.Resampling.BICUBIC)
    smooth.save(tmp_path / "photo.jpg", quality=95)
    full, draft = PIL.Image.open(tmp_path / "photo.jpg"), PIL.Image.open(tmp_path / "photo.jpg")
    processor = make_processor(3, (32, 48))
    draft.draft(None, processor.draft_size[::-1])
    assert draft.size == (200, 150)
    assert (processor.read(full).float() - processor.read(draft).float()).abs().max() <= 6


# Configuration


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": -1}, "channels is -1"),
        ({"channels": 0}, "channels is 0"),
        ({"content": (0, 4)}, "content_size is"),
        ({"content": (4,)}, "content_size is"),
        ({"image": (8, 11)}, "smaller than content_size"),
        ({"image": (8.0, 12)}, "image_size is"),
    ],
)
def test_a_wrong_field_is_named_in_one_line(fields, message):
    with pytest.raises(ConfigError, match=message) as error:
        make_processor(**fields)
    assert "\n" not in str(error.value)
    assert "expected" in str(error.value)


def test_lists_from_json_make_an_equal_processor():
    assert make_processor(3, [8, 12], [16, 16]) == make_processor(3, (8, 12), (16, 16))


@given(st.tuples(*[st.integers(1, 300)] * 2), st.integers(1, 64))
def test_a_padded_size_is_the_smallest_multiple_that_contains_the_content(content, multiple):
    for side, padded in zip(content, padded_size(content, multiple), strict=True):
        assert padded % multiple == 0
        assert side <= padded < side + multiple


def test_a_multiple_below_one_is_refused():
    with pytest.raises(ConfigError, match="multiple is 0"):
        padded_size((28, 28), 0)
