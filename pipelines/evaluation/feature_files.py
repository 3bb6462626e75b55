"""Features of a set of images in files, so that only one slice of them is in memory at a time.

A file starts with the number of columns F as 8 bytes, little-endian. The rows follow as float32. A folder holds the features
of one set of images, with one file for each field of `ImageFeatures`. Every metric of this package takes `Rows`: such a
file, or a tensor (N, F).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from pipelines.evaluation.features import ImageFeatures
from training_harness.errors import UserError

HEADER = np.dtype("<i8")
SLICE = 1_000  # rows in memory at once


class FeatureFile:
    """(N, F) float32 rows on disk, or a selection of them.

    The file is read and not memory-mapped, because mapped pages count as memory of the process.
    """

    def __init__(self, path: Path, positions: np.ndarray | None = None) -> None:
        self.path = path
        with path.open("rb") as file:
            columns = int(np.fromfile(file, HEADER, 1)[0])
        self._positions = positions
        rows = (path.stat().st_size - HEADER.itemsize) // (4 * columns)
        self.shape = (rows if positions is None else len(positions), columns)

    def __len__(self) -> int:
        return self.shape[0]

    def select(self, positions: Tensor | np.ndarray) -> FeatureFile:
        """Select the rows at `positions`, in that order."""
        selected = np.asarray(positions)
        return FeatureFile(self.path, selected if self._positions is None else self._positions[selected])

    def read(self, start: int, stop: int) -> Tensor:
        """Read rows `start` to `stop` as float32."""
        stop, columns = min(stop, len(self)), self.shape[1]
        rows = np.empty((stop - start, columns), np.float32)
        positions = np.arange(start, stop) if self._positions is None else self._positions[start:stop]
        # adjacent rows are read with one call
        breaks = np.flatnonzero(np.diff(positions) != 1) + 1
        with self.path.open("rb") as file:
            for adjacent in np.split(np.arange(stop - start), breaks):
                if len(adjacent):
                    file.seek(HEADER.itemsize + 4 * columns * int(positions[adjacent[0]]))
                    file.readinto(rows[adjacent[0] : adjacent[-1] + 1].data.cast("B"))
        return torch.from_numpy(rows)


Rows = Tensor | FeatureFile


def iterate_slices(rows: Rows, size: int = SLICE, first: int = 0) -> Iterator[Tensor]:
    """Yield the rows from position `first` on, in order, as float64 (n, F) on the CPU with n ≤ size."""
    for start in range(first, len(rows), size):
        yield read_rows(rows, start, start + size).double()


def read_rows(rows: Rows, start: int, stop: int) -> Tensor:
    """Return rows `start` to `stop` on the CPU."""
    return rows[start:stop].detach().cpu() if isinstance(rows, Tensor) else rows.read(start, stop)


def select_rows(rows: Rows, positions: Tensor) -> Rows:
    return rows[positions] if isinstance(rows, Tensor) else rows.select(positions)


def random_positions(count: int, limit: int, seed: int) -> Tensor:
    """Select at most `limit` of `count` positions at random; return them in ascending order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:limit].sort().values


def write_features(folder: Path, batches: Iterable[ImageFeatures]) -> dict[str, FeatureFile]:
    """Write features, batch after batch, into an existing folder; return the files by name.

    Raises:
        UserError: at the first batch with a number that is not finite.
    """
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for batch in batches:
            for name, rows in batch.to_dict().items():
                check_finite(rows)
                array = rows.detach().to("cpu", torch.float32).numpy()
                if name not in files:
                    files[name] = stack.enter_context((folder / name).open("wb"))
                    np.asarray(array.shape[1], HEADER).tofile(files[name])
                array.tofile(files[name])
    return read_features(folder)


def read_features(folder: Path) -> dict[str, FeatureFile]:
    return {name: FeatureFile(folder / name) for name in ImageFeatures._fields if (folder / name).exists()}


def check_finite(rows: Tensor) -> None:
    """Raise UserError if a row holds NaN or inf."""
    if count := int((~rows.isfinite().all(dim=1)).sum()):
        raise UserError(
            f"{count} of {len(rows)} rows of features hold NaN or inf; expected finite numbers. "
            "Check the images and the network that computed the features"
        )


def check_pair(a: Rows, b: Rows, min_rows: int, metric: str) -> None:
    """Check that two sets are finite, (N, F) with equal F, and have at least `min_rows` rows each.

    Raises:
        UserError: if they do not; the message names the metric.
    """
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[1]:
        raise UserError(
            f"two sets have features of shapes {tuple(a.shape)} and {tuple(b.shape)}; expected (N, F) with equal F"
        )
    for rows in (a, b):
        if len(rows) < min_rows:
            raise UserError(f"a set has {len(rows)} images; {metric} needs {min_rows} or more. Pass more images")
        if isinstance(rows, Tensor):  # a file was checked when it was written
            check_finite(rows)
