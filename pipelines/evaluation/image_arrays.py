"""Read and write images in `.npz` files, the exchange format of published evaluators, in batches.

A file of ADM (Dhariwal, Nichol 2021, arXiv 2105.05233) holds `arr_0`, (N, h, w, 3) uint8. A reference file also holds, or
only holds, moments of Inception features over a whole data set: `mu` and `sigma` of the pooled features, `mu_s` and
`sigma_s` of the spatial features. Published evaluators read RGB only, so grey images are written with equal channels.
"""

import math
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from pipelines.evaluation.frechet import Gaussian, gaussian_from_moments
from stage1_tokenizer.data.image_processor import as_rgb
from training_harness.errors import UserError
from training_harness.files import atomic_file

IMAGES = "arr_0.npy"
UNREADABLE = (OSError, EOFError, KeyError, TypeError, ValueError, zipfile.BadZipFile, zlib.error)
MOMENTS = {"features": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}


class ImageArray:
    """The images of an `.npz` file: its array `arr_0`, N images of one size.

    Raises:
        UserError: if the file cannot be read, or if `arr_0` is not uint8 (N, h, w, C).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with zipfile.ZipFile(path) as archive, archive.open(IMAGES) as member:
                shape, dtype = _read_header(cast(BinaryIO, member))
        except UNREADABLE as error:
            raise UserError(
                f"{path} holds no images ({error}); expected an .npz with arr_0, uint8 (N, h, w, C)"
            ) from None
        if len(shape) != 4 or dtype != np.uint8:
            raise UserError(
                f"arr_0 of {path} is {dtype} {shape}; expected uint8 (N, h, w, C) in 0 … 255; scale and round the images"
            )
        self._shape = shape
        self.image_shape: tuple[int, int, int] = (shape[3], shape[1], shape[2])  # (C, h, w)

    def __len__(self) -> int:
        return self._shape[0]

    def batches(self, batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Yield (positions, images) in order; images are (B, C, h, w) uint8."""
        size = math.prod(self._shape[1:])
        with zipfile.ZipFile(self.path) as archive, archive.open(IMAGES) as member:
            _read_header(cast(BinaryIO, member))
            for start in range(0, len(self), batch_size):
                count = min(batch_size, len(self) - start)
                try:
                    data = member.read(count * size)
                except UNREADABLE as error:
                    raise UserError(
                        f"{self.path} is damaged ({error}); expected {len(self)} images; copy the file again"
                    ) from None
                if len(data) < count * size:
                    raise UserError(f"{self.path} is cut short; expected {len(self)} images; copy the file again")
                batch = np.frombuffer(data, np.uint8).reshape(count, *self._shape[1:])
                yield list(range(start, start + count)), torch.from_numpy(batch.copy()).permute(0, 3, 1, 2)

    def labels(self) -> None:
        return None


class ReferenceArrays(NamedTuple):
    """Images and moments of a reference file."""

    images: ImageArray | None
    moments: dict[str, Gaussian]  # of the Inception features "features" and "spatial", if the file has them


def read_reference(path: Path) -> ReferenceArrays:
    """Read the images and moments of a reference `.npz`.

    Raises:
        UserError: if the file is no `.npz`, or holds neither images nor moments.
    """
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it is a single array")
        with file:
            names = set(file.files)
            moments = {
                field: gaussian_from_moments(*(torch.from_numpy(np.atleast_1d(file[name])) for name in pair))
                for field, pair in MOMENTS.items()
                if names.issuperset(pair)
            }
    except UNREADABLE as error:
        raise UserError(f"{path} cannot be read ({error}); expected an .npz of images or of moments") from None
    if "arr_0" not in names and not moments:
        contents = ", ".join(sorted(names)) or "nothing"
        raise UserError(f"{path} holds {contents}; expected arr_0 (images) or mu and sigma (moments)")
    return ReferenceArrays(ImageArray(path) if "arr_0" in names else None, moments)


def write_and_yield(path: Path, batches: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """Write batches of images to an `.npz` file and yield each batch unchanged.

    The file holds `arr_0`, (count, h, w, 3) uint8. It exists only after the last batch.

    Args:
        batches: (B, C, h, w) uint8, `count` images in total.

    Raises:
        UserError: if the batches hold another number of images; no file is written then.
    """
    num_written = 0
    with (
        atomic_file(path) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
        archive.open(IMAGES, "w", force_zip64=True) as member,
    ):
        for batch in batches:
            array = np.ascontiguousarray(as_rgb(batch).permute(0, 2, 3, 1).cpu().numpy())
            if num_written == 0:
                header = {"descr": "|u1", "fortran_order": False, "shape": (count, *array.shape[1:])}
                np.lib.format.write_array_header_1_0(cast(BinaryIO, member), header)
            member.write(array.tobytes())
            num_written += len(batch)
            yield batch
        if num_written != count:
            raise UserError(
                f"{num_written} images were available for {path}; expected {count}; look for images that cannot be read"
            )


def _read_header(member: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Return the shape and dtype of a `.npy` member; the position moves to its data."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran_order, dtype = read(member)
    if is_fortran_order:
        raise UserError("arr_0 is in Fortran order; expected C order; write it with numpy.ascontiguousarray")
    return shape, dtype
