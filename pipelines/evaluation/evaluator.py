"""Measures sets of images and compares them, in batches: memory does not grow with the number of images.

    images → features → a folder of rows → Fréchet and kernel distance, precision, recall, density, coverage
                                         → verdicts of the judge, or of a linear probe → class agreement
                                         → nearest training image → memorisation

Beside every distance stands its noise floor: the same figure for as many real training images in the samples' place. What
the names mean, and from which papers they come, say the modules that compute them.
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
FEWEST = DENSITY_NEIGHBOURS + 1  # images on a side, for all figures to exist
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
            with atomic_folder(folder) as beside:
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
        with progress_bar(total=count, desc=describe, unit="image") as bar:

            def extracted() -> Iterator[ImageFeatures]:
                for batch in batches:
                    yield self.extractor.extract(batch)
                    bar.update(len(batch))

            return write_features(folder, extracted())

    # -- figures --------------------------------------------------------------------------------------------------

    def sample_metrics(
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
            floor = self.noise_floor(train, samples.labels if names else torch.full_like(samples.labels, -1))
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

    def moments_metrics(self, samples: Measured, moments: Mapping[str, Gaussian]) -> dict[str, Any]:
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

    def noise_floor(self, train: Measured, labels: Tensor) -> Measured:
        """A training image for each of `labels`, of that class; of any class where either side has none.

        Drawn at random; where a class has too few, all that it has.
        """
        if (train.labels < 0).any() or (labels < 0).any():
            return train.select(random_positions(len(train), len(labels), self.seed))
        drawn = []
        for label, count in zip(*labels.unique(return_counts=True), strict=True):
            of_class = (train.labels == label).nonzero().flatten()
            drawn.append(of_class[random_positions(len(of_class), int(count), self.seed)])
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
            torch.cat([probe.logits(part).argmax(1) for part in iterate_slices(found.features)])
            for found in (samples, real)
        ]
        return seen[0], seen[1]


def predicted(logits: FeatureFile) -> Tensor:
    """(N,) index of each row's largest entry."""
    return torch.cat([part.argmax(1) for part in iterate_slices(logits)])


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


def check_inception(extractor: FeatureExtractor) -> None:
    if extractor.name != "inception":
        raise UserError(
            f"the reference holds moments of Inception's features and images are to be measured by {extractor.name}; "
            "expected the same; give --features inception, or a reference of images"
        )
