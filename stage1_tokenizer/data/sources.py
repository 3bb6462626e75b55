"""Where images come from: folders, Parquet, saved data sets and the Hub, all as splits of pictures with ids and labels.

What a folder means follows from where its pictures lie, below the deepest folder that holds them all:

    a.png  b.png                     flat: no labels
    cat/a.png  dog/b/c.png           class folders: the first folder is the class, whatever is nested below it
    train/…  val/…  test/…           splits, each flat or of class folders; what lies beside them belongs to no split
    train2017/…  test_set/…          the same (the rule for names is in `source_splits`)
    train/images/cat/…               the same: a single folder whose name says nothing, or repeats the split's, is no class
    trainA/…  trainB/…  testA/…      splits of the classes A and B
    cat/train/…  cat/test/…          the same: splits below class folders
    a.png  cat/b.png                 mixed: every picture is used, without labels, since some would have none
    train-0.parquet  test/0.parquet  Parquet, split by its names or those of its folders, read through `datasets`

Folders count as splits when all are named so, or when `train` and another split lie side by side. A source with one
split trains on it, whatever its name. Fewer than two classes are no labels; `unlabelled_because` says why a source has
none. Classes are numbered in natural order (2 before 10), or as a data set declares them.

A picture is a file that Pillow opens, or a NumPy file (.npy) of any number of channels; without an ending, one that begins
as a picture does. Hidden files are left out, as is what operating systems and NAS boxes leave in folders (`@eaDir`,
`__MACOSX`); links are followed. Tables that hold no pictures are ignored beside images.

The validation split of a source that has none: the pictures whose SHA-256 of the source id, as a number in [0, 1), is
below 5 %. So a picture's side depends on its own id alone. Some bounds look at the others: of more than 2,000 such
pictures the 2,000 with the smallest hashes stay; a side that would be empty gets one picture, the smallest hash for
validation and the largest for train; a class keeps the picture of its largest hash in train. Where that leaves nothing
for validation, the picture of the smallest hash is on both sides. Where none of a few can be read, the next that can joins.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from stage1_tokenizer.data.folder_sources import files_below, folder_parts, image_endings, image_files
from stage1_tokenizer.data.image_decoding import decode_image, open_image
from stage1_tokenizer.data.image_processor import ImageLike
from stage1_tokenizer.data.row_sources import (
    load_from_hub,
    load_parquet,
    load_saved,
    parquet_splits,
    row_parts,
    saved_splits,
    tables_with_images,
)
from stage1_tokenizer.data.source_splits import (
    EXPECTED,
    TEST,
    TRAIN,
    VALIDATION,
    ImageStore,
    Part,
    in_natural_order,
    one_line,
    printable,
)
from training_harness.errors import UserError

VALIDATION_SHARE, VALIDATION_CAP = 0.05, 2_000
TRIED = 8  # held-out pictures up to which it is made sure that one can be read
FINGERPRINTED = 32  # pictures of a split whose files are looked at


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
        self,
        store: ImageStore,
        labels: list[int] | None = None,
        positions: Sequence[int] | None = None,
        origin: str = "",
    ) -> None:
        """`labels[i]` belongs to picture i of this split, which is picture `positions[i]` of the store.

        `origin` is what the user gave, for messages."""
        self._store = store
        self._labels = labels
        self._positions = range(len(store)) if positions is None else positions
        self._fingerprint: str | None = None
        self.origin = origin

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

    def image(self, i: int, *, at_least: tuple[int, int] | None = None) -> ImageLike:
        """Picture i, decoded whole, in its own mode and as stored: the image processor turns it upright.

        Args:     at_least: (height, width). A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size while it stays that
                  large, several times faster; `ImageProcessor.draft_size` is made for it.
        Raises:   UnreadableImage, whatever was wrong with the picture."""
        with self._as_unreadable(i):
            return decode_image(self._store.read_bytes(self._positions[i]), at_least)

    def size(self, i: int) -> tuple[int, int]:
        """(height, width) as stored, from the header: what comes after it may still be broken.

        Raises:   UnreadableImage."""
        with self._as_unreadable(i):
            image = open_image(self._store.read_bytes(self._positions[i]))
            if isinstance(image, np.ndarray):
                return image.shape[0], image.shape[1]
            return image.height, image.width

    def can_be_read(self, i: int) -> bool:
        try:
            self.image(i, at_least=(1, 1))
        except UnreadableImage:
            return False
        return True

    def select(self, indices: Sequence[int]) -> ImageSplit:
        """The pictures at `indices`, in that order."""
        labels = None if self._labels is None else [self._labels[i] for i in indices]
        return ImageSplit(self._store, labels, [self._positions[i] for i in indices], self.origin)

    def fingerprint(self) -> str:
        """Hash of all ids, the sizes of all files, and the bytes of at most 32 images, evenly spaced: 16 hexadecimal digits."""
        if self._fingerprint is None:
            byte_sizes, digest = self._store.byte_sizes(), hashlib.sha256()
            for i, position in enumerate(self._positions):
                digest.update(f"{self.source_id(i)}\0{byte_sizes[position]}\0".encode())
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
                digest.update(self._store.read_bytes(self._positions[i]))

    def with_label_names(self, ids: Sequence[int]) -> ImageSplit:
        """The same pictures, those of label i now of label `ids[i]`; −1 stays."""
        labels = None if self._labels is None else [ids[label] if label >= 0 else -1 for label in self._labels]
        return ImageSplit(self._store, labels, self._positions, self.origin)

    @contextmanager
    def _as_unreadable(self, i: int) -> Iterator[None]:
        source_id = self.source_id(i)  # before the guard: an index out of range is the caller's
        try:
            yield
        except PIL.UnidentifiedImageError as error:
            raise UnreadableImage(source_id, "not a picture that Pillow can read") from error
        except Exception as error:  # on broken data decoders raise OSError, SyntaxError, struct.error, and others yet
            raise UnreadableImage(source_id, one_line(error)) from error


@dataclass(frozen=True)
class ImageSource:
    """The splits of one set of images. `test` is the source's own, for evaluation alone, or none."""

    name: str
    label_names: tuple[str, ...] | None
    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit | None
    unlabelled_reason: str = ""
    """Why there are no labels; empty where there are."""

    @property
    def held_out(self) -> ImageSplit:
        """What figures are measured on: the test split, else the validation split."""
        return self.validation if self.test is None else self.test

    @property
    def classes_without_images(self) -> tuple[str, ...]:
        """Names of the classes that have no training image, so that nothing can be learnt of them."""
        with_images = set(self.train.labels or ())
        return tuple(name for i, name in enumerate(self.label_names or ()) if i not in with_images)

    def describe_classes(self) -> str:
        """One line: how many classes there are, or why there are none."""
        names = self.label_names
        if names is None:
            line = f"no classes: {self.unlabelled_reason}"
        else:
            line = f"{len(names)} classes: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}"
        return " ".join(line.split())

    def with_label_names(self, label_names: tuple[str, ...] | None) -> ImageSource:
        """The same pictures, with the ids that `label_names` give to their classes; −1 for a class that has none there."""
        known = {name: i for i, name in enumerate(label_names or ())}
        ids = [known.get(name, -1) for name in self.label_names or ()]
        train, validation = self.train.with_label_names(ids), self.validation.with_label_names(ids)
        test = self.test and self.test.with_label_names(ids)
        return replace(self, label_names=label_names, train=train, validation=validation, test=test)

    def with_label_order(self, label_names: Sequence[str] | None) -> ImageSource:
        """With the ids of `label_names` where these are the same classes in another order; else as it is.

        Earlier versions sorted 10 before 2: what they wrote goes on with its own ids."""
        if label_names is None or self.label_names is None or sorted(label_names) != sorted(self.label_names):
            return self
        return self.with_label_names(tuple(label_names))


def open_source(data: str | Path, *, hold_out: bool = True) -> ImageSource:
    """The images at a path, or of a data set on the Hub. Folders need no `datasets`; hardly a picture is decoded here.

    Without `hold_out`, a source that has no validation split keeps all its images in `train`, and that split is empty.
    Raises: UserError when there is nothing at the path, no image in it, no train split, or the Hub does not answer."""
    if not str(data).strip():
        raise UserError(f"the data set's name is {str(data)!r}; expected {EXPECTED}. Give one")
    try:
        path = Path(data).expanduser()
        is_folder, is_file = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, a user whose home is not known
        raise UserError(f"{str(data)!r} is no path ({one_line(error)}); expected {EXPECTED}. Check it") from error
    names: Sequence[str] | None = None
    if is_folder:
        origin = printable(path.resolve().name)
        parts, names = _folder_parts(path, data)
    elif path.suffix.lower() == ".parquet" and path.is_file():
        origin = printable(path.stem)
        parts, names = row_parts(load_parquet({TRAIN: [str(path)]}, data), data)
    elif is_file:
        raise UserError(f"{str(data)!r} is a file; expected {EXPECTED}. Give the folder it lies in, or unpack it")
    elif _looks_like_a_path(str(data)):
        raise UserError(f"there is nothing at {str(data)!r}; expected {EXPECTED}. Check the path")
    else:
        origin = str(data)
        parts, names = row_parts(load_from_hub(origin), data)
    return _assemble(origin, parts, names, data, hold_out)


def _folder_parts(path: Path, data: str | Path) -> tuple[dict[str, Part], Sequence[str] | None]:
    """Parts, and class names where the data set declares them: of a saved data set, of Parquet, or of image files."""
    if folders := saved_splits(path):
        return row_parts(load_saved(folders, data), data)
    files = files_below(path)
    images = image_files(path, files)
    if parquet := [file for file in files if file.lower().endswith(".parquet")]:
        if images:  # img2dataset writes a table of addresses beside each folder
            parquet = tables_with_images(path, parquet)
        if parquet:
            return row_parts(load_parquet(parquet_splits(path, parquet), data), data)
    return folder_parts(path, images, data, files), None


def _assemble(
    name: str, parts: Mapping[str, Part], names: Sequence[str] | None, data: str | Path, hold_out: bool
) -> ImageSource:
    """Numbers the classes, the same way in every split, and makes a validation split where there is none."""
    values = _classes_in_order(parts, names)
    labelled = parts[TRAIN].classes is not None and len(values) > 1
    number = {value: i for i, value in enumerate(values)}
    splits: dict[str, ImageSplit] = {}
    for role, part in parts.items():
        labels = [number[value] for value in part.classes] if labelled and part.classes is not None else None
        splits[role] = ImageSplit(part.store, labels, origin=str(data))
    if not len(splits[TRAIN]):
        raise UserError(
            f"the train split of {str(data)!r} is empty; expected at least one image. Check how it was written"
        )
    train, validation = splits[TRAIN], splits.get(VALIDATION)
    if not validation:
        train, validation = _hold_out(train) if hold_out else (train, train.select([]))
    one_class = f"all images are of one class, {values[0]}" if values else "no class is named"
    because = "" if labelled else parts[TRAIN].unlabelled_reason or one_class
    label_names = tuple(map(str, values)) if labelled else None
    return ImageSource(name, label_names, train, validation, splits.get(TEST) or None, because)


def _classes_in_order(parts: Mapping[str, Part], names: Sequence[str] | None) -> list[Any]:
    """The classes of all splits: those that the data set declares, then others; numbers by value, names in natural order."""
    found = {value for part in parts.values() for value in part.classes or ()} - set(names or ())
    in_order = in_natural_order(found) if all(isinstance(value, str) for value in found) else sorted(found)
    return [*(names or ()), *in_order]


def _hold_out(split: ImageSplit) -> tuple[ImageSplit, ImageSplit]:
    """(train, validation) by the rule in this module's header; a single image serves as both."""
    if len(split) == 1:
        return split, split
    digests = (hashlib.sha256(split.source_id(i).encode()).digest() for i in range(len(split)))
    hashes = np.fromiter((int.from_bytes(digest[:8], "big") for digest in digests), np.uint64, len(split))
    by_hash = np.argsort(hashes, kind="stable")
    below = int((hashes < np.uint64(int(VALIDATION_SHARE * 2**64))).sum())
    count = min(max(below, 1), VALIDATION_CAP, len(split) - 1)
    held_out = np.zeros(len(split), dtype=bool)
    held_out[by_hash[:count]] = True
    if split.labels is not None:
        labels = np.array(split.labels)
        for label in np.setdiff1d(labels, labels[~held_out]):
            held_out[max(np.flatnonzero(labels == label), key=lambda i: hashes[i])] = False
    in_train = ~held_out
    if not held_out.any():  # an image a class
        held_out[by_hash[0]] = True
    if held_out.sum() <= TRIED and not any(map(split.can_be_read, np.flatnonzero(held_out).tolist())):
        for i in filter(split.can_be_read, by_hash[count : count + TRIED].tolist()):
            held_out[i] = True
            alone = in_train.sum() == 1 or (split.labels is not None and (labels[in_train] == labels[i]).sum() == 1)
            in_train[i] = alone
            break
    return split.select(np.flatnonzero(in_train).tolist()), split.select(np.flatnonzero(held_out).tolist())


def _looks_like_a_path(data: str) -> bool:
    # `images/cats` may be a Hub name too, but not where `images` is a folder here.
    return (
        data.startswith((".", "/", "~", os.sep))
        or data.count(os.sep) > 1
        or os.path.isdir(os.path.dirname(data))
        or data.endswith((os.sep, ".parquet", *image_endings()))
    )
