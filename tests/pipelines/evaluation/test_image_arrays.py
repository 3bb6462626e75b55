"""Images as `.npz`: numpy reads what is written, and what numpy writes is read; files that hold none are named."""

import math
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_sets import normal
from small_parts import error_message
from tiny_models import seeded
from torch import Tensor

from pipelines.evaluation.frechet import distance_between, fit_gaussian
from pipelines.evaluation.image_arrays import ImageArray, read_reference, written
from training_harness.errors import UserError

pytestmark = pytest.mark.filterwarnings("error:.*not writable")  # torch warns once of arrays that share a file's bytes


def pictures(count: int = 11, channels: int = 3, height: int = 5, width: int = 4) -> Tensor:
    return torch.randint(256, (count, channels, height, width), generator=seeded(0), dtype=torch.uint8)


def places_last(images: Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


# -- written and read -------------------------------------------------------------------------------------------------


def test_what_is_written_on_the_way_is_read_by_numpy_and_in_batches_of_any_size(tmp_path: Path):
    images, path = pictures(), tmp_path / "new folder" / "samples.npz"
    passed = list(written(path, images.split(4), count=11))
    assert torch.equal(torch.cat(passed), images)
    with np.load(path) as file:
        assert file.files == ["arr_0"]
        assert file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], places_last(images))
    array = ImageArray(path)
    assert (len(array), array.image_shape, array.labels()) == (11, (3, 5, 4), None)
    for size in (1, 3, 11, 100):
        read = list(array.batches(size))
        assert [position for positions, _ in read for position in positions] == list(range(11))
        assert all(len(positions) == len(batch) <= size for positions, batch in read)
        assert torch.equal(torch.cat([batch for _, batch in read]), images)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_what_numpy_writes_is_read(save: Callable, channels: int, tmp_path: Path):
    images = pictures(channels=channels)
    save(tmp_path / "a.npz", places_last(images))
    array = ImageArray(tmp_path / "a.npz")
    assert array.image_shape == (channels, 5, 4)
    assert torch.equal(torch.cat([batch for _, batch in array.batches(4)]), images)


def test_grey_is_written_with_equal_channels_and_passed_on_as_it_is(tmp_path: Path):
    images = pictures(channels=1)
    assert torch.equal(torch.cat(list(written(tmp_path / "a.npz", images.split(3), 11))), images)
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["arr_0"], places_last(images).repeat(3, axis=3))


def test_a_batch_can_be_changed_without_changing_the_next_reading(tmp_path: Path):
    np.savez(tmp_path / "a.npz", places_last(pictures()))
    array = ImageArray(tmp_path / "a.npz")
    for _, batch in array.batches(4):
        batch.zero_()
    assert torch.equal(torch.cat([batch for _, batch in array.batches(4)]), pictures())


def test_a_stream_that_fails_is_abandoned_or_too_short_or_too_long_leaves_no_file(tmp_path: Path):
    def failing() -> Iterator[Tensor]:
        yield pictures(4)
        raise RuntimeError("the sampler failed")

    path = tmp_path / "samples.npz"
    with pytest.raises(RuntimeError, match="sampler failed"):
        list(written(path, failing(), 8))
    assert not list(tmp_path.iterdir())
    abandoned = written(path, pictures(8).split(4), 8)
    next(abandoned)
    abandoned.close()
    assert not list(tmp_path.iterdir())
    for count in (7, 9):
        with pytest.raises(UserError, match=f"8 images.*{count}") as error:
            list(written(path, pictures(8).split(4), count))
        assert str(path) in error_message(error)
        assert not list(tmp_path.iterdir())
    list(written(path, pictures(8).split(4), 8))
    assert [found.name for found in tmp_path.iterdir()] == ["samples.npz"]


def test_an_earlier_file_stays_until_a_new_one_is_whole(tmp_path: Path):
    path = tmp_path / "samples.npz"
    list(written(path, [pictures()], 11))
    before = path.read_bytes()
    second = written(path, (255 - pictures()).split(4), 11)
    next(second)
    assert path.read_bytes() == before
    list(second)
    assert path.read_bytes() != before
    assert len(ImageArray(path)) == 11


# -- references -------------------------------------------------------------------------------------------------------


def moments(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return features.numpy().mean(0), np.cov(features.numpy(), rowvar=False)


def test_a_reference_has_the_moments_of_features_and_of_places_and_its_images(tmp_path: Path):
    whole, places, images = normal(30, 5, seed=1) + 2, normal(30, 7, seed=2), places_last(pictures())
    (mu, sigma), (mu_s, sigma_s) = moments(whole), moments(places)
    np.savez(tmp_path / "reference.npz", arr_0=images, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    reference = read_reference(tmp_path / "reference.npz")
    assert reference.images is not None
    assert len(reference.images) == 11
    assert list(reference.moments) == ["features", "spatial"]
    for name, features in (("features", whole), ("spatial", places)):
        torch.testing.assert_close(reference.moments[name].mean, features.mean(0))
        assert distance_between(reference.moments[name], fit_gaussian(features)) == pytest.approx(0, abs=1e-8)


def test_a_reference_may_hold_images_alone_or_the_moments_of_one_network_alone(tmp_path: Path):
    mu, sigma = moments(normal(30, 5))
    np.savez(tmp_path / "moments.npz", mu=mu, sigma=sigma, mu_s=mu)  # half a pair is none
    only_moments = read_reference(tmp_path / "moments.npz")
    assert only_moments.images is None
    assert list(only_moments.moments) == ["features"]
    np.savez(tmp_path / "images.npz", places_last(pictures()))
    only_images = read_reference(tmp_path / "images.npz")
    assert only_images.images is not None
    assert only_images.moments == {}


# -- files that are none ----------------------------------------------------------------------------------------------

IMAGES = places_last(pictures(40, 3, 16, 16))


def text(path: Path) -> None:
    path.write_text("arr_0\n1,2,3\n")


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def bare_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, IMAGES)


def other_names(path: Path) -> None:
    np.savez(path, images=IMAGES)


def floats(path: Path) -> None:
    np.savez(path, (IMAGES / 255).astype(np.float32))


def no_batch(path: Path) -> None:
    np.savez(path, IMAGES[0])


def by_columns(path: Path) -> None:
    np.savez(path, np.asfortranarray(IMAGES))


def objects(path: Path) -> None:
    np.savez(path, np.array([[[[{}]]]], dtype=object))


def cut_short(path: Path) -> None:
    np.savez(path, IMAGES)
    path.write_bytes(path.read_bytes()[:-5000])


def fewer_than_stated(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (41, *IMAGES.shape[1:])}
        np.lib.format.write_array_header_1_0(member, header)
        member.write(IMAGES.tobytes())


def changed_on_the_way(path: Path) -> None:
    np.savez(path, IMAGES)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def changed_when_compressed(path: Path) -> None:
    np.savez_compressed(path, IMAGES // 16)
    data = bytearray(path.read_bytes())
    data[300:400] = bytes(100)
    path.write_bytes(data)


BAD = [text, nothing, other_names, floats, no_batch, by_columns, objects, cut_short, bare_array]
DAMAGED = [fewer_than_stated, changed_on_the_way, changed_when_compressed]


@pytest.mark.parametrize("make", [*BAD, *DAMAGED])
def test_a_file_that_holds_no_images_or_damaged_ones_is_one_line_that_names_it(make: Callable, tmp_path: Path):
    path = tmp_path / "bad.npz"
    make(path)
    with pytest.raises(UserError) as error:
        list(ImageArray(path).batches(7))
    assert str(path) in error_message(error)
    with pytest.raises(UserError) as error:
        list(read_reference(path).images.batches(7))
    assert str(path) in error_message(error)


def test_a_missing_file_is_one_line_that_names_it(tmp_path: Path):
    for read in (ImageArray, read_reference):
        with pytest.raises(UserError, match="No such file") as error:
            read(tmp_path / "none.npz")
        assert "none.npz" in error_message(error)


def test_a_file_that_holds_neither_images_nor_moments_is_told_by_what_it_holds(tmp_path: Path):
    np.savez(tmp_path / "other.npz", labels=np.arange(3), mu=np.zeros(3))
    with pytest.raises(UserError, match="holds labels, mu;") as error:
        read_reference(tmp_path / "other.npz")
    assert "other.npz" in error_message(error)


@pytest.mark.parametrize(
    ("mu", "sigma"),
    [
        (np.zeros(3), np.eye(4)),
        (np.array([0, math.nan, 0]), np.eye(3)),
        (np.zeros(3), -np.eye(3)),
        (np.zeros((1, 3)), np.eye(3)),
        (np.array(0.0), np.array(1.0)),
        (np.array(["a"]), np.eye(1)),
        (np.array([None]), np.eye(1)),
    ],
)
def test_moments_that_are_none_are_one_line_that_names_the_file(mu: np.ndarray, sigma: np.ndarray, tmp_path: Path):
    path = tmp_path / "moments.npz"
    np.savez(path, mu=mu, sigma=sigma)
    with pytest.raises(UserError) as error:
        read_reference(path)
    assert str(path) in error_message(error)
