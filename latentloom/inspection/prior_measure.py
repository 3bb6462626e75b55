"""One look at a pipeline's prior: its surprise at held-out codes, and how near its samples come to training images.

held-out images → codes → bits of each code → the most and the least surprising images, some at random
samples, held-out images → codes → the training grid that shares the most codes with each
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
SHOWN = 3  # of the most surprising images, of the least, and at random
NEAREST = 6  # samples that are shown beside the training image they come nearest to


@dataclass(frozen=True, eq=False)
class LikelihoodExample:
    """An image and the bits of its codes."""

    kind: str
    source_id: str
    original: Tensor
    """(C, h, w) uint8."""
    bits: Tensor
    """(h, w) of the code grid, levels summed."""


@dataclass(frozen=True, eq=False)
class Neighbours:
    """How many codes images share with the training image that is nearest to each, by codes."""

    samples: Tensor
    """(n,) shares in [0, 1]."""
    held_out: Tensor
    """(N,), the same of images that the prior has not seen."""
    pairs: list[tuple[float, Tensor, Tensor]]
    """Share, sample and training image, (C, h, w) uint8 each; the nearest first."""
    num_training: int


@dataclass(frozen=True, eq=False)
class PriorInspection:
    bits: Tensor
    """(N, h, w) or (N, levels, h, w) float64."""
    labels: Tensor
    """(N,) class ids, −1 without one."""
    examples: list[LikelihoodExample]
    neighbours: Neighbours


def inspect_prior(
    pipeline: LatentGenerationPipeline, held_out: ImageLoader, train: ImageLoader, num_samples: int, seed: int = 0
) -> PriorInspection:
    """`seed` is of the samples and of the images shown at random. Raises UserError for a prior without likelihoods."""
    prior = pipeline.prior
    if not isinstance(prior, AutoregressivePrior):
        raise UserError(
            f"a {type(prior).__name__} gives codes no probability; expected an autoregressive prior; for figures of its samples "
            "run: latentloom evaluate"
        )
    codes, labels = torch.cat(list(encoded(pipeline.tokenizer, held_out, "held-out images"))), class_ids(held_out)
    bits = negative_log_likelihood(prior, codes, labels)
    chosen = balanced_labels(pipeline, num_samples)
    generators = image_generators(torch.Generator().manual_seed(seed), len(chosen))
    drawn = [
        prior.sample(
            pipeline.tokenizer.latent_spec(),
            of.to(pipeline.device),
            pipeline.sampling,
            generators[i * BATCH :][: len(of)],
        )
        for i, of in enumerate(progress_bar(iterable=chosen.split(BATCH), desc="samples", unit="batch"))
    ]
    samples = torch.cat(drawn).cpu()
    both = torch.cat([samples, codes])
    shares, where = nearest_grids(both, encoded(pipeline.tokenizer, train, "training images"))
    nearest = shares[: len(samples)].argsort(descending=True, stable=True)[:NEAREST]
    pairs = [
        (float(shares[i]), to_uint8(pipeline.decode(samples[i : i + 1]))[0], train[[int(where[i])]][0]) for i in nearest
    ]
    return PriorInspection(
        bits=bits,
        labels=labels,
        examples=likelihood_examples(held_out, bits, seed),
        neighbours=Neighbours(shares[: len(samples)], shares[len(samples) :], pairs, len(train)),
    )


@torch.inference_mode()
def encoded(tokenizer: Tokenizer, images: ImageLoader, describe: str) -> Iterator[Tensor]:
    """Codes of all images, batch after batch, on the CPU."""
    with progress_bar(total=len(images), desc=describe, unit="image") as bar:
        for positions, batch in images.batches(BATCH):
            pixel_values = tokenizer.config.image_processor.preprocess(batch.to(tokenizer.device))
            yield tokenizer.encode_indices(pixel_values).cpu()
            bar.update(len(positions))


def class_ids(images: ImageLoader) -> Tensor:
    labels = images.labels()
    return torch.full((len(images),), -1) if labels is None else torch.tensor(labels)


def likelihood_examples(images: ImageLoader, bits: Tensor, seed: int) -> list[LikelihoodExample]:
    """Each image at most once."""
    order = bits.flatten(1).sum(1).argsort(descending=True, stable=True).tolist()
    most, least = order[:SHOWN], order[SHOWN:][-SHOWN:][::-1]
    drawn = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    others = [i for i in drawn if i not in most + least][:SHOWN]
    maps = bits.view(len(bits), -1, *bits.shape[-2:]).sum(1)  # (N, h, w)
    return [
        LikelihoodExample(kind, images.source_ids([i])[0], images[[i]][0], maps[i])
        for kind, positions in (("Most surprising", most), ("Least surprising", least), ("At random", others))
        for i in positions
    ]
