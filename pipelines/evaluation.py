"""Figures of a tokenizer and of a pipeline on held-out images.

Features are a function of uint8 images (N, C, h, w). With a judge, a classifier that no generator has seen, they are its
penultimate activations, and its logits give the class agreement; without one they are the images themselves, pooled to
8×8, which sees colours and layout and nothing finer. The name of the features stands beside every distance.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from pipelines.judge import Judge
from pipelines.latent_generation import LatentGenerationPipeline, to_uint8
from pipelines.set_metrics import class_agreement, frechet_distance, precision_recall
from stage1_tokenizer.metrics import codebook_usage, psnr
from stage1_tokenizer.pixels import Pixels
from stage1_tokenizer.vqgan import VQGAN
from training_harness.errors import UserError

NEIGHBOURS = 3  # k of precision and recall


class FeatureExtractor(NamedTuple):
    name: str
    features: Callable[[Tensor], Tensor]  # uint8 (N, C, h, w) → (N, F) float
    logits: Callable[[Tensor], Tensor] | None = None  # the same → (N, classes)


def judge_features(judge: Judge) -> FeatureExtractor:
    return FeatureExtractor(
        "fashion-mnist-judge",
        lambda images: judge.classify_images(images).features,
        lambda images: judge.classify_images(images).logits,
    )


def pooled_pixels(images: Tensor) -> Tensor:
    """(N, C, h, w) uint8 → (N, C · 64) float32: means over an 8×8 grid, in [0, 1]."""
    return F.adaptive_avg_pool2d(images.float() / 255, 8).flatten(1)


POOLED_PIXELS = FeatureExtractor("pixels-8x8", pooled_pixels)


@torch.inference_mode()
def reconstructions(tokenizer: VQGAN, pixels: Pixels, batch_size: int = 250) -> tuple[Tensor, Tensor, Tensor]:
    """Originals and reconstructions (N, C, h, w) uint8 of the content, and how often each code was chosen (K,)."""
    processor = tokenizer.config.image_processor
    counts = torch.zeros(tokenizer.config.codebook_size)
    originals, rebuilt = [], []
    with tqdm(total=len(pixels), desc="reconstruct", unit="image", disable=None) as bar:
        for _, images in pixels.batches(batch_size):
            output = tokenizer(processor.preprocess(images.to(tokenizer.device)))
            counts += torch.bincount(output.indices.flatten().cpu(), minlength=len(counts))
            originals.append(images)
            rebuilt.append(processor.postprocess(output.reconstruction).cpu())
            bar.update(len(images))
    return torch.cat(originals), torch.cat(rebuilt), counts


def evaluate_tokenizer(tokenizer: VQGAN, pixels: Pixels, extractor: FeatureExtractor) -> dict[str, Any]:
    """psnr (mean over images, dB), codes_used, perplexity, reconstruction_frechet."""
    return evaluate_reconstructions(*reconstructions(tokenizer, pixels), extractor)


def evaluate_reconstructions(
    originals: Tensor, rebuilt: Tensor, counts: Tensor, extractor: FeatureExtractor
) -> dict[str, Any]:
    """The figures of `evaluate_tokenizer`, of what `reconstructions` gave."""
    used = codebook_usage(counts)
    return {
        "psnr": float(psnr(rebuilt, originals).mean()),
        "codes_used": used.codes_used,
        "perplexity": used.perplexity,
        "reconstruction_frechet": _distance(extractor, rebuilt, originals),
    }


def evaluate_samples(images: Tensor, labels: Tensor, reference: Tensor, extractor: FeatureExtractor) -> dict[str, Any]:
    """class_agreement, frechet, precision, recall of samples against reference images, all (N, C, h, w) uint8.

    class_agreement is none without a judge or without labels (−1), the others with three images or fewer on a side.
    """
    if images.shape[1:] != reference.shape[1:]:
        raise UserError(
            f"samples are {tuple(images.shape[1:])} and reference images {tuple(reference.shape[1:])}; "
            "expected one shape (channels, height, width)"
        )
    figures: dict[str, Any] = {"class_agreement": None}
    if extractor.logits is not None and bool((labels >= 0).all()):
        figures["class_agreement"] = class_agreement(extractor.logits(images), labels)
    if min(len(images), len(reference)) <= NEIGHBOURS:
        return figures | dict.fromkeys(("frechet", "precision", "recall"))
    generated, real = extractor.features(images), extractor.features(reference)
    manifold = precision_recall(real, generated, k=NEIGHBOURS)
    return figures | {
        "frechet": frechet_distance(generated, real),
        "precision": manifold.precision,
        "recall": manifold.recall,
    }


def balanced_samples(pipeline: LatentGenerationPipeline, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """About `count` samples as uint8 (N, C, h, w), as many of each class, and their labels (N,); −1 without classes."""
    classes = list(range(pipeline.prior.config.num_classes)) or None
    per_class = max(1, count // len(classes)) if classes else count
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(classes or [-1]).repeat_interleave(per_class)
    return to_uint8(pipeline.sample_pixels(labels, generator, batch_size=200)), labels


def _distance(extractor: FeatureExtractor, images: Tensor, reference: Tensor) -> float | None:
    return frechet_distance(extractor.features(images), extractor.features(reference)) if len(images) > 1 else None
