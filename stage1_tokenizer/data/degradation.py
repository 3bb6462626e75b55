"""Pictures made worse on purpose, for a prior that learns to give back what was lost.

    noise           + N(0, σ²), σ from 10 to 80 of 255 levels, another of each picture
    downscale-2x    half the width and height, as a camera or a web page makes them, and back by `ImageProcessor.read`
    downscale-4x    a quarter

A small picture that a user gives goes through the same `read`, so that it looks to the prior like those that it was trained on.
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
FACTORS: dict[Degradation, int] = {"downscale-2x": 2, "downscale-4x": 4}
NOISE = 10.0, 80.0  # least and most standard deviation, in levels


def degrade_images(images: Tensor, kind: Degradation, processor: ImageProcessor, seeds: Sequence[int]) -> Tensor:
    """uint8 (B, C, h, w) of the content → the same, made worse; noise is that of each picture's seed."""
    if kind == "noise":
        return torch.stack([_noisy(image, seed) for image, seed in zip(images, seeds, strict=True)])
    return torch.stack([processor.read(downscale_image(image, FACTORS[kind])) for image in images])


def downscale_image(image: Tensor, factor: int) -> ImageLike:
    """uint8 (C, h, w) → a picture of 1 / factor of its sides."""
    height, width = image.shape[1] // factor, image.shape[2] // factor
    if min(height, width) < 1:
        raise ConfigError(
            f"a picture of {image.shape[1]}×{image.shape[2]} has no {factor}th of its sides; expected larger pictures, or another "
            "degradation"
        )
    if image.shape[0] in MODES:
        return to_pil(image[None])[0].resize((width, height), PIL.Image.Resampling.LANCZOS)
    small = F.interpolate(image[None].float(), (height, width), mode="bicubic", antialias=True)[0]
    array: np.ndarray = small.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
    return array


def _noisy(image: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    least, most = NOISE
    sigma = least + (most - least) * torch.rand((), generator=generator)
    return (image + sigma * torch.randn(image.shape, generator=generator)).round().clamp(0, 255).to(torch.uint8)
