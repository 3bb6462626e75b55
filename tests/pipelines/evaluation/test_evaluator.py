"""The report's figures, against direct computations on features that are easy to compute."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import LABEL_NAMES, seeded, tiny_pipeline, tiny_prior, tiny_split, tiny_tokenizer
from torch import Tensor

from pipelines.evaluation.evaluator import Evaluator, Measured, memorisation
from pipelines.evaluation.features import POOLED_PIXELS, FeatureExtractor, ImageFeatures
from pipelines.evaluation.frechet import frechet_distance, gaussian_of_moments
from pipelines.evaluation.kernel_distance import kernel_distance
from pipelines.evaluation.manifolds import density_coverage, precision_recall
from pipelines.evaluation.pipeline_metrics import (
    balanced_labels,
    bits_per_token,
    check_enough,
    keeping_first,
    pipeline_metrics,
    sampled_batches,
    warnings_for,
)
from pipelines.evaluation.tokenizer_metrics import reconstruct, tokenizer_metrics
from pipelines.latent_generation import LatentGenerationPipeline, to_uint8
from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.metrics import ssim
from stage1_tokenizer.vqgan import VQGAN
from training_harness.errors import UserError


def pictures(count: int, seed: int, channels: int = 1, size: int = 14) -> Tensor:
    return torch.randint(256, (count, channels, size, size), generator=seeded(seed), dtype=torch.uint8)


def corners(images: Tensor) -> Tensor:
    return images[:, 0, :2, :2].flatten(1).float()


def first_pixels(images: Tensor) -> Tensor:
    return images[:, 0, 0, :3].float()


CORNERS = FeatureExtractor("corners", lambda images: ImageFeatures(corners(images)))
BY_FIRST_PIXEL = FeatureExtractor("first-pixel", lambda images: ImageFeatures(corners(images), first_pixels(images)))


class Pictures:
    """A set of images in memory that counts how often it is read."""

    def __init__(self, images: Tensor, labels: list[int] | None = None) -> None:
        self.images, self.own_labels, self.reads = images, labels, 0

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
        self.reads += 1
        for start in range(0, len(self), batch_size):
            positions = list(range(len(self)))[start : start + batch_size]
            yield positions, self.images[start : start + batch_size]

    def labels(self) -> list[int] | None:
        return self.own_labels


@pytest.fixture
def evaluator(tmp_path: Path) -> Iterator[Evaluator]:
    with Evaluator(CORNERS, tmp_path) as evaluator:
        yield evaluator


def measured(evaluator: Evaluator, images: Tensor, labels: list[int] | None = None) -> Measured:
    return evaluator.measure(Pictures(images, labels), "images")


@pytest.fixture(scope="module")
def tokenizer() -> VQGAN:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def pixels(tokenizer: VQGAN) -> ImageLoader:
    return ImageLoader(tiny_split(23), tokenizer.config.image_processor)


def test_features_of_real_images_are_computed_once_and_found_again_by_what_the_images_show(tmp_path: Path) -> None:
    calls = []

    def extract(images: Tensor) -> ImageFeatures:
        calls.append(len(images))
        return ImageFeatures(corners(images))

    images = pictures(20, 1)
    extractor = FeatureExtractor("corners", extract, weights="a")
    for _ in range(2):
        with Evaluator(extractor, tmp_path) as evaluator:
            first = measured(evaluator, images.clone())
    assert calls == [20]
    assert torch.equal(first.features.read(0, 20), corners(images))
    with Evaluator(extractor, tmp_path) as evaluator:
        changed = images.clone()
        changed[7, 0, 13, 13] ^= 1
        assert measured(evaluator, changed).hash != first.hash
        assert measured(evaluator, images.flip(0)).hash != first.hash
    assert len(calls) == 3
    for weights, added in (("b", 1), ("b", 0), ("", 1), ("", 1)):  # without a hash, nothing is found again
        before = len(calls)
        with Evaluator(extractor._replace(weights=weights), tmp_path) as evaluator:
            measured(evaluator, images)
        assert len(calls) - before == added


def test_what_samples_leave_is_gone_when_the_evaluator_is_closed_and_after_an_error(tmp_path: Path) -> None:
    with Evaluator(CORNERS, tmp_path) as evaluator:
        evaluator.measure_stream([pictures(8, 1)], torch.zeros(8), "samples")
        assert len(list(tmp_path.rglob("features"))) == 1
    assert list(tmp_path.iterdir()) == []
    broken = FeatureExtractor("nan", lambda images: ImageFeatures(corners(images) * math.nan))
    with pytest.raises(UserError, match="8 of 8 rows"), Evaluator(broken, tmp_path) as evaluator:
        measured(evaluator, pictures(8, 1))
    assert list(tmp_path.iterdir()) == []


def test_the_tokenizers_figures_equal_those_computed_image_by_image(
    tokenizer: VQGAN, pixels: ImageLoader, tmp_path: Path
) -> None:
    processor = tokenizer.config.image_processor
    errors, likenesses, counts, rebuilt = [], [], np.zeros(16), []
    for i in range(len(pixels)):
        original = pixels[[i]]
        with torch.no_grad():
            indices = tokenizer.encode_indices(processor.preprocess(original))
            again = processor.postprocess(tokenizer.decode_indices(indices))
        rebuilt.append(again)
        errors.append(np.mean((again.numpy().astype(float) - original.numpy()) ** 2))
        likenesses.append(float(ssim(again, original)))
        counts += np.bincount(indices.flatten().numpy(), minlength=16)
    shares = counts[counts > 0] / counts.sum()
    train = Pictures(pictures(30, 3))
    with Evaluator(POOLED_PIXELS, tmp_path) as evaluator:
        real, trained = evaluator.measure(pixels, "real"), evaluator.measure(train, "train")
        figures = tokenizer_metrics(evaluator, tokenizer, pixels, real, trained)
        alone = tokenizer_metrics(evaluator, tokenizer, pixels, real)
    assert figures["psnr"] == pytest.approx(np.mean([10 * math.log10(255**2 / error) for error in errors]), abs=0.01)
    assert figures["ssim"] == pytest.approx(np.mean(likenesses), abs=1e-3)
    assert figures["lpips"] is None  # no weights are shipped
    assert figures["codes_used"] == (counts > 0).sum() > 1
    assert figures["perplexity"] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    assert figures["bits_per_pixel"] == 16 * 4 / 14**2  # 16 codes of 4 bits on 14×14 pixels, the padding not counted
    pooled = [POOLED_PIXELS.extract(images).features for images in (torch.cat(rebuilt), pixels[range(23)])]
    assert figures["reconstruction_frechet"] == pytest.approx(frechet_distance(*pooled), rel=1e-4)
    low, high = figures["reconstruction_frechet_interval"]
    assert low < figures["reconstruction_frechet"] < high
    assert figures["reconstruction_frechet_floor"] > 0
    assert alone["reconstruction_frechet_floor"] is None


def test_reconstructions_come_in_order_without_padding(tokenizer: VQGAN, pixels: ImageLoader) -> None:
    originals = pixels[range(23)]
    together = reconstruct(tokenizer, originals)
    assert together[0].shape == originals.shape
    assert together[0].dtype == torch.uint8
    apart = [reconstruct(tokenizer, originals[i : i + 1]) for i in range(23)]
    assert torch.equal(together[1], torch.cat([indices for _, indices in apart]))
    assert (together[0].int() - torch.cat([images for images, _ in apart]).int()).abs().max() <= 1


def test_evaluating_a_tokenizer_does_not_change_it(pixels: ImageLoader, evaluator: Evaluator) -> None:
    fresh = tiny_tokenizer()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    tokenizer_metrics(evaluator, fresh, pixels, evaluator.measure(pixels, "real"))
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in before.items())


def test_lpips_and_ssim_are_left_out_of_images_that_are_too_small(
    tmp_path: Path, evaluator: Evaluator, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def fake(device: object) -> Callable[[Tensor, Tensor], Tensor]:
        asked.append(device)
        return lambda images, references: torch.full((len(images),), 0.25)

    monkeypatch.setattr("pipelines.evaluation.tokenizer_metrics.lpips_distance", fake)

    def figures(side: int) -> dict[str, Any]:
        tokenizer = tiny_tokenizer(image_size=(side, side), content_size=(side, side))
        images = ImageLoader(tiny_split(4, size=(side, side)), tokenizer.config.image_processor)
        return tokenizer_metrics(evaluator, tokenizer, images, evaluator.measure(images, "real"))

    assert figures(8)["ssim"] is figures(8)["lpips"] is figures(28)["lpips"] is None
    assert not asked
    assert figures(28)["ssim"] is not None
    assert figures(32)["lpips"] == 0.25


def test_a_single_image_has_no_frechet_distance(tokenizer: VQGAN, evaluator: Evaluator) -> None:
    one = ImageLoader(tiny_split(1), tokenizer.config.image_processor)
    figures = tokenizer_metrics(evaluator, tokenizer, one, evaluator.measure(one, "real"))
    assert figures["reconstruction_frechet"] is figures["reconstruction_frechet_interval"] is None
    assert figures["psnr"] > 0


def test_the_samples_figures_are_those_of_the_features_that_were_given(evaluator: Evaluator) -> None:
    images, reference = pictures(20, 1), pictures(30, 2)
    figures = evaluator.sample_metrics(measured(evaluator, images), measured(evaluator, reference))
    a, b = corners(images), corners(reference)
    kid = kernel_distance(a, b, seed=0)
    expected = {"frechet": frechet_distance(a, b), "kid": kid.mean, "kid_std": kid.std}
    expected |= precision_recall(b, a)._asdict() | density_coverage(b, a)._asdict()
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-9)
    assert figures["precision"] != figures["recall"]  # or an exchange would not be seen
    assert figures["frechet_interval"][0] < figures["frechet"] < figures["frechet_interval"][1]
    assert figures["class_agreement"] is figures["floor"] is figures["memorisation"] is None
    assert figures["by_class"] == {}
    assert "fid" not in figures


def test_the_noise_floor_is_the_figure_of_as_many_training_images(evaluator: Evaluator) -> None:
    images, reference = measured(evaluator, pictures(12, 1)), measured(evaluator, pictures(30, 2))
    train = pictures(50, 3)
    floor = evaluator.sample_metrics(images, reference, measured(evaluator, train))["floor"]
    assert floor["num_images"] == 12
    few = measured(evaluator, train[:9])
    whole = evaluator.sample_metrics(images, reference, few)["floor"]
    assert whole["num_images"] == 9
    assert whole["frechet"] == pytest.approx(frechet_distance(corners(train[:9]), corners(pictures(30, 2))), rel=1e-6)


def test_the_noise_floor_has_as_many_images_of_each_class_as_the_samples(evaluator: Evaluator) -> None:
    train = measured(evaluator, pictures(50, 3), [0] * 40 + [1] * 8 + [2] * 2)
    wanted = torch.tensor([0] * 3 + [1] * 5 + [2] * 4)
    floor = evaluator.noise_floor(train, wanted)
    assert floor.labels.bincount().tolist() == [3, 5, 2]  # of the third class there are but two
    assert torch.equal(floor.features.read(0, 99), evaluator.noise_floor(train, wanted.flip(0)).features.read(0, 99))


def test_real_images_in_the_samples_place_have_no_distance_and_are_seen_as_copies(evaluator: Evaluator) -> None:
    train = measured(evaluator, pictures(40, 1))
    held_out = measured(evaluator, pictures(30, 2))
    same = evaluator.sample_metrics(train, train, train)
    assert same["frechet"] == pytest.approx(0, abs=1e-6)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    copied = evaluator.sample_metrics(train, held_out, train)["memorisation"]
    assert copied["nearest_training_image"] == copied["ratio"] == 0
    assert copied["closer_than_held_out_5_percent"] == 1
    honest = evaluator.sample_metrics(held_out, held_out, train)["memorisation"]
    assert honest["ratio"] == 1
    assert honest["closer_than_held_out_5_percent"] == pytest.approx(0.05, abs=0.02)


def test_memorisation_compares_medians() -> None:
    found = memorisation(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([2.0, 4.0, 5.0]))
    assert (found["nearest_training_image"], found["the_same_for_held_out"], found["ratio"]) == (2, 4, 0.5)
    assert memorisation(torch.ones(3), torch.zeros(3))["ratio"] is None


def test_a_judges_verdicts_give_the_agreement_overall_and_by_class(tmp_path: Path) -> None:
    images, reference = pictures(21, 1), pictures(30, 2)
    seen = first_pixels(images).argmax(1)
    labels = seen.clone()
    labels[:7] = (labels[:7] + 1) % 3
    real_labels = first_pixels(reference).argmax(1).tolist()
    with Evaluator(BY_FIRST_PIXEL, tmp_path) as evaluator:
        samples = evaluator.measure_stream(images.split(4), labels, "samples")
        real = measured(evaluator, reference, real_labels)
        figures = evaluator.sample_metrics(samples, real, real, LABEL_NAMES)
        without = evaluator.sample_metrics(samples, real, real)
    assert figures["class_agreement"] == pytest.approx(14 / 21)
    assert figures["floor"]["class_agreement"] == 1
    assert list(figures["by_class"]) == list(LABEL_NAMES)
    for label, name in enumerate(LABEL_NAMES):
        row, mine = figures["by_class"][name], labels == label
        assert row["class_agreement"] == pytest.approx((seen[mine] == label).double().mean())
        assert row["num_images"] == mine.sum()
        theirs = torch.tensor(real_labels) == label
        if min(mine.sum(), theirs.sum()) >= 6:
            expected = frechet_distance(corners(images[mine]), corners(reference[theirs]))
            assert row["frechet"] == pytest.approx(expected, rel=1e-6)
        else:
            assert row["frechet"] is None
    assert any(row["frechet"] for row in figures["by_class"].values())
    assert without["class_agreement"] is None  # other classes: the ids mean something else
    assert without["by_class"] == {}


def test_without_a_judge_a_probe_trained_on_real_images_gives_the_agreement(evaluator: Evaluator) -> None:
    def shades(count: int, seed: int) -> tuple[Tensor, list[int]]:
        labels = torch.arange(count) % 3
        noise = torch.randint(20, (count, 1, 14, 14), generator=seeded(seed))
        return (noise + 100 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels.tolist()

    train, real = (measured(evaluator, *shades(30, seed)) for seed in (1, 2))
    images, labels = shades(12, 3)
    wrong = torch.tensor(labels)
    wrong[:4] = (wrong[:4] + 1) % 3
    samples = evaluator.measure_stream([images], wrong, "samples")
    figures = evaluator.sample_metrics(samples, real, train, LABEL_NAMES)
    assert figures["class_agreement"] == pytest.approx(8 / 12)
    assert figures["floor"]["class_agreement"] == 1
    unlabelled = measured(evaluator, shades(30, 1)[0])
    assert evaluator.sample_metrics(samples, real, unlabelled, LABEL_NAMES)["class_agreement"] is None


@pytest.mark.parametrize(("count", "reference"), [(5, 8), (8, 5)])
def test_five_images_on_a_side_are_too_few_for_distances_and_six_are_enough(
    count: int, reference: int, evaluator: Evaluator
) -> None:
    few = evaluator.sample_metrics(*(measured(evaluator, pictures(n, n)) for n in (count, reference)))
    assert few["frechet"] is few["precision"] is few["kid"] is few["coverage"] is None
    enough = evaluator.sample_metrics(*(measured(evaluator, pictures(n + 1, n)) for n in (count, reference)))
    assert min(enough[name] for name in ("frechet", "precision", "recall", "density", "coverage")) >= 0
    with pytest.raises(UserError, match="samples: 5; expected at least 6"):
        check_enough(5, "samples")
    check_enough(6, "samples")


def test_moments_are_compared_by_inceptions_features_alone(tmp_path: Path) -> None:
    images = pictures(30, 1)

    def extract(batch: Tensor) -> ImageFeatures:
        return ImageFeatures(corners(batch), imagenet_logits=first_pixels(batch), spatial=corners(batch)[:, :2])

    features = corners(images).double()
    moments = {"features": gaussian_of_moments(features.mean(0), features.T.cov())}
    moments["spatial"] = gaussian_of_moments(features[:, :2].mean(0) + 1, features[:, :2].T.cov())
    with Evaluator(FeatureExtractor("inception", extract), tmp_path) as evaluator:
        figures = evaluator.moments_metrics(measured(evaluator, images), moments)
        compared = evaluator.sample_metrics(*(measured(evaluator, pictures(30, seed)) for seed in (1, 2)))
    assert figures["fid"] == figures["frechet"] == pytest.approx(0, abs=1e-5)
    assert figures["sfid"] == pytest.approx(2, rel=1e-6)
    assert figures["inception_score"] >= 1
    assert compared["fid"] == compared["frechet"] > 0
    assert compared["sfid"] != compared["fid"]
    with Evaluator(CORNERS, tmp_path) as evaluator, pytest.raises(UserError, match="to be measured by corners"):
        evaluator.moments_metrics(measured(evaluator, images), moments)


def test_bits_per_token_are_those_of_the_priors_own_loss(pixels: ImageLoader) -> None:
    pipeline = tiny_pipeline()
    found = bits_per_token(pipeline, pixels)
    codes = reconstruct(pipeline.tokenizer, pixels[range(23)])[1]
    labels = torch.tensor(pixels.labels())
    with torch.no_grad():
        whole = pipeline.prior(codes, labels).total
        dogs = pipeline.prior(codes[labels == 1], labels[labels == 1]).total
    assert found["bits_per_token"] == pytest.approx(float(whole) / math.log(2), rel=1e-5)
    assert found["bits_per_token_by_class"]["dog"] == pytest.approx(float(dogs) / math.log(2), rel=1e-5)
    assert found["bits_per_token_uniform"] == 4


def test_samples_are_as_many_of_each_class_whatever_the_batch_size_and_repeat_with_the_seed() -> None:
    pipeline = tiny_pipeline()
    labels = balanced_labels(pipeline, 10)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert balanced_labels(pipeline, 2).tolist() == [0, 1, 2]  # at least one of each

    def drawn(seed: int, batch_size: int) -> Tensor:
        return torch.cat(list(sampled_batches(pipeline, labels, seed, batch_size)))

    images = drawn(4, 200)
    assert images.shape == (9, 1, 14, 14)
    assert images.dtype == torch.uint8
    assert torch.equal(images, to_uint8(pipeline.sample_pixels(labels, seeded(4))))
    assert (images.int() - drawn(4, 2).int()).abs().max() <= 1
    assert not torch.equal(images, drawn(5, 200))


def test_a_pipeline_without_classes_gives_the_count_asked_for_without_labels() -> None:
    tokenizer = tiny_tokenizer()
    pipeline = LatentGenerationPipeline(tokenizer, tiny_prior(num_classes=0, tokenizer_id=tokenizer.compute_id()))
    assert balanced_labels(pipeline, 5).tolist() == [-1] * 5


def test_keeping_the_first_of_the_first_classes_passes_everything_on() -> None:
    images, labels = pictures(10, 1), torch.tensor([0, 0, 0, 1, 1, 0, 2, 2, 1, 1])
    kept: dict[int, list[Tensor]] = {}
    passed = list(keeping_first(images.split(4), labels, kept, rows=2, columns=2))
    assert torch.equal(torch.cat(passed), images)
    assert {label: len(row) for label, row in kept.items()} == {0: 2, 1: 2}
    assert torch.equal(torch.stack(kept[1]), images[3:5])
    without: dict[int, list[Tensor]] = {}
    list(keeping_first(images.split(4), torch.full((10,), -1), without, rows=2, columns=3))
    assert torch.equal(torch.stack(without[-1]), images[:6])


def test_a_pipelines_report_has_its_tokenizers_its_priors_and_its_samples_figures(tmp_path: Path) -> None:
    pipeline = tiny_pipeline()
    processor = pipeline.tokenizer.config.image_processor
    held_out, train = (ImageLoader(tiny_split(count, seed), processor) for count, seed in ((23, 1), (40, 0)))
    labels = balanced_labels(pipeline, 30)
    with Evaluator(POOLED_PIXELS, tmp_path) as evaluator:
        samples = evaluator.measure_stream(sampled_batches(pipeline, labels, 0), labels, "sample")
        figures = pipeline_metrics(evaluator, pipeline, samples, held_out, train, LABEL_NAMES)
    assert {"psnr", "ssim", "perplexity", "bits_per_token", "frechet", "kid", "coverage", "floor"} <= figures.keys()
    assert figures["floor"]["frechet"] < figures["frechet"]  # the models are untrained
    assert (figures["num_images"], figures["num_reference_images"], figures["num_training_images"]) == (30, 23, 40)
    assert figures["by_class"]["dog"]["num_images"] == 10
    assert figures["memorisation"]["ratio"] > 1


def test_fewer_images_than_published_figures_use_are_said_with_their_number() -> None:
    assert "2,000 images" in warnings_for(2_000, 50_000)[0]
    assert "1,000 images" in warnings_for(50_000, 1_000)[0]
    assert warnings_for(50_000, 50_000) == []
