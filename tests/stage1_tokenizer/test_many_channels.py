"""Pictures of more channels than Pillow holds come as NumPy files, and go the same way as all others."""

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
def arrays(tmp_path_factory) -> Path:
    """Discs that each channel shows in another brightness."""
    folder, rng = tmp_path_factory.mktemp("arrays") / "scenes", np.random.default_rng(0)
    rows, columns = np.mgrid[0:16, 0:24]
    for i in range(24):
        inside = (rows - rng.uniform(4, 12)) ** 2 + (columns - rng.uniform(4, 20)) ** 2 < 20
        values = np.where(inside[..., None], rng.integers(0, 256, CHANNELS), rng.integers(0, 256, CHANNELS))
        path = folder / "ab"[i % 2] / f"{i:02d}.npy"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, values.astype(np.uint8))
    return folder


def test_an_array_of_the_content_size_is_read_unchanged(arrays):
    source = open_source(str(arrays))
    seen = dataset_statistics(source.train)
    assert (seen.channels, seen.commonest_size, seen.unreadable) == (CHANNELS, (16, 24), 0)
    pixels = ImageLoader(source.train, ImageProcessor(channels=CHANNELS, content_size=(16, 24), image_size=(16, 24)))
    for i in range(3):
        expected = np.load(arrays / source.train.source_id(i))
        assert np.array_equal(pixels[[i]][0].permute(1, 2, 0).numpy(), expected)


def test_each_channel_is_resized_independently(arrays):
    array = np.load(next(arrays.rglob("*.npy")))
    whole, alone = (
        ImageProcessor(channels=n, content_size=(8, 8), image_size=(8, 8)) for n in (CHANNELS, CHANNELS + 1)
    )
    small = whole.read(array)
    assert small.shape == (CHANNELS, 8, 8)
    doubled = alone.read(np.concatenate([array, array[..., :1]], 2))
    assert torch.equal(doubled[:CHANNELS], small)
    assert torch.equal(doubled[-1], small[0])
    flat = whole.read(np.full((20, 33, CHANNELS), 77, np.uint8))
    assert flat.unique().tolist() == [77]


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
    ids=["complex", "not a number", "one axis", "two pictures", "empty", "pickled"],
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
    assert (len(pixels), pixels.skipped[1].reason) == (1, "it has 3 channels; expected 6")


def test_a_six_channel_tokenizer_trains_and_reconstructs_from_the_command_line(arrays, tmp_path):
    words = f"--data {arrays} --output {tmp_path / 'run'} --recipe vqgan-f4 --max-steps 2 --batch-size 4"
    assert latentloom("train-tokenizer", *words.split()) == 0
    tokenizer = saved_tokenizer(tmp_path / "run" / "model")
    assert tokenizer.latent_spec().image_channels == CHANNELS
    words = f"--tokenizer {tmp_path / 'run'} --data {arrays} --num-images 2 --output {tmp_path / 'out'}"
    assert latentloom("reconstruct", *words.split()) == 0
    rebuilt = [np.load(path) for path in sorted((tmp_path / "out").glob("*.npy"))]
    assert all(array.shape == (16, 24, CHANNELS) and array.dtype == np.uint8 for array in rebuilt)
    first = to_pil(torch.from_numpy(rebuilt[0]).permute(2, 0, 1)[None])[0]
    assert np.array_equal(np.asarray(first), rebuilt[0][..., :3])  # what the sheet shows
