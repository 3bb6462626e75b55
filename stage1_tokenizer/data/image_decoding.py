"""Encoded bytes to an image: what Pillow opens, and NumPy arrays, within a bound on memory.

Pillow refuses text of more than a megabyte in a PNG, and text that is broken. It holds nothing of the image: such a file is
read without it.
It also refuses more than 179 million pixels. Here the bound is on bytes, `LARGEST` as Pillow holds them (1 a pixel for grey,
4 for colours), after a JPEG was decoded smaller where that is enough. One image above Pillow's bound is decoded at a time,
and shrunk at once by a whole number where it need not stay that large.

TIFF files of numbers that Pillow does not know (float64, colours of floats or signed integers) are read here, uncompressed or
deflated.
"""

from __future__ import annotations

import io
import struct
import zlib
from threading import Lock

import numpy as np
import PIL.Image
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from stage1_tokenizer.data.image_processor import ImageLike, to_eight_bits, upright_with_eight_bits

NUMPY_MAGIC, PNG_MAGIC, TIFF_MAGIC = b"\x93NUMPY", b"\x89PNG\r\n\x1a\n", (b"II*\0", b"MM\0*")
METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks of a PNG that change nothing in its pixels
LARGEST = 1 << 30  # bytes of one decoded image
TOO_LARGE = f"expected at most {LARGEST >> 30} GiB decoded; make it smaller"
BYTES_A_PIXEL = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}  # Pillow's; all other modes 4
_one_at_a_time = Lock()


def open_image(encoded: bytes) -> ImageLike:
    """The image with its size and mode; pixels of Pillow's are not decoded yet.

    Raises:   whatever is wrong with the bytes."""
    if encoded.startswith(NUMPY_MAGIC):
        return opened_array(encoded)
    try:
        return PIL.Image.open(io.BytesIO(encoded))
    except (PIL.UnidentifiedImageError, ValueError):
        if encoded[:4] in TIFF_MAGIC and (array := tiff_array(encoded)) is not None:
            return as_image(array, channels_last=True)
        return PIL.Image.open(io.BytesIO(without_metadata(encoded)))
    except PIL.Image.DecompressionBombError:
        return _opened_without_bound(encoded)


def decode_image(encoded: bytes, at_least: tuple[int, int] | None = None) -> ImageLike:
    """The image with its pixels.

    Args:     at_least: (height, width). A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size while it stays that large.
    Raises:   whatever is wrong with the bytes; ValueError for an image of more than `LARGEST` bytes."""
    try:
        return _loaded(open_image(encoded), at_least)
    except (ValueError, OSError, SyntaxError):
        if (stripped := without_metadata(encoded)) == encoded:
            raise
        return _loaded(open_image(stripped), at_least)  # text may also come after the pixels


def _loaded(image: ImageLike, at_least: tuple[int, int] | None) -> ImageLike:
    if isinstance(image, np.ndarray):
        return image
    width, height = image.size
    if at_least is not None:
        image.draft(None, (at_least[1], at_least[0]))  # does nothing but for JPEG
    large = image.width * image.height > 2 * (PIL.Image.MAX_IMAGE_PIXELS or width * height)
    size = image.width * image.height * BYTES_A_PIXEL.get(image.mode, 4)
    if size > LARGEST:
        raise ValueError(
            f"it has {width}×{height} = {width * height:,} pixels, {size / 2**30:.1f} GiB decoded; {TOO_LARGE}"
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


def opened_array(encoded: bytes) -> ImageLike:
    """A NumPy file of (h, w) or (h, w, C) numbers, in 8 bits: an array of more than four channels stays one.

    Channels may come first: where the first axis is the smallest and is at most 4, or the other two are equal. Values become
    8 bits by `to_eight_bits`."""
    return as_image(np.load(io.BytesIO(encoded), allow_pickle=False))


def as_image(array: np.ndarray, channels_last: bool = False) -> ImageLike:
    """What `opened_array` says of the numbers in a file."""
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
    if array.ndim == 3 and not channels_last and channels_come_first(array.shape):
        array = np.moveaxis(array, 0, 2)
    array = np.ascontiguousarray(to_eight_bits(array))
    if array.ndim == 3 and array.shape[2] > 4:
        return array
    return PIL.Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


def tiff_array(encoded: bytes) -> np.ndarray | None:
    """(h, w, C) numbers of a TIFF's first page; none of a kind that is not read here."""
    file = io.BytesIO(encoded)
    try:
        directory = ImageFileDirectory_v2(file.read(8))
        file.seek(directory.next)
        directory.load(file)
        return _numbers_in(encoded, directory)
    except (KeyError, TypeError, SyntaxError, struct.error, zlib.error):  # a broken file
        return None


def _numbers_in(encoded: bytes, directory: ImageFileDirectory_v2) -> np.ndarray | None:
    width, height, samples = (int(directory.get(tag, 1)) for tag in (256, 257, 277))
    bits, formats = (set(directory.get(tag, (default,))) for tag, default in ((258, 1), (339, 1)))
    compression, planar, predictor = (directory.get(tag, 1) for tag in (259, 284, 317))
    kind = {(1,): "u", (2,): "i", (3,): "f"}.get(tuple(formats))
    deflated = compression in (8, 32_946)
    if kind is None or len(bits) != 1 or predictor != 1 or 273 not in directory or not (deflated or compression == 1):
        return None
    dtype = np.dtype(f"{'<' if encoded[:2] == b'II' else '>'}{kind}{bits.pop() // 8}")
    size = width * height * samples * dtype.itemsize
    if size > LARGEST:
        raise ValueError(f"it has {width}×{height} = {width * height:,} pixels of {samples} × {dtype}; {TOO_LARGE}")
    strips = [encoded[begin : begin + count] for begin, count in zip(directory[273], directory[279], strict=True)]
    content = b"".join(zlib.decompressobj().decompress(strip, size) if deflated else strip for strip in strips)
    array = np.frombuffer(content, dtype, width * height * samples)
    if planar == 2:
        return np.moveaxis(array.reshape(samples, height, width), 0, 2)
    return array.reshape(height, width, samples)


def channels_come_first(shape: tuple[int, ...]) -> bool:
    """Whether (a, b, c) is (channels, height, width): (3, 64, 96) and (13, 64, 64) are, (64, 96, 3) and (3, 8, 4) are not."""
    first, second, third = shape
    return first < min(second, third) and third > 4 and (first <= 4 or second == third)
