"""Feature files: files rows are read back, in any order and in slices of any size."""

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
    iterate_slices,
    read_features,
    select_rows,
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


def test_batches_of_any_size_are_read_as_one_set_of_rows(rows: Tensor, tmp_path: Path):
    files = write_features(tmp_path, (ImageFeatures(batch) for batch in rows.split([1, 19, 0, 30])))
    assert list(files) == ["features"]
    for file in (files["features"], read_features(tmp_path)["features"]):
        assert (len(file), file.shape) == (50, (50, 7))
        assert torch.equal(file.read(0, 50), rows)
        assert torch.equal(file.read(13, 14), rows[13:14])
        assert torch.equal(file.read(48, 1000), rows[48:])  # rows after the last one are left out


def test_each_field_of_the_features_has_its_own_file_and_number_of_columns(rows: Tensor, tmp_path: Path):
    batches = [
        ImageFeatures(batch, class_logits=batch[:, :2].double(), spatial=batch[:, 1:].half())
        for batch in rows.split(20)
    ]
    files = write_features(tmp_path, batches)
    assert {path.name for path in tmp_path.iterdir()} == set(files) == {"features", "class_logits", "spatial"}
    assert torch.equal(files["features"].read(0, 50), rows)
    assert torch.equal(files["class_logits"].read(0, 50), rows[:, :2])
    assert torch.equal(files["spatial"].read(0, 50), rows[:, 1:].half().float())


def test_a_file_holds_the_number_of_columns_and_then_the_rows_in_little_endian(rows: Tensor, file: FeatureFile):
    data = file.path.read_bytes()
    assert data[:8] == (7).to_bytes(8, "little")
    assert np.array_equal(np.frombuffer(data[8:], "<f4").reshape(50, 7), rows.numpy())


POSITIONS = {
    "backwards": list(range(49, -1, -1)),
    "runs and gaps": [3, 4, 5, 40, 41, 0, 49, 7],
    "repeated": [6, 6, 6, 7, 6],
    "one": [49],
    "none": [],
}


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_a_selection_has_the_selected_rows_in_order(rows: Tensor, file: FeatureFile, positions: list[int]):
    index = torch.tensor(positions, dtype=torch.int64)
    expected = rows[index]
    for selection in (file.select(index), file.select(index.numpy()), select_rows(file, index)):
        assert (len(selection), selection.shape) == (len(positions), expected.shape)
        assert torch.equal(selection.read(0, len(positions)), expected)
        assert torch.equal(torch.cat([selection.read(i, i + 1) for i in range(len(positions))] or [expected]), expected)
    assert torch.equal(select_rows(rows, index), expected)


def test_a_selection_of_a_selection_counts_positions_in_the_first_selection(rows: Tensor, file: FeatureFile):
    first, second, third = (
        torch.randperm(50, generator=seeded(1))[:30],
        torch.tensor([29, 3, 3, 4, 0]),
        torch.tensor([4, 1]),
    )
    assert torch.equal(file.select(first).select(second).read(0, 5), rows[first][second])
    assert torch.equal(file.select(first).select(second).select(third).read(0, 2), rows[first][second][third])
    assert torch.equal(file.read(0, 50), rows)  # the file itself is unchanged


@pytest.mark.parametrize("size", [1, 7, 25, 50, 1000])
def test_concatenated_slices_are_all_rows_as_float64(rows: Tensor, file: FeatureFile, size: int):
    backwards = torch.arange(49, -1, -1)
    for source, expected in ((rows, rows), (file, rows), (file.select(backwards), rows.flip(0))):
        row_slices = list(iterate_slices(source, size))
        assert [len(row_slice) for row_slice in row_slices] == [len(row_slice) for row_slice in rows.split(size)]
        assert all(row_slice.dtype == torch.float64 for row_slice in row_slices)
        assert torch.equal(torch.cat(row_slices), expected.double())


def test_no_slice_has_more_rows_than_the_limit(tmp_path: Path):
    many = torch.arange(2.0 * SLICE + 1)[:, None]
    for source in (many, stored_features(tmp_path / "many", many)):
        assert [len(row_slice) for row_slice in iterate_slices(source)] == [SLICE, SLICE, 1]
        assert torch.equal(torch.cat(list(iterate_slices(source))), many.double())


class UniformImages:
    """Images with one grey level each, in batches of ten."""

    def __init__(self, count: int) -> None:
        self.images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 1, 4, 4)

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
        for start in range(0, len(self), 10):
            yield list(range(start, min(start + 10, len(self)))), self.images[start : start + 10]

    def labels(self) -> None:
        return None


def test_non_finite_rows_are_an_error_with_their_count_and_are_not_cached(tmp_path: Path):
    def extract(images: Tensor) -> ImageFeatures:
        features = images.float().flatten(1)
        features[(images[:, 0, 0, 0] == 23) | (images[:, 0, 0, 0] == 27)] = math.nan
        return ImageFeatures(features)

    with Evaluator(FeatureExtractor("broken", extract, weights="a"), tmp_path) as evaluator:
        with pytest.raises(UserError, match="2 of 10 rows") as error:
            evaluator.measure(UniformImages(40), "images")
        error_message(error)
        assert not list(tmp_path.glob("broken*"))
        assert len(evaluator.measure(UniformImages(20), "images").features) == 20  # the first twenty rows are finite
    assert len(list(tmp_path.glob("broken*"))) == 1
    assert len(list(tmp_path.iterdir())) == 1  # no incomplete folder is left


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_one_non_finite_number_in_any_file_is_an_error(rows: Tensor, tmp_path: Path, number: float):
    non_finite = rows.clone()
    non_finite[11, 3] = number
    with pytest.raises(UserError, match="1 of 50 rows"):
        write_features(tmp_path, [ImageFeatures(rows, spatial=non_finite)])


def test_a_pair_of_sets_is_checked_for_columns_rows_and_finite_numbers(rows: Tensor, file: FeatureFile):
    check_pair(rows, file, min_rows=50, metric="a test")
    with pytest.raises(UserError, match=r"50 images; a test needs 51 or more") as error:
        check_pair(rows, file, min_rows=51, metric="a test")
    with pytest.raises(UserError, match=r"\(50, 6\) and \(50, 7\)") as error:
        check_pair(rows[:, 1:], file, min_rows=1, metric="a test")
    error_message(error)
    with pytest.raises(UserError, match="1 of 50 rows"):
        check_pair(file, rows.index_fill(0, torch.tensor([2]), math.nan), min_rows=1, metric="a test")
