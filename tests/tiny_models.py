"""Tiny untrained models, image sources and pipelines for tests."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines.latent_generation import LatentGenerationPipeline
from stage1_tokenizer.data.sources import ImageSource, ImageSplit
from stage1_tokenizer.vqgan import VQGAN, VQGANConfig
from stage2_prior.autoregressive.config import AutoregressivePriorConfig
from stage2_prior.autoregressive.model import AutoregressivePrior
from stage2_prior.diffusion.config import DiffusionPriorConfig
from stage2_prior.diffusion.model import DiffusionPrior
from stage2_prior.diffusion.sampling import DiffusionOptions

LABEL_NAMES = ("cat", "dog", "7")
DIFFUSERS_REASON = "this test compares with diffusers, which is in the extra `bench`"


def seeded(seed: int) -> torch.Generator:
    """Return a CPU generator with a seed."""
    return torch.Generator().manual_seed(seed)


def diffusers_scheduler(name: str, **fields: Any) -> Any:
    """Return a scheduler of diffusers; skip the test if diffusers is not installed."""
    return getattr(pytest.importorskip("diffusers", reason=DIFFUSERS_REASON), name)(**fields)


def tiny_tokenizer(seed: int = 0, **fields: Any) -> VQGAN:
    """Return a tokenizer for grey 14×14 images padded to 16×16: f = 4, 4×4 codes, K = 16, with statistics and an id."""
    sizes = {"image_channels": 1, "image_size": (16, 16), "content_size": (14, 14), "channels": (8, 8, 8)}
    parts = {"blocks": (0, 0, 1), "attention": (), "latent_channels": 4, "codebook_size": 16}
    statistics = {"latent_mean": [0.1, -0.2, 0.3, 0.0], "latent_std": [0.5, 1.0, 1.5, 2.0]}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = VQGAN(VQGANConfig(**sizes | parts | statistics | fields))
    tokenizer.config.tokenizer_id = tokenizer.compute_id()
    return tokenizer.eval()


def tiny_prior(seed: int = 0, sharpness: float = 20.0, **fields: Any) -> AutoregressivePrior:
    """Return a prior for 4×4 codes, K = 16, three classes; `sharpness` scales the head so that it is far from uniform."""
    sizes = {"codebook_size": 16, "height": 4, "width": 4, "num_classes": len(LABEL_NAMES)}
    parts = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        prior = AutoregressivePrior(AutoregressivePriorConfig(**sizes | parts | fields))
    with torch.no_grad():
        (prior.code_embedding if prior.head is None else prior.head).weight.mul_(sharpness)
    return prior.eval()


def tiny_diffusion(randomize_zeros: bool = True, **fields: Any) -> DiffusionPrior:
    """Return a diffusion prior for 4×4 latents with 4 channels and three classes.

    `randomize_zeros` replaces weights that are initialized to zero; with them the network would predict zero.
    """
    sizes = {"channels": 4, "height": 4, "width": 4, "num_classes": len(LABEL_NAMES)}
    parts = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "intermediate_size": 48}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        prior = DiffusionPrior(DiffusionPriorConfig(**sizes | parts | fields))
        if randomize_zeros:
            for parameter in prior.parameters():
                if not parameter.any():
                    torch.nn.init.normal_(parameter, std=0.2)
    return prior.eval()


def tiny_pipeline(label_names: Sequence[str] | None = LABEL_NAMES, **tokenizer_fields: Any) -> LatentGenerationPipeline:
    """Return a pipeline of a tiny tokenizer and an autoregressive prior."""
    tokenizer = tiny_tokenizer(**tokenizer_fields)
    spec = tokenizer.latent_spec()
    grid = {"height": spec.height, "width": spec.width, "tokenizer_id": spec.tokenizer_id}
    pipeline = LatentGenerationPipeline(tokenizer, tiny_prior(**grid), label_names)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def diffusion_pipeline(**options: Any) -> LatentGenerationPipeline:
    """Return a pipeline of a tiny tokenizer and a diffusion prior; `options` are sampling options."""
    tokenizer = tiny_tokenizer()
    prior = tiny_diffusion(tokenizer_id=tokenizer.config.tokenizer_id)
    sampling_options = DiffusionOptions(**{"num_inference_steps": 5} | options)
    pipeline = LatentGenerationPipeline(tokenizer, prior, LABEL_NAMES, sampling_options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


class InMemoryImages:
    """Images (C, h, w) uint8 as PNG files in memory."""

    def __init__(self, images: Tensor, prefix: str) -> None:
        self._images, self._prefix = images, prefix

    def __len__(self) -> int:
        return len(self._images)

    def source_id(self, i: int) -> str:
        return f"{self._prefix}/{i:05d}"

    def byte_sizes(self) -> list[int]:
        return [len(self.read_bytes(i)) for i in range(len(self))]

    def read_bytes(self, i: int) -> bytes:
        buffer = io.BytesIO()
        pixels = self._images[i].permute(1, 2, 0).numpy()
        Image.fromarray(np.squeeze(pixels)).save(buffer, format="PNG")
        return buffer.getvalue()


def tiny_split(count: int, seed: int = 0, size: tuple[int, int] = (14, 14), labelled: bool = True) -> ImageSplit:
    """Return grey noise images; the brightness of image i depends on its class, i mod 3."""
    labels = torch.arange(count) % len(LABEL_NAMES)
    noise = torch.randint(60, (count, 1, *size), generator=seeded(seed))
    images = (noise + 80 * labels.view(-1, 1, 1, 1)).to(torch.uint8)
    return ImageSplit(InMemoryImages(images, f"seed{seed}"), labels.tolist() if labelled else None)


def tiny_source(train: int = 40, validation: int = 10, labelled: bool = True) -> ImageSource:
    """Return a source of `tiny_split` images for training and validation."""
    names = LABEL_NAMES if labelled else None
    splits = tiny_split(train, 0, labelled=labelled), tiny_split(validation, 1, labelled=labelled)
    return ImageSource("tiny", names, *splits, None)
