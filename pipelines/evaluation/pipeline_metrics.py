"""Metrics of a pipeline on held-out images: metrics of its tokenizer, of its prior and of its samples."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines.across_processes import sample_across_processes
from pipelines.evaluation.evaluator import MIN_IMAGES, Evaluator, ImageSet, MeasuredImages
from pipelines.evaluation.likelihood import likelihood_metrics, negative_log_likelihood
from pipelines.evaluation.tokenizer_metrics import tokenizer_metrics
from pipelines.latent_generation import LatentGenerationPipeline
from stage1_tokenizer.data.image_loader import inference_batch_size
from stage2_prior.autoregressive.model import AutoregressivePrior
from training_harness.errors import UserError
from training_harness.processes import number_of_processes

PUBLISHED_NUM_IMAGES = 50_000  # images in published distances


def pipeline_metrics(
    evaluator: Evaluator,
    pipeline: LatentGenerationPipeline,
    samples: MeasuredImages,
    held_out: ImageSet,
    train: ImageSet,
    label_names: Sequence[str],
) -> dict[str, Any]:
    """Compute every metric of a pipeline: of its tokenizer, of its prior and of its samples.

    Args:
        label_names: names of the classes; empty if the class ids of the pipeline and of the images have different meanings.
    """
    real = evaluator.measure(held_out, "held-out images")
    training_images = evaluator.measure(train, "training images")
    return (
        tokenizer_metrics(evaluator, pipeline.tokenizer, held_out, real, training_images)
        | evaluator.sample_metrics(samples, real, training_images, label_names)
        | bits_per_token(pipeline, held_out)
        | {"num_images": len(samples), "num_reference_images": len(real), "num_training_images": len(training_images)}
        | {"reference_hash": real.hash, "training_hash": training_images.hash}
    )


def bits_per_token(pipeline: LatentGenerationPipeline, images: ImageSet) -> dict[str, Any]:
    """Compute the metrics of `likelihood_metrics` on images; None for a prior without likelihoods."""
    prior, processor = pipeline.prior, pipeline.tokenizer.config.image_processor
    if not isinstance(prior, AutoregressivePrior):
        return {"bits_per_token": None, "bits_per_token_uniform": None, "bits_per_token_by_class": {}}
    labels, bits, classes = images.labels(), [], []
    for positions, batch in images.batches(inference_batch_size(pipeline.tokenizer.config.image_size)):
        with torch.inference_mode():
            codes = pipeline.tokenizer.encode_indices(processor.preprocess(batch.to(pipeline.tokenizer.device)))
        classes.append(torch.tensor([-1 if labels is None else labels[i] for i in positions]))
        bits.append(negative_log_likelihood(prior, codes, classes[-1]))
    return likelihood_metrics(
        torch.cat(bits),
        torch.cat(classes),
        pipeline.label_names or (),
        prior.config.codebook_size,
        math.prod(processor.content_size),
    )


def balanced_labels(pipeline: LatentGenerationPipeline, count: int) -> Tensor:
    """Return about `count` class ids: equally many of each class with training images, or −1 without classes."""
    classes = list(pipeline.trained_classes) or None
    per_class = max(1, count // len(classes)) if classes else count
    return torch.tensor(classes or [-1]).repeat_interleave(per_class)


def sample_batches(
    pipeline: LatentGenerationPipeline, labels: Tensor, seed: int, batch_size: int = 200, **options: Any
) -> Iterator[Tensor]:
    """Sample one image for each label, batch after batch; image i does not depend on the batch size.

    If there are several processes, each of them must iterate over all batches. Each process gets all samples.

    Yields:
        (B, C, h, w) uint8.
    """
    generator = torch.Generator().manual_seed(seed)
    for batch_labels in labels.split(batch_size * number_of_processes()):
        yield sample_across_processes(pipeline, batch_labels, generator, batch_size, **options)


def collect_grid_images(
    batches: Iterable[Tensor], labels: Tensor, grid_images: dict[int, list[Tensor]], rows: int, columns: int
) -> Iterator[Tensor]:
    """Yield batches unchanged, and collect the images of a sample grid from them.

    Args:
        batches: (B, C, h, w).
        labels: (N,) class ids of the images in all batches, −1 for no class.
        grid_images: receives the first `columns` images (C, h, w) of the first `rows` classes by class id. It receives
            `rows` × `columns` images without a class.
    """
    start = 0
    for batch in batches:
        for image, label in zip(batch, labels[start : start + len(batch)].tolist(), strict=True):
            row = grid_images.setdefault(label, []) if len(grid_images) < rows else grid_images.get(label, [])
            if len(row) < (columns if label >= 0 else rows * columns):
                row.append(image.clone())  # a view would keep the whole batch in memory
        start += len(batch)
        yield batch


def sample_size_warnings(num_images: int, num_reference_images: int) -> list[str]:
    """Return warnings for the reader of metrics of so many images."""
    smaller = min(num_images, num_reference_images)
    if smaller >= PUBLISHED_NUM_IMAGES:
        return []
    return [
        f"{smaller:,} images: distances grow as N falls, and published distances use {PUBLISHED_NUM_IMAGES:,}; "
        "compare with the noise floor, and only with distances of equal N"
    ]


def check_image_count(count: int, description: str) -> None:
    """Raise UserError if there are too few images for all metrics."""
    if count < MIN_IMAGES:
        raise UserError(
            f"{description}: {count}; expected at least {MIN_IMAGES}, the minimum for all metrics; pass more images"
        )
