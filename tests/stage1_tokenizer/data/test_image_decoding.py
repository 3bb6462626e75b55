"""Image files of cameras, microscopes and programs are decoded, or the error states the reason in one line."""

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


def encode_tiff(numbers: np.ndarray, order: str = "<") -> bytes:
    """Encode (h, w) or (h, w, C) numbers as an uncompressed TIFF of one strip."""
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
    extra_start = 8 + 2 + 12 * len(tags) + 4
    tags[273] = [extra_start + 8 * len(tags)]
    entries, extra = b"", b""
    for tag, values in sorted(tags.items()):
        letter, code = ("I", 4) if tag in (256, 257, 273, 278, 279) else ("H", 3)
        content = struct.pack(f"{order}{len(values)}{letter}", *values)
        if len(content) > 4:
            content, extra = struct.pack(f"{order}I", extra_start + len(extra)), extra + content.ljust(8, b"\0")
        entries += struct.pack(f"{order}HHI", tag, code, len(values)) + content.ljust(4, b"\0")
    magic = b"II*\0" if order == "<" else b"MM\0*"
    header = magic + struct.pack(f"{order}IH", 8, len(tags)) + entries + bytes(4)
    return header + extra.ljust(8 * len(tags), b"\0") + numbers.astype(numbers.dtype.newbyteorder(order)).tobytes()


def encode_npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def encode_image(image: PIL.Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def read_grey(encoded: bytes) -> np.ndarray:
    """Read an image with a processor of one channel: (8, 12)."""
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
@pytest.mark.parametrize(
    "write", [encode_tiff, lambda numbers: encode_tiff(numbers, ">"), encode_npy], ids=["TIFF", "TIFF MM", "NumPy"]
)
def test_numbers_are_scaled_by_their_range(name, write):
    pixels = read_grey(write(NUMBERS[name]))
    assert np.abs(pixels.astype(int) - EXPECTED).max() <= 1


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int16, np.int8, np.uint16])
def test_colour_tiffs_of_any_dtype_are_read(kind):
    numbers = (
        RAMP if np.dtype(kind).kind == "f" else np.iinfo(kind).min + RAMP * (2.0 ** (8 * np.dtype(kind).itemsize) - 1)
    )
    image = decode_image(encode_tiff(np.stack([numbers, numbers[::-1], numbers], 2).astype(kind)))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image)[..., 0].astype(int) - EXPECTED).max() <= 1
    assert np.abs(np.asarray(image)[..., 1].astype(int) - EXPECTED[::-1]).max() <= 1


def test_dark_16_bit_images_stay_dark():
    dark = np.full((8, 12), 200, np.uint16)
    assert read_grey(encode_tiff(dark)).max() == 1
    assert read_grey(encode_npy(dark)).max() == 1
    assert read_grey(b"P5 12 8 65535\n" + dark.astype(">u2").tobytes()).max() == 1


def test_values_that_are_not_finite_become_the_darkest_or_the_brightest():
    values = np.array([0.5, np.nan, -np.inf, np.inf, 0.25, 0.75])
    assert to_uint8(values).tolist() == [128, 64, 64, 191, 64, 191]
    with pytest.raises(ValueError, match="finite"):
        to_uint8(np.full(3, np.nan))


def test_values_slightly_outside_a_range_are_clipped():
    assert to_uint8(np.array([-0.04, 0.0, 0.5, 1.03])).tolist() == [0, 0, 128, 255]
    assert to_uint8(np.array([-1.05, -1.0, 0.0, 1.0])).tolist() == [0, 0, 128, 255]


def test_constant_and_huge_numbers_become_levels():
    assert to_uint8(np.full(3, -7.0)).tolist() == [0, 0, 0]
    assert to_uint8(np.array([-1e308, 0, 1e308])).tolist() == [0, 128, 255]
    assert to_uint8(np.array([False, True])).tolist() == [0, 255]


# Arrays


@pytest.mark.parametrize(
    ("shape", "channels_first"),
    [((3, 64, 96), True), ((1, 28, 28), True), ((4, 8, 8), True), ((13, 64, 64), True), ((64, 96, 3), False),
     ((8, 8, 4), False), ((3, 3, 3), False), ((4, 4, 6), False), ((32, 64, 200), False), ((145, 145, 200), False)]
)  # fmt: skip
def test_the_order_of_axes_follows_from_the_shape(shape, channels_first):
    assert is_channels_first(shape) == channels_first


def test_arrays_of_both_axis_orders_are_the_same_image():
    colours = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    expected = PIL.Image.fromarray(colours)
    for array in (colours, colours.transpose(2, 0, 1), colours[None], colours.transpose(2, 0, 1)[None], colours / 255):
        assert decode_image(encode_npy(array)).tobytes() == expected.tobytes()
    assert np.array_equal(decode_image(encode_npy(np.zeros((6, 8, 8), np.float32))), np.zeros((8, 8, 6), np.uint8))


# Metadata and sizes


@pytest.mark.parametrize("after", [False, True], ids=["before the pixels", "after the pixels"])
def test_a_png_with_text_of_any_length_is_read(after):
    image = PIL.Image.fromarray(EXPECTED)
    text = PngInfo()
    text.add_itxt("workflow", "x" * 2_000_000, zip=True)
    text.add_text("prompt", "y" * 3_000_000, zip=True)
    for i in range(70):
        text.add_text(f"part {i}", "z" * 1_000_000, zip=True)
    encoded = encode_image(image, pnginfo=text)
    if after:
        head, rest = encoded[:33], encoded[33:]
        pixels = rest.index(b"IDAT") - 4
        encoded = head + rest[pixels:-12] + rest[:pixels] + rest[-12:]
    assert np.array_equal(read_grey(encoded), EXPECTED)
    assert open_image(encoded).size == (12, 8)


def test_a_png_with_broken_text_is_read():
    text = PngInfo()
    text.add_text("comment", "b" * 50)
    encoded = encode_image(PIL.Image.fromarray(EXPECTED), pnginfo=text).replace(b"bbb", b"bab")
    assert np.array_equal(read_grey(encoded), EXPECTED)


def test_a_png_with_a_colour_profile_of_any_length_is_read():
    assert np.array_equal(
        read_grey(encode_image(PIL.Image.fromarray(EXPECTED), icc_profile=bytes(3_000_000))), EXPECTED
    )


@pytest.fixture
def low_limits(monkeypatch):
    """Set Pillow's limit to 2 × 1,000 pixels and ours to 16 kB."""
    monkeypatch.setattr(PIL.Image, "MAX_IMAGE_PIXELS", 1000)
    monkeypatch.setattr(image_decoding, "MAX_DECODED_BYTES", 16_000)


@pytest.mark.usefixtures("low_limits")
def test_a_large_image_within_the_limit_is_reduced_to_the_requested_size():
    encoded = encode_image(PIL.Image.linear_gradient("L").resize((100, 100)))
    assert decode_image(encoded).size == (100, 100)
    small = decode_image(encoded, at_least=(16, 16))
    assert small.size == (17, 17)
    full = np.asarray(decode_image(encoded)).astype(int)
    assert abs(np.asarray(small)[:16, :16].mean() - full[:96, :96].mean()) < 1
    assert PIL.Image.MAX_IMAGE_PIXELS == 1000


@pytest.mark.usefixtures("low_limits")
def test_the_error_for_an_image_above_the_limit_states_its_pixels():
    with pytest.raises(ValueError, match=r"200×200 = 40,000 pixels"):
        decode_image(encode_image(PIL.Image.new("L", (200, 200))))


@pytest.mark.usefixtures("low_limits")
def test_a_jpeg_above_the_limit_is_decoded_at_a_smaller_size():
    encoded = encode_image(PIL.Image.new("RGB", (300, 300)), "JPEG")
    assert decode_image(encoded, at_least=(20, 20)).size == (38, 38)
    with pytest.raises(ValueError, match="pixels"):
        decode_image(encoded)


def test_the_limit_is_checked_before_memory_is_allocated():
    numbers = encode_tiff(np.zeros((1, 1), np.float64))
    huge = numbers.replace(struct.pack("<HHII", 256, 4, 1, 1), struct.pack("<HHII", 256, 4, 1, 2**31))
    huge = huge.replace(struct.pack("<HHII", 257, 4, 1, 1), struct.pack("<HHII", 257, 4, 1, 2**20))
    tracemalloc.start()
    with pytest.raises(ValueError, match="pixels"):
        decode_image(huge)
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


# Kinds of files


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_frames_is_read(kind):
    frames = [PIL.Image.new("RGB", (12, 8), colour) for colour in ((200, 0, 0), (0, 200, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    image = decode_image(encode_image(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert image.convert("RGB").getpixel((0, 0)) == (200, 0, 0)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "LAB", "I;16", "I", "F"])
def test_a_tiff_of_any_mode_is_read(mode):
    processor = ImageProcessor(channels=3, content_size=(8, 12), image_size=(8, 12))
    assert processor.read(decode_image(encode_image(PIL.Image.new(mode, (30, 20)), "TIFF"))).shape == (3, 8, 12)


@pytest.mark.parametrize(
    ("mode", "transparency"),
    [("P", 0), ("P", b"\x00\x80"), ("P", bytes(256)), ("L", 0), ("1", 0), ("I;16", 0), ("RGB", (0, 0, 0))],
)
def test_a_png_with_any_transparency_is_read(mode, transparency):
    encoded = encode_image(PIL.Image.new(mode, (12, 8)), transparency=transparency)
    for channels in range(1, 5):
        processor = ImageProcessor(channels=channels, content_size=(8, 12), image_size=(8, 12))
        assert processor.read(decode_image(encoded)).shape == (channels, 8, 12)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
@pytest.mark.parametrize("channels", [3, 6])
def test_a_pixel_and_a_line_are_resized_to_any_size(size, channels):
    content = (64, 4)
    processor = ImageProcessor(channels=channels, content_size=content, image_size=content)
    image = PIL.Image.new("RGB", size, (9, 9, 9)) if channels == 3 else np.full((*size[::-1], 6), 9, np.uint8)
    assert processor.read(image).unique().tolist() == [9]
