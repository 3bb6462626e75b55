"""The embedded data and the reference classifier: contents of the files, and accuracy of the classifier."""

import io
import json
from collections import Counter
from importlib.resources import files
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from pipelines.evaluation.linear_probe import class_agreement
from pipelines.evaluation.reference_classifier import ReferenceClassifier, ReferenceClassifierConfig
from training_harness.errors import ConfigError, UserError

DATA = Path(str(files("latentloom") / "data"))
MINI = DATA / "fashion-mnist-mini"
CLASSIFIER = DATA / "fashion-mnist-classifier"


def read_column(split: str, name: str) -> list:
    return pq.read_table(MINI / f"{split}.parquet", columns=[name])[name].to_pylist()


def load_images(split: str) -> Tensor:
    """Load the images of a split as (N, 1, 28, 28) uint8."""
    images = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in read_column(split, "image")]
    return torch.from_numpy(np.stack(images)).unsqueeze(1)


@pytest.fixture(scope="module")
def classifier() -> ReferenceClassifier:
    return ReferenceClassifier.from_pretrained(CLASSIFIER)


@pytest.fixture(scope="module")
def held_out() -> Tensor:
    return load_images("test")


def test_the_embedded_files_stay_within_their_sizes():
    assert sum(path.stat().st_size for path in MINI.glob("*.parquet")) <= 8_000_000
    assert (CLASSIFIER / "model.safetensors").stat().st_size <= 2_000_000


@pytest.mark.parametrize(("split", "images_per_class"), [("train", 1000), ("test", 200)])
def test_each_of_ten_classes_has_equally_many_images(split: str, images_per_class: int):
    assert Counter(read_column(split, "label")) == dict.fromkeys(range(10), images_per_class)


def test_no_image_occurs_twice_in_or_across_train_and_test():
    ids = read_column("train", "source_id") + read_column("test", "source_id")
    assert len(set(ids)) == len(ids) == 12_000
    assert Counter(name.split("/")[0] for name in ids) == {"train": 10_000, "test": 2_000}


def test_datasets_reads_images_and_class_names(tmp_path: Path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.load_dataset(
        "parquet", data_files={"test": str(MINI / "test.parquet")}, cache_dir=str(tmp_path), split="test"
    )
    assert dataset[0]["image"].size == (28, 28)
    assert dataset[0]["image"].mode == "L"
    assert dataset.features["label"].names[0] == "T-shirt/top"
    assert dataset.features["label"].names[9] == "Ankle boot"


def test_the_classifier_and_the_data_have_equal_class_names(classifier: ReferenceClassifier):
    features = json.loads(pq.read_schema(MINI / "train.parquet").metadata[b"huggingface"])["info"]["features"]
    assert list(classifier.config.id2label.values()) == features["label"]["names"]


def test_the_classifier_has_at_least_91_percent_accuracy_on_the_embedded_test_images(
    classifier: ReferenceClassifier, held_out: Tensor
):
    labels = torch.tensor(read_column("test", "label"))
    assert class_agreement(classifier.classify_images(held_out).logits, labels) >= 0.91
    assert class_agreement(classifier.classify_images(255 - held_out).logits, labels) < 0.5  # the pixels matter


def test_the_output_does_not_depend_on_batch_size_or_training_mode(classifier: ReferenceClassifier, held_out: Tensor):
    expected = classifier.classify_images(held_out[:200])
    classifier.train()
    in_small_batches = classifier.classify_images(held_out[:200], batch_size=7)
    assert classifier.training  # the mode is restored
    classifier.eval()
    torch.testing.assert_close(in_small_batches.logits, expected.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(in_small_batches.features, expected.features, rtol=0, atol=1e-4)


def test_features_are_the_float32_inputs_of_the_last_layer_even_under_autocast(
    classifier: ReferenceClassifier, held_out: Tensor
):
    output = classifier.classify_images(held_out[:50])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast_output = classifier.classify_images(held_out[:50])
    assert torch.equal(output.features, autocast_output.features)
    assert output.features.dtype == output.logits.dtype == torch.float32
    assert output.features.shape == (50, classifier.config.widths[-1])
    with torch.no_grad():
        torch.testing.assert_close(classifier.head(output.features), output.logits, rtol=0, atol=1e-5)


def test_a_saved_classifier_gives_equal_logits_bit_by_bit(
    classifier: ReferenceClassifier, held_out: Tensor, tmp_path: Path
):
    classifier.save_pretrained(tmp_path)
    loaded = ReferenceClassifier.from_pretrained(tmp_path)
    assert torch.equal(loaded.classify_images(held_out[:100]).logits, classifier.classify_images(held_out[:100]).logits)
    assert loaded.config.to_diff_dict() == classifier.config.to_diff_dict()


def test_an_untrained_classifier_differs_from_the_trained_one(classifier: ReferenceClassifier, held_out: Tensor):
    untrained = ReferenceClassifier(classifier.config).eval()
    assert not torch.equal(
        untrained.classify_images(held_out[:10]).logits, classifier.classify_images(held_out[:10]).logits
    )


def test_images_of_another_shape_or_dtype_are_an_error_with_the_expected_one(classifier: ReferenceClassifier):
    with pytest.raises(UserError, match=r"\(2, 3, 32, 32\); expected \(N, 1, 28, 28\)"):
        classifier.classify_images(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(UserError, match="float32"):
        classifier.classify_images(torch.zeros(2, 1, 28, 28))
    with pytest.raises(UserError, match="0 images"):
        classifier.classify_images(torch.zeros(0, 1, 28, 28, dtype=torch.uint8))


def test_the_error_for_an_unknown_config_field_names_it():
    with pytest.raises(ConfigError, match="widhts"):
        ReferenceClassifierConfig(widhts=[8])
