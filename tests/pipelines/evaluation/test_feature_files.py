"""Features in files: what is written is read back, in any order and by slices of any size."""

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_sets import normal, stored_features
from small_parts import error_message
from tiny_models import seeded
from torch import Tensor

from pipelines.evaluation.evaluator import Evaluator
from pipelines.evaluation.feature_files import (
    SLICE,
    FeatureFile,
    check_pair,
    chosen,
    read_features,
    slices,
    write_features,
)
from pipelines.evaluation.features import FeatureExtractor, ImageFeatures
from training_harness.errors import UserError


@pytest.fixture
def rows() -> Tensor:
    return normal(50, 7).float()


@pytest.fixture
def file(rows: Tensor, tmp_path: Path) -> FeatureFile:
    return stored_features(tmp_path / "set", rows)


def test_batches_of_any_size_come_back_as_one_set_of_rows(rows: Tensor, tmp_path: Path):
    written = write_features(tmp_path, (ImageFeatures(batch) for batch in rows.split([1, 19, 0, 30])))
    assert list(written) == ["features"]
    for file in (written["features"], read_features(tmp_path)["features"]):
        assert (len(file), file.shape) == (50, (50, 7))
        assert torch.equal(file.read(0, 50), rows)
        assert torch.equal(file.read(13, 14), rows[13:14])
        assert torch.equal(file.read(48, 1000), rows[48:])  # the end is cut to what there is


def test_each_thing_that_an_extractor_gives_has_a_file_of_its_own_width(rows: Tensor, tmp_path: Path):
    batches = [
        ImageFeatures(part, class_logits=part[:, :2].double(), spatial=part[:, 1:].half()) for part in rows.split(20)
    ]
    written = write_features(tmp_path, batches)
    assert {path.name for path in tmp_path.iterdir()} == set(written) == {"features", "class_logits", "spatial"}
    assert torch.equal(written["features"].read(0, 50), rows)
    assert torch.equal(written["class_logits"].read(0, 50), rows[:, :2])
    assert torch.equal(written["spatial"].read(0, 50), rows[:, 1:].half().float())


def test_a_file_is_the_number_of_columns_and_then_the_rows_little_endian(rows: Tensor, file: FeatureFile):
    data = file.path.read_bytes()
    assert data[:8] == (7).to_bytes(8, "little")
    assert np.array_equal(np.frombuffer(data[8:], "<f4").reshape(50, 7), rows.numpy())


POSITIONS = {
    "backwards": list(range(49, -1, -1)),
    "runs and leaps": [3, 4, 5, 40, 41, 0, 49, 7],
    "repeated": [6, 6, 6, 7, 6],
    "one": [49],
    "none": [],
}


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_a_selection_has_the_rows_of_its_positions_in_their_order(
    rows: Tensor, file: FeatureFile, positions: list[int]
):
    index = torch.tensor(positions, dtype=torch.int64)
    expected = rows[index]
    for found in (file.select(index), file.select(index.numpy()), chosen(file, index)):
        assert (len(found), found.shape) == (len(positions), expected.shape)
        assert torch.equal(found.read(0, len(positions)), expected)
        assert torch.equal(torch.cat([found.read(i, i + 1) for i in range(len(positions))] or [expected]), expected)
    assert torch.equal(chosen(rows, index), expected)


def test_a_selection_of_a_selection_counts_within_the_first(rows: Tensor, file: FeatureFile):
    first, second, third = (
        torch.randperm(50, generator=seeded(1))[:30],
        torch.tensor([29, 3, 3, 4, 0]),
        torch.tensor([4, 1]),
    )
    assert torch.equal(file.select(first).select(second).read(0, 5), rows[first][second])
    assert torch.equal(file.select(first).select(second).select(third).read(0, 2), rows[first][second][third])
    assert torch.equal(file.read(0, 50), rows)  # a selection leaves the whole as it was


@pytest.mark.parametrize("size", [1, 7, 25, 50, 1000])
def test_slices_together_are_the_whole_as_float64(rows: Tensor, file: FeatureFile, size: int):
    backwards = torch.arange(49, -1, -1)
    for whole, expected in ((rows, rows), (file, rows), (file.select(backwards), rows.flip(0))):
        parts = list(slices(whole, size))
        assert [len(part) for part in parts] == [len(part) for part in rows.split(size)]
        assert all(part.dtype == torch.float64 for part in parts)
        assert torch.equal(torch.cat(parts), expected.double())


def test_no_slice_has_more_rows_than_stated(tmp_path: Path):
    many = torch.arange(2.0 * SLICE + 1)[:, None]
    for whole in (many, stored_features(tmp_path / "many", many)):
        assert [len(part) for part in slices(whole)] == [SLICE, SLICE, 1]
        assert torch.equal(torch.cat(list(slices(whole))), many.double())


class Pictures:
    """Images of one level each, in batches of ten."""

    def __init__(self, count: int) -> None:
        self.images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
        for start in range(0, len(self), 10):
            yield list(range(start, min(start + 10, len(self)))), self.images[start : start + 10]

    def labels(self) -> None:
        return None


def test_rows_that_are_not_finite_are_refused_with_their_count_and_nothing_stays_in_the_cache(tmp_path: Path):
    def extract(images: Tensor) -> ImageFeatures:
        features = images.float().flatten(1)
        features[(images[:, 0, 0, 0] == 23) | (images[:, 0, 0, 0] == 27)] = math.nan
        return ImageFeatures(features)

    with Evaluator(FeatureExtractor("broken", extract, weights="a"), tmp_path) as evaluator:
        with pytest.raises(UserError, match="2 of 10 rows") as error:
            evaluator.measure(Pictures(40), "images")
        error_message(error)
        assert not list(tmp_path.glob("broken*"))
        assert len(evaluator.measure(Pictures(20), "images").features) == 20  # the first twenty are sound
    assert len(list(tmp_path.glob("broken*"))) == 1
    assert len(list(tmp_path.iterdir())) == 1  # and no half-written folder beside it


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_one_number_that_is_not_finite_in_any_file_is_refused(rows: Tensor, tmp_path: Path, number: float):
    broken = rows.clone()
    broken[11, 3] = number
    with pytest.raises(UserError, match="1 of 50 rows"):
        write_features(tmp_path, [ImageFeatures(rows, spatial=broken)])


def test_a_pair_of_sets_is_checked_for_its_widths_and_its_numbers(rows: Tensor, file: FeatureFile):
    check_pair(rows, file, at_least=50, needed_for="a test")
    with pytest.raises(UserError, match=r"50 images; a test needs 51 or more") as error:
        check_pair(rows, file, at_least=51, needed_for="a test")
    with pytest.raises(UserError, match=r"\(50, 6\) and \(50, 7\)") as error:
        check_pair(rows[:, 1:], file, at_least=1, needed_for="a test")
    error_message(error)
    with pytest.raises(UserError, match="1 of 50 rows"):
        check_pair(file, rows.index_fill(0, torch.tensor([2]), math.nan), at_least=1, needed_for="a test")
