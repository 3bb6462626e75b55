"""Metrics of a pipeline on held-out images: its tokenizer's, its prior's, and those of its samples."""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from pipelines.across_processes import sample_across_processes
from pipelines.evaluation.evaluator import FEWEST, Evaluator, ImageSet, Measured
from pipelines.evaluation.likelihood import likelihood_metrics, negative_log_likelihood
from pipelines.evaluation.tokenizer_metrics import tokenizer_metrics
from pipelines.latent_generation import LatentGenerationPipeline
from stage1_tokenizer.data.image_loader import images_at_once
from stage2_prior.autoregressive.model import AutoregressivePrior
from training_harness.errors import UserError
from training_harness.processes import number_of_processes

PUBLISHED = 50_000  # images that published distances use


def pipeline_metrics(
    evaluator: Evaluator,
    pipeline: LatentGenerationPipeline,
    samples: Measured,
    held_out: ImageSet,
    train: ImageSet,
    label_names: Sequence[str],
) -> dict[str, Any]:
    """Every figure of a pipeline: its tokenizer's, its prior's, and those of its samples.

    `label_names` are the classes' when the pipeline's ids mean the same as the images'; empty otherwise.
    """
    real, trained = evaluator.measure(held_out, "held-out images"), evaluator.measure(train, "training images")
    return (
        tokenizer_metrics(evaluator, pipeline.tokenizer, held_out, real, trained)
        | evaluator.sample_metrics(samples, real, trained, label_names)
        | bits_per_token(pipeline, held_out)
        | {"num_images": len(samples), "num_reference_images": len(real), "num_training_images": len(trained)}
        | {"reference_hash": real.hash, "training_hash": trained.hash}
    )


def bits_per_token(pipeline: LatentGenerationPipeline, images: ImageSet) -> dict[str, Any]:
    """Figures of `likelihood_metrics` on images; none where the prior gives codes no probability."""
    prior, processor = pipeline.prior, pipeline.tokenizer.config.image_processor
    if not isinstance(prior, AutoregressivePrior):
        return {"bits_per_token": None, "bits_per_token_uniform": None, "bits_per_token_by_class": {}}
    labels, bits, classes = images.labels(), [], []
    for positions, batch in images.batches(images_at_once(pipeline.tokenizer.config.image_size)):
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
    """About `count` class ids, as many of each class with training images; −1 for a pipeline without classes."""
    classes = list(pipeline.trained_classes) or None
    per_class = max(1, count // len(classes)) if classes else count
    return torch.tensor(classes or [-1]).repeat_interleave(per_class)


def sample_batches(
    pipeline: LatentGenerationPipeline, labels: Tensor, seed: int, batch_size: int = 200, **options: Any
) -> Iterator[Tensor]:
    """One sample for each label as uint8 (B, C, h, w), batch after batch; image i does not depend on the batch size.

    Several processes share the work and must all go through it; each gets all samples.
    """
    generator = torch.Generator().manual_seed(seed)
    for part in labels.split(batch_size * number_of_processes()):
        yield sample_across_processes(pipeline, part, generator, batch_size, **options)


def collect_grid_images(
    batches: Iterable[Tensor], labels: Tensor, kept: dict[int, list[Tensor]], rows: int, columns: int
) -> Iterator[Tensor]:
    """Passes batches on, and puts the first `columns` images (C, h, w) of the first `rows` classes into `kept`.

    Of images without a class it keeps `rows` × `columns`.
    """
    start = 0
    for batch in batches:
        for image, label in zip(batch, labels[start : start + len(batch)].tolist(), strict=True):
            row = kept.setdefault(label, []) if len(kept) < rows else kept.get(label, [])
            if len(row) < (columns if label >= 0 else rows * columns):
                row.append(image.clone())  # or the whole batch would stay in memory
        start += len(batch)
        yield batch


def sample_size_warnings(num_images: int, num_reference_images: int) -> list[str]:
    """What a reader of the figures must know."""
    found = []
    if (fewest := min(num_images, num_reference_images)) < PUBLISHED:
        found.append(
            f"{fewest:,} images: distances grow as N falls, and published ones use {PUBLISHED:,}; compare with the floor, "
            "and with figures of the same N alone"
        )
    return found


def check_image_count(count: int, what: str) -> None:
    if count < FEWEST:
        raise UserError(f"{what}: {count}; expected at least {FEWEST}, or the figures do not exist; give more images")
