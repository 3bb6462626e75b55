"""Measure sets of images and compare them, in batches: memory does not grow with the number of images.

    images → features → a folder of files → Fréchet and kernel distance, precision, recall, density, coverage
                                          → predictions of a classifier or of a linear probe → class agreement
                                          → nearest training image → memorisation

Every distance comes with its noise floor: the distance of real training images in the place of the samples, with an equal
number of images. The modules that compute the metrics define them and cite their papers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor

from pipelines.evaluation.feature_files import (
    FeatureFile,
    iterate_slices,
    random_positions,
    read_features,
    write_features,
)
from pipelines.evaluation.features import FeatureExtractor, ImageFeatures
from pipelines.evaluation.frechet import Gaussian, bootstrap_interval, distance_between, fit_gaussian, frechet_distance
from pipelines.evaluation.inception_score import inception_score
from pipelines.evaluation.kernel_distance import kernel_distance
from pipelines.evaluation.linear_probe import fit_probe
from pipelines.evaluation.manifolds import DENSITY_NEIGHBOURS, density_coverage, nearest_distances, precision_recall
from training_harness.errors import UserError
from training_harness.files import atomic_folder
from training_harness.progress import progress_bar

BATCH = 250
MIN_IMAGES = DENSITY_NEIGHBOURS + 1  # images in each set, for all metrics to exist
NEAR_QUANTILE = 0.05  # a sample is near if at most this share of held-out images is as near to a training image


class ImageSet(Protocol):
    """An `ImageLoader`, or an array of images."""

    def __len__(self) -> int: ...
    def batches(self, batch_size: int) -> Iterator[tuple[list[int], Tensor]]: ...
    def labels(self) -> list[int] | None: ...


class MeasuredImages(NamedTuple):
    """Features and labels of a set of images."""

    files: dict[str, FeatureFile]
    labels: Tensor  # (N,) int64, −1 without a class
    hash: str | None = None  # of the images

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def features(self) -> FeatureFile:
        return self.files["features"]

    def select(self, positions: Tensor) -> MeasuredImages:
        return MeasuredImages(
            {name: file.select(positions) for name, file in self.files.items()}, self.labels[positions]
        )


class Evaluator:
    """Measure sets of images with one feature extractor.

    Args:
        cache: folder for the features of real images. They are read again when the same images are measured again. Features
            of samples and reconstructions are stored there until the evaluator is closed.
        seed: of the bootstrap, the subsets of the kernel distance, and the training images of the noise floor.
    """

    def __init__(self, extractor: FeatureExtractor, cache: Path, seed: int = 0) -> None:
        self.extractor, self.cache, self.seed = extractor, cache, seed
        cache.mkdir(parents=True, exist_ok=True)
        self._temporary = TemporaryDirectory(prefix=".passing-", dir=cache)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._temporary.cleanup()

    def measure(self, images: ImageSet, description: str) -> MeasuredImages:
        """Extract features of real images, or read them from the cache.

        The cache is used for equal images and a network with equal weights.

        Args:
            description: text of the progress bar.
        """
        digest, positions = hashlib.sha256(), list[int]()
        for batch_positions, batch in images.batches(BATCH):
            digest.update(str(tuple(batch.shape)).encode() + batch.contiguous().numpy().tobytes())
            positions += batch_positions
        images_hash = digest.hexdigest()[:16]
        # without a hash of its weights, a network cannot be distinguished from another one
        parent = self.cache if self.extractor.weights else Path(self._temporary.name)
        folder = parent / f"{self.extractor.name}-{self.extractor.weights}-{images_hash}"
        if not folder.exists():
            with atomic_folder(folder) as new_folder:
                self._write(new_folder, (batch for _, batch in images.batches(BATCH)), len(images), description)
        all_labels = images.labels()
        labels = torch.tensor([-1] * len(positions) if all_labels is None else [all_labels[i] for i in positions])
        return MeasuredImages(read_features(folder), labels, images_hash)

    def measure_stream(self, batches: Iterable[Tensor], labels: Tensor, description: str) -> MeasuredImages:
        """Extract features of images that can be read only once, such as samples.

        Args:
            batches: (B, C, h, w) uint8.
            labels: (N,) int64, −1 for images without a class.
            description: text of the progress bar and of the error.

        Raises:
            UserError: if the batches hold another number of images than `labels`.
        """
        files = self._write(Path(mkdtemp(dir=self._temporary.name)), batches, len(labels), description)
        if (count := len(files.get("features", ()))) != len(labels):
            raise UserError(
                f"{count} of {len(labels)} {description} could be read; expected all of them; look for broken files"
            )
        return MeasuredImages(files, labels)

    def _write(self, folder: Path, batches: Iterable[Tensor], count: int, description: str) -> dict[str, FeatureFile]:
        with progress_bar(total=count, desc=description, unit="image") as bar:

            def extract_batches() -> Iterator[ImageFeatures]:
                for batch in batches:
                    yield self.extractor.extract(batch)
                    bar.update(len(batch))

            return write_features(folder, extract_batches())

    # -- metrics --------------------------------------------------------------------------------------------------

    def sample_metrics(
        self,
        samples: MeasuredImages,
        real: MeasuredImages,
        train: MeasuredImages | None = None,
        label_names: Iterable[str] = (),
    ) -> dict[str, Any]:
        """Compute every metric of samples against held-out images: of all samples, of the noise floor, and by class.

        A metric is None if it needs more images or an argument that was not passed.

        Args:
            train: training images, for the noise floor, the linear probe and the memorisation.
            label_names: names of the classes, for the metrics by class. Leave it empty if the labels of samples and real images
                have different meanings.
        """
        names = list(label_names)
        predictions = self._predict_classes(samples, real, train, len(names)) if names else None
        metrics = self._compare_sets(samples, real) | {
            "class_agreement": label_agreement(predictions and predictions[0], samples)
        }
        metrics["floor"] = metrics["memorisation"] = None
        nearest: tuple[Tensor, Tensor] | None = None
        if train is not None:
            floor = self.noise_floor(train, samples.labels if names else torch.full_like(samples.labels, -1))
            metrics["floor"] = self._compare_sets(floor, real) | {"num_images": len(floor)}
            metrics["floor"]["class_agreement"] = label_agreement(predictions and predictions[1], real)
            nearest = (
                nearest_distances(samples.features, train.features),
                nearest_distances(real.features, train.features),
            )
            metrics["memorisation"] = memorisation_metrics(*nearest)
        metrics["by_class"] = {}
        for label, name in enumerate(names):
            in_samples, in_real = ((images.labels == label).nonzero().flatten() for images in (samples, real))
            if not len(in_samples):
                continue
            row = self._compare_sets(samples.select(in_samples), real.select(in_real), interval=False)
            row["class_agreement"] = label_agreement(
                predictions and predictions[0][in_samples], samples.select(in_samples)
            )
            if nearest is not None and len(in_real):
                row["memorisation"] = memorisation_metrics(nearest[0][in_samples], nearest[1][in_real])
            metrics["by_class"][name] = row | {"num_images": len(in_samples)}
        return metrics

    def moments_metrics(self, samples: MeasuredImages, moments: Mapping[str, Gaussian]) -> dict[str, Any]:
        """Compute FID, sFID and Inception Score against stored moments of Inception features.

        Raises:
            UserError: if the images were measured with another network.
        """
        check_inception(self.extractor)
        distance = distance_between(fit_gaussian(samples.features), moments["features"])
        metrics = {"frechet": distance, "fid": distance, "sfid": None}
        if "spatial" in moments:
            metrics["sfid"] = distance_between(fit_gaussian(samples.files["spatial"]), moments["spatial"])
        return metrics | inception_score(samples.files["imagenet_logits"], self.seed)

    def _compare_sets(self, generated: MeasuredImages, real: MeasuredImages, interval: bool = True) -> dict[str, Any]:
        """Compute the metrics of two sets; all are None if a set has too few images."""
        a, b = generated.features, real.features
        metrics: dict[str, Any] = dict.fromkeys(
            ("frechet", "frechet_interval", "kid", "kid_std", "precision", "recall", "density", "coverage")
        )
        if min(len(a), len(b)) < MIN_IMAGES:
            return metrics
        metrics["frechet"] = frechet_distance(a, b)
        if interval:
            metrics["frechet_interval"] = bootstrap_interval(a, b, self.seed)
        else:
            del metrics["frechet_interval"]
        if self.extractor.name == "inception":
            metrics["fid"] = metrics["frechet"]
            metrics["sfid"] = frechet_distance(generated.files["spatial"], real.files["spatial"])
            metrics |= inception_score(generated.files["imagenet_logits"], self.seed)
        metrics["kid"], metrics["kid_std"] = kernel_distance(a, b, seed=self.seed)
        metrics |= precision_recall(b, a)._asdict() | density_coverage(b, a)._asdict()
        return metrics

    def noise_floor(self, train: MeasuredImages, labels: Tensor) -> MeasuredImages:
        """Select one random training image for each label, of the same class.

        If a class has too few training images, all of them are selected. If the training images or `labels` have no classes,
        the images are selected from all training images.
        """
        if (train.labels < 0).any() or (labels < 0).any():
            return train.select(random_positions(len(train), len(labels), self.seed))
        positions = []
        for label, count in zip(*labels.unique(return_counts=True), strict=True):
            in_class = (train.labels == label).nonzero().flatten()
            positions.append(in_class[random_positions(len(in_class), int(count), self.seed)])
        return train.select(torch.cat(positions).sort().values)

    def _predict_classes(
        self, samples: MeasuredImages, real: MeasuredImages, train: MeasuredImages | None, num_classes: int
    ) -> tuple[Tensor, Tensor] | None:
        """Predict the class (N,) of each sample and of each real image.

        The predictions come from the reference classifier if there is one, else from a linear probe on training images.
        """
        if "class_logits" in samples.files:
            return argmax_of_rows(samples.files["class_logits"]), argmax_of_rows(real.files["class_logits"])
        if train is None or (train.labels < 0).any():
            return None
        probe = fit_probe(train.features, train.labels, num_classes, self.seed)
        predictions = [
            torch.cat([probe.logits(rows).argmax(1) for rows in iterate_slices(images.features)])
            for images in (samples, real)
        ]
        return predictions[0], predictions[1]


def argmax_of_rows(logits: FeatureFile) -> Tensor:
    """Return the (N,) index of the largest entry of each row."""
    return torch.cat([rows.argmax(1) for rows in iterate_slices(logits)])


def label_agreement(predictions: Tensor | None, images: MeasuredImages) -> float | None:
    """Return the share of images with a correct prediction; None without predictions or labels."""
    if predictions is None or (images.labels < 0).any():
        return None
    return (predictions == images.labels).double().mean().item()


def memorisation_metrics(sample_distances: Tensor, held_out_distances: Tensor) -> dict[str, float | None]:
    """Compare the distances of samples and of held-out images, each (N,), to the nearest training image.

    If `closer_than_held_out_5_percent` is well above 0.05, then the model repeats training images.
    """
    sample_median, held_out_median = sample_distances.median().item(), held_out_distances.median().item()
    near_distance = held_out_distances.quantile(NEAR_QUANTILE)
    return {
        "nearest_training_image": sample_median,
        "the_same_for_held_out": held_out_median,
        "ratio": sample_median / held_out_median if held_out_median else None,
        "closer_than_held_out_5_percent": (sample_distances < near_distance).double().mean().item(),
    }


def check_inception(extractor: FeatureExtractor) -> None:
    """Raise UserError unless the extractor is the Inception network."""
    if extractor.name != "inception":
        raise UserError(
            f"the reference holds moments of Inception features, but the images would be measured by {extractor.name}; "
            "expected the same features; pass --features inception, or a reference with images"
        )
