"""The evaluator's metrics equal direct computations on simple features."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import LABEL_NAMES, seeded, tiny_pipeline, tiny_prior, tiny_split, tiny_tokenizer
from torch import Tensor

from pipelines.evaluation.evaluator import Evaluator, MeasuredImages, memorisation_metrics
from pipelines.evaluation.features import POOLED_PIXELS, FeatureExtractor, ImageFeatures
from pipelines.evaluation.frechet import frechet_distance, gaussian_from_moments
from pipelines.evaluation.kernel_distance import kernel_distance
from pipelines.evaluation.manifolds import density_coverage, precision_recall
from pipelines.evaluation.pipeline_metrics import (
    balanced_labels,
    bits_per_token,
    check_image_count,
    collect_grid_images,
    pipeline_metrics,
    sample_batches,
    sample_size_warnings,
)
from pipelines.evaluation.tokenizer_metrics import reconstruct, tokenizer_metrics
from pipelines.latent_generation import LatentGenerationPipeline, to_uint8
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.metrics import ssim
from stage1_tokenizer.vqgan import VQGAN
from training_harness.errors import UserError


def random_images(count: int, seed: int, channels: int = 1, size: int = 14) -> Tensor:
    return torch.randint(256, (count, channels, size, size), generator=seeded(seed), dtype=torch.uint8)


def corners(images: Tensor) -> Tensor:
    return images[:, 0, :2, :2].flatten(1).float()


def first_pixels(images: Tensor) -> Tensor:
    return images[:, 0, 0, :3].float()


CORNERS = FeatureExtractor("corners", lambda images: ImageFeatures(corners(images)))
BY_FIRST_PIXEL = FeatureExtractor("first-pixel", lambda images: ImageFeatures(corners(images), first_pixels(images)))


class ImagesInMemory:
    """A set of images in memory that counts its reads."""

    def __init__(self, images: Tensor, labels: list[int] | None = None) -> None:
        self.images, self.all_labels, self.reads = images, labels, 0

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
        self.reads += 1
        for start in range(0, len(self), batch_size):
            positions = list(range(len(self)))[start : start + batch_size]
            yield positions, self.images[start : start + batch_size]

    def labels(self) -> list[int] | None:
        return self.all_labels


@pytest.fixture
def evaluator(tmp_path: Path) -> Iterator[Evaluator]:
    with Evaluator(CORNERS, tmp_path) as evaluator:
        yield evaluator


def measure_images(evaluator: Evaluator, images: Tensor, labels: list[int] | None = None) -> MeasuredImages:
    return evaluator.measure(ImagesInMemory(images, labels), "images")


@pytest.fixture(scope="module")
def tokenizer() -> VQGAN:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def pixels(tokenizer: VQGAN) -> ImageLoader:
    return ImageLoader(tiny_split(23), tokenizer.config.image_processor)


def test_features_of_real_images_are_computed_once_and_cached_by_the_pixels_of_the_images(tmp_path: Path) -> None:
    calls = []

    def extract(images: Tensor) -> ImageFeatures:
        calls.append(len(images))
        return ImageFeatures(corners(images))

    images = random_images(20, 1)
    extractor = FeatureExtractor("corners", extract, weights="a")
    for _ in range(2):
        with Evaluator(extractor, tmp_path) as evaluator:
            first = measure_images(evaluator, images.clone())
    assert calls == [20]
    assert torch.equal(first.features.read(0, 20), corners(images))
    with Evaluator(extractor, tmp_path) as evaluator:
        changed = images.clone()
        changed[7, 0, 13, 13] ^= 1
        assert measure_images(evaluator, changed).hash != first.hash
        assert measure_images(evaluator, images.flip(0)).hash != first.hash
    assert len(calls) == 3
    for weights, new_calls in (("b", 1), ("b", 0), ("", 1), ("", 1)):  # without a hash, nothing is cached
        calls_before = len(calls)
        with Evaluator(extractor._replace(weights=weights), tmp_path) as evaluator:
            measure_images(evaluator, images)
        assert len(calls) - calls_before == new_calls


def test_features_of_samples_are_deleted_when_the_evaluator_is_closed_and_after_an_error(tmp_path: Path) -> None:
    with Evaluator(CORNERS, tmp_path) as evaluator:
        evaluator.measure_stream([random_images(8, 1)], torch.zeros(8), "samples")
        assert len(list(tmp_path.rglob("features"))) == 1
    assert list(tmp_path.iterdir()) == []
    nan_extractor = FeatureExtractor("nan", lambda images: ImageFeatures(corners(images) * math.nan))
    with pytest.raises(UserError, match="8 of 8 rows"), Evaluator(nan_extractor, tmp_path) as evaluator:
        measure_images(evaluator, random_images(8, 1))
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizer_metrics_equal_metrics_computed_image_by_image(
    tokenizer: VQGAN, pixels: ImageLoader, tmp_path: Path
) -> None:
    processor = tokenizer.config.image_processor
    errors, similarities, counts, reconstructions = [], [], np.zeros(16), []
    for i in range(len(pixels)):
        original = pixels[[i]]
        with torch.no_grad():
            indices = tokenizer.encode_indices(processor.preprocess(original))
            reconstruction = processor.postprocess(tokenizer.decode_indices(indices))
        reconstructions.append(reconstruction)
        errors.append(np.mean((reconstruction.numpy().astype(float) - original.numpy()) ** 2))
        similarities.append(float(ssim(reconstruction, original)))
        counts += np.bincount(indices.flatten().numpy(), minlength=16)
    shares = counts[counts > 0] / counts.sum()
    train = ImagesInMemory(random_images(30, 3))
    with Evaluator(POOLED_PIXELS, tmp_path) as evaluator:
        real, training_images = evaluator.measure(pixels, "real"), evaluator.measure(train, "train")
        metrics = tokenizer_metrics(evaluator, tokenizer, pixels, real, training_images)
        without_training_images = tokenizer_metrics(evaluator, tokenizer, pixels, real)
    assert metrics["psnr"] == pytest.approx(np.mean([10 * math.log10(255**2 / error) for error in errors]), abs=0.01)
    assert metrics["ssim"] == pytest.approx(np.mean(similarities), abs=1e-3)
    assert metrics["lpips"] is None  # no weights are shipped
    assert metrics["codes_used"] == (counts > 0).sum() > 1
    assert metrics["perplexity"] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    assert metrics["bits_per_pixel"] == 16 * 4 / 14**2  # 16 codes of 4 bits on 14×14 pixels without padding
    pooled = [POOLED_PIXELS.extract(images).features for images in (torch.cat(reconstructions), pixels[range(23)])]
    assert metrics["reconstruction_frechet"] == pytest.approx(frechet_distance(*pooled), rel=1e-4)
    low, high = metrics["reconstruction_frechet_interval"]
    assert low < metrics["reconstruction_frechet"] < high
    assert metrics["reconstruction_frechet_floor"] > 0
    assert without_training_images["reconstruction_frechet_floor"] is None


def test_reconstructions_are_in_order_and_without_padding(tokenizer: VQGAN, pixels: ImageLoader) -> None:
    originals = pixels[range(23)]
    batched = reconstruct(tokenizer, originals)
    assert batched[0].shape == originals.shape
    assert batched[0].dtype == torch.uint8
    one_by_one = [reconstruct(tokenizer, originals[i : i + 1]) for i in range(23)]
    assert torch.equal(batched[1], torch.cat([indices for _, indices in one_by_one]))
    assert (batched[0].int() - torch.cat([images for images, _ in one_by_one]).int()).abs().max() <= 1


def test_evaluating_a_tokenizer_does_not_change_it(pixels: ImageLoader, evaluator: Evaluator) -> None:
    tokenizer = tiny_tokenizer()
    before = {name: tensor.clone() for name, tensor in tokenizer.state_dict().items()}
    tokenizer_metrics(evaluator, tokenizer, pixels, evaluator.measure(pixels, "real"))
    assert all(torch.equal(tokenizer.state_dict()[name], tensor) for name, tensor in before.items())


def test_lpips_and_ssim_are_none_for_images_that_are_too_small(
    tmp_path: Path, evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested_devices = []

    def constant_lpips(device: object) -> Callable[[Tensor, Tensor], Tensor]:
        requested_devices.append(device)
        return lambda images, references: torch.full((len(images),), 0.25)

    monkeypatch.setattr("pipelines.evaluation.tokenizer_metrics.load_lpips_distance", constant_lpips)

    def compute_metrics(side: int) -> dict[str, Any]:
        tokenizer = tiny_tokenizer(image_size=(side, side), content_size=(side, side))
        images = ImageLoader(tiny_split(4, size=(side, side)), tokenizer.config.image_processor)
        return tokenizer_metrics(evaluator, tokenizer, images, evaluator.measure(images, "real"))

    assert compute_metrics(8)["ssim"] is compute_metrics(8)["lpips"] is compute_metrics(28)["lpips"] is None
    assert not requested_devices
    assert compute_metrics(28)["ssim"] is not None
    assert compute_metrics(32)["lpips"] == 0.25


def test_a_single_image_has_no_frechet_distance(tokenizer: VQGAN, evaluator: Evaluator) -> None:
    single_image = ImageLoader(tiny_split(1), tokenizer.config.image_processor)
    metrics = tokenizer_metrics(evaluator, tokenizer, single_image, evaluator.measure(single_image, "real"))
    assert metrics["reconstruction_frechet"] is metrics["reconstruction_frechet_interval"] is None
    assert metrics["psnr"] > 0


def test_the_sample_metrics_equal_direct_computations_on_their_features(evaluator: Evaluator) -> None:
    images, reference = random_images(20, 1), random_images(30, 2)
    metrics = evaluator.sample_metrics(measure_images(evaluator, images), measure_images(evaluator, reference))
    a, b = corners(images), corners(reference)
    kid = kernel_distance(a, b, seed=0)
    expected = {"frechet": frechet_distance(a, b), "kid": kid.mean, "kid_std": kid.std}
    expected |= precision_recall(b, a)._asdict() | density_coverage(b, a)._asdict()
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert metrics["precision"] != metrics["recall"]  # so that swapped sets would fail the test
    assert metrics["frechet_interval"][0] < metrics["frechet"] < metrics["frechet_interval"][1]
    assert metrics["class_agreement"] is metrics["floor"] is metrics["memorisation"] is None
    assert metrics["by_class"] == {}
    assert "fid" not in metrics


def test_the_noise_floor_is_the_metric_of_an_equal_number_of_training_images(evaluator: Evaluator) -> None:
    images, reference = measure_images(evaluator, random_images(12, 1)), measure_images(evaluator, random_images(30, 2))
    train = random_images(50, 3)
    floor = evaluator.sample_metrics(images, reference, measure_images(evaluator, train))["floor"]
    assert floor["num_images"] == 12
    few_training_images = measure_images(evaluator, train[:9])
    floor = evaluator.sample_metrics(images, reference, few_training_images)["floor"]
    assert floor["num_images"] == 9
    assert floor["frechet"] == pytest.approx(
        frechet_distance(corners(train[:9]), corners(random_images(30, 2))), rel=1e-6
    )


def test_the_noise_floor_and_the_samples_have_equal_numbers_of_images_of_each_class(evaluator: Evaluator) -> None:
    train = measure_images(evaluator, random_images(50, 3), [0] * 40 + [1] * 8 + [2] * 2)
    labels = torch.tensor([0] * 3 + [1] * 5 + [2] * 4)
    floor = evaluator.noise_floor(train, labels)
    assert floor.labels.bincount().tolist() == [3, 5, 2]  # the third class has only two images
    assert torch.equal(floor.features.read(0, 99), evaluator.noise_floor(train, labels.flip(0)).features.read(0, 99))


def test_training_images_in_place_of_samples_have_distance_zero_and_count_as_memorised(evaluator: Evaluator) -> None:
    train = measure_images(evaluator, random_images(40, 1))
    held_out = measure_images(evaluator, random_images(30, 2))
    same = evaluator.sample_metrics(train, train, train)
    assert same["frechet"] == pytest.approx(0, abs=1e-6)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    memorised = evaluator.sample_metrics(train, held_out, train)["memorisation"]
    assert memorised["nearest_training_image"] == memorised["ratio"] == 0
    assert memorised["closer_than_held_out_5_percent"] == 1
    not_memorised = evaluator.sample_metrics(held_out, held_out, train)["memorisation"]
    assert not_memorised["ratio"] == 1
    assert not_memorised["closer_than_held_out_5_percent"] == pytest.approx(0.05, abs=0.02)


def test_memorisation_compares_medians() -> None:
    metrics = memorisation_metrics(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([2.0, 4.0, 5.0]))
    assert (metrics["nearest_training_image"], metrics["the_same_for_held_out"], metrics["ratio"]) == (2, 4, 0.5)
    assert memorisation_metrics(torch.ones(3), torch.zeros(3))["ratio"] is None


def test_predictions_of_a_classifier_give_the_class_agreement_overall_and_by_class(tmp_path: Path) -> None:
    images, reference = random_images(21, 1), random_images(30, 2)
    predictions = first_pixels(images).argmax(1)
    labels = predictions.clone()
    labels[:7] = (labels[:7] + 1) % 3
    real_labels = first_pixels(reference).argmax(1).tolist()
    with Evaluator(BY_FIRST_PIXEL, tmp_path) as evaluator:
        samples = evaluator.measure_stream(images.split(4), labels, "samples")
        real = measure_images(evaluator, reference, real_labels)
        metrics = evaluator.sample_metrics(samples, real, real, LABEL_NAMES)
        without_names = evaluator.sample_metrics(samples, real, real)
    assert metrics["class_agreement"] == pytest.approx(14 / 21)
    assert metrics["floor"]["class_agreement"] == 1
    assert list(metrics["by_class"]) == list(LABEL_NAMES)
    for label, name in enumerate(LABEL_NAMES):
        row, in_class = metrics["by_class"][name], labels == label
        assert row["class_agreement"] == pytest.approx((predictions[in_class] == label).double().mean())
        assert row["num_images"] == in_class.sum()
        real_in_class = torch.tensor(real_labels) == label
        if min(in_class.sum(), real_in_class.sum()) >= 6:
            expected = frechet_distance(corners(images[in_class]), corners(reference[real_in_class]))
            assert row["frechet"] == pytest.approx(expected, rel=1e-6)
        else:
            assert row["frechet"] is None
    assert any(row["frechet"] for row in metrics["by_class"].values())
    assert without_names["class_agreement"] is None  # the class ids of samples and real images have different meanings
    assert without_names["by_class"] == {}


def test_without_a_classifier_a_probe_trained_on_real_images_gives_the_class_agreement(evaluator: Evaluator) -> None:
    def images_by_brightness(count: int, seed: int) -> tuple[Tensor, list[int]]:
        labels = torch.arange(count) % 3
        noise = torch.randint(20, (count, 1, 14, 14), generator=seeded(seed))
        return (noise + 100 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels.tolist()

    train, real = (measure_images(evaluator, *images_by_brightness(30, seed)) for seed in (1, 2))
    images, labels = images_by_brightness(12, 3)
    wrong_labels = torch.tensor(labels)
    wrong_labels[:4] = (wrong_labels[:4] + 1) % 3
    samples = evaluator.measure_stream([images], wrong_labels, "samples")
    metrics = evaluator.sample_metrics(samples, real, train, LABEL_NAMES)
    assert metrics["class_agreement"] == pytest.approx(8 / 12)
    assert metrics["floor"]["class_agreement"] == 1
    unlabelled = measure_images(evaluator, images_by_brightness(30, 1)[0])
    assert evaluator.sample_metrics(samples, real, unlabelled, LABEL_NAMES)["class_agreement"] is None


@pytest.mark.parametrize(("count", "reference"), [(5, 8), (8, 5)])
def test_distances_need_six_images_in_each_set(count: int, reference: int, evaluator: Evaluator) -> None:
    few = evaluator.sample_metrics(*(measure_images(evaluator, random_images(n, n)) for n in (count, reference)))
    assert few["frechet"] is few["precision"] is few["kid"] is few["coverage"] is None
    enough = evaluator.sample_metrics(*(measure_images(evaluator, random_images(n + 1, n)) for n in (count, reference)))
    assert min(enough[name] for name in ("frechet", "precision", "recall", "density", "coverage")) >= 0
    with pytest.raises(UserError, match="samples: 5; expected at least 6"):
        check_image_count(5, "samples")
    check_image_count(6, "samples")


def test_moments_are_compared_with_inception_features_only(tmp_path: Path) -> None:
    images = random_images(30, 1)

    def extract(batch: Tensor) -> ImageFeatures:
        return ImageFeatures(corners(batch), imagenet_logits=first_pixels(batch), spatial=corners(batch)[:, :2])

    features = corners(images).double()
    moments = {"features": gaussian_from_moments(features.mean(0), features.T.cov())}
    moments["spatial"] = gaussian_from_moments(features[:, :2].mean(0) + 1, features[:, :2].T.cov())
    with Evaluator(FeatureExtractor("inception", extract), tmp_path) as evaluator:
        metrics = evaluator.moments_metrics(measure_images(evaluator, images), moments)
        sample_metrics = evaluator.sample_metrics(
            *(measure_images(evaluator, random_images(30, seed)) for seed in (1, 2))
        )
    assert metrics["fid"] == metrics["frechet"] == pytest.approx(0, abs=1e-5)
    assert metrics["sfid"] == pytest.approx(2, rel=1e-6)
    assert metrics["inception_score"] >= 1
    assert sample_metrics["fid"] == sample_metrics["frechet"] > 0
    assert sample_metrics["sfid"] != sample_metrics["fid"]
    with Evaluator(CORNERS, tmp_path) as evaluator, pytest.raises(UserError, match="would be measured by corners"):
        evaluator.moments_metrics(measure_images(evaluator, images), moments)


def test_bits_per_token_equal_the_loss_of_the_prior(pixels: ImageLoader) -> None:
    pipeline = tiny_pipeline()
    metrics = bits_per_token(pipeline, pixels)
    codes = reconstruct(pipeline.tokenizer, pixels[range(23)])[1]
    labels = torch.tensor(pixels.labels())
    with torch.no_grad():
        loss = pipeline.prior(codes, labels).total
        dog_loss = pipeline.prior(codes[labels == 1], labels[labels == 1]).total
    assert metrics["bits_per_token"] == pytest.approx(float(loss) / math.log(2), rel=1e-5)
    assert metrics["bits_per_token_by_class"]["dog"] == pytest.approx(float(dog_loss) / math.log(2), rel=1e-5)
    assert metrics["bits_per_token_uniform"] == 4


def test_samples_have_balanced_classes_and_depend_on_the_seed_but_not_on_the_batch_size() -> None:
    pipeline = tiny_pipeline()
    labels = balanced_labels(pipeline, 10)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert balanced_labels(pipeline, 2).tolist() == [0, 1, 2]  # at least one of each

    def sample(seed: int, batch_size: int) -> Tensor:
        return torch.cat(list(sample_batches(pipeline, labels, seed, batch_size)))

    images = sample(4, 200)
    assert images.shape == (9, 1, 14, 14)
    assert images.dtype == torch.uint8
    assert torch.equal(images, to_uint8(pipeline.sample_pixels(labels, seeded(4))))
    assert (images.int() - sample(4, 2).int()).abs().max() <= 1
    assert not torch.equal(images, sample(5, 200))


def test_balanced_labels_of_a_pipeline_without_classes_are_minus_one() -> None:
    tokenizer = tiny_tokenizer()
    pipeline = LatentGenerationPipeline(tokenizer, tiny_prior(num_classes=0, tokenizer_id=tokenizer.compute_id()))
    assert balanced_labels(pipeline, 5).tolist() == [-1] * 5


def test_collecting_grid_images_yields_all_batches_unchanged() -> None:
    images, labels = random_images(10, 1), torch.tensor([0, 0, 0, 1, 1, 0, 2, 2, 1, 1])
    grid_images: dict[int, list[Tensor]] = {}
    yielded = list(collect_grid_images(images.split(4), labels, grid_images, rows=2, columns=2))
    assert torch.equal(torch.cat(yielded), images)
    assert {label: len(row) for label, row in grid_images.items()} == {0: 2, 1: 2}
    assert torch.equal(torch.stack(grid_images[1]), images[3:5])
    without_classes: dict[int, list[Tensor]] = {}
    list(collect_grid_images(images.split(4), torch.full((10,), -1), without_classes, rows=2, columns=3))
    assert torch.equal(torch.stack(without_classes[-1]), images[:6])


def test_pipeline_metrics_include_metrics_of_tokenizer_prior_and_samples(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    processor = pipeline.tokenizer.config.image_processor
    held_out, train = (ImageLoader(tiny_split(count, seed), processor) for count, seed in ((23, 1), (40, 0)))
    labels = balanced_labels(pipeline, 30)
    with Evaluator(POOLED_PIXELS, tmp_path) as evaluator:
        samples = evaluator.measure_stream(sample_batches(pipeline, labels, 0), labels, "sample")
        metrics = pipeline_metrics(evaluator, pipeline, samples, held_out, train, LABEL_NAMES)
    assert {"psnr", "ssim", "perplexity", "bits_per_token", "frechet", "kid", "coverage", "floor"} <= metrics.keys()
    assert metrics["floor"]["frechet"] < metrics["frechet"]  # the models are untrained
    assert (metrics["num_images"], metrics["num_reference_images"], metrics["num_training_images"]) == (30, 23, 40)
    assert metrics["by_class"]["dog"]["num_images"] == 10
    assert metrics["memorisation"]["ratio"] > 1


def test_fewer_images_than_in_published_distances_give_a_warning_with_their_number() -> None:
    assert "2,000 images" in sample_size_warnings(2_000, 50_000)[0]
    assert "1,000 images" in sample_size_warnings(50_000, 1_000)[0]
    assert sample_size_warnings(50_000, 50_000) == []
