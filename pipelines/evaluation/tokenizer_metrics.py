"""Metrics of a tokenizer on held-out images: reconstruction errors, and use of the codebook."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipelines.evaluation.evaluator import BATCH, Evaluator, ImageSet, MeasuredImages
from pipelines.evaluation.frechet import bootstrap_interval, frechet_distance
from stage1_tokenizer.data.image_loader import inference_batch_size
from stage1_tokenizer.metrics import (
    LPIPS_MIN_SIDE,
    SSIM_WINDOW,
    codebook_usage,
    load_lpips_distance,
    psnr,
    ssim,
)
from stage1_tokenizer.tokenizer import Tokenizer


def tokenizer_metrics(
    evaluator: Evaluator,
    tokenizer: Tokenizer,
    images: ImageSet,
    real: MeasuredImages,
    train: MeasuredImages | None = None,
) -> dict[str, Any]:
    """Compute the metrics of reconstructions: PSNR, SSIM, LPIPS, codebook use, and the Fréchet distance to the originals.

    PSNR, SSIM and LPIPS are means over images. The metrics of codebook use are None for a tokenizer without a codebook.

    Args:
        real: features of `images`.
        train: features of training images, for the noise floor.
    """
    spec = tokenizer.latent_spec()
    code_counts = torch.zeros(spec.codebook_size or 0)
    by_image: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "lpips": []}
    side = min(tokenizer.config.image_processor.content_size)
    lpips = load_lpips_distance(tokenizer.device) if side >= LPIPS_MIN_SIDE else None

    def reconstruct_batches() -> Iterator[Tensor]:
        for _, originals in images.batches(BATCH):
            batch, indices = reconstruct(tokenizer, originals)
            if indices is not None:
                code_counts.add_(torch.bincount(indices.flatten(), minlength=len(code_counts)))
            by_image["psnr"].append(psnr(batch, originals))
            if side >= SSIM_WINDOW:
                by_image["ssim"].append(ssim(batch, originals))
            if lpips is not None:
                by_image["lpips"].append(lpips(batch, originals).cpu())
            yield batch

    reconstructions = evaluator.measure_stream(reconstruct_batches(), real.labels, "reconstructions").features
    metrics: dict[str, Any] = {
        name: float(torch.cat(values).mean()) if values else None for name, values in by_image.items()
    }
    metrics |= dict.fromkeys(("codes_used", "perplexity", "bits_per_pixel"))
    if spec.codebook_size is not None:
        metrics |= codebook_usage(code_counts)._asdict()
        pixels = math.prod(tokenizer.config.image_processor.content_size)
        metrics["bits_per_pixel"] = spec.tokens * math.log2(spec.codebook_size) / pixels
    originals = real.features
    floor = originals if train is None else evaluator.noise_floor(train, real.labels).features
    has_distance, has_floor = len(real) >= 2, train is not None and min(len(floor), len(real)) >= 2
    interval = bootstrap_interval(reconstructions, originals, evaluator.seed, paired=True) if has_distance else None
    return metrics | {
        "reconstruction_frechet": frechet_distance(reconstructions, originals) if has_distance else None,
        "reconstruction_frechet_interval": interval,
        "reconstruction_frechet_floor": frechet_distance(floor, originals) if has_floor else None,
    }


@torch.inference_mode()
def reconstruct(tokenizer: Tokenizer, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """Encode and decode images.

    Args:
        images: (B, C, h, w) uint8.

    Returns:
        Reconstructions (B, C, h, w) uint8 and indices (B, h, w) int64, both on the CPU; None in place of the indices for a
        tokenizer without a codebook.
    """
    processor, reconstructions, indices = tokenizer.config.image_processor, list[Tensor](), list[Tensor]()
    for batch in images.split(inference_batch_size(tokenizer.config.image_size)):
        output = tokenizer(processor.preprocess(batch.to(tokenizer.device)))
        reconstructions.append(processor.postprocess(output.reconstruction).cpu())
        if output.indices is not None:
            indices.append(output.indices.cpu())
    return torch.cat(reconstructions), torch.cat(indices) if indices else None
