"""Encoded bytes to a picture: what Pillow opens, and NumPy arrays, within a bound on memory.

Pillow refuses text of more than a megabyte in a PNG, which holds nothing of the picture: such a file is read without it.
It also refuses more than 179 million pixels. Here the bound is on bytes, `LARGEST` as Pillow holds them (1 a pixel for grey,
4 for colours), after a JPEG was decoded smaller where that is enough. One picture above Pillow's bound is decoded at a time,
and shrunk at once by a whole number where it need not stay that large.
"""

from __future__ import annotations

import io
import struct
from threading import Lock

import numpy as np
import PIL.Image

from stage1_tokenizer.data.image_processor import Picture, to_eight_bits, upright_with_eight_bits

NUMPY_MAGIC, PNG_MAGIC = b"\x93NUMPY", b"\x89PNG\r\n\x1a\n"
METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks of a PNG that change nothing in its pixels
LARGEST = 1 << 30  # bytes of one decoded picture
BYTES_A_PIXEL = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}  # Pillow's; all other modes 4
_one_at_a_time = Lock()


def opened(encoded: bytes) -> Picture:
    """The picture with its size and mode; pixels of Pillow's are not decoded yet.

    Raises:   whatever is wrong with the bytes."""
    if encoded.startswith(NUMPY_MAGIC):
        return opened_array(encoded)
    try:
        return PIL.Image.open(io.BytesIO(encoded))
    except ValueError:
        return PIL.Image.open(io.BytesIO(without_metadata(encoded)))
    except PIL.Image.DecompressionBombError:
        return _opened_without_bound(encoded)


def decoded(encoded: bytes, at_least: tuple[int, int] | None = None) -> Picture:
    """The picture with its pixels.

    Args:     at_least: (height, width). A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size while it stays that large.
    Raises:   whatever is wrong with the bytes; ValueError for a picture of more than `LARGEST` bytes."""
    try:
        return _loaded(opened(encoded), at_least)
    except ValueError:
        if (stripped := without_metadata(encoded)) == encoded:
            raise
        return _loaded(opened(stripped), at_least)  # text may also come after the pixels


def _loaded(image: Picture, at_least: tuple[int, int] | None) -> Picture:
    if isinstance(image, np.ndarray):
        return image
    width, height = image.size
    large = width * height > 2 * (PIL.Image.MAX_IMAGE_PIXELS or width * height)
    if at_least is not None:
        image.draft(None, (at_least[1], at_least[0]))  # does nothing but for JPEG
    size = image.width * image.height * BYTES_A_PIXEL.get(image.mode, 4)
    if size > LARGEST:
        raise ValueError(
            f"it has {width}×{height} = {width * height:,} pixels, {size / 2**30:.1f} GiB decoded; expected at most "
            f"{LARGEST / 2**30:.0f} GiB; make it smaller"
        )
    if not large:
        image.load()
        return image
    with _one_at_a_time:
        image.load()
        times = 1 if at_least is None else min(image.width // at_least[1], image.height // at_least[0])
        return image if times < 2 else upright_with_eight_bits(image).reduce(times)


def _opened_without_bound(encoded: bytes) -> PIL.Image.Image:
    with _one_at_a_time:
        bound = PIL.Image.MAX_IMAGE_PIXELS
        PIL.Image.MAX_IMAGE_PIXELS = None
        try:
            return PIL.Image.open(io.BytesIO(encoded))
        finally:
            PIL.Image.MAX_IMAGE_PIXELS = bound


def without_metadata(encoded: bytes) -> bytes:
    """A PNG without text and colour profile; other bytes as they are."""
    if not encoded.startswith(PNG_MAGIC):
        return encoded
    kept, begin = [PNG_MAGIC], len(PNG_MAGIC)
    while begin + 8 <= len(encoded):
        length, kind = struct.unpack_from(">I4s", encoded, begin)
        end = begin + 12 + length  # length, kind, content, checksum
        if kind not in METADATA:
            kept.append(encoded[begin:end])
        begin = end
    return b"".join(kept)


def opened_array(encoded: bytes) -> Picture:
    """A NumPy file of (h, w) or (h, w, C) numbers, in 8 bits: an array of more than four channels stays one.

    Channels may come first: where the first axis is the smallest and is at most 4, or the other two are equal. Values are
    those of `to_eight_bits`."""
    array = np.load(io.BytesIO(encoded), allow_pickle=False)
    found = f"an array of {array.dtype} {array.shape}"
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.dtype.kind not in "biuf" or array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(
            f"{found}; expected numbers (height, width), (height, width, channels) or (channels, height, width)"
        )
    if array.ndim == 3 and channels_come_first(array.shape):
        array = np.moveaxis(array, 0, 2)
    array = np.ascontiguousarray(to_eight_bits(array))
    if array.ndim == 3 and array.shape[2] > 4:
        return array
    return PIL.Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def channels_come_first(shape: tuple[int, ...]) -> bool:
    """Whether (a, b, c) is (channels, height, width): (3, 64, 96) and (13, 64, 64) are, (64, 96, 3) and (3, 8, 4) are not."""
    first, second, third = shape
    return first < min(second, third) and third > 4 and (first <= 4 or second == third)
