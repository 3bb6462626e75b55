"""From any picture to a tensor and back: the only place that knows how uint8 becomes [-1, 1].

    read        PIL, any mode and size  →  uint8   (C, h, w)      turned upright, converted, cropped, resized
                (h, w, C) array, C > 4  →  the same               cropped, resized
    preprocess  uint8   (B, C, h, w)    →  float32 (B, C, H, W)   x = v / 127.5 − 1, then padded by repeating edges
    postprocess float   (B, C, H, W)    →  uint8   (B, C, h, w)   padding cropped off, v = round(127.5 (x + 1))

`postprocess` undoes `preprocess` exactly. Content (h, w) is what users see; (H, W) is what the tokenizer sees.

Numbers of more than 8 bits become 8 bits by the least and the greatest of a picture, in this order (`to_eight_bits`):

    uint16               v / 257                       int8, bool      v + 128, 255 v
    integers             in [0, 255]    as they are    in [0, 65535]   v / 257          others   stretched to [0, 255]
    floats               in [0, 1]      255 v          in [-1, 1]      127.5 (v + 1)
                         in [0, 255]    as they are    in [0, 65535]   v / 257          others   stretched to [0, 255]

Floats may leave [0, 1] and [-1, 1] by a twentieth of their width, as resampling does, and are clipped. NaN and −∞ count as the
least finite value, +∞ as the greatest.
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
"""A picture as Pillow holds it, or where it has more channels than that takes an array (h, w, C) of uint8."""
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}  # channels → Pillow's mode
ORIENTATION_TAG, BITS_TAG, SAMPLE_FORMAT_TAG = 0x0112, 258, 339  # of EXIF and TIFF
RANGE_TOLERANCE = 0.05
UPRIGHT_TRANSPOSE = {  # EXIF 2.3, tag 0x0112: what turns a stored picture upright
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
    """How pictures become pixel values. Sizes are (height, width)."""

    channels: int
    """1 grey, 2 grey and alpha, 3 RGB, 4 RGBA; more are those of arrays, and none of them is special."""
    content_size: tuple[int, int]
    """The pictures, as users see them."""
    image_size: tuple[int, int]
    """What the tokenizer sees: the content and its padding."""

    def __post_init__(self) -> None:
        if self.channels < 1:
            raise ConfigError(
                f"channels is {self.channels}; expected 1 (grey), 2 (grey, alpha), 3 (RGB), 4 (RGBA), or the number of an array's"
            )
        for name in ("content_size", "image_size"):
            object.__setattr__(self, name, _validate_size(name, getattr(self, name)))  # JSON gives lists
        if any(whole < part for whole, part in zip(self.image_size, self.content_size, strict=True)):
            raise ConfigError(
                f"image_size {self.image_size} is smaller than content_size {self.content_size}; "
                "expected it to be equal or larger. padded_size(content_size, multiple) gives one"
            )

    @property
    def draft_size(self) -> tuple[int, int]:
        """For `ImageSplit.image(i, at_least=…)`: the least size that `read` should be given to lose nothing visible.

        Twice the content, so that the last halving is antialiased; square, since EXIF may still turn the picture."""
        return (2 * max(self.content_size),) * 2

    def read(self, image: ImageLike) -> Tensor:
        """A picture of any mode and size as uint8 (C, h, w) of the content.

        Turned upright by its EXIF orientation; other numbers brought to 8 bits; transparency kept where this processor has an alpha
        channel and laid on white where it has none; cropped at the centre to the content's aspect ratio, then resized
        (Lanczos). A picture that has the size already is not resampled. Raises ValueError for one of other channels than
        this processor's where there is no conversion."""
        height, width = self.content_size
        found = image.shape[2] if isinstance(image, np.ndarray) else len(image.getbands())
        if (isinstance(image, np.ndarray) or self.channels not in MODES) and found != self.channels:
            raise ValueError(f"it has {found} channels; expected {self.channels}")
        if isinstance(image, np.ndarray):
            return _crop_and_resize(torch.from_numpy(image).permute(2, 0, 1), height, width)
        image = _convert_mode(make_upright_8bit(image), MODES[self.channels])
        if image.size != (width, height):
            image = PIL.ImageOps.fit(image, (width, height), method=PIL.Image.Resampling.LANCZOS)
        pixels = torch.from_numpy(np.array(image)).view(height, width, self.channels)
        return pixels.permute(2, 0, 1).contiguous()

    def preprocess(self, images: Tensor) -> Tensor:
        """uint8 (B, C, h, w) of the content → (B, C, H, W) of torch's default type in [-1, 1], padded evenly by repeated edges."""
        self._check("images", images, self.content_size)
        if images.dtype != torch.uint8:
            raise ValueError(f"images are {images.dtype}; expected torch.uint8 in 0..255, as `read` gives them")
        top, left = self._offset
        bottom = self.image_size[0] - self.content_size[0] - top
        right = self.image_size[1] - self.content_size[1] - left
        return F.pad(images.to(torch.get_default_dtype()) / 127.5 - 1, (left, right, top, bottom), mode="replicate")

    def postprocess(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] → uint8 (B, C, h, w) of the content, clamped and rounded."""
        return (self.to_unit_range(pixel_values) * 255).round().to(torch.uint8)

    def to_unit_range(self, pixel_values: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] → float32 (B, C, h, w) of the content in [0, 1], clamped."""
        self._check("pixel_values", pixel_values, self.image_size)
        (top, left), (height, width) = self._offset, self.content_size
        content = pixel_values[:, :, top : top + height, left : left + width]
        return ((content.float() + 1) / 2).clamp(0, 1)

    @property
    def _offset(self) -> tuple[int, int]:
        """Rows above and columns left of the content; an odd one goes below or to the right."""
        return (self.image_size[0] - self.content_size[0]) // 2, (self.image_size[1] - self.content_size[1]) // 2

    def _check(self, name: str, tensor: Tensor, size: tuple[int, ...]) -> None:
        if tensor.ndim != 4 or tuple(tensor.shape[1:]) != (self.channels, *size):
            expected = ", ".join(map(str, (self.channels, *size)))
            raise ValueError(f"{name} have the shape {tuple(tensor.shape)}; expected (B, {expected})")


def to_pil(images: Tensor) -> list[PIL.Image.Image]:
    """uint8 (B, C, h, w) → one picture each, of mode L, LA, RGB or RGBA; of more than four channels the first three."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images are {images.dtype} {tuple(images.shape)}; expected uint8 (B, C, h, w)")
    if images.shape[1] not in MODES:
        images = as_rgb(images)
    arrays = images.cpu().permute(0, 2, 3, 1).numpy()  # (B, h, w, C)
    return [PIL.Image.fromarray(array[..., 0] if images.shape[1] == 1 else array) for array in arrays]


def as_rgb(images: Tensor) -> Tensor:
    """(B, C, h, w) → (B, 3, h, w), for networks that know RGB alone: grey is repeated, what comes after RGB left out."""
    return images[:, :3] if images.shape[1] >= 3 else images[:, :1].expand(-1, 3, -1, -1)


def _crop_and_resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """uint8 (C, rows, columns) of any size → (C, height, width): cropped at the centre, resized with an antialiased cubic."""
    rows, columns = pixels.shape[1:]
    if (rows, columns) == (height, width):
        return pixels.contiguous()
    kept = min(rows, max(1, round(columns * height / width))), min(columns, max(1, round(rows * width / height)))
    top, left = (rows - kept[0]) // 2, (columns - kept[1]) // 2
    cropped = pixels[None, :, top : top + kept[0], left : left + kept[1]].float()
    resized = F.interpolate(cropped, (height, width), mode="bicubic", align_corners=False, antialias=True)
    return resized[0].round().clamp(0, 255).to(torch.uint8)


def padded_size(content_size: tuple[int, int], multiple: int) -> tuple[int, int]:
    """The smallest (height, width) of multiples that holds the content: (28, 30) in eights is (32, 32)."""
    height, width = _validate_size("content_size", content_size)
    if multiple < 1:
        raise ConfigError(f"multiple is {multiple}; expected a positive number, the tokenizer's downsampling factor")
    return -(-height // multiple) * multiple, -(-width // multiple) * multiple


def get_exif_orientation(image: ImageLike) -> int:
    """EXIF orientation, 1 (upright) to 8; from 5 on, height and width change places. Unreadable EXIF counts as none."""
    if isinstance(image, np.ndarray):
        return 1
    try:
        orientation = image.getexif().get(ORIENTATION_TAG)
        return orientation if orientation in UPRIGHT_TRANSPOSE else 1
    except Exception:  # cameras and editors write broken EXIF in many ways; the picture itself is fine
        return 1


def make_upright(image: PIL.Image.Image) -> PIL.Image.Image:
    """The picture as its EXIF orientation wants it seen."""
    return _apply_orientation(image, get_exif_orientation(image))


def make_upright_8bit(image: PIL.Image.Image) -> PIL.Image.Image:
    """`with_eight_bits` of the picture, as its EXIF orientation wants it seen."""
    return _apply_orientation(to_8bit_image(image), get_exif_orientation(image))


def _apply_orientation(image: PIL.Image.Image, orientation: int) -> PIL.Image.Image:
    if orientation == 1:
        return image
    turned = image.transpose(UPRIGHT_TRANSPOSE[orientation])
    if "transparency" in image.info:
        turned.info["transparency"] = image.info["transparency"]
    return turned


def to_8bit_image(image: PIL.Image.Image) -> PIL.Image.Image:
    """The picture in mode L, LA, RGB or RGBA, whichever holds what it shows; see the header for other numbers."""
    if (values := _high_bit_depth_values(image)) is not None:
        return PIL.Image.fromarray(to_uint8(values))
    if image.mode in MODES.values() and "transparency" not in image.info:
        return image
    grey = image.mode in ("1", "L", "La", "LA")
    if image.has_transparency_data:
        return image.convert("LA" if grey else "RGBA")
    return image.convert("L" if grey else "RGB")


def _high_bit_depth_values(image: PIL.Image.Image) -> np.ndarray | None:
    """(h, w) of a grey picture with the type that its file has; none for modes of 8 bits."""
    tags = getattr(image, "tag_v2", {})
    signed = tags.get(SAMPLE_FORMAT_TAG) == (2,)
    if image.mode == "L":
        return np.asarray(image).view(np.int8) if signed else None
    if image.mode != "F" and not image.mode.startswith("I"):
        return None
    values = np.asarray(image)
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return values.clip(0, 65_535).astype(np.uint16)  # Pillow opens their 16 bits so
    if image.mode == "I" and tags.get(BITS_TAG) == (32,) and not signed:
        return values.view(np.uint32)
    return values


def to_uint8(values: np.ndarray) -> np.ndarray:
    """Numbers of any type as uint8, by the table in this module's header.

    Raises:   ValueError when none of them is finite."""
    if values.dtype == np.uint8:
        return values
    if values.dtype == np.bool_:
        return values.astype(np.uint8) * np.uint8(255)
    if values.dtype == np.int8:
        return (values.astype(np.int16) + 128).astype(np.uint8)
    floats = values.dtype.kind == "f"
    if floats and not np.isfinite(values).all():
        finite = values[np.isfinite(values)]
        if not finite.size:
            raise ValueError("none of its numbers is finite; expected grey levels")
        values = np.nan_to_num(values, nan=finite.min(), neginf=finite.min(), posinf=finite.max())
    least, most = float(values.min()), float(values.max())

    def within(low: float, high: float) -> bool:
        return least >= low and most <= high

    if floats and within(-RANGE_TOLERANCE, 1 + RANGE_TOLERANCE):
        return _scale_to_uint8(values, 0, 255)
    if floats and within(-1 - 2 * RANGE_TOLERANCE, 1 + 2 * RANGE_TOLERANCE):
        return _scale_to_uint8(values, -1, 127.5)
    if values.dtype != np.uint16 and within(0, 255):
        return _scale_to_uint8(values, 0, 1)
    if within(0, 65_535):
        return _scale_to_uint8(values, 0, 1 / 257)
    return _scale_to_uint8(values, least, 127.5 / (most / 2 - least / 2) if most > least else 0)


def _scale_to_uint8(values: np.ndarray, zero: float, scale: float) -> np.ndarray:
    """uint8 of (v − zero) · scale, row by row: a large picture is never held in float64."""
    out = np.empty(values.shape, np.uint8)
    with np.errstate(over="ignore"):
        for i, row in enumerate(values):
            out[i] = ((row.astype(np.float64) - zero) * scale).round().clip(0, 255)
    return out


def _convert_mode(image: PIL.Image.Image, mode: str) -> PIL.Image.Image:
    """L, LA, RGB or RGBA → another of them; what was transparent is laid on white where the alpha channel goes."""
    if image.mode == mode:
        return image
    if image.mode in ("LA", "RGBA") and mode in ("L", "RGB"):
        coloured = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), coloured).convert("RGB")
    return image.convert(mode)


def _validate_size(name: str, size: tuple[int, int]) -> tuple[int, int]:
    sides = tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ConfigError(f"{name} is {size}; expected (height, width), two positive whole numbers")
    return sides[0], sides[1]
