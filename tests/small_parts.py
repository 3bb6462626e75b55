"""Shared by the tests of stage one and the harness: a small tokenizer with all parts, and image folders."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_models import seeded

from stage1_tokenizer.vqgan import VQGAN, VQGANConfig


def small_config(**changes: Any) -> VQGANConfig:
    """Return a configuration: 16×16 RGB images, 4×4 codes, K = 16, with residual blocks and attention."""
    fields: dict[str, Any] = {
        "image_size": (16, 16),
        "channels": (8, 8, 16),
        "blocks": (0, 1, 1),
        "attention": (4,),
        "latent_channels": 4,
        "codebook_size": 16,
        "latent_mean": [0.5, -1.0, 0.0, 2.0],
        "latent_std": [1.0, 2.0, 0.5, 0.25],
    }
    return VQGANConfig(**fields | changes)


def random_pixels(batch: int = 6, channels: int = 3, height: int = 16, width: int = 16, seed: int = 0) -> torch.Tensor:
    """Return (batch, channels, height, width) uniform random pixels in [-1, 1]."""
    return torch.rand(batch, channels, height, width, generator=seeded(seed)) * 2 - 1


def small_tokenizer(**changes: Any) -> VQGAN:
    """Return a tokenizer in evaluation mode. Its codebook is initialized from a batch, so that many codes are used."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = VQGAN(small_config(**changes)).train()
        with torch.no_grad():
            tokenizer(random_pixels(channels=tokenizer.config.image_channels, seed=1))
    return tokenizer.eval()


def write_images(folder: Path, count: int = 24, size: tuple[int, int] = (16, 16), classes: int = 2) -> Path:
    """Write `folder/class/NN.png`: discs of many sizes and colours on a colour gradient; `size` is (height, width)."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]]
    for i in range(count):
        colour, background = rng.integers(0, 256, 3), rng.integers(0, 256, 3)
        is_inside = (rows - rng.uniform(4, 12)) ** 2 + (columns - rng.uniform(4, 12)) ** 2 < rng.uniform(4, 30)
        gradient = (columns / size[1])[..., None] * background
        pixels = np.where(is_inside[..., None], colour, gradient).astype(np.uint8)
        path = folder / "abcdefgh"[i % classes] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(path)
    return folder


def error_message(error: pytest.ExceptionInfo) -> str:
    """Return the message of a user error. Check its form: one line that says what was expected."""
    message = str(error.value)
    assert "\n" not in message
    assert "expected" in message or "did you mean" in message, message
    return message
