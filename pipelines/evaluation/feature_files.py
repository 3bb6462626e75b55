"""Features of a set of images as a file of rows, so that a set of any size takes as much memory as one slice of it.

A file is the number of columns F as 8 bytes, little-endian, then float32 rows. A set is a folder with one file for each
thing that its extractor gives. Every metric of this package takes a `Rows`: such a file, or a tensor (N, F).
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
    """(N, F) float32 rows on disk, or those of them at `positions`; read without mapping, whose pages would count as memory."""

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
        """The rows at `positions`, in that order."""
        chosen = np.asarray(positions)
        return FeatureFile(self.path, chosen if self._positions is None else self._positions[chosen])

    def read(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` as float32."""
        stop, columns = min(stop, len(self)), self.shape[1]
        rows = np.empty((stop - start, columns), np.float32)
        positions = np.arange(start, stop) if self._positions is None else self._positions[start:stop]
        # neighbours in the file are read in one go
        breaks = np.flatnonzero(np.diff(positions) != 1) + 1
        with self.path.open("rb") as file:
            for block in np.split(np.arange(stop - start), breaks):
                if len(block):
                    file.seek(HEADER.itemsize + 4 * columns * int(positions[block[0]]))
                    file.readinto(rows[block[0] : block[-1] + 1].data.cast("B"))
        return torch.from_numpy(rows)


Rows = Tensor | FeatureFile


def iterate_slices(rows: Rows, size: int = SLICE, first: int = 0) -> Iterator[Tensor]:
    """The rows from `first` on in order as float64 (n, F) on the CPU, n ≤ size."""
    for start in range(first, len(rows), size):
        yield block(rows, start, start + size).double()


def block(rows: Rows, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` on the CPU."""
    return rows[start:stop].detach().cpu() if isinstance(rows, Tensor) else rows.read(start, stop)


def chosen(rows: Rows, positions: Tensor) -> Rows:
    return rows[positions] if isinstance(rows, Tensor) else rows.select(positions)


def random_positions(count: int, most: int, seed: int) -> Tensor:
    """At most `most` positions out of `count`, drawn at random, in rising order."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:most].sort().values


def write_features(folder: Path, batches: Iterable[ImageFeatures]) -> dict[str, FeatureFile]:
    """Writes what an extractor gives, batch after batch, into an existing folder; returns the files by name.

    Raises:   UserError at the first batch with a number that is not finite.
    """
    with ExitStack() as stack:
        files: dict[str, BinaryIO] = {}
        for batch in batches:
            for name, rows in batch.present().items():
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
    if broken := int((~rows.isfinite().all(dim=1)).sum()):
        raise UserError(
            f"{broken} of {len(rows)} rows of features hold NaN or inf; expected finite numbers. "
            "Look at the images and the network that they come from"
        )


def check_pair(a: Rows, b: Rows, at_least: int, needed_for: str) -> None:
    """Raises UserError unless both are (N, F) with equal F, finite, and have `at_least` rows."""
    if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[1] != b.shape[1]:
        raise UserError(
            f"two sets have features of shapes {tuple(a.shape)} and {tuple(b.shape)}; expected (N, F), F equal"
        )
    for rows in (a, b):
        if len(rows) < at_least:
            raise UserError(f"a set has {len(rows)} images; {needed_for} needs {at_least} or more. Give more images")
        if isinstance(rows, Tensor):  # a file was looked at when it was written
            check_finite(rows)
