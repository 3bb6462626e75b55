"""Pictures are the same from memory and from disk, and one that cannot be read is left out, counted and listed."""

from pathlib import Path

import numpy as np
import pytest
import torch
from small_parts import error_message, write_images

from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.data.image_processor import ImageProcessor
from stage1_tokenizer.data.sources import open_source
from training_harness.batch_order import BatchOrder
from training_harness.errors import UserError

PROCESSOR = ImageProcessor(channels=3, content_size=(16, 16), image_size=(16, 16))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return write_images(tmp_path / "pictures")


@pytest.fixture
def harmed(tmp_path: Path) -> Path:
    """24 pictures of which three cannot be read: no picture, cut short, empty."""
    folder = write_images(tmp_path / "pictures")
    whole = (folder / "a" / "04.png").read_bytes()
    for name, content in (("04.png", b"a letter"), ("10.png", whole[: len(whole) // 2]), ("16.png", b"")):
        (folder / "a" / name).write_bytes(content)
    return folder


def split_of(folder: Path):
    """Every picture of the folder: train and validation together."""
    train = open_source(folder).train
    return type(train)(train._store, [0] * len(train._store))


def all_of(pixels: ImageLoader) -> dict[str, torch.Tensor]:
    """Source id → picture, through `batches`."""
    ids = pixels.source_ids()
    return {
        ids[i]: image for positions, images in pixels.batches(5) for i, image in zip(positions, images, strict=True)
    }


@pytest.mark.parametrize("folder", ["pictures", "harmed"])
def test_memory_and_disk_give_the_same_pictures(request, folder):
    split = split_of(request.getfixturevalue(folder))
    kept, lazy = ImageLoader(split, PROCESSOR), ImageLoader(split, PROCESSOR, memory_limit=0)
    in_memory, from_disk = all_of(kept), all_of(lazy)
    assert list(in_memory) == list(from_disk)
    assert len(in_memory) == (24 if folder == "pictures" else 21)
    for name, image in in_memory.items():
        assert torch.equal(image, from_disk[name]), name
        assert torch.equal(image, PROCESSOR.read(split.image(split_index(split, name))))
    assert {e.source_id for e in kept.skipped.values()} == {e.source_id for e in lazy.skipped.values()}


def split_index(split, name: str) -> int:
    return next(i for i in range(len(split)) if split.source_id(i) == name)


def test_indexing_and_random_batches_give_the_same_from_memory_and_from_disk(pictures):
    split, order = split_of(pictures), BatchOrder(24, 7, seed=0)
    kept, lazy = ImageLoader(split, PROCESSOR), ImageLoader(split, PROCESSOR, memory_limit=0)
    for first in (0, 5):
        streams = [pixels.random_batches(order, first) for pixels in (kept, lazy)]
        for number in range(first, first + 6):
            expected = kept[order.batch_indices(number)]
            assert all(torch.equal(next(stream), expected) for stream in streams)
    assert not torch.equal(kept[np.array([0])], kept[np.array([1])])


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_unreadable_pictures_are_counted_and_listed_with_their_reason(harmed, capsys, limit):
    pixels = ImageLoader(split_of(harmed), PROCESSOR, limit)
    seen = all_of(pixels)
    assert {error.source_id for error in pixels.skipped.values()} == {"a/04.png", "a/10.png", "a/16.png"}
    assert not {"a/04.png", "a/10.png", "a/16.png"} & set(seen)
    pixels.report_skipped()
    line = capsys.readouterr().err
    assert "skipped 3 of 24 images" in line
    assert "a/04.png" in line
    assert len(pixels.labels()) == len(pixels.source_ids())


def test_on_disk_an_unreadable_picture_gives_the_next_readable_one(harmed):
    split = split_of(harmed)
    pixels, bad = ImageLoader(split, PROCESSOR, memory_limit=0), split_index(split, "a/04.png")
    assert torch.equal(pixels[[bad]], pixels[[bad + 1]])
    assert list(pixels.skipped) == [bad]


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_nothing_readable_is_one_line_that_names_a_picture(tmp_path, limit):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"a letter")
    split = split_of(tmp_path)
    with pytest.raises(UserError) as caught:
        ImageLoader(split, PROCESSOR, limit)[[0]]
    assert "none of 3 images" in error_message(caught)
    assert ".png" in str(caught.value)
