"""Metrics of a tokenizer on held-out images: the errors of its reconstructions, and how its codes are used."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pipelines.evaluation.evaluator import BATCH, Evaluator, ImageSet, Measured
from pipelines.evaluation.frechet import bootstrap_interval, frechet_distance
from stage1_tokenizer.data.image_loader import inference_batch_size
from stage1_tokenizer.metrics import LPIPS_MIN_SIDE, SSIM_WINDOW, load_lpips_distance, psnr, ssim
from stage1_tokenizer.tokenizer import Tokenizer


def tokenizer_metrics(
    evaluator: Evaluator, tokenizer: Tokenizer, images: ImageSet, real: Measured, train: Measured | None = None
) -> dict[str, Any]:
    """psnr, ssim, lpips (means over images), codes, and the distance of the reconstructions from their originals.

    What is said of codes is none of a tokenizer without a codebook. `real` are the features of `images`, `train` those of
    training images for the noise floor.
    """
    spec = tokenizer.latent_spec()
    counts = torch.zeros(spec.codebook_size or 0)
    by_image: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "lpips": []}
    side = min(tokenizer.config.image_processor.content_size)
    lpips = load_lpips_distance(tokenizer.device) if side >= LPIPS_MIN_SIDE else None

    def rebuilt() -> Iterator[Tensor]:
        for _, originals in images.batches(BATCH):
            reconstruction, indices = reconstruct(tokenizer, originals)
            if indices is not None:
                counts.add_(torch.bincount(indices.flatten(), minlength=len(counts)))
            by_image["psnr"].append(psnr(reconstruction, originals))
            if side >= SSIM_WINDOW:
                by_image["ssim"].append(ssim(reconstruction, originals))
            if lpips is not None:
                by_image["lpips"].append(lpips(reconstruction, originals).cpu())
            yield reconstruction

    reconstructions = evaluator.measure_stream(rebuilt(), real.labels, "reconstructions")
    figures: dict[str, Any] = {
        name: float(torch.cat(values).mean()) if values else None for name, values in by_image.items()
    }
    figures |= dict.fromkeys(("codes_used", "perplexity", "bits_per_pixel"))
    if spec.codebook_size is not None:
        figures |= codebook_usage(counts)._asdict()
        pixels = math.prod(tokenizer.config.image_processor.content_size)
        figures["bits_per_pixel"] = spec.tokens * math.log2(spec.codebook_size) / pixels
    rebuilt_rows, real_rows = reconstructions.features, real.features
    floor = real_rows if train is None else evaluator.noise_floor(train, real.labels).features
    enough, floor_exists = len(real) >= 2, train is not None and min(len(floor), len(real)) >= 2
    interval = bootstrap_interval(rebuilt_rows, real_rows, evaluator.seed, paired=True) if enough else None
    return figures | {
        "reconstruction_frechet": frechet_distance(rebuilt_rows, real_rows) if enough else None,
        "reconstruction_frechet_interval": interval,
        "reconstruction_frechet_floor": frechet_distance(floor, real_rows) if floor_exists else None,
    }


@torch.inference_mode()
def reconstruct(tokenizer: Tokenizer, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """uint8 (B, C, h, w) → the same after the round trip, and the codes (B, h, w) if there are any, both on the CPU."""
    processor, pictures, codes = tokenizer.config.image_processor, list[Tensor](), list[Tensor]()
    for part in images.split(inference_batch_size(tokenizer.config.image_size)):
        output = tokenizer(processor.preprocess(part.to(tokenizer.device)))
        pictures.append(processor.postprocess(output.reconstruction).cpu())
        if output.indices is not None:
            codes.append(output.indices.cpu())
    return torch.cat(pictures), torch.cat(codes) if codes else None
