"""The embedded data and the judge: what is in the files, and that the judge knows what it sees."""

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
JUDGE = DATA / "fashion-mnist-classifier"


def column(split: str, name: str) -> list:
    return pq.read_table(MINI / f"{split}.parquet", columns=[name])[name].to_pylist()


def images_of(split: str) -> Tensor:
    """(N, 1, 28, 28) uint8."""
    pictures = [np.asarray(Image.open(io.BytesIO(row["bytes"]))) for row in column(split, "image")]
    return torch.from_numpy(np.stack(pictures)).unsqueeze(1)


@pytest.fixture(scope="module")
def classifier() -> ReferenceClassifier:
    return ReferenceClassifier.from_pretrained(JUDGE)


@pytest.fixture(scope="module")
def held_out() -> Tensor:
    return images_of("test")


def test_the_embedded_files_stay_within_their_sizes():
    assert sum(path.stat().st_size for path in MINI.glob("*.parquet")) <= 8_000_000
    assert (JUDGE / "model.safetensors").stat().st_size <= 2_000_000


@pytest.mark.parametrize(("split", "images_per_class"), [("train", 1000), ("test", 200)])
def test_each_of_ten_classes_has_equally_many_images(split: str, images_per_class: int):
    assert Counter(column(split, "label")) == dict.fromkeys(range(10), images_per_class)


def test_no_image_is_in_train_and_test_or_twice_in_one():
    ids = column("train", "source_id") + column("test", "source_id")
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


def test_the_judge_and_the_data_name_the_classes_alike(classifier: ReferenceClassifier):
    features = json.loads(pq.read_schema(MINI / "train.parquet").metadata[b"huggingface"])["info"]["features"]
    assert list(classifier.config.id2label.values()) == features["label"]["names"]


def test_the_judge_names_at_least_91_percent_of_the_embedded_test_images_right(
    classifier: ReferenceClassifier, held_out: Tensor
):
    labels = torch.tensor(column("test", "label"))
    assert class_agreement(classifier.classify_images(held_out).logits, labels) >= 0.91
    assert class_agreement(classifier.classify_images(255 - held_out).logits, labels) < 0.5  # it looks at the pixels


def test_an_image_is_judged_alike_in_any_batch_and_in_training_mode(classifier: ReferenceClassifier, held_out: Tensor):
    together = classifier.classify_images(held_out[:200])
    classifier.train()
    apart = classifier.classify_images(held_out[:200], batch_size=7)
    assert classifier.training  # left as it was found
    classifier.eval()
    torch.testing.assert_close(together.logits, apart.logits, rtol=0, atol=1e-4)
    torch.testing.assert_close(together.features, apart.features, rtol=0, atol=1e-4)


def test_features_are_what_the_last_layer_reads_in_float32_even_under_autocast(
    classifier: ReferenceClassifier, held_out: Tensor
):
    plain = classifier.classify_images(held_out[:50])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = classifier.classify_images(held_out[:50])
    assert torch.equal(plain.features, inside.features)
    assert plain.features.dtype == plain.logits.dtype == torch.float32
    assert plain.features.shape == (50, classifier.config.widths[-1])
    with torch.no_grad():
        torch.testing.assert_close(classifier.head(plain.features), plain.logits, rtol=0, atol=1e-5)


def test_a_saved_judge_gives_the_same_logits_bit_by_bit(
    classifier: ReferenceClassifier, held_out: Tensor, tmp_path: Path
):
    classifier.save_pretrained(tmp_path)
    again = ReferenceClassifier.from_pretrained(tmp_path)
    assert torch.equal(again.classify_images(held_out[:100]).logits, classifier.classify_images(held_out[:100]).logits)
    assert again.config.to_diff_dict() == classifier.config.to_diff_dict()


def test_a_new_judge_differs_from_the_trained_one(classifier: ReferenceClassifier, held_out: Tensor):
    new = ReferenceClassifier(classifier.config).eval()
    assert not torch.equal(new.classify_images(held_out[:10]).logits, classifier.classify_images(held_out[:10]).logits)


def test_images_of_another_kind_are_an_error_that_says_which_kind_fits(classifier: ReferenceClassifier):
    with pytest.raises(UserError, match=r"\(2, 3, 32, 32\); expected \(N, 1, 28, 28\)"):
        classifier.classify_images(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    with pytest.raises(UserError, match="float32"):
        classifier.classify_images(torch.zeros(2, 1, 28, 28))
    with pytest.raises(UserError, match="0 images"):
        classifier.classify_images(torch.zeros(0, 1, 28, 28, dtype=torch.uint8))


def test_a_field_that_a_judge_does_not_have_is_named():
    with pytest.raises(ConfigError, match="widhts"):
        ReferenceClassifierConfig(widhts=[8])
