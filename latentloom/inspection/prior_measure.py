"""Measure a pipeline's prior: the likelihood of held-out codes, and how close samples are to training images.

held-out images → codes → bits of each code → images with the highest and the lowest negative log-likelihood, random images
samples, held-out images → codes → for each, the training image that shares the most codes
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.evaluation.likelihood import nearest_grids, negative_log_likelihood
from pipelines.evaluation.pipeline_metrics import balanced_labels
from pipelines.latent_generation import LatentGenerationPipeline, image_generators, to_uint8
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.tokenizer import Tokenizer
from stage2_prior.autoregressive.model import AutoregressivePrior
from training_harness.errors import UserError
from training_harness.progress import progress_bar

BATCH = 50
NUM_EXAMPLES = 3  # of the least likely images, of the most likely ones, and of random ones
NUM_PAIRS = 6  # samples that are shown with their nearest training image


@dataclass(frozen=True, eq=False)
class LikelihoodExample:
    """An image with the negative log-likelihood of its codes."""

    kind: str
    source_id: str
    original: Tensor
    """(C, h, w) uint8."""
    bits: Tensor
    """(h, w) float64, bits at each position of the code grid, summed over levels."""


@dataclass(frozen=True, eq=False)
class Neighbours:
    """Shares of codes that images have in common with their nearest training image.

    The nearest training image is the one that shares the most codes at the same positions.
    """

    samples: Tensor
    """(n,) shares in [0, 1] of the samples."""
    held_out: Tensor
    """(N,) shares in [0, 1] of the held-out images."""
    pairs: list[tuple[float, Tensor, Tensor]]
    """Share, sample and training image, (C, h, w) uint8 each; sorted by share, the largest first."""
    num_training: int
    """Number of training images that were compared."""


@dataclass(frozen=True, eq=False)
class PriorInspection:
    """Likelihoods and nearest training images of a prior."""

    bits: Tensor
    """(N, h, w) or (N, levels, h, w) float64, bits of each code."""
    labels: Tensor
    """(N,) class ids; −1 without classes."""
    examples: list[LikelihoodExample]
    neighbours: Neighbours


def inspect_prior(
    pipeline: LatentGenerationPipeline, held_out: ImageLoader, train: ImageLoader, num_samples: int, seed: int = 0
) -> PriorInspection:
    """Measure the likelihood of held-out images and compare samples with training images.

    Args:
        pipeline: A pipeline with an autoregressive prior.
        held_out: Images that the prior was not trained on.
        train: Images that the prior was trained on.
        num_samples: Number of images to sample.
        seed: Seed of the samples and of the random examples.

    Raises:
        UserError: The prior has no likelihoods.
    """
    prior = pipeline.prior
    if not isinstance(prior, AutoregressivePrior):
        raise UserError(
            f"a {type(prior).__name__} gives codes no probability; expected an autoregressive prior; to measure its samples run: "
            "latentloom evaluate"
        )
    codes, labels = torch.cat(list(encode_images(pipeline.tokenizer, held_out, "held-out images"))), class_ids(held_out)
    bits = negative_log_likelihood(prior, codes, labels)
    sample_labels = balanced_labels(pipeline, num_samples)
    generators = image_generators(torch.Generator().manual_seed(seed), len(sample_labels))
    sample_batches = [
        prior.sample(
            pipeline.tokenizer.latent_spec(),
            batch_labels.to(pipeline.device),
            pipeline.sampling,
            generators[i * BATCH :][: len(batch_labels)],
        )
        for i, batch_labels in enumerate(
            progress_bar(iterable=sample_labels.split(BATCH), desc="samples", unit="batch")
        )
    ]
    samples = torch.cat(sample_batches).cpu()
    training_codes = encode_images(pipeline.tokenizer, train, "training images")
    shares, indices = nearest_grids(torch.cat([samples, codes]), training_codes)
    nearest = shares[: len(samples)].argsort(descending=True, stable=True)[:NUM_PAIRS]
    pairs = [
        (float(shares[i]), to_uint8(pipeline.decode(samples[i : i + 1]))[0], train[[int(indices[i])]][0])
        for i in nearest
    ]
    return PriorInspection(
        bits=bits,
        labels=labels,
        examples=likelihood_examples(held_out, bits, seed),
        neighbours=Neighbours(shares[: len(samples)], shares[len(samples) :], pairs, len(train)),
    )


@torch.inference_mode()
def encode_images(tokenizer: Tokenizer, images: ImageLoader, description: str) -> Iterator[Tensor]:
    """Yield the codes of all images in batches, on the CPU, with a progress bar."""
    with progress_bar(total=len(images), desc=description, unit="image") as bar:
        for positions, batch in images.batches(BATCH):
            pixel_values = tokenizer.config.image_processor.preprocess(batch.to(tokenizer.device))
            yield tokenizer.encode_indices(pixel_values).cpu()
            bar.update(len(positions))


def class_ids(images: ImageLoader) -> Tensor:
    """Return the class ids (N,) int64; −1 without classes."""
    labels = images.labels()
    return torch.full((len(images),), -1) if labels is None else torch.tensor(labels)


def likelihood_examples(images: ImageLoader, bits: Tensor, seed: int) -> list[LikelihoodExample]:
    """Select the least likely, the most likely and random images, so that no image appears twice."""
    order = bits.flatten(1).sum(1).argsort(descending=True, stable=True).tolist()
    least_likely, most_likely = order[:NUM_EXAMPLES], order[NUM_EXAMPLES:][-NUM_EXAMPLES:][::-1]
    shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    random = [i for i in shuffled if i not in least_likely + most_likely][:NUM_EXAMPLES]
    maps = bits.view(len(bits), -1, *bits.shape[-2:]).sum(1)  # (N, h, w)
    return [
        LikelihoodExample(kind, images.source_ids([i])[0], images[[i]][0], maps[i])
        for kind, positions in (("Least likely", least_likely), ("Most likely", most_likely), ("Random", random))
        for i in positions
    ]
