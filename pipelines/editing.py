r"""Editing: keep a part of the user's images and generate the rest.

    images, masks → fill the masked region from the pixels around it → encode → codes
    codes → generate the codes of the masked region again → decode → pixels
    result = generated pixels where the mask is white, original pixels where the mask is black

The original pixels stay equal byte for byte. Each code depends on pixels far away from its position, so pixels inside the
masked region would change the codes around it. The region is therefore filled before it is encoded.

`strength` is the share of the positions in the masked region that are generated again. Without a mask the region is the
whole image. For a prior of latents, `strength` is the amount of noise added to the latents.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from stage1_tokenizer.data.image_loader import inference_batch_size
from stage1_tokenizer.data.image_processor import MODES, ImageLike, ImageProcessor
from stage1_tokenizer.tokenizer import Tokenizer
from stage2_prior.prior import KnownCodes, rand_per_image
from training_harness.errors import UserError

DEFAULT_STRENGTH = 0.8  # without a mask
ImagesLike = Image.Image | np.ndarray | Tensor | Sequence[Image.Image | np.ndarray | Tensor]


@dataclass(frozen=True)
class Edit:
    """The images of one edit, their masks and their codes."""

    originals: Tensor  # (N, C, h, w) uint8
    mask: Tensor  # (N, 1, h, w) bool: pixels to generate
    masked_region: Tensor  # (N, rows, columns) bool: positions of the code grid to generate
    codes: Tensor  # (N, rows, columns) int64, or (N, levels, rows, columns); latents (N, c, rows, columns)

    @classmethod
    def from_images(
        cls,
        tokenizer: Tokenizer,
        images: ImagesLike,
        masks: ImagesLike | None,
        latents: bool = False,
        batch_size: int | None = None,
    ) -> Self:
        """Read images and masks, and encode the images.

        Args:
            images: one image or several.
            masks: one mask for all images, one mask for each image, or None to generate the whole image.
            latents: encode to latents instead of indices.
            batch_size: images in one forward pass of the encoder.

        Raises:
            UserError: if an image or a mask cannot be read, or if a mask and its image differ in size.
        """
        processor, input_images = tokenizer.config.image_processor, _to_image_list(images)
        if not input_images:
            raise UserError("image is empty; expected one image, or one image for each label")
        originals = torch.stack([_read_image(image, processor, "image") for image in input_images])
        if masks is None:
            mask = torch.ones(len(originals), 1, *originals.shape[2:], dtype=torch.bool)
            pixels = originals
        else:
            mask = _read_masks(_to_image_list(masks), input_images, processor)
            pixels = fill_masked_pixels(originals, mask)
        encode = tokenizer.encode_latents if latents else tokenizer.encode_indices
        with torch.no_grad():
            codes = torch.cat(
                [
                    encode(processor.preprocess(batch).to(tokenizer.device, tokenizer.dtype)).cpu()
                    for batch in pixels.split(batch_size or inference_batch_size(tokenizer.config.image_size))
                ]
            )
        padded_mask = replace(processor, channels=1).preprocess(mask.to(torch.uint8) * 255)
        masked_region = F.max_pool2d(padded_mask, tokenizer.latent_spec().downsampling_factor).squeeze(1) > -1
        return cls(originals, mask, masked_region, codes)

    def repeat(self, count: int) -> Self:
        """Repeat each image `count` times."""
        return type(self)(
            *(x.repeat_interleave(count, 0) for x in (self.originals, self.mask, self.masked_region, self.codes))
        )

    def select_known_codes(self, strength: float, at_random: bool, generators: Sequence[torch.Generator]) -> KnownCodes:
        """Select the codes that stay as they are.

        All codes outside the masked region stay. A share of 1 − `strength` of the codes inside it stays: random positions,
        or the first in raster order.
        """
        regenerated = self.masked_region.flatten(1)
        if strength < 1:
            if at_random:
                scores = rand_per_image(regenerated.shape[1], generators)
            else:
                scores = torch.linspace(1, 0, regenerated.shape[1]).expand(regenerated.shape)
            rank = scores.masked_fill(~regenerated, 2.0).argsort(1).argsort(1)  # masked positions come first
            num_regenerated = (strength * regenerated.sum(1, keepdim=True)).round().clamp(min=1)
            regenerated = regenerated & (rank < num_regenerated)
        return KnownCodes(self.codes, ~regenerated.view_as(self.masked_region))

    def composite(self, generated: Tensor) -> Tensor:
        """Replace the unmasked pixels of generated images (N, C, h, w) in [0, 1] by the original pixels."""
        return torch.where(self.mask, generated, self.originals / 255)


def fill_masked_pixels(images: Tensor, mask: Tensor) -> Tensor:
    """Replace each masked pixel by the mean of the nearest unmasked pixels.

    Args:
        images: (N, C, h, w) uint8.
        mask: (N, 1, h, w) bool.

    Returns:
        (N, C, h, w) uint8; grey (127) where an image has no unmasked pixel.
    """
    known = (~mask).float()
    values, result, remaining = images.float() * known, images.float(), mask.clone()
    for radius in (2**n for n in range(math.ceil(math.log2(max(images.shape[2:]))) + 1)):
        window = {"kernel_size": 2 * radius + 1, "stride": 1, "padding": radius}
        mean_value, known_share = F.avg_pool2d(values, **window), F.avg_pool2d(known, **window)
        fillable = remaining & (known_share > 0)
        result = torch.where(fillable, mean_value / known_share.clamp(min=1e-12), result)
        remaining = remaining & ~fillable
        if not remaining.any():
            break
    return torch.where(remaining, 127.0, result).round().clamp(0, 255).to(torch.uint8)


def check_edit(image: object, mask_image: object, strength: float | None) -> None:
    """Check the arguments of an edit before any image is read.

    Raises:
        UserError: if a mask or a strength comes without an image, or if `strength` is outside (0, 1].
    """
    for name, value in (("mask_image", mask_image), ("strength", strength)):
        if image is None and value is not None:
            raise UserError(f"{name} was given without image; expected the image to edit; give image=")
    if strength is not None and not 0 < strength <= 1:
        raise UserError(f"strength is {strength}; expected a share in (0, 1]; pass 1 to generate everything again")


def _to_image_list(images: ImagesLike) -> list[ImageLike]:
    """Convert one image, a sequence of images or a batch to a list."""
    if isinstance(images, Image.Image) or (isinstance(images, np.ndarray | Tensor) and images.ndim < 4):
        return [_to_image(images)]
    return [_to_image(image) for image in images]


def _to_image(image: Any) -> ImageLike:
    """Convert an image to an `ImageLike`.

    Args:
        image: a PIL image, an array (h, w) or (h, w, C), or a tensor (h, w) or (C, h, w). Arrays and tensors are uint8, or
            numbers in [0, 1].
    """
    if isinstance(image, Image.Image):
        return ImageOps.exif_transpose(image)  # the sizes of image and mask are compared as they are displayed
    if isinstance(image, Tensor):
        image = image.detach().cpu()
        image = (image.permute(1, 2, 0) if image.ndim == 3 else image).numpy()
    array = np.asarray(image)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8:
        if array.size and not (array.min() >= 0 and array.max() <= 1):
            raise UserError(
                f"an image of dtype {array.dtype} has values from {array.min():.3g} to {array.max():.3g}; expected values in "
                "[0, 1], or dtype uint8"
            )
        array = (array * 255).round().astype(np.uint8)
    array = array[..., None] if array.ndim == 2 else array
    if array.shape[2] not in MODES:
        return array
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def _read_image(image: ImageLike, processor: ImageProcessor, name: str) -> Tensor:
    try:
        return processor.read(image)
    except (ValueError, OSError, IndexError) as error:
        raise UserError(
            f"{name} could not be read: {error}; expected an image like the tokenizer's training images"
        ) from error


def _read_masks(masks: Sequence[ImageLike], images: Sequence[ImageLike], processor: ImageProcessor) -> Tensor:
    """Read masks to (N, 1, h, w) bool, true where a mask is white."""
    if len(masks) not in (1, len(images)):
        raise UserError(
            f"{len(masks)} masks were given for {len(images)} images; expected one mask, or one mask for each image"
        )
    grey_processor, pixel_masks = replace(processor, channels=1), []
    for image, mask in zip(images, [*masks] * (len(images) // len(masks)), strict=True):
        (mask_height, mask_width), (height, width) = _image_size(mask), _image_size(image)
        if (mask_height, mask_width) != (height, width):
            raise UserError(
                f"the mask is {mask_height}×{mask_width} and its image {height}×{width}; expected the same size; paint the "
                "mask on a copy of the image"
            )
        pixel_masks.append(_read_image(mask, grey_processor, "mask_image") >= 128)
    return torch.stack(pixel_masks)


def _image_size(image: ImageLike) -> tuple[int, int]:
    """Return (height, width)."""
    return (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]
