r"""Editing: what stays of given pictures, as pixels and as codes.

    picture, mask  →  the hole filled from around it  →  codes  →  those that the hole touches are drawn anew  →  pixels
    result = drawn where the mask is white, the picture where it is black: there byte for byte

The encoder sees far, so what stands in the hole would reach the codes beside it; that is why it is filled first. `strength` is
the share of the places in the hole (without a mask: of all places) that are drawn anew; of a prior of latents, how much noise is
laid on them.
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
    """What is given of `len(originals)` pictures."""

    originals: Tensor  # (N, C, h, w) uint8
    mask: Tensor  # (N, 1, h, w) bool: pixels that are drawn
    masked_region: Tensor  # (N, rows, columns) bool: places of the code grid that are drawn
    codes: Tensor  # (N, rows, columns) int64, or (N, levels, rows, columns); latents (N, c, rows, columns)

    @classmethod
    def of(
        cls,
        tokenizer: Tokenizer,
        images: ImagesLike,
        masks: ImagesLike | None,
        latents: bool = False,
        batch_size: int | None = None,
    ) -> Self:
        """Raises UserError when the pictures cannot be read, or a mask has not the size of its picture."""
        processor, pictures = tokenizer.config.image_processor, _as_images(images)
        if not pictures:
            raise UserError("image is empty; expected a picture, or one a label")
        originals = torch.stack([_read(picture, processor, "image") for picture in pictures])
        if masks is None:
            mask = torch.ones(len(originals), 1, *originals.shape[2:], dtype=torch.bool)
        else:
            mask = _masks(_as_images(masks), pictures, processor)
        spec, given = tokenizer.latent_spec(), filled(originals, mask) if masks is not None else originals
        encode = tokenizer.encode_latents if latents else tokenizer.encode_indices
        with torch.no_grad():
            codes = torch.cat(
                [
                    encode(processor.preprocess(part).to(tokenizer.device, tokenizer.dtype)).cpu()
                    for part in given.split(batch_size or inference_batch_size(tokenizer.config.image_size))
                ]
            )
        padded = replace(processor, channels=1).preprocess(mask.to(torch.uint8) * 255)
        masked_region = F.max_pool2d(padded, spec.downsampling_factor).squeeze(1) > -1
        return cls(originals, mask, masked_region, codes)

    def repeated(self, count: int) -> Self:
        """Each picture `count` times."""
        return type(self)(
            *(x.repeat_interleave(count, 0) for x in (self.originals, self.mask, self.masked_region, self.codes))
        )

    def known(self, strength: float, at_random: bool, generators: Sequence[torch.Generator]) -> KnownCodes:
        """The codes that stay: outside the hole all, inside a share of 1 − `strength`, at random or the first in raster order."""
        drawn = self.masked_region.flatten(1)
        if strength < 1:
            if at_random:
                scores = rand_per_image(drawn.shape[1], generators)
            else:
                scores = torch.linspace(1, 0, drawn.shape[1]).expand(drawn.shape)
            rank = scores.masked_fill(~drawn, 2.0).argsort(1).argsort(1)  # of the hole's places the first, by score
            wanted = (strength * drawn.sum(1, keepdim=True)).round().clamp(min=1)
            drawn = drawn & (rank < wanted)
        return KnownCodes(self.codes, ~drawn.view_as(self.masked_region))

    def composited(self, pictures: Tensor) -> Tensor:
        """(N, C, h, w) float in [0, 1]: what was drawn, laid under what was kept."""
        return torch.where(self.mask, pictures, self.originals / 255)


def filled(pictures: Tensor, mask: Tensor) -> Tensor:
    """uint8 (N, C, h, w): pixels under the mask (N, 1, h, w) bool become the mean of the nearest that are not; grey if none is."""
    known = (~mask).float()
    values, result, rest = pictures.float() * known, pictures.float(), mask.clone()
    for reach in (2**n for n in range(math.ceil(math.log2(max(pictures.shape[2:]))) + 1)):
        size = {"kernel_size": 2 * reach + 1, "stride": 1, "padding": reach}
        total, share = F.avg_pool2d(values, **size), F.avg_pool2d(known, **size)
        reached = rest & (share > 0)
        result = torch.where(reached, total / share.clamp(min=1e-12), result)
        rest = rest & ~reached
        if not rest.any():
            break
    return torch.where(rest, 127.0, result).round().clamp(0, 255).to(torch.uint8)


def check_edit(image: object, mask_image: object, strength: float | None) -> None:
    """What can be refused before anything is read."""
    for name, value in (("mask_image", mask_image), ("strength", strength)):
        if image is None and value is not None:
            raise UserError(f"{name} was given without image; expected the picture that it is about; give image=")
    if strength is not None and not 0 < strength <= 1:
        raise UserError(f"strength is {strength}; expected a share in (0, 1]; 1 draws everything anew")


def _as_images(pictures: ImagesLike) -> list[ImageLike]:
    """One picture or several, alone, in a sequence or in a batch."""
    if isinstance(pictures, Image.Image) or (isinstance(pictures, np.ndarray | Tensor) and pictures.ndim < 4):
        return [_as_image(pictures)]
    return [_as_image(picture) for picture in pictures]


def _as_image(picture: Any) -> ImageLike:
    """A PIL picture; an array (h, w) or (h, w, C), or a tensor (h, w) or (C, h, w), of uint8 or of numbers in [0, 1]."""
    if isinstance(picture, Image.Image):
        return ImageOps.exif_transpose(picture)  # upright, as it is seen: sizes of picture and mask are compared
    if isinstance(picture, Tensor):
        picture = picture.detach().cpu()
        picture = (picture.permute(1, 2, 0) if picture.ndim == 3 else picture).numpy()
    array = np.asarray(picture)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8:
        if array.size and not (array.min() >= 0 and array.max() <= 1):
            raise UserError(
                f"a picture of {array.dtype} has values from {array.min():.3g} to {array.max():.3g}; expected [0, 1], or uint8"
            )
        array = (array * 255).round().astype(np.uint8)
    array = array[..., None] if array.ndim == 2 else array
    if array.shape[2] not in MODES:
        return array
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def _read(picture: ImageLike, processor: ImageProcessor, name: str) -> Tensor:
    try:
        return processor.read(picture)
    except (ValueError, OSError, IndexError) as error:
        raise UserError(
            f"{name} could not be read: {error}; expected a picture like those the tokenizer knows"
        ) from error


def _masks(masks: Sequence[ImageLike], pictures: Sequence[ImageLike], processor: ImageProcessor) -> Tensor:
    """(N, 1, h, w) bool, true where white."""
    if len(masks) not in (1, len(pictures)):
        raise UserError(f"{len(masks)} masks were given for {len(pictures)} images; expected one, or one an image")
    grey, found = replace(processor, channels=1), []
    for picture, mask in zip(pictures, [*masks] * (len(pictures) // len(masks)), strict=True):
        (rows, columns), (height, width) = _size(mask), _size(picture)
        if (rows, columns) != (height, width):
            raise UserError(
                f"the mask is {rows}×{columns} and its image {height}×{width}; expected the same size; draw the mask on the image"
            )
        found.append(_read(mask, grey, "mask_image") >= 128)
    return torch.stack(found)


def _size(picture: ImageLike) -> tuple[int, int]:
    return (picture.height, picture.width) if isinstance(picture, Image.Image) else picture.shape[:2]
