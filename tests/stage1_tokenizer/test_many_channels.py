"""Images with more channels than Pillow supports are NumPy files, and are processed like all other images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import latentloom

from stage1_tokenizer.data.image_loader import ImageLoader
from stage1_tokenizer.data.image_processor import ImageProcessor, to_pil
from stage1_tokenizer.data.sources import UnreadableImage, open_source
from stage1_tokenizer.data.statistics import dataset_statistics
from stage1_tokenizer.registry import saved_tokenizer

CHANNELS = 6


@pytest.fixture(scope="module")
def array_folder(tmp_path_factory) -> Path:
    """A folder of images of discs, with another brightness in each channel."""
    folder, rng = tmp_path_factory.mktemp("arrays") / "scenes", np.random.default_rng(0)
    rows, columns = np.mgrid[0:16, 0:24]
    for i in range(24):
        inside = (rows - rng.uniform(4, 12)) ** 2 + (columns - rng.uniform(4, 20)) ** 2 < 20
        values = np.where(inside[..., None], rng.integers(0, 256, CHANNELS), rng.integers(0, 256, CHANNELS))
        path = folder / "ab"[i % 2] / f"{i:02d}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, values.astype(np.uint8))
    return folder


def test_an_array_of_the_content_size_is_read_unchanged(array_folder):
    source = open_source(str(array_folder))
    statistics = dataset_statistics(source.train)
    assert (statistics.channels, statistics.most_common_size, statistics.unreadable_images) == (CHANNELS, (16, 24), 0)
    pixels = ImageLoader(source.train, ImageProcessor(channels=CHANNELS, content_size=(16, 24), image_size=(16, 24)))
    for i in range(3):
        expected = np.load(array_folder / source.train.source_id(i))
        assert np.array_equal(pixels[[i]][0].permute(1, 2, 0).numpy(), expected)


def test_each_channel_is_resized_independently(array_folder):
    array = np.load(next(array_folder.rglob("*.npy")))
    processor, wider_processor = (
        ImageProcessor(channels=n, content_size=(8, 8), image_size=(8, 8)) for n in (CHANNELS, CHANNELS + 1)
    )
    resized = processor.read(array)
    assert resized.shape == (CHANNELS, 8, 8)
    wider = wider_processor.read(np.concatenate([array, array[..., :1]], 2))
    assert torch.equal(wider[:CHANNELS], resized)
    assert torch.equal(wider[-1], resized[0])
    constant = processor.read(np.full((20, 33, CHANNELS), 77, np.uint8))
    assert constant.unique().tolist() == [77]


def test_arrays_of_up_to_four_channels_become_pillow_images(tmp_path):
    for shape in ((16, 16), (16, 16, 1), (16, 16, 3), (16, 16, 4)):
        np.save(tmp_path / f"{'x'.join(map(str, shape))}.npy", np.full(shape, 9, np.uint8))
    split = open_source(str(tmp_path), hold_out=False).train
    assert sorted(split.image(i).mode for i in range(4)) == ["L", "L", "RGB", "RGBA"]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((4, 4, 6), np.complex64),
        np.full((4, 4, 6), np.nan),
        np.zeros(4, np.uint8),
        np.zeros((2, 4, 4, 6), np.uint8),
        np.zeros((0, 4, 6), np.uint8),
        np.array([{}], object),
    ],
    ids=["complex", "not a number", "one axis", "two images", "empty", "pickled"],
)
def test_an_array_that_is_no_image_is_skipped(tmp_path, array):
    np.save(tmp_path / "a.npy", array, allow_pickle=True)
    np.save(tmp_path / "b.npy", np.zeros((8, 8, 6), np.uint8))
    split = open_source(str(tmp_path), hold_out=False).train
    with pytest.raises(UnreadableImage):
        split.image(0)
    pixels = ImageLoader(split, ImageProcessor(channels=6, content_size=(8, 8), image_size=(8, 8)))
    assert len(pixels) == 1


def test_an_array_with_other_channels_is_skipped_with_the_reason(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((8, 8, 6), np.uint8))
    np.save(tmp_path / "b.npy", np.zeros((8, 8, 3), np.uint8))
    split = open_source(str(tmp_path), hold_out=False).train
    pixels = ImageLoader(split, ImageProcessor(channels=6, content_size=(8, 8), image_size=(8, 8)))
    assert (len(pixels), pixels.read_errors[1].reason) == (1, "it has 3 channels; expected 6")


def test_a_six_channel_tokenizer_trains_and_reconstructs_from_the_command_line(array_folder, tmp_path):
    arguments = f"--data {array_folder} --output {tmp_path / 'run'} --recipe vqgan-f4 --max-steps 2 --batch-size 4"
    assert latentloom("train-tokenizer", *arguments.split()) == 0
    tokenizer = saved_tokenizer(tmp_path / "run" / "model")
    assert tokenizer.latent_spec().image_channels == CHANNELS
    arguments = f"--tokenizer {tmp_path / 'run'} --data {array_folder} --num-images 2 --output {tmp_path / 'out'}"
    assert latentloom("reconstruct", *arguments.split()) == 0
    reconstructions = [np.load(path) for path in sorted((tmp_path / "out").glob("*.npy"))]
    assert all(array.shape == (16, 24, CHANNELS) and array.dtype == np.uint8 for array in reconstructions)
    first = to_pil(torch.from_numpy(reconstructions[0]).permute(2, 0, 1)[None])[0]
    assert np.array_equal(
        np.asarray(first), reconstructions[0][..., :3]
    )  # the image grid shows the first three channels
