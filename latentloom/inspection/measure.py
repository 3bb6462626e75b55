"""One pass of images through a tokenizer: PSNR and SSIM of each, all codes or statistics of the latents, and examples.

    images → reconstructions → PSNR, SSIM → the worst, the best, some at random
           → codes (N, h, w), or latents by channel where there is no codebook

Only examples keep their pictures: memory grows with the number of codes, not of pixels.
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
DRAWN, EXTREMES = 3, 3  # examples at random, and of the worst and of the best


@dataclass(frozen=True, eq=False)
class Example:
    position: int
    source_id: str
    psnr: float
    original: Tensor
    """(C, h, w) uint8, as is the reconstruction."""
    reconstruction: Tensor


@dataclass(frozen=True)
class Examples:
    """Each image at most once."""

    worst: list[Example]
    """The worst first."""
    best: list[Example]
    """The best first."""
    drawn: list[Example]


@dataclass(frozen=True, kw_only=True)
class Inspection:
    psnr: Tensor
    """(N,) float64 in dB."""
    ssim: Tensor | None
    """(N,) float64; none of images that are smaller than its window."""
    examples: Examples
    codes: Tensor | None
    """(N, h, w), or (N, levels, h, w) of residual codes; int32 in [0, K)."""
    latents: LatentStatistics | None
    """Of a tokenizer without a codebook."""

    @property
    def num_images(self) -> int:
        return len(self.psnr)


@torch.inference_mode()
def inspect(tokenizer: Tokenizer, images: ImageLoader, seed: int = 0) -> Inspection:
    """`seed` is of the examples at random."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    drawn = order[: DRAWN + 2 * EXTREMES].tolist()  # enough, should the first be among the worst and the best
    small = min(tokenizer.config.image_processor.content_size) < SSIM_WINDOW
    sums = LatentSums(isinstance(tokenizer, AutoencoderKL)) if tokenizer.codebook_size is None else None
    likeness, structure, codes, kept = list[Tensor](), list[Tensor](), list[Tensor](), list[Example]()
    with progress_bar(total=len(images), desc="inspect", unit="image") as bar:
        for positions, originals in images.batches(BATCH):
            rebuilt, indices = reconstruct(tokenizer, originals)
            likeness.append(psnr(rebuilt, originals))
            if not small:
                structure.append(ssim(rebuilt, originals))
            if indices is not None:
                codes.append(indices.int())
            if sums is not None:
                pixel_values = tokenizer.config.image_processor.preprocess(originals.to(tokenizer.device))
                sums.add(*tokenizer.latent_moments(pixel_values))
            ids = images.source_ids(positions)
            rows = zip(positions, ids, likeness[-1].tolist(), originals, rebuilt, strict=True)
            kept = worth_keeping(kept + [Example(*row) for row in rows], drawn)
            bar.update(len(positions))
    return Inspection(
        psnr=torch.cat(likeness),
        ssim=torch.cat(structure) if structure else None,
        examples=chosen(kept, drawn),
        codes=torch.cat(codes) if codes else None,
        latents=None if sums is None else sums.statistics(),
    )


def ranked(examples: list[Example]) -> list[Example]:
    """The worst first; of equals the one that came first."""
    return sorted(examples, key=lambda example: (example.psnr, example.position))


def worth_keeping(examples: list[Example], drawn: Sequence[int]) -> list[Example]:
    """Those that may still be shown, cut out of their batches, which would stay in memory with them."""
    order = ranked(examples)
    extremes = {example.position for example in order[:EXTREMES] + order[-EXTREMES:]}
    return [
        Example(e.position, e.source_id, e.psnr, e.original.clone(), e.reconstruction.clone())
        for e in examples
        if e.position in extremes.union(drawn)
    ]


def chosen(examples: list[Example], drawn: Sequence[int]) -> Examples:
    order = ranked(examples)
    worst = order[:EXTREMES]
    best = order[len(worst) :][-EXTREMES:][::-1]
    others = {example.position: example for example in examples if example not in worst + best}
    return Examples(worst, best, [others[position] for position in drawn if position in others][:DRAWN])
