"""Degrade images on purpose, to train a prior that restores them.

    noise           + N(0, σ²), with σ from 10 to 80 of 255 levels, chosen for each image
    downscale-2x    half the height and width, then enlarged by `ImageProcessor.read`
    downscale-4x    a quarter of the height and width, then the same

A small image that a user passes goes through the same `read`. So the prior gets input of the kind it was trained on.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import PIL.Image
import torch
import torch.nn.functional as F
from torch import Tensor

from stage1_tokenizer.data.image_processor import MODES, ImageLike, ImageProcessor, to_pil
from training_harness.errors import ConfigError

Degradation = Literal["none", "noise", "downscale-2x", "downscale-4x"]
DOWNSCALE_FACTORS: dict[Degradation, int] = {"downscale-2x": 2, "downscale-4x": 4}
NOISE_RANGE = 10.0, 80.0  # smallest and largest standard deviation, in levels of 255


def degrade_images(images: Tensor, kind: Degradation, processor: ImageProcessor, seeds: Sequence[int]) -> Tensor:
    """Degrade images of the content size.

    Args:
        images: (B, C, h, w) uint8.
        kind: any degradation other than "none".
        processor: enlarges downscaled images again.
        seeds: one seed of the noise for each image.

    Returns:
        (B, C, h, w) uint8.
    """
    if kind == "noise":
        return torch.stack([_add_noise(image, seed) for image, seed in zip(images, seeds, strict=True)])
    return torch.stack([processor.read(downscale_image(image, DOWNSCALE_FACTORS[kind])) for image in images])


def downscale_image(image: Tensor, factor: int) -> ImageLike:
    """Reduce the height and width of a (C, h, w) uint8 image by `factor`.

    Raises:
        ConfigError: the image is smaller than `factor` pixels.
    """
    height, width = image.shape[1] // factor, image.shape[2] // factor
    if min(height, width) < 1:
        raise ConfigError(
            f"an image of {image.shape[1]}×{image.shape[2]} pixels cannot be downscaled by {factor}; expected at least {factor} "
            "pixels a side. Use larger images or another degradation"
        )
    if image.shape[0] in MODES:
        return to_pil(image[None])[0].resize((width, height), PIL.Image.Resampling.LANCZOS)
    small = F.interpolate(image[None].float(), (height, width), mode="bicubic", antialias=True)[0]
    array: np.ndarray = small.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return array


def _add_noise(image: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    min_sigma, max_sigma = NOISE_RANGE
    sigma = min_sigma + (max_sigma - min_sigma) * torch.rand((), generator=generator)
    return (image + sigma * torch.randn(image.shape, generator=generator)).round().clamp(0, 255).to(torch.uint8)
