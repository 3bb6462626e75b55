"""Where images come from: folders, Parquet, saved data sets and the Hub, all as splits of pictures with ids and labels.

What a folder means follows from where its pictures lie, below the deepest folder that holds them all:

    a.png  b.png                     flat: no labels
    cat/a.png  dog/b/c.png           class folders: the first folder is the class, whatever is nested below it
    train/…  val/…  test/…           splits, each flat or of class folders; what lies beside them belongs to no split
    a.png  cat/b.png                 mixed: every picture is used, without labels, since some would have none
    train-0.parquet  test.parquet    Parquet, split by the beginning of its names, read through `datasets`

Folders count as splits when all are named so, or when `train` and another split lie side by side. A source with one
split trains on it, whatever its name. Fewer than two classes are no labels. Hidden files and `__MACOSX` are left out,
links are followed. A picture is a file that Pillow opens, or a NumPy file (.npy) of uint8 with any number of channels.

The validation split of a source that has none: the pictures whose SHA-256 of the source id, as a number in [0, 1), is
below 5 %. So a picture's side depends on its own id alone. Two bounds look at the others: of more than 2,000 such
pictures the 2,000 with the smallest hashes stay, and a side that would be empty gets one picture: the smallest hash for
validation, the largest for train.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image

from stage1_tokenizer.data.folder_sources import files_below, folder_parts, image_endings
from stage1_tokenizer.data.image_processor import Picture
from stage1_tokenizer.data.row_sources import load_from_hub, load_parquet, load_saved, parquet_splits, row_parts
from stage1_tokenizer.data.source_splits import EXPECTED, TEST, TRAIN, VALIDATION, Part, PictureStore, one_line
from training_harness.errors import UserError

VALIDATION_SHARE, VALIDATION_CAP = 0.05, 2_000
FINGERPRINTED = 32  # pictures of a split whose files are looked at
NUMPY_MAGIC = b"\x93NUMPY"


class UnreadableImage(Exception):  # noqa: N818 - one picture's state, which loops expect; no error of the program
    """A picture that cannot be decoded. Whoever loops over pictures skips it, counts it and lists it."""

    def __init__(self, source_id: str, reason: str) -> None:
        super().__init__(source_id, reason)  # both as args, or it could not cross from a worker process
        self.source_id, self.reason = source_id, reason

    def __str__(self) -> str:
        return f"{self.source_id}: {self.reason}"


class ImageSplit:
    """A read-only sequence of pictures with ids and labels; nothing is decoded before `image` asks for it."""

    def __init__(
        self, store: PictureStore, labels: list[int] | None = None, positions: Sequence[int] | None = None
    ) -> None:
        """`labels[i]` belongs to picture i of this split, which is picture `positions[i]` of the store."""
        self._store = store
        self._labels = labels
        self._positions = range(len(store)) if positions is None else positions
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def labels(self) -> list[int] | None:
        """The label of every picture, or none when the split is not labelled."""
        return self._labels

    def label(self, i: int) -> int | None:
        """Index into `ImageSource.label_names`."""
        return None if self._labels is None else self._labels[i]

    def source_id(self, i: int) -> str:
        """`dog/7.png` below the folder that was opened, the row's `source_id`, or `train/00012`."""
        return self._store.source_id(self._positions[i])

    def image(self, i: int, *, at_least: tuple[int, int] | None = None) -> Picture:
        """Picture i, decoded whole, in its own mode and as stored: the image processor turns it upright.

        Args:     at_least: (height, width). A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size while it stays that
                  large, several times faster; `ImageProcessor.draft_size` is made for it.
        Raises:   UnreadableImage, whatever was wrong with the picture."""
        with self._as_unreadable(i):
            image = self._opened(i)
            if isinstance(image, np.ndarray):
                return image
            if at_least is not None:
                image.draft(None, (at_least[1], at_least[0]))  # does nothing but for JPEG
            image.load()
            return image

    def size(self, i: int) -> tuple[int, int]:
        """(height, width) as stored, from the header: what comes after it may still be broken.

        Raises:   UnreadableImage."""
        with self._as_unreadable(i):
            image = self._opened(i)
            if isinstance(image, np.ndarray):
                return image.shape[0], image.shape[1]
            return image.height, image.width

    def select(self, indices: Sequence[int]) -> ImageSplit:
        """The pictures at `indices`, in that order."""
        labels = None if self._labels is None else [self._labels[i] for i in indices]
        return ImageSplit(self._store, labels, [self._positions[i] for i in indices])

    def fingerprint(self) -> str:
        """Hash of all ids, the sizes of all files, and the bytes of at most 32 images, evenly spaced: 16 hexadecimal digits."""
        if self._fingerprint is None:
            sizes, digest = self._store.sizes(), hashlib.sha256()
            for i, position in enumerate(self._positions):
                digest.update(f"{self.source_id(i)}\0{sizes[position]}\0".encode())
            self._update_with_files(digest)
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def fingerprint_of_ids(self) -> str:
        """The fingerprint that code caches of format 1 hold, without the sizes."""
        digest = hashlib.sha256("\0".join(map(self.source_id, range(len(self)))).encode())
        self._update_with_files(digest)
        return digest.hexdigest()[:16]

    def _update_with_files(self, digest: hashlib._Hash) -> None:
        for i in range(0, len(self), -(-len(self) // FINGERPRINTED) or 1):
            with suppress(UnreadableImage), self._as_unreadable(i):
                digest.update(self._store.encoded(self._positions[i]))

    def relabelled(self, ids: Sequence[int]) -> ImageSplit:
        """The same pictures, those of label i now of label `ids[i]`; −1 stays."""
        labels = None if self._labels is None else [ids[label] if label >= 0 else -1 for label in self._labels]
        return ImageSplit(self._store, labels, self._positions)

    def _opened(self, i: int) -> Picture:
        encoded = self._store.encoded(self._positions[i])
        if encoded.startswith(NUMPY_MAGIC):
            return opened_array(encoded)
        return PIL.Image.open(io.BytesIO(encoded))

    @contextmanager
    def _as_unreadable(self, i: int) -> Iterator[None]:
        source_id = self.source_id(i)  # before the guard: an index out of range is the caller's
        try:
            yield
        except PIL.UnidentifiedImageError as error:
            raise UnreadableImage(source_id, "not a picture that Pillow can read") from error
        except Exception as error:  # on broken data decoders raise OSError, SyntaxError, struct.error, and others yet
            raise UnreadableImage(source_id, one_line(error)) from error


def opened_array(encoded: bytes) -> Picture:
    """A NumPy file of uint8, (h, w) or (h, w, C): an array of more than four channels stays one."""
    array = np.load(io.BytesIO(encoded), allow_pickle=False)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or 0 in array.shape:
        raise ValueError(f"an array of {array.dtype} {array.shape}; expected uint8 (height, width, channels)")
    if array.ndim == 3 and array.shape[2] > 4:
        return array
    return PIL.Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array)


@dataclass(frozen=True)
class ImageSource:
    """The splits of one set of images. `test` is the source's own, for evaluation alone, or none."""

    name: str
    label_names: tuple[str, ...] | None
    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit | None

    @property
    def held_out(self) -> ImageSplit:
        """What figures are measured on: the test split, else the validation split."""
        return self.validation if self.test is None else self.test

    def relabelled(self, label_names: tuple[str, ...] | None) -> ImageSource:
        """The same pictures, with the ids that `label_names` give to their classes; −1 for a class that has none there."""
        known = {name: i for i, name in enumerate(label_names or ())}
        ids = [known.get(name, -1) for name in self.label_names or ()]
        train, validation = self.train.relabelled(ids), self.validation.relabelled(ids)
        return ImageSource(self.name, label_names, train, validation, self.test and self.test.relabelled(ids))


def open_source(data: str | Path, *, hold_out: bool = True) -> ImageSource:
    """The images at a path, or of a data set on the Hub. Folders need no `datasets`; nothing is decoded here.

    Without `hold_out`, a source that has no validation split keeps all its images in `train`, and that split is empty.
    Raises: UserError when there is nothing at the path, no image in it, no train split, or the Hub does not answer."""
    path = Path(data).expanduser()
    names: Sequence[str] | None = None
    if path.is_dir():
        origin = path.resolve().name
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            parts, names = row_parts(load_saved(path), data)
        elif parquet := files_below(path, frozenset({".parquet"}), besides={"metadata.parquet"}):
            parts, names = row_parts(load_parquet(parquet_splits(path, parquet)), data)
        else:
            parts = folder_parts(path, files_below(path, image_endings()), data)
    elif path.suffix.lower() == ".parquet" and path.is_file():
        origin = path.stem
        parts, names = row_parts(load_parquet({TRAIN: [str(path)]}), data)
    elif path.exists():
        raise UserError(f"{str(data)!r} is a file; expected {EXPECTED}. Give the folder it lies in, or unpack it")
    elif _looks_like_a_path(str(data)):
        raise UserError(f"there is nothing at {str(data)!r}; expected {EXPECTED}. Check the path")
    else:
        origin = str(data)
        parts, names = row_parts(load_from_hub(origin), data)
    return _assemble(origin, parts, names, data, hold_out)


def _assemble(
    name: str, parts: Mapping[str, Part], names: Sequence[str] | None, data: str | Path, hold_out: bool
) -> ImageSource:
    """Numbers the classes, the same way in every split, and makes a validation split where there is none."""
    classes = [part.classes for part in parts.values() if part.classes is not None]
    values = sorted({value for column in classes for value in column}) if names is None else list(names)
    labelled = parts[TRAIN].classes is not None and len(values) > 1
    number = {value: i for i, value in enumerate(values)}
    splits: dict[str, ImageSplit] = {}
    for role, part in parts.items():
        labels = [number[value] for value in part.classes] if labelled and part.classes is not None else None
        splits[role] = ImageSplit(part.store, labels)
    if not len(splits[TRAIN]):
        raise UserError(
            f"the train split of {str(data)!r} is empty; expected at least one image. Check how it was written"
        )
    train, validation = splits[TRAIN], splits.get(VALIDATION)
    if not validation:
        train, validation = _hold_out(train) if hold_out else (train, train.select([]))
    return ImageSource(name, tuple(map(str, values)) if labelled else None, train, validation, splits.get(TEST) or None)


def _hold_out(split: ImageSplit) -> tuple[ImageSplit, ImageSplit]:
    """(train, validation) by the rule in this module's header; a single image serves as both."""
    if len(split) == 1:
        return split, split
    digests = (hashlib.sha256(split.source_id(i).encode()).digest() for i in range(len(split)))
    hashes = np.fromiter((int.from_bytes(digest[:8], "big") for digest in digests), np.uint64, len(split))
    below = int((hashes < np.uint64(int(VALIDATION_SHARE * 2**64))).sum())
    count = min(max(below, 1), VALIDATION_CAP, len(split) - 1)
    held_out = np.zeros(len(split), dtype=bool)
    held_out[np.argsort(hashes, kind="stable")[:count]] = True
    return split.select(np.flatnonzero(~held_out).tolist()), split.select(np.flatnonzero(held_out).tolist())


def _looks_like_a_path(data: str) -> bool:
    # `images/cats` may be a Hub name too, but not where `images` is a folder here.
    return (
        data.startswith((".", "/", "~", os.sep))
        or data.count(os.sep) > 1
        or os.path.isdir(os.path.dirname(data))
        or data.endswith((os.sep, ".parquet", *image_endings()))
    )
