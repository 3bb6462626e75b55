"""Pictures as cameras, microscopes and other programs write them are decoded, or say in one line why not."""

import io
import struct
import tracemalloc

import numpy as np
import PIL.Image
import pytest
from PIL.PngImagePlugin import PngInfo

from stage1_tokenizer.data import image_decoding
from stage1_tokenizer.data.image_decoding import decode_image, is_channels_first, open_image
from stage1_tokenizer.data.image_processor import ImageProcessor, to_uint8

RAMP = np.linspace(0, 1, 96).reshape(8, 12)
EXPECTED = (RAMP * 255).round().astype(np.uint8)


def tiff(numbers: np.ndarray, order: str = "<") -> bytes:
    """An uncompressed TIFF of one strip, (h, w) or (h, w, C)."""
    height, width = numbers.shape[:2]
    samples = numbers.size // (height * width)
    kind = {"u": 1, "i": 2, "f": 3}[numbers.dtype.kind]
    tags = {
        256: [width],
        257: [height],
        258: [numbers.itemsize * 8] * samples,
        259: [1],
        262: [1 if samples == 1 else 2],
    }
    tags |= {273: [0], 277: [samples], 278: [height], 279: [numbers.nbytes], 339: [kind] * samples}
    beyond = 8 + 2 + 12 * len(tags) + 4
    tags[273] = [beyond + 8 * len(tags)]
    entries, extra = b"", b""
    for tag, values in sorted(tags.items()):
        letter, code = ("I", 4) if tag in (256, 257, 273, 278, 279) else ("H", 3)
        content = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(content) > 4:
            content, extra = struct.pack(f"{order}I", beyond + len(extra)), extra + content.ljust(8, b"\0")
        entries += struct.pack(f"{order}HHI", tag, code, len(values)) + content.ljust(4, b"\0")
    begin = b"II*\0" if order == "<" else b"MM\0*"
    header = begin + struct.pack(f"{order}IH", 8, len(tags)) + entries + bytes(4)
    return header + extra.ljust(8 * len(tags), b"\0") + numbers.astype(numbers.dtype.newbyteorder(order)).tobytes()


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def written(image: PIL.Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def grey(encoded: bytes) -> np.ndarray:
    """(8, 12) as a processor of one channel reads it."""
    processor = ImageProcessor(channels=1, content_size=(8, 12), image_size=(8, 12))
    return processor.read(decode_image(encoded))[0].numpy()


# Numbers of more than 8 bits

NUMBERS = {
    "float32 in [0, 1]": RAMP.astype(np.float32),
    "float64 in [0, 1]": RAMP,
    "float16 in [0, 1]": RAMP.astype(np.float16),
    "float32 in [-1, 1]": (2 * RAMP - 1).astype(np.float32),
    "float32 in [0, 255]": EXPECTED.astype(np.float32),
    "float32 of other numbers": (1000 * RAMP - 200).astype(np.float32),
    "uint16": (65_535 * RAMP).round().astype(np.uint16),
    "int16 of both signs": (4000 * RAMP - 1000).round().astype(np.int16),
    "int8": (EXPECTED.astype(np.int16) - 128).astype(np.int8),
    "int32 in [0, 255]": EXPECTED.astype(np.int32),
    "int32 of both signs": (4e9 * RAMP - 2e9).astype(np.int32),
    "uint32": (4e9 * RAMP).astype(np.uint32),
    "uint32 in [0, 255]": EXPECTED.astype(np.uint32),
}


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("write", [tiff, lambda numbers: tiff(numbers, ">"), npy], ids=["TIFF", "TIFF MM", "NumPy"])
def test_numbers_are_scaled_by_their_range(name, write):
    found = grey(write(NUMBERS[name]))
    assert np.abs(found.astype(int) - EXPECTED).max() <= 1


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int16, np.int8, np.uint16])
def test_colours_of_other_numbers_are_read_from_tiff(kind):
    numbers = (
        RAMP if np.dtype(kind).kind == "f" else np.iinfo(kind).min + RAMP * (2.0 ** (8 * np.dtype(kind).itemsize) - 1)
    )
    image = decode_image(tiff(np.stack([numbers, numbers[::-1], numbers], 2).astype(kind)))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image)[..., 0].astype(int) - EXPECTED).max() <= 1
    assert np.abs(np.asarray(image)[..., 1].astype(int) - EXPECTED[::-1]).max() <= 1


def test_dark_sixteen_bits_stay_dark():
    dark = np.full((8, 12), 200, np.uint16)
    assert grey(tiff(dark)).max() == 1
    assert grey(npy(dark)).max() == 1
    assert grey(b"P5 12 8 65535\n" + dark.astype(">u2").tobytes()).max() == 1


def test_what_is_not_finite_is_the_darkest_or_the_brightest():
    values = np.array([0.5, np.nan, -np.inf, np.inf, 0.25, 0.75])
    assert to_uint8(values).tolist() == [128, 64, 64, 191, 64, 191]
    with pytest.raises(ValueError, match="finite"):
        to_uint8(np.full(3, np.nan))


def test_what_resampling_overshoots_is_clipped_and_not_taken_for_another_range():
    assert to_uint8(np.array([-0.04, 0.0, 0.5, 1.03])).tolist() == [0, 0, 128, 255]
    assert to_uint8(np.array([-1.05, -1.0, 0.0, 1.0])).tolist() == [0, 0, 128, 255]


def test_constant_and_huge_numbers_are_levels():
    assert to_uint8(np.full(3, -7.0)).tolist() == [0, 0, 0]
    assert to_uint8(np.array([-1e308, 0, 1e308])).tolist() == [0, 128, 255]
    assert to_uint8(np.array([False, True])).tolist() == [0, 255]


# Arrays


@pytest.mark.parametrize(
    ("shape", "first"),
    [((3, 64, 96), True), ((1, 28, 28), True), ((4, 8, 8), True), ((13, 64, 64), True), ((64, 96, 3), False),
     ((8, 8, 4), False), ((3, 3, 3), False), ((4, 4, 6), False), ((32, 64, 200), False), ((145, 145, 200), False)]
)  # fmt: skip
def test_channels_come_first_where_nothing_else_makes_sense(shape, first):
    assert is_channels_first(shape) == first


def test_arrays_of_both_orders_are_the_same_picture():
    colours = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    expected = PIL.Image.fromarray(colours)
    for array in (colours, colours.transpose(2, 0, 1), colours[None], colours.transpose(2, 0, 1)[None], colours / 255):
        assert decode_image(npy(array)).tobytes() == expected.tobytes()
    assert np.array_equal(decode_image(npy(np.zeros((6, 8, 8), np.float32))), np.zeros((8, 8, 6), np.uint8))


# Metadata and sizes


@pytest.mark.parametrize("after", [False, True], ids=["before the pixels", "after the pixels"])
def test_text_of_any_length_in_a_png_does_no_harm(after):
    image = PIL.Image.fromarray(EXPECTED)
    text = PngInfo()
    text.add_itxt("workflow", "x" * 2_000_000, zip=True)
    text.add_text("prompt", "y" * 3_000_000, zip=True)
    for i in range(70):
        text.add_text(f"part {i}", "z" * 1_000_000, zip=True)
    encoded = written(image, pnginfo=text)
    if after:
        head, rest = encoded[:33], encoded[33:]
        pixels = rest.index(b"IDAT") - 4
        encoded = head + rest[pixels:-12] + rest[:pixels] + rest[-12:]
    assert np.array_equal(grey(encoded), EXPECTED)
    assert open_image(encoded).size == (12, 8)


def test_broken_text_in_a_png_does_no_harm():
    text = PngInfo()
    text.add_text("comment", "b" * 50)
    encoded = written(PIL.Image.fromarray(EXPECTED), pnginfo=text).replace(b"bbb", b"bab")
    assert np.array_equal(grey(encoded), EXPECTED)


def test_a_colour_profile_of_any_length_does_no_harm():
    assert np.array_equal(grey(written(PIL.Image.fromarray(EXPECTED), icc_profile=bytes(3_000_000))), EXPECTED)


@pytest.fixture
def low_bounds(monkeypatch):
    """Pillow's bound at 2 × 1,000 pixels and ours at 16 kB."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(image_decoding, "MAX_DECODED_BYTES", 16_000)


@pytest.mark.usefixtures("low_bounds")
def test_a_large_picture_is_decoded_within_the_bound_and_shrunk_to_what_is_asked():
    encoded = written(PIL.Image.linear_gradient("L").resize((100, 100)))
    assert decode_image(encoded).size == (100, 100)
    small = decode_image(encoded, at_least=(16, 16))
    assert small.size == (17, 17)
    whole = np.asarray(decode_image(encoded)).astype(int)
    assert abs(np.asarray(small)[:16, :16].mean() - whole[:96, :96].mean()) < 1
    assert PIL.Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.usefixtures("low_bounds")
def test_a_picture_beyond_the_bound_says_how_many_pixels_it_has():
    with pytest.raises(ValueError, match=r"200×200 = 40,000 pixels"):
        decode_image(written(PIL.Image.new("L", (200, 200))))


@pytest.mark.usefixtures("low_bounds")
def test_a_jpeg_beyond_the_bound_is_decoded_smaller_where_that_is_enough():
    encoded = written(PIL.Image.new("RGB", (300, 300)), "JPEG")
    assert decode_image(encoded, at_least=(20, 20)).size == (38, 38)
    with pytest.raises(ValueError, match="pixels"):
        decode_image(encoded)


def test_the_bound_is_checked_before_memory_is_taken():
    numbers = tiff(np.zeros((1, 1), np.float64))
    vast = numbers.replace(struct.pack("<HHII", 256, 4, 1, 1), struct.pack("<HHII", 256, 4, 1, 2**31))
    vast = vast.replace(struct.pack("<HHII", 257, 4, 1, 1), struct.pack("<HHII", 257, 4, 1, 2**20))
    tracemalloc.start()
    with pytest.raises(ValueError, match="pixels"):
        decode_image(vast)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


# Kinds of files


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_several_frames_the_first_is_read(kind):
    frames = [PIL.Image.new("RGB", (12, 8), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    image = decode_image(written(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert image.convert("RGB").getpixel((0, 0)) == (200, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "LAB", "I;16", "I", "F"])
def test_a_tiff_of_any_mode_is_read(mode):
    processor = ImageProcessor(channels=3, content_size=(8, 12), image_size=(8, 12))
    assert processor.read(decode_image(written(PIL.Image.new(mode, (30, 20)), "TIFF"))).shape == (3, 8, 12)


@pytest.mark.parametrize(
    ("mode", "transparency"),
    [("P", 0), ("P", b"\x00\x80"), ("P", bytes(256)), ("L", 0), ("1", 0), ("I;16", 0), ("RGB", (0, 0, 0))],
)
def test_a_png_with_any_transparency_is_read(mode, transparency):
    encoded = written(PIL.Image.new(mode, (12, 8)), transparency=transparency)
    for channels in range(1, 5):
        processor = ImageProcessor(channels=channels, content_size=(8, 12), image_size=(8, 12))
        assert processor.read(decode_image(encoded)).shape == (channels, 8, 12)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
@pytest.mark.parametrize("channels", [3, 6])
def test_a_pixel_and_a_line_become_any_size(size, channels):
    content = (64, 4)
    processor = ImageProcessor(channels=channels, content_size=content, image_size=content)
    image = PIL.Image.new("RGB", size, (9, 9, 9)) if channels == 3 else np.full((*size[::-1], 6), 9, np.uint8)
    assert processor.read(image).unique().tolist() == [9]
