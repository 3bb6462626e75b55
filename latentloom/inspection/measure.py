"""Measure a tokenizer in one pass over a set of images.

    images → reconstructions → PSNR, SSIM → the worst, the best and some random examples
           → codes (N, h, w), or latent statistics by channel when there is no codebook

Pixels are kept for the examples only, so memory grows with the number of codes and not with the number of pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from latentloom.inspection.latents import LatentStatistics, LatentSums
from pipelines.evaluation.tokenizer_metrics import reconstruct
from stage1_tokenizer.autoencoder_kl import AutoencoderKL
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.metrics import SSIM_WINDOW, psnr, ssim
from stage1_tokenizer.tokenizer import Tokenizer
from training_harness.progress import progress_bar

BATCH = 50
NUM_RANDOM = 3  # random examples
NUM_EXTREMES = 3  # worst examples, and as many best ones


@dataclass(frozen=True, eq=False)
class ReconstructionExample:
    """An image with its reconstruction."""

    position: int
    """Index in the data set."""
    source_id: str
    psnr: float
    """In dB."""
    original: Tensor
    """(C, h, w) uint8."""
    reconstruction: Tensor
    """(C, h, w) uint8."""


@dataclass(frozen=True)
class ReconstructionExamples:
    """Examples of three kinds; no image appears twice."""

    worst: list[ReconstructionExample]
    """Sorted by PSNR, the lowest first."""
    best: list[ReconstructionExample]
    """Sorted by PSNR, the highest first."""
    random: list[ReconstructionExample]


@dataclass(frozen=True, kw_only=True)
class TokenizerInspection:
    """What one pass of images through a tokenizer gives."""

    psnr: Tensor
    """(N,) float64 in dB."""
    ssim: Tensor | None
    """(N,) float64 in [-1, 1]; None when images are smaller than the SSIM window."""
    examples: ReconstructionExamples
    codes: Tensor | None
    """(N, h, w), or (N, levels, h, w) for residual codes; int32 in [0, K); None without a codebook."""
    latents: LatentStatistics | None
    """None with a codebook."""

    @property
    def num_images(self) -> int:
        return len(self.psnr)


@torch.inference_mode()
def inspect_tokenizer(tokenizer: Tokenizer, images: ImageLoader, seed: int = 0) -> TokenizerInspection:
    """Run all images through a tokenizer and measure its reconstructions and its codes or latents.

    Args:
        tokenizer: The tokenizer to inspect.
        images: The images.
        seed: Seed that selects the random examples.
    """
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    random_positions = order[: NUM_RANDOM + 2 * NUM_EXTREMES].tolist()  # spares, in case some are extremes
    skip_ssim = min(tokenizer.config.image_processor.content_size) < SSIM_WINDOW
    sums = LatentSums(isinstance(tokenizer, AutoencoderKL)) if tokenizer.codebook_size is None else None
    psnr_batches, ssim_batches, code_batches = list[Tensor](), list[Tensor](), list[Tensor]()
    candidates = list[ReconstructionExample]()
    with progress_bar(total=len(images), desc="inspect", unit="image") as bar:
        for positions, originals in images.batches(BATCH):
            reconstructions, indices = reconstruct(tokenizer, originals)
            psnr_batches.append(psnr(reconstructions, originals))
            if not skip_ssim:
                ssim_batches.append(ssim(reconstructions, originals))
            if indices is not None:
                code_batches.append(indices.int())
            if sums is not None:
                pixel_values = tokenizer.config.image_processor.preprocess(originals.to(tokenizer.device))
                sums.add(*tokenizer.latent_moments(pixel_values))
            ids = images.source_ids(positions)
            rows = zip(positions, ids, psnr_batches[-1].tolist(), originals, reconstructions, strict=True)
            candidates = keep_candidates(candidates + [ReconstructionExample(*row) for row in rows], random_positions)
            bar.update(len(positions))
    return TokenizerInspection(
        psnr=torch.cat(psnr_batches),
        ssim=torch.cat(ssim_batches) if ssim_batches else None,
        examples=select_examples(candidates, random_positions),
        codes=torch.cat(code_batches) if code_batches else None,
        latents=None if sums is None else sums.compute_statistics(),
    )


def sort_by_psnr(examples: list[ReconstructionExample]) -> list[ReconstructionExample]:
    """Sort by PSNR, the lowest first; equal values by position."""
    return sorted(examples, key=lambda example: (example.psnr, example.position))


def keep_candidates(
    examples: list[ReconstructionExample], random_positions: Sequence[int]
) -> list[ReconstructionExample]:
    """Keep the examples that may still be selected, as copies: views would keep their whole batches in memory."""
    order = sort_by_psnr(examples)
    extremes = {example.position for example in order[:NUM_EXTREMES] + order[-NUM_EXTREMES:]}
    return [
        ReconstructionExample(e.position, e.source_id, e.psnr, e.original.clone(), e.reconstruction.clone())
        for e in examples
        if e.position in extremes.union(random_positions)
    ]


def select_examples(examples: list[ReconstructionExample], random_positions: Sequence[int]) -> ReconstructionExamples:
    """Select the worst, the best and random examples, so that no image appears twice."""
    order = sort_by_psnr(examples)
    worst = order[:NUM_EXTREMES]
    best = order[len(worst) :][-NUM_EXTREMES:][::-1]
    others = {example.position: example for example in examples if example not in worst + best}
    random = [others[position] for position in random_positions if position in others][:NUM_RANDOM]
    return ReconstructionExamples(worst, best, random)
