"""Images from memory equal images from disk, and unreadable images are left out, counted and listed."""

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
def intact_folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "pictures")


@pytest.fixture
def broken_folder(tmp_path: Path) -> Path:
    """24 images; three files cannot be read: text, a cut file, an empty file."""
    folder = write_images(tmp_path / "pictures")
    intact = (folder / "a" / "04.png").read_bytes()
    for name, content in (("04.png", b"a letter"), ("10.png", intact[: len(intact) // 2]), ("16.png", b"")):
        (folder / "a" / name).write_bytes(content)
    return folder


def open_whole_folder(folder: Path):
    """All images of the folder, training and validation, as one split."""
    train = open_source(folder).train
    return type(train)(train._store, [0] * len(train._store))


def collect_images(pixels: ImageLoader) -> dict[str, torch.Tensor]:
    """Map source ids to images, read through `batches`."""
    ids = pixels.source_ids()
    return {
        ids[i]: image for positions, images in pixels.batches(5) for i, image in zip(positions, images, strict=True)
    }


@pytest.mark.parametrize("folder", ["intact_folder", "broken_folder"])
def test_images_from_memory_equal_images_from_disk(request, folder):
    split = open_whole_folder(request.getfixturevalue(folder))
    in_memory, on_disk = ImageLoader(split, PROCESSOR), ImageLoader(split, PROCESSOR, memory_limit=0)
    memory_images, disk_images = collect_images(in_memory), collect_images(on_disk)
    assert list(memory_images) == list(disk_images)
    assert len(memory_images) == (24 if folder == "intact_folder" else 21)
    for name, image in memory_images.items():
        assert torch.equal(image, disk_images[name]), name
        assert torch.equal(image, PROCESSOR.read(split.image(find_position(split, name))))
    assert {e.source_id for e in in_memory.read_errors.values()} == {e.source_id for e in on_disk.read_errors.values()}


def find_position(split, name: str) -> int:
    return next(i for i in range(len(split)) if split.source_id(i) == name)


def test_batches_from_memory_equal_batches_from_disk(intact_folder):
    split, order = open_whole_folder(intact_folder), BatchOrder(24, 7, seed=0)
    in_memory, on_disk = ImageLoader(split, PROCESSOR), ImageLoader(split, PROCESSOR, memory_limit=0)
    for first in (0, 5):
        streams = [pixels.random_batches(order, first) for pixels in (in_memory, on_disk)]
        for number in range(first, first + 6):
            expected = in_memory[order.batch_indices(number)]
            assert all(torch.equal(next(stream), expected) for stream in streams)
    assert not torch.equal(in_memory[np.array([0])], in_memory[np.array([1])])


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_unreadable_images_are_counted_and_listed_with_their_reason(broken_folder, capsys, limit):
    pixels = ImageLoader(open_whole_folder(broken_folder), PROCESSOR, limit)
    images = collect_images(pixels)
    assert {error.source_id for error in pixels.read_errors.values()} == {"a/04.png", "a/10.png", "a/16.png"}
    assert not {"a/04.png", "a/10.png", "a/16.png"} & set(images)
    pixels.report_skipped()
    line = capsys.readouterr().err
    assert "skipped 3 of 24 images" in line
    assert "a/04.png" in line
    assert len(pixels.labels()) == len(pixels.source_ids())


def test_without_memory_the_next_readable_image_replaces_an_unreadable_one(broken_folder):
    split = open_whole_folder(broken_folder)
    pixels, broken = ImageLoader(split, PROCESSOR, memory_limit=0), find_position(split, "a/04.png")
    assert torch.equal(pixels[[broken]], pixels[[broken + 1]])
    assert list(pixels.read_errors) == [broken]


@pytest.mark.parametrize("limit", [0, 1 << 30])
def test_the_error_for_a_split_without_readable_images_names_one(tmp_path, limit):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(b"a letter")
    split = open_whole_folder(tmp_path)
    with pytest.raises(UserError) as caught:
        ImageLoader(split, PROCESSOR, limit)[[0]]
    assert "none of 3 images" in error_message(caught)
    assert ".png" in str(caught.value)
