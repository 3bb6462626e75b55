"""Images in `.npz` files are exchanged with numpy in both directions; errors name the files without images."""

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
from pipelines.evaluation.image_arrays import ImageArray, read_reference, write_and_yield
from training_harness.errors import UserError

pytestmark = pytest.mark.filterwarnings("error:.*not writable")  # torch warns once about arrays on the bytes of a file


def random_images(count: int = 11, channels: int = 3, height: int = 5, width: int = 4) -> Tensor:
    return torch.randint(256, (count, channels, height, width), generator=seeded(0), dtype=torch.uint8)


def channels_last(images: Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


# -- writing and reading -----------------------------------------------------------------------------------------------


def test_written_images_are_read_by_numpy_and_in_batches_of_any_size(tmp_path: Path):
    images, path = random_images(), tmp_path / "new folder" / "samples.npz"
    yielded = list(write_and_yield(path, images.split(4), count=11))
    assert torch.equal(torch.cat(yielded), images)
    with np.load(path) as file:
        assert file.files == ["arr_0"]
        assert file["arr_0"].dtype == np.uint8
        assert np.array_equal(file["arr_0"], channels_last(images))
    array = ImageArray(path)
    assert (len(array), array.image_shape, array.labels()) == (11, (3, 5, 4), None)
    for size in (1, 3, 11, 100):
        batches = list(array.batches(size))
        assert [position for positions, _ in batches for position in positions] == list(range(11))
        assert all(len(positions) == len(batch) <= size for positions, batch in batches)
        assert torch.equal(torch.cat([batch for _, batch in batches]), images)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_that_numpy_writes_are_read(save: Callable, channels: int, tmp_path: Path):
    images = random_images(channels=channels)
    save(tmp_path / "a.npz", channels_last(images))
    array = ImageArray(tmp_path / "a.npz")
    assert array.image_shape == (channels, 5, 4)
    assert torch.equal(torch.cat([batch for _, batch in array.batches(4)]), images)


def test_grey_images_are_written_with_equal_channels_and_yielded_unchanged(tmp_path: Path):
    images = random_images(channels=1)
    assert torch.equal(torch.cat(list(write_and_yield(tmp_path / "a.npz", images.split(3), 11))), images)
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["arr_0"], channels_last(images).repeat(3, axis=3))


def test_changing_a_batch_does_not_change_the_next_reading(tmp_path: Path):
    np.savez(tmp_path / "a.npz", channels_last(random_images()))
    array = ImageArray(tmp_path / "a.npz")
    for _, batch in array.batches(4):
        batch.zero_()
    assert torch.equal(torch.cat([batch for _, batch in array.batches(4)]), random_images())


def test_a_failed_closed_too_short_or_too_long_stream_leaves_no_file(tmp_path: Path):
    def failing_batches() -> Iterator[Tensor]:
        yield random_images(4)
        raise RuntimeError("the sampler failed")

    path = tmp_path / "samples.npz"
    with pytest.raises(RuntimeError, match="sampler failed"):
        list(write_and_yield(path, failing_batches(), 8))
    assert not list(tmp_path.iterdir())
    stream = write_and_yield(path, random_images(8).split(4), 8)
    next(stream)
    stream.close()
    assert not list(tmp_path.iterdir())
    for count in (7, 9):
        with pytest.raises(UserError, match=f"8 images.*{count}") as error:
            list(write_and_yield(path, random_images(8).split(4), count))
        assert str(path) in error_message(error)
        assert not list(tmp_path.iterdir())
    list(write_and_yield(path, random_images(8).split(4), 8))
    assert [file.name for file in tmp_path.iterdir()] == ["samples.npz"]


def test_an_earlier_file_stays_until_the_new_one_is_complete(tmp_path: Path):
    path = tmp_path / "samples.npz"
    list(write_and_yield(path, [random_images()], 11))
    before = path.read_bytes()
    new_stream = write_and_yield(path, (255 - random_images()).split(4), 11)
    next(new_stream)
    assert path.read_bytes() == before
    list(new_stream)
    assert path.read_bytes() != before
    assert len(ImageArray(path)) == 11


# -- references -------------------------------------------------------------------------------------------------------


def moments(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    return features.numpy().mean(0), np.cov(features.numpy(), rowvar=False)


def test_a_reference_has_images_and_the_moments_of_pooled_and_spatial_features(tmp_path: Path):
    pooled, spatial, images = normal(30, 5, seed=1) + 2, normal(30, 7, seed=2), channels_last(random_images())
    (mu, sigma), (mu_s, sigma_s) = moments(pooled), moments(spatial)
    np.savez(tmp_path / "reference.npz", arr_0=images, mu=mu, sigma=sigma, mu_s=mu_s, sigma_s=sigma_s)
    reference = read_reference(tmp_path / "reference.npz")
    assert reference.images is not None
    assert len(reference.images) == 11
    assert list(reference.moments) == ["features", "spatial"]
    for name, features in (("features", pooled), ("spatial", spatial)):
        torch.testing.assert_close(reference.moments[name].mean, features.mean(0))
        assert distance_between(reference.moments[name], fit_gaussian(features)) == pytest.approx(0, abs=1e-8)


def test_a_reference_may_hold_only_images_or_only_moments_of_pooled_features(tmp_path: Path):
    mu, sigma = moments(normal(30, 5))
    np.savez(tmp_path / "moments.npz", mu=mu, sigma=sigma, mu_s=mu)  # mu_s without sigma_s is ignored
    only_moments = read_reference(tmp_path / "moments.npz")
    assert only_moments.images is None
    assert list(only_moments.moments) == ["features"]
    np.savez(tmp_path / "images.npz", channels_last(random_images()))
    only_images = read_reference(tmp_path / "images.npz")
    assert only_images.images is not None
    assert only_images.moments == {}


# -- invalid files ---------------------------------------------------------------------------------------------------

IMAGES = channels_last(random_images(40, 3, 16, 16))


def write_text_file(path: Path) -> None:
    path.write_text("arr_0\n1,2,3\n")


def write_empty_file(path: Path) -> None:
    path.write_bytes(b"")


def write_bare_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, IMAGES)


def write_other_names(path: Path) -> None:
    np.savez(path, images=IMAGES)


def write_floats(path: Path) -> None:
    np.savez(path, (IMAGES / 255).astype(np.float32))


def write_single_image(path: Path) -> None:
    np.savez(path, IMAGES[0])


def write_fortran_order(path: Path) -> None:
    np.savez(path, np.asfortranarray(IMAGES))


def write_objects(path: Path) -> None:
    np.savez(path, np.array([[[[{}]]]], dtype=object))


def write_truncated_file(path: Path) -> None:
    np.savez(path, IMAGES)
    path.write_bytes(path.read_bytes()[:-5000])


def write_too_few_images(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive, archive.open("arr_0.npy", "w") as member:
        header = {"descr": "|u1", "fortran_order": False, "shape": (41, *IMAGES.shape[1:])}
        np.lib.format.write_array_header_1_0(member, header)
        member.write(IMAGES.tobytes())


def write_corrupted_file(path: Path) -> None:
    np.savez(path, IMAGES)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


def write_corrupted_compressed_file(path: Path) -> None:
    np.savez_compressed(path, IMAGES // 16)
    data = bytearray(path.read_bytes())
    data[300:400] = bytes(100)
    path.write_bytes(data)


WRITE_INVALID = [
    write_text_file,
    write_empty_file,
    write_other_names,
    write_floats,
    write_single_image,
    write_fortran_order,
    write_objects,
    write_truncated_file,
    write_bare_array,
]
WRITE_DAMAGED = [write_too_few_images, write_corrupted_file, write_corrupted_compressed_file]


@pytest.mark.parametrize("write", [*WRITE_INVALID, *WRITE_DAMAGED])
def test_a_file_without_images_or_with_damaged_images_is_a_one_line_error_with_its_path(
    write: Callable, tmp_path: Path
):
    path = tmp_path / "bad.npz"
    write(path)
    with pytest.raises(UserError) as error:
        list(ImageArray(path).batches(7))
    assert str(path) in error_message(error)
    with pytest.raises(UserError) as error:
        list(read_reference(path).images.batches(7))
    assert str(path) in error_message(error)


def test_a_missing_file_is_a_one_line_error_with_its_path(tmp_path: Path):
    for read in (ImageArray, read_reference):
        with pytest.raises(UserError, match="No such file") as error:
            read(tmp_path / "none.npz")
        assert "none.npz" in error_message(error)


def test_the_error_for_a_file_without_images_and_moments_lists_its_contents(tmp_path: Path):
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
def test_invalid_moments_are_a_one_line_error_with_the_path(mu: np.ndarray, sigma: np.ndarray, tmp_path: Path):
    path = tmp_path / "moments.npz"
    np.savez(path, mu=mu, sigma=sigma)
    with pytest.raises(UserError) as error:
        read_reference(path)
    assert str(path) in error_message(error)
