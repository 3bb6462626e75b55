"""Figures of whole sets, against direct computations."""

import math

import numpy as np
import pytest
import torch
from tiny_models import seeded, tiny_pipeline, tiny_prior, tiny_split, tiny_tokenizer
from torch import Tensor

from pipelines.evaluation import (
    POOLED_PIXELS,
    FeatureExtractor,
    balanced_samples,
    evaluate_samples,
    evaluate_tokenizer,
    pooled_pixels,
    reconstructions,
)
from pipelines.latent_generation import LatentGenerationPipeline
from pipelines.set_metrics import frechet_distance, precision_recall
from stage1_tokenizer.pixels import Pixels
from stage1_tokenizer.vqgan import VQGAN
from training_harness.errors import UserError


def pictures(count: int, seed: int, channels: int = 1, size: int = 14) -> Tensor:
    return torch.randint(256, (count, channels, size, size), generator=seeded(seed), dtype=torch.uint8)


def corners(images: Tensor) -> Tensor:
    return images[:, 0, :2, :2].flatten(1).float()


NO_JUDGE = FeatureExtractor("corners", corners)
BY_FIRST_PIXEL = FeatureExtractor("corners", corners, lambda images: images[:, 0, 0, :3].float())


@pytest.mark.parametrize(("channels", "size"), [(1, 28), (3, 16), (3, 13)])
def test_pooled_pixels_are_the_means_of_the_64_cells(channels: int, size: int) -> None:
    images = pictures(2, 0, channels, size).numpy()
    bounds = [(i * size // 8, -(-(i + 1) * size // 8)) for i in range(8)]
    cells = [
        [images[:, c, top:bottom, left:right].mean((1, 2)) / 255 for top, bottom in bounds for left, right in bounds]
        for c in range(channels)
    ]
    expected = np.concatenate([np.stack(row, 1) for row in cells], 1)
    found = pooled_pixels(torch.from_numpy(images))
    assert found.shape == (2, channels * 64)
    assert np.allclose(found.numpy(), expected, atol=1e-6)


@pytest.fixture(scope="module")
def tokenizer() -> VQGAN:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def pixels(tokenizer: VQGAN) -> Pixels:
    return Pixels(tiny_split(23), tokenizer.config.image_processor)


def test_the_tokenizers_figures_equal_those_computed_image_by_image(tokenizer: VQGAN, pixels: Pixels) -> None:
    processor = tokenizer.config.image_processor
    errors, counts = [], np.zeros(16)
    for i in range(len(pixels)):
        original = pixels[[i]]
        with torch.no_grad():
            indices = tokenizer.encode_indices(processor.preprocess(original))
            rebuilt = processor.postprocess(tokenizer.decode_indices(indices)).numpy().astype(float)
        errors.append(np.mean((rebuilt - original.numpy()) ** 2))
        counts += np.bincount(indices.flatten().numpy(), minlength=16)
    shares = counts[counts > 0] / counts.sum()
    figures = evaluate_tokenizer(tokenizer, pixels, POOLED_PIXELS)
    assert figures["psnr"] == pytest.approx(np.mean([10 * math.log10(255**2 / error) for error in errors]), abs=0.01)
    assert figures["codes_used"] == (counts > 0).sum() > 1
    assert figures["perplexity"] == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))
    originals, rebuilt, total = reconstructions(tokenizer, pixels, batch_size=5)
    assert total.tolist() == counts.tolist()
    assert figures["reconstruction_frechet"] == pytest.approx(
        frechet_distance(pooled_pixels(rebuilt), pooled_pixels(originals)), rel=1e-6
    )


def test_originals_and_reconstructions_come_in_order_without_padding(tokenizer: VQGAN, pixels: Pixels) -> None:
    originals, rebuilt, _ = reconstructions(tokenizer, pixels, batch_size=5)
    assert torch.equal(originals, pixels[range(23)])
    assert rebuilt.shape == originals.shape == (23, 1, 14, 14)
    assert rebuilt.dtype == torch.uint8


def test_evaluating_a_tokenizer_does_not_change_it(pixels: Pixels) -> None:
    fresh = tiny_tokenizer()
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    evaluate_tokenizer(fresh, pixels, POOLED_PIXELS)
    assert all(torch.equal(fresh.state_dict()[name], tensor) for name, tensor in before.items())


def test_a_single_image_has_no_frechet_distance(tokenizer: VQGAN) -> None:
    one = Pixels(tiny_split(1), tokenizer.config.image_processor)
    figures = evaluate_tokenizer(tokenizer, one, POOLED_PIXELS)
    assert figures["reconstruction_frechet"] is None
    assert figures["psnr"] > 0


def test_the_samples_figures_are_those_of_the_features_that_were_given() -> None:
    images, reference = pictures(20, 1), pictures(30, 2)
    labels = images[:, 0, 0, :3].long().argmax(1)
    labels[:5] = (labels[:5] + 1) % 3
    figures = evaluate_samples(images, labels, reference, BY_FIRST_PIXEL)
    manifold = precision_recall(corners(reference), corners(images), k=3)
    assert figures == {
        "class_agreement": pytest.approx(0.75),
        "frechet": pytest.approx(frechet_distance(corners(images), corners(reference))),
        "precision": manifold.precision,
        "recall": manifold.recall,
    }
    assert manifold.precision != manifold.recall  # or an exchange would not be seen


def test_class_agreement_needs_a_judge_and_labels() -> None:
    images, labels = pictures(8, 1), torch.zeros(8, dtype=torch.int64)
    assert evaluate_samples(images, labels, pictures(8, 2), NO_JUDGE)["class_agreement"] is None
    assert evaluate_samples(images, labels - 1, pictures(8, 2), BY_FIRST_PIXEL)["class_agreement"] is None


@pytest.mark.parametrize(("count", "reference"), [(3, 8), (8, 3)])
def test_three_images_on_a_side_are_too_few_for_distances_and_four_are_enough(count: int, reference: int) -> None:
    labels = torch.zeros(8, dtype=torch.int64)
    few = evaluate_samples(pictures(count, 1), labels[:count], pictures(reference, 2), BY_FIRST_PIXEL)
    assert few["class_agreement"] is not None
    assert few["frechet"] is few["precision"] is few["recall"] is None
    enough = evaluate_samples(pictures(count + 1, 1), labels[: count + 1], pictures(reference + 1, 2), NO_JUDGE)
    assert min(enough["frechet"], enough["recall"], enough["precision"]) >= 0


def test_samples_and_reference_of_other_shapes_are_an_error_that_names_both() -> None:
    labels = torch.zeros(8, dtype=torch.int64)
    with pytest.raises(UserError, match=r"samples are \(3, 14, 14\) and reference images \(1, 14, 14\)"):
        evaluate_samples(pictures(8, 1, channels=3), labels, pictures(8, 2), BY_FIRST_PIXEL)
    with pytest.raises(UserError, match=r"\(1, 14, 14\) and reference images \(1, 16, 16\)"):
        evaluate_samples(pictures(8, 1), labels, pictures(8, 2, size=16), NO_JUDGE)


def test_balanced_samples_are_as_many_of_each_class_and_repeat_with_the_seed() -> None:
    pipeline = tiny_pipeline()
    images, labels = balanced_samples(pipeline, 10, seed=4)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert images.shape == (9, 1, 14, 14)
    assert images.dtype == torch.uint8
    assert torch.equal(images, balanced_samples(pipeline, 10, seed=4)[0])
    assert not torch.equal(images, balanced_samples(pipeline, 10, seed=5)[0])
    assert balanced_samples(pipeline, 2, seed=4)[1].tolist() == [0, 1, 2]  # at least one of each


def test_a_pipeline_without_classes_gives_the_count_asked_for_without_labels() -> None:
    tokenizer = tiny_tokenizer()
    pipeline = LatentGenerationPipeline(tokenizer, tiny_prior(num_classes=0, tokenizer_id=tokenizer.compute_id()))
    pipeline.set_progress_bar_config(disable=True)
    images, labels = balanced_samples(pipeline, 5, seed=0)
    assert len(images) == 5
    assert labels.tolist() == [-1] * 5
