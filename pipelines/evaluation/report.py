"""Figures of a tokenizer and of a pipeline on held-out images, in batches: memory does not grow with their number.

    images → features → a folder of rows → Fréchet and kernel distance, precision, recall, density, coverage
                                         → verdicts of the judge, or of a linear probe → class agreement
                                         → nearest training image → memorisation

Beside every distance stands its noise floor: the same figure for as many real training images in the samples' place. What
the names mean, and from which papers they come, say the modules that compute them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pipelines.across_processes import sample_across_processes
from pipelines.evaluation.feature_files import FeatureFile, drawn_positions, read_features, slices, write_features
from pipelines.evaluation.features import FeatureExtractor, ImageFeatures
from pipelines.evaluation.frechet import Gaussian, bootstrap_interval, distance_between, fit_gaussian, frechet_distance
from pipelines.evaluation.inception_score import inception_score
from pipelines.evaluation.kernel_distance import kernel_distance
from pipelines.evaluation.likelihood import likelihood_figures, surprise
from pipelines.evaluation.linear_probe import fit_probe
from pipelines.evaluation.manifolds import DENSITY_NEIGHBOURS, density_coverage, nearest_distances, precision_recall
from pipelines.latent_generation import LatentGenerationPipeline
from stage1_tokenizer.data.image_loader import images_at_once
from stage1_tokenizer.metrics import LPIPS_SIDE, codebook_usage, lpips_distance, psnr, ssim
from stage1_tokenizer.metrics import WINDOW as SSIM_WINDOW
from stage1_tokenizer.tokenizer import Tokenizer
from stage2_prior.autoregressive.model import AutoregressivePrior
from training_harness.errors import UserError
from training_harness.files import whole_folder
from training_harness.processes import number_of_processes

BATCH = 250
FEWEST = DENSITY_NEIGHBOURS + 1  # images on a side, for all figures to exist
PUBLISHED = 50_000  # images that published distances use
COPIED = 0.05  # a share of held-out images by which a sample counts as near a training image


class ImageSet(Protocol):
    """`stage1_tokenizer.data.image_loader.Pixels`, or an array of images."""

    def __len__(self) -> int: ...
    def batches(self, batch_size: int) -> Iterator[tuple[list[int], Tensor]]: ...
    def labels(self) -> list[int] | None: ...


class Measured(NamedTuple):
    """Features of a set of images."""

    files: dict[str, FeatureFile]
    labels: Tensor  # (N,) int64, −1 without a class
    hash: str | None = None  # of the images

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def features(self) -> FeatureFile:
        return self.files["features"]

    def select(self, positions: Tensor) -> Measured:
        return Measured({name: file.select(positions) for name, file in self.files.items()}, self.labels[positions])


class Evaluator:
    """Measures sets of images by one extractor.

    Args:
        cache: folder for features of real images, which are found again when the same images come back; those of samples
            and reconstructions lie there until the evaluator is closed.
        seed: of the bootstrap, the subsets of the kernel distance, and the images that stand for the noise floor.
    """

    def __init__(self, extractor: FeatureExtractor, cache: Path, seed: int = 0) -> None:
        self.extractor, self.cache, self.seed = extractor, cache, seed
        cache.mkdir(parents=True, exist_ok=True)
        self._passing = TemporaryDirectory(prefix=".passing-", dir=cache)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._passing.cleanup()

    def measure(self, images: ImageSet, describe: str) -> Measured:
        """Features of real images; taken from an earlier call for the same images by a network of the same weights."""
        digest, positions = hashlib.sha256(), list[int]()
        for part, batch in images.batches(BATCH):
            digest.update(str(tuple(batch.shape)).encode() + batch.contiguous().numpy().tobytes())
            positions += part
        found = digest.hexdigest()[:16]
        # what cannot be told from another network's is not kept
        kept = self.cache if self.extractor.weights else Path(self._passing.name)
        folder = kept / f"{self.extractor.name}-{self.extractor.weights}-{found}"
        if not folder.exists():
            with whole_folder(folder) as beside:
                self._write(beside, (batch for _, batch in images.batches(BATCH)), len(images), describe)
        labels = images.labels()
        chosen = torch.tensor([-1] * len(positions) if labels is None else [labels[i] for i in positions])
        return Measured(read_features(folder), chosen, found)

    def measure_stream(self, batches: Iterable[Tensor], labels: Tensor, describe: str) -> Measured:
        """Features of images (B, C, h, w) uint8 that come once, such as samples."""
        files = self._write(Path(mkdtemp(dir=self._passing.name)), batches, len(labels), describe)
        if (count := len(files.get("features", ()))) != len(labels):
            raise UserError(
                f"{count} of {len(labels)} {describe} could be read; expected all of them; look for broken files"
            )
        return Measured(files, labels)

    def _write(self, folder: Path, batches: Iterable[Tensor], count: int, describe: str) -> dict[str, FeatureFile]:
        with tqdm(total=count, desc=describe, unit="image", disable=None) as bar:

            def extracted() -> Iterator[ImageFeatures]:
                for batch in batches:
                    yield self.extractor.extract(batch)
                    bar.update(len(batch))

            return write_features(folder, extracted())

    # -- figures --------------------------------------------------------------------------------------------------

    def tokenizer_figures(
        self, tokenizer: Tokenizer, images: ImageSet, real: Measured, train: Measured | None = None
    ) -> dict[str, Any]:
        """psnr, ssim, lpips (means over images), codes, and the distance of the reconstructions from their originals.

        What is said of codes is none of a tokenizer without a codebook. `real` are the features of `images`, `train` those of
        training images for the noise floor.
        """
        spec = tokenizer.latent_spec()
        counts = torch.zeros(spec.codebook_size or 0)
        by_image: dict[str, list[Tensor]] = {"psnr": [], "ssim": [], "lpips": []}
        side = min(tokenizer.config.image_processor.content_size)
        lpips = lpips_distance(tokenizer.device) if side >= LPIPS_SIDE else None

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

        reconstructions = self.measure_stream(rebuilt(), real.labels, "reconstructions")
        figures: dict[str, Any] = {
            name: float(torch.cat(values).mean()) if values else None for name, values in by_image.items()
        }
        figures |= dict.fromkeys(("codes_used", "perplexity", "bits_per_pixel"))
        if spec.codebook_size is not None:
            figures |= codebook_usage(counts)._asdict()
            pixels = math.prod(tokenizer.config.image_processor.content_size)
            figures["bits_per_pixel"] = spec.tokens * math.log2(spec.codebook_size) / pixels
        rebuilt_rows, real_rows = reconstructions.features, real.features
        floor = real_rows if train is None else self._floor(train, real.labels).features
        enough, floor_exists = len(real) >= 2, train is not None and min(len(floor), len(real)) >= 2
        interval = bootstrap_interval(rebuilt_rows, real_rows, self.seed, paired=True) if enough else None
        return figures | {
            "reconstruction_frechet": frechet_distance(rebuilt_rows, real_rows) if enough else None,
            "reconstruction_frechet_interval": interval,
            "reconstruction_frechet_floor": frechet_distance(floor, real_rows) if floor_exists else None,
        }

    def sample_figures(
        self,
        samples: Measured,
        real: Measured,
        train: Measured | None = None,
        label_names: Iterable[str] = (),
    ) -> dict[str, Any]:
        """Every figure of samples against held-out images, overall, for the noise floor, and by class.

        Args:
            train: features of training images, for the noise floor, the probe and the memorisation; none without them.
            label_names: of the classes, when the samples' labels mean the same as the real ones'; else no figure by class.
        Figures that need more images than there are, or what was not given, are none.
        """
        names = list(label_names)
        verdicts = self._verdicts(samples, real, train, len(names)) if names else None
        figures = self._compared(samples, real) | {"class_agreement": agreement(verdicts and verdicts[0], samples)}
        figures["floor"] = figures["memorisation"] = None
        nearest: tuple[Tensor, Tensor] | None = None
        if train is not None:
            floor = self._floor(train, samples.labels if names else torch.full_like(samples.labels, -1))
            figures["floor"] = self._compared(floor, real) | {"num_images": len(floor)}
            figures["floor"]["class_agreement"] = agreement(verdicts and verdicts[1], real)
            nearest = (
                nearest_distances(samples.features, train.features),
                nearest_distances(real.features, train.features),
            )
            figures["memorisation"] = memorisation(*nearest)
        figures["by_class"] = {}
        for label, name in enumerate(names):
            mine, theirs = ((found.labels == label).nonzero().flatten() for found in (samples, real))
            if not len(mine):
                continue
            row = self._compared(samples.select(mine), real.select(theirs), interval=False)
            row["class_agreement"] = agreement(verdicts and verdicts[0][mine], samples.select(mine))
            if nearest is not None and len(theirs):
                row["memorisation"] = memorisation(nearest[0][mine], nearest[1][theirs])
            figures["by_class"][name] = row | {"num_images": len(mine)}
        return figures

    def moments_figures(self, samples: Measured, moments: Mapping[str, Gaussian]) -> dict[str, Any]:
        """FID and sFID against stored moments of Inception's features.

        Raises:   UserError when the images were measured by another network.
        """
        check_inception(self.extractor)
        distance = distance_between(fit_gaussian(samples.features), moments["features"])
        figures = {"frechet": distance, "fid": distance, "sfid": None}
        if "spatial" in moments:
            figures["sfid"] = distance_between(fit_gaussian(samples.files["spatial"]), moments["spatial"])
        return figures | inception_score(samples.files["imagenet_logits"], self.seed)

    def _compared(self, generated: Measured, real: Measured, interval: bool = True) -> dict[str, Any]:
        """The distances between two sets, none where a side has too few images."""
        a, b = generated.features, real.features
        figures: dict[str, Any] = dict.fromkeys(
            ("frechet", "frechet_interval", "kid", "kid_std", "precision", "recall", "density", "coverage")
        )
        if min(len(a), len(b)) < FEWEST:
            return figures
        figures["frechet"] = frechet_distance(a, b)
        if interval:
            figures["frechet_interval"] = bootstrap_interval(a, b, self.seed)
        else:
            del figures["frechet_interval"]
        if self.extractor.name == "inception":
            figures["fid"] = figures["frechet"]
            figures["sfid"] = frechet_distance(generated.files["spatial"], real.files["spatial"])
            figures |= inception_score(generated.files["imagenet_logits"], self.seed)
        figures["kid"], figures["kid_std"] = kernel_distance(a, b, seed=self.seed)
        figures |= precision_recall(b, a)._asdict() | density_coverage(b, a)._asdict()
        return figures

    def _floor(self, train: Measured, labels: Tensor) -> Measured:
        """A training image for each of `labels`, of that class; of any class where either side has none.

        Drawn at random; where a class has too few, all that it has.
        """
        if (train.labels < 0).any() or (labels < 0).any():
            return train.select(drawn_positions(len(train), len(labels), self.seed))
        drawn = []
        for label, count in zip(*labels.unique(return_counts=True), strict=True):
            of_class = (train.labels == label).nonzero().flatten()
            drawn.append(of_class[drawn_positions(len(of_class), int(count), self.seed)])
        return train.select(torch.cat(drawn).sort().values)

    def _verdicts(
        self, samples: Measured, real: Measured, train: Measured | None, num_classes: int
    ) -> tuple[Tensor, Tensor] | None:
        """The class (N,) seen in each sample and in each real image: by the judge, or by a probe trained on real images."""
        if "class_logits" in samples.files:
            return predicted(samples.files["class_logits"]), predicted(real.files["class_logits"])
        if train is None or (train.labels < 0).any():
            return None
        probe = fit_probe(train.features, train.labels, num_classes, self.seed)
        seen = [
            torch.cat([probe.logits(part).argmax(1) for part in slices(found.features)]) for found in (samples, real)
        ]
        return seen[0], seen[1]


def predicted(logits: FeatureFile) -> Tensor:
    """(N,) index of each row's largest entry."""
    return torch.cat([part.argmax(1) for part in slices(logits)])


def agreement(verdicts: Tensor | None, measured: Measured) -> float | None:
    """Share of images seen as their own class; none without verdicts or labels."""
    if verdicts is None or (measured.labels < 0).any():
        return None
    return (verdicts == measured.labels).double().mean().item()


def memorisation(samples: Tensor, held_out: Tensor) -> dict[str, float | None]:
    """How near samples lie to training images, beside how near held-out real images do; both (N,) distances.

    A share of `closer_than_held_out_5_percent` well above 0.05 says that the model repeats what it was trained on.
    """
    own, others = samples.median().item(), held_out.median().item()
    near = held_out.quantile(COPIED)
    return {
        "nearest_training_image": own,
        "the_same_for_held_out": others,
        "ratio": own / others if others else None,
        "closer_than_held_out_5_percent": (samples < near).double().mean().item(),
    }


def pipeline_figures(
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
        evaluator.tokenizer_figures(pipeline.tokenizer, held_out, real, trained)
        | evaluator.sample_figures(samples, real, trained, label_names)
        | bits_per_token(pipeline, held_out)
        | {"num_images": len(samples), "num_reference_images": len(real), "num_training_images": len(trained)}
        | {"reference_hash": real.hash, "training_hash": trained.hash}
    )


@torch.inference_mode()
def reconstruct(tokenizer: Tokenizer, images: Tensor) -> tuple[Tensor, Tensor | None]:
    """uint8 (B, C, h, w) → the same after the round trip, and the codes (B, h, w) if there are any, both on the CPU."""
    processor, pictures, codes = tokenizer.config.image_processor, list[Tensor](), list[Tensor]()
    for part in images.split(images_at_once(tokenizer.config.image_size)):
        output = tokenizer(processor.preprocess(part.to(tokenizer.device)))
        pictures.append(processor.postprocess(output.reconstruction).cpu())
        if output.indices is not None:
            codes.append(output.indices.cpu())
    return torch.cat(pictures), torch.cat(codes) if codes else None


def bits_per_token(pipeline: LatentGenerationPipeline, images: ImageSet) -> dict[str, Any]:
    """Figures of `likelihood_figures` on images; none where the prior gives codes no probability."""
    prior, processor = pipeline.prior, pipeline.tokenizer.config.image_processor
    if not isinstance(prior, AutoregressivePrior):
        return {"bits_per_token": None, "bits_per_token_uniform": None, "bits_per_token_by_class": {}}
    labels, bits, classes = images.labels(), [], []
    for positions, batch in images.batches(images_at_once(pipeline.tokenizer.config.image_size)):
        with torch.inference_mode():
            codes = pipeline.tokenizer.encode_indices(processor.preprocess(batch.to(pipeline.tokenizer.device)))
        classes.append(torch.tensor([-1 if labels is None else labels[i] for i in positions]))
        bits.append(surprise(prior, codes, classes[-1]))
    return likelihood_figures(
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


def sampled_batches(
    pipeline: LatentGenerationPipeline, labels: Tensor, seed: int, batch_size: int = 200, **options: Any
) -> Iterator[Tensor]:
    """One sample for each label as uint8 (B, C, h, w), batch after batch; image i does not depend on the batch size.

    Several processes share the work and must all go through it; each gets all samples.
    """
    generator = torch.Generator().manual_seed(seed)
    for part in labels.split(batch_size * number_of_processes()):
        yield sample_across_processes(pipeline, part, generator, batch_size, **options)


def keeping_first(
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


def warnings_for(num_images: int, num_reference_images: int) -> list[str]:
    """What a reader of the figures must know."""
    found = []
    if (fewest := min(num_images, num_reference_images)) < PUBLISHED:
        found.append(
            f"{fewest:,} images: distances grow as N falls, and published ones use {PUBLISHED:,}; compare with the floor, "
            "and with figures of the same N alone"
        )
    return found


def check_inception(extractor: FeatureExtractor) -> None:
    if extractor.name != "inception":
        raise UserError(
            f"the reference holds moments of Inception's features and images are to be measured by {extractor.name}; "
            "expected the same; give --features inception, or a reference of images"
        )


def check_enough(count: int, what: str) -> None:
    if count < FEWEST:
        raise UserError(f"{what}: {count}; expected at least {FEWEST}, or the figures do not exist; give more images")
