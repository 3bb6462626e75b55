"""Convert any image to a tensor and back: the only module that maps uint8 to [-1, 1].

    read        PIL, any mode and size  →  uint8   (C, h, w)      made upright, converted, cropped, resized
                (h, w, C) array, C > 4  →  the same               cropped, resized
    preprocess  uint8   (B, C, h, w)    →  float32 (B, C, H, W)   x = v / 127.5 − 1, then padded by repeating edges
    postprocess float   (B, C, H, W)    →  uint8   (B, C, h, w)   padding removed, v = round(127.5 (x + 1))

`postprocess` is the exact inverse of `preprocess`. Users see the content (h, w); the tokenizer sees (H, W).

`to_uint8` scales other numbers to 8 bits. The minimum and maximum of the image decide, in this order:

    uint16               v / 257                       int8, bool      v + 128, 255 v
    integers             in [0, 255]    unchanged      in [0, 65535]   v / 257          others   stretched to [0, 255]
    floats               in [0, 1]      255 v          in [-1, 1]      127.5 (v + 1)
                         in [0, 255]    unchanged      in [0, 65535]   v / 257          others   stretched to [0, 255]

Floats may exceed [0, 1] and [-1, 1] by 5 % of the width, because resampling overshoots; they are clipped. NaN and −∞ are
replaced by the smallest finite value, +∞ by the largest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
from PIL.Image import Transpose
from torch import Tensor
from torch.nn import functional as F

from training_harness.errors import ConfigError

ImageLike = PIL.Image.Image | np.ndarray
"""An image of Pillow; with more than four channels, an array (h, w, C) of uint8."""
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # channels → mode of Pillow
ORIENTATION_TAG, BITS_TAG, SAMPLE_FORMAT_TAG = 0x0112, 258, 339  # of EXIF and TIFF
RANGE_TOLERANCE = 0.05  # of the width of a range
UPRIGHT_TRANSPOSE = {  # EXIF 2.3, tag 0x0112: orientation → transpose to upright
    2: Transpose.FLIP_LEFT_RIGHT,
    3: Transpose.ROTATE_180,
    4: Transpose.FLIP_TOP_BOTTOM,
    5: Transpose.TRANSPOSE,
    6: Transpose.ROTATE_270,
    7: Transpose.TRANSVERSE,
    8: Transpose.ROTATE_90,
}


@dataclass(frozen=True, kw_only=True)
class ImageProcessor:
    """Converts images to pixel values and back. Sizes are (height, width)."""

    channels: int
    """1 grey, 2 grey and alpha, 3 RGB, 4 RGBA; more for arrays."""
    content_size: tuple[int, int]
    """Size of the images that users see."""
    image_size: tuple[int, int]
    """Size of the tokenizer's input: the content with padding."""

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ConfigError(
                f"channels is {self.channels}; expected 1 (grey), 2 (grey, alpha), 3 (RGB), 4 (RGBA), or the channels of an array"
            )
        for name in ("content_size", "image_size"):
            object.__setattr__(self, name, _validate_size(name, getattr(self, name)))  # lists in JSON
        if any(side < content for side, content in zip(self.image_size, self.content_size, strict=True)):
            raise ConfigError(
                f"image_size {self.image_size} is smaller than content_size {self.content_size}; "
                "expected it to be equal or larger. Use padded_size(content_size, multiple)"
            )

    @property
    def draft_size(self) -> tuple[int, int]:
        """The smallest input of `read` without visible loss, for `ImageSplit.image(i, at_least=…)`.

        It is twice the content, so that the last reduction by two is antialiased. It is square, because the EXIF orientation
        may exchange height and width.
        """
        return (2 * max(self.content_size),) * 2

    def read(self, image: ImageLike) -> Tensor:
        """Convert an image of any mode and size to a tensor of the content size.

        The image is made upright by its EXIF orientation, scaled to 8 bits, cropped at the centre to the content's aspect
        ratio, and resized (Lanczos). An image of the content size is not resampled. Transparency is kept if this processor
        has an alpha channel; otherwise the image is placed on white.

        Args:
            image: an image of Pillow, or an array (rows, columns, C) of uint8.

        Returns:
            (C, h, w) uint8.

        Raises:
            ValueError: the image has other channels, and cannot be converted.
        """
        height, width = self.content_size
        channels = image.shape[2] if isinstance(image, np.ndarray) else len(image.getbands())
        if (isinstance(image, np.ndarray) or self.channels not in MODES) and channels != self.channels:
            raise ValueError(f"it has {channels} channels; expected {self.channels}")
        if isinstance(image, np.ndarray):
            return _crop_and_resize(torch.from_numpy(image).permute(2, 0, 1), height, width)
        image = _convert_mode(make_upright_8bit(image), MODES[self.channels])
        if image.size != (width, height):
            image = PIL.ImageOps.fit(image, (width, height), method=PIL.Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(image)).view(height, width, self.channels)
        return pixels.permute(2, 0, 1).contiguous()

    def preprocess(self, images: Tensor) -> Tensor:
        """Convert images to pixel values, padded evenly by repeating edges.

        Args:
            images: (B, C, h, w) uint8 of the content size.

        Returns:
            (B, C, H, W) of torch's default dtype in [-1, 1].
        """
        self._check("images", images, self.content_size)
        if images.dtype != torch.uint8:
            raise ValueError(f"images are {images.dtype}; expected torch.uint8 in 0..255, the output of `read`")
        top, left = self._offset
        bottom = self.image_size[0] - self.content_size[0] - top
        right = self.image_size[1] - self.content_size[1] - left
        return F.pad(images.to(torch.get_default_dtype()) / 127.5 - 1, (left, right, top, bottom), mode="replicate")

    def postprocess(self, pixel_values: Tensor) -> Tensor:
        """Convert pixel values to images: clamp, round and remove the padding.

        Args:
            pixel_values: (B, C, H, W) in [-1, 1].

        Returns:
            (B, C, h, w) uint8 of the content size.
        """
        return (self.to_unit_range(pixel_values) * 255).round().to(torch.uint8)

    def to_unit_range(self, pixel_values: Tensor) -> Tensor:
        """Convert pixel values to [0, 1]: clamp and remove the padding.

        Args:
            pixel_values: (B, C, H, W) in [-1, 1].

        Returns:
            (B, C, h, w) float32 of the content size in [0, 1].
        """
        self._check("pixel_values", pixel_values, self.image_size)
        (top, left), (height, width) = self._offset, self.content_size
        content = pixel_values[:, :, top : top + height, left : left + width]
        return ((content.float() + 1) / 2).clamp(0, 1)

    @property
    def _offset(self) -> tuple[int, int]:
        """Padding above and left of the content; the extra row or column of odd padding is below or at the right."""
        return (self.image_size[0] - self.content_size[0]) // 2, (self.image_size[1] - self.content_size[1]) // 2

    def _check(self, name: str, tensor: Tensor, size: tuple[int, ...]) -> None:
        if tensor.ndim != 4 or tuple(tensor.shape[1:]) != (self.channels, *size):
            expected = ", ".join(map(str, (self.channels, *size)))
            raise ValueError(f"{name} have the shape {tuple(tensor.shape)}; expected (B, {expected})")


def to_pil(images: Tensor) -> list[PIL.Image.Image]:
    """Convert (B, C, h, w) uint8 to images of mode L, LA, RGB or RGBA; of more than four channels use the first three."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; expected uint8 (B, C, h, w)")
    if images.shape[1] not in MODES:
        images = as_rgb(images)
    arrays = images.cpu().permute(0, 2, 3, 1).numpy()  # (B, h, w, C)
    return [PIL.Image.fromarray(array[..., 0] if images.shape[1] == 1 else array) for array in arrays]


def as_rgb(images: Tensor) -> Tensor:
    """Convert (B, C, h, w) to (B, 3, h, w), for networks with RGB input: repeat grey, drop the channels after RGB."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


def _crop_and_resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Crop (C, rows, columns) uint8 at the centre and resize it to (C, height, width): bicubic, antialiased."""
    rows, columns = pixels.shape[1:]
    if (rows, columns) == (height, width):
        return pixels.contiguous()
    crop_height = min(rows, max(1, round(columns * height / width)))
    crop_width = min(columns, max(1, round(rows * width / height)))
    top, left = (rows - crop_height) // 2, (columns - crop_width) // 2
    cropped = pixels[None, :, top : top + crop_height, left : left + crop_width].float()
    resized = F.interpolate(cropped, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return resized[0].round().clamp(0, 255).to(torch.uint8)


def padded_size(content_size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """Round (height, width) up to multiples: (28, 30) becomes (32, 32) for the multiple 8."""
    height, width = _validate_size("content_size", content_size)
    if multiple < 1:
        raise ConfigError(f"multiple is {multiple}; expected a positive number, the tokenizer's downsampling factor")
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def get_exif_orientation(image: ImageLike) -> int:
    """Return the EXIF orientation, 1 (upright) to 8; 5 to 8 exchange height and width. Unreadable EXIF counts as 1."""
    if isinstance(image, np.ndarray):
        return 1
    try:
        orientation = image.getexif().get(ORIENTATION_TAG)
        return orientation if orientation in UPRIGHT_TRANSPOSE else 1
    except Exception:  # cameras and editors write broken EXIF in many ways; the pixels are fine
        return 1


def make_upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """Apply the EXIF orientation of an image."""
    return _apply_orientation(image, get_exif_orientation(image))


def make_upright_8bit(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert an image to 8 bits (`to_8bit_image`) and apply its EXIF orientation."""
    return _apply_orientation(to_8bit_image(image), get_exif_orientation(image))


def _apply_orientation(image: PIL.Image.Image, orientation: int) -> PIL.Image.Image:
    if orientation == 1:
        return image
    transposed = image.transpose(UPRIGHT_TRANSPOSE[orientation])
    if "transparency" in image.info:
        transposed.info["transparency"] = image.info["transparency"]
    return transposed


def to_8bit_image(image: PIL.Image.Image) -> PIL.Image.Image:
    """Convert an image to the mode L, LA, RGB or RGBA that keeps its content; the header says how numbers are scaled."""
    if (values := _high_bit_depth_values(image)) is not None:
        return PIL.Image.fromarray(to_uint8(values))
    if image.mode in MODES.values() and "transparency" not in image.info:
        return image
    is_grey = image.mode in ("1", "L", "La", "LA")
    if image.has_transparency_data:
        return image.convert("LA" if is_grey else "RGBA")
    return image.convert("L" if is_grey else "RGB")


def _high_bit_depth_values(image: PIL.Image.Image) -> np.ndarray | None:
    """Return the (h, w) values of a grey image in the dtype of its file; None for modes of 8 bits."""
    tags = getattr(image, "tag_v2", {})
    is_signed = tags.get(SAMPLE_FORMAT_TAG) == (2,)
    if image.mode == "L":
        return np.asarray(image).view(np.int8) if is_signed else None
    if image.mode != "F" and not image.mode.startswith("I"):
        return None
    values = np.asarray(image)
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return values.clip(0, 65_535).astype(np.uint16)  # Pillow opens 16 bits of these formats as mode I
    if image.mode == "I" and tags.get(BITS_TAG) == (32,) and not is_signed:
        return values.view(np.uint32)
    return values


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Scale numbers of any type to uint8, by the table in this module's header.

    Raises:
        ValueError: none of the numbers is finite.
    """
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.int8:
        return (values.astype(np.int16) + 128).astype(np.uint8)
    is_float = values.dtype.kind == "f"
    if is_float and not np.isfinite(values).all():
        finite = values[np.isfinite(values)]
        if not finite.size:
            raise ValueError("none of its numbers is finite; expected grey levels")
        values = np.nan_to_num(values, nan=finite.min(), neginf=finite.min(), posinf=finite.max())
    minimum, maximum = float(values.min()), float(values.max())

    def is_within(low: float, high: float) -> bool:
        return minimum >= low and maximum <= high

    if is_float and is_within(-RANGE_TOLERANCE, 1 + RANGE_TOLERANCE):
        return _scale_to_uint8(values, 0, 255)
    if is_float and is_within(-1 - 2 * RANGE_TOLERANCE, 1 + 2 * RANGE_TOLERANCE):
        return _scale_to_uint8(values, -1, 127.5)
    if values.dtype != np.uint16 and is_within(0, 255):
        return _scale_to_uint8(values, 0, 1)
    if is_within(0, 65_535):
        return _scale_to_uint8(values, 0, 1 / 257)
    return _scale_to_uint8(values, minimum, 127.5 / (maximum / 2 - minimum / 2) if maximum > minimum else 0)


def _scale_to_uint8(values: np.ndarray, zero: float, scale: float) -> np.ndarray:
    """Compute (v − zero) · scale as uint8, row by row, so that float64 never takes the memory of a whole image."""
    out = np.empty(values.shape, np.uint8)
    with np.errstate(over="ignore"):
        for i, row in enumerate(values):
            out[i] = ((row.astype(np.float64) - zero) * scale).round().clip(0, 255)
    return out


def _convert_mode(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    """Convert an image between the modes L, LA, RGB and RGBA; without alpha channel, transparent pixels become white."""
    if image.mode == mode:
        return image
    if image.mode in ("LA", "RGBA") and mode in ("L", "RGB"):
        rgba = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), rgba).convert("RGB")
    return image.convert(mode)


def _validate_size(name: str, size: tuple[int, int]) -> tuple[int, int]:
    sides = tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ConfigError(f"{name} is {size}; expected (height, width), two positive whole numbers")
    return sides[0], sides[1]
