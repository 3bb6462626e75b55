"""Decode image files: every format of Pillow, and NumPy arrays, with a limit on memory.

Pillow refuses a PNG with more than a megabyte of text, or with broken text. Text chunks do not change the pixels, so the
file is then read without them.
Pillow also refuses more than 179 million pixels. This module limits bytes instead: `MAX_DECODED_BYTES` for the image as
Pillow stores it (1 byte a pixel for grey, 4 for colours). A JPEG is decoded at a smaller size first, where that is enough.
Images above Pillow's limit are decoded one at a time, and are reduced at once by a whole factor where the caller needs less.

Pillow cannot read TIFF files of float64, or colour TIFF files of floats or signed integers. They are read here, uncompressed
or deflated.
"""

from __future__ import annotations

import io
import struct
import zlib
from threading import Lock

import numpy as np
import PIL.Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from stage1_tokenizer.data.image_processor import ImageLike, make_upright_8bit, to_uint8

NUMPY_MAGIC, PNG_MAGIC, TIFF_MAGIC = b"\x93NUMPY", b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*")
METADATA_CHUNKS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # PNG chunks that do not change the pixels
MAX_DECODED_BYTES = 1 << 30  # of one decoded image
SIZE_LIMIT_MESSAGE = f"expected at most {MAX_DECODED_BYTES >> 30} GiB decoded; make it smaller"
BYTES_PER_PIXEL = {
    "1": 1,
    "L": 1,
    "P": 1,
    "I;16": 2,
    "I;16B": 2,
    "I;16L": 2,
    "I;16N": 2,
}  # all other modes of Pillow: 4
_large_image_lock = Lock()


def open_image(encoded: bytes) -> ImageLike:
    """Open an image file, so that its size and mode are known.

    Pixels of formats that Pillow reads are not decoded yet.

    Raises:
        Exception: any error that the bytes cause.
    """
    if encoded.startswith(NUMPY_MAGIC):
        return load_npy_image(encoded)
    try:
        return PIL.Image.open(io.BytesIO(encoded))
    except (PIL.UnidentifiedImageError, ValueError):
        if encoded[:4] in TIFF_MAGIC and (array := read_tiff_array(encoded)) is not None:
            return array_to_image(array, channels_last=True)
        return PIL.Image.open(io.BytesIO(strip_png_metadata(encoded)))
    except PIL.Image.DecompressionBombError:
        return _open_without_pixel_limit(encoded)


def decode_image(encoded: bytes, at_least: tuple[int, int] | None = None) -> ImageLike:
    """Decode an image file.

    Args:
        encoded: the content of the file.
        at_least: (height, width). A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, but not below this size.

    Raises:
        ValueError: the decoded image would take more than `MAX_DECODED_BYTES`.
        Exception: any other error that the bytes cause.
    """
    try:
        return _load_pixels(open_image(encoded), at_least)
    except (ValueError, OSError, SyntaxError):
        if (stripped := strip_png_metadata(encoded)) == encoded:
            raise
        return _load_pixels(open_image(stripped), at_least)  # text may also come after the pixels


def _load_pixels(image: ImageLike, at_least: tuple[int, int] | None) -> ImageLike:
    if isinstance(image, np.ndarray):
        return image
    width, height = image.size
    if at_least is not None:
        image.draft(None, (at_least[1], at_least[0]))  # has an effect on JPEG only
    is_large = image.width * image.height > 2 * (PIL.Image.MAX_IMAGE_PIXELS or width * height)
    size = image.width * image.height * BYTES_PER_PIXEL.get(image.mode, 4)
    if size > MAX_DECODED_BYTES:
        raise ValueError(
            f"it has {width}×{height} = {width * height:,} pixels, {size / 2**30:.1f} GiB decoded; {SIZE_LIMIT_MESSAGE}"
        )
    if not is_large:
        image.load()
        return image
    with _large_image_lock:
        image.load()
        factor = 1 if at_least is None else min(image.width // at_least[1], image.height // at_least[0])
        return image if factor < 2 else make_upright_8bit(image).reduce(factor)


def _open_without_pixel_limit(encoded: bytes) -> PIL.Image.Image:
    with _large_image_lock:
        limit = PIL.Image.MAX_IMAGE_PIXELS
        PIL.Image.MAX_IMAGE_PIXELS = None
        try:
            return PIL.Image.open(io.BytesIO(encoded))
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = limit


def strip_png_metadata(encoded: bytes) -> bytes:
    """Remove text and colour profile from a PNG file; return other files unchanged."""
    if not encoded.startswith(PNG_MAGIC):
        return encoded
    chunks, begin = [PNG_MAGIC], len(PNG_MAGIC)
    while begin + 8 <= len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, begin)
        end = begin + 12 + length  # length, kind, content, checksum
        if kind not in METADATA_CHUNKS:
            chunks.append(encoded[begin:end])
        begin = end
    return b"".join(chunks)


def load_npy_image(encoded: bytes) -> ImageLike:
    """Load a NumPy file of (h, w), (h, w, C) or (C, h, w) numbers as an 8-bit image (see `array_to_image`)."""
    return array_to_image(np.load(io.BytesIO(encoded), allow_pickle=False))


def array_to_image(array: np.ndarray, channels_last: bool = False) -> ImageLike:
    """Convert an array of any numeric type to an 8-bit image.

    Args:
        array: (h, w), (h, w, C) or (C, h, w), also with a leading axis of length 1.
        channels_last: the order is (h, w, C). By default `is_channels_first` decides it.

    Returns:
        An image of Pillow with up to four channels; an array (h, w, C) of uint8 with more. `to_uint8` scales the values.

    Raises:
        ValueError: the array has another shape or another type.
    """
    if (
        array.dtype.kind not in "biuf"
        or array.ndim not in (2, 3, 4)
        or array.shape[:-3] not in ((), (1,))
        or 0 in array.shape
    ):
        raise ValueError(
            f"an array of {array.dtype} {array.shape}; expected numbers (height, width), (height, width, channels) or (channels, "
            "height, width)"
        )
    array = array.reshape(array.shape[-3:])
    if array.ndim == 3 and not channels_last and is_channels_first(array.shape):
        array = np.moveaxis(array, 0, 2)
    array = np.ascontiguousarray(to_uint8(array))
    if array.ndim == 3 and array.shape[2] > 4:
        return array
    return PIL.Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def read_tiff_array(encoded: bytes) -> np.ndarray | None:
    """Read the first page of a TIFF file as (h, w, C) numbers; return None for an unsupported or broken file."""
    file = io.BytesIO(encoded)
    try:
        directory = ImageFileDirectory_v2(file.read(8))
        file.seek(directory.next)
        directory.load(file)
        return _read_tiff_pixels(encoded, directory)
    except (KeyError, TypeError, SyntaxError, struct.error, zlib.error):  # a broken file
        return None


def _read_tiff_pixels(encoded: bytes, directory: ImageFileDirectory_v2) -> np.ndarray | None:
    width, height, samples = (int(directory.get(tag, 1)) for tag in (256, 257, 277))
    bits, formats = (set(directory.get(tag, (default,))) for tag, default in ((258, 1), (339, 1)))
    compression, planar, predictor = (directory.get(tag, 1) for tag in (259, 284, 317))
    kind = {(1,): "u", (2,): "i", (3,): "f"}.get(tuple(formats))
    is_deflated = compression in (8, 32_946)
    if (
        kind is None
        or len(bits) != 1
        or predictor != 1
        or 273 not in directory
        or not (is_deflated or compression == 1)
    ):
        return None
    dtype = np.dtype(f"{'<' if encoded[:2] == b'II' else '>'}{kind}{bits.pop() // 8}")
    size = width * height * samples * dtype.itemsize
    if size > MAX_DECODED_BYTES:
        raise ValueError(
            f"it has {width}×{height} = {width * height:,} pixels of {samples} × {dtype}; {SIZE_LIMIT_MESSAGE}"
        )
    strips = [encoded[begin : begin + count] for begin, count in zip(directory[273], directory[279], strict=True)]
    content = b"".join(zlib.decompressobj().decompress(strip, size) if is_deflated else strip for strip in strips)
    array = np.frombuffer(content, dtype, width * height * samples)
    if planar == 2:
        return np.moveaxis(array.reshape(samples, height, width), 0, 2)
    return array.reshape(height, width, samples)


def is_channels_first(shape: tuple[int, ...]) -> bool:
    """Whether (a, b, c) is (channels, height, width).

    It is where the first axis is the smallest, the last axis is longer than 4, and either the first axis is at most 4 or the
    other two are equal: (3, 64, 96) and (13, 64, 64) are channels first, (64, 96, 3) and (3, 8, 4) are not.
    """
    first, second, third = shape
    return first < min(second, third) and third > 4 and (first <= 4 or second == third)
