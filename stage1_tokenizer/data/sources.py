"""Sources of images: folders, Parquet, saved data sets and the Hub, all as splits of images with ids and labels.

The layout below the deepest folder that contains all images decides what a folder means:

    a.png  b.png                     flat: no labels
    cat/a.png  dog/b/c.png           class folders: the first folder is the class, at any depth of nesting
    train/…  val/…  test/…           splits, each flat or with class folders; images next to them belong to no split
    train2017/…  test_set/…          the same (`source_splits` has the rule for names)
    train/images/cat/…               the same: a single folder with a neutral name, or with the split's name, is no class
    trainA/…  trainB/…  testA/…      splits of the classes A and B
    cat/train/…  cat/test/…          the same: splits below class folders
    a.png  cat/b.png                 mixed: all images are used, without labels, because some would have none
    train-0.parquet  test/0.parquet  Parquet, split by the names of files or folders, read through `datasets`

Folders are splits when all have names of splits, or when `train` and another split are among them. A source with one
split trains on it, whatever its name. A source with fewer than two classes has no labels; `unlabelled_reason` says why.
Classes are numbered in natural order (2 before 10), or as the data set declares them.

An image is a file that Pillow opens, or a NumPy file (.npy) with any number of channels. A file without an extension is an
image if its first bytes are an image's. Hidden files and the files of operating systems and NAS devices (`@eaDir`,
`__MACOSX`) are ignored. Links are followed. Parquet files without images are ignored when there are image files.

A source without a validation split gets one: the images for which the SHA-256 of the source id, as a number in [0, 1), is
below 5 %. So an image's split depends on its own id only. There are four exceptions. Of more than 2,000 such images, the
2,000 with the smallest hashes are used. An empty split gets one image: the smallest hash for validation, the largest for
train. Each class keeps the image with its largest hash in train; if nothing is left for validation, the image with the
smallest hash is in both splits. If none of a few validation images can be read, the next readable image is added.
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

from stage1_tokenizer.data.folder_sources import build_folder_splits, image_extensions, list_files, select_image_files
from stage1_tokenizer.data.image_decoding import decode_image, open_image
from stage1_tokenizer.data.image_processor import ImageLike
from stage1_tokenizer.data.row_sources import (
    build_row_splits,
    find_saved_splits,
    group_parquet_files,
    load_from_hub,
    load_parquet,
    load_saved,
    select_image_tables,
)
from stage1_tokenizer.data.source_splits import (
    EXPECTED_DATA,
    TEST,
    TRAIN,
    VALIDATION,
    ImageStore,
    RawSplit,
    escape_undecodable_name,
    sort_naturally,
    summarize_error,
)
from training_harness.errors import UserError

VALIDATION_SHARE, MAX_VALIDATION_IMAGES = 0.05, 2_000
MAX_READ_ATTEMPTS = 8  # images; a larger validation split is not tested for a readable image
FINGERPRINT_IMAGES = 32  # images of a split whose bytes enter its fingerprint


class UnreadableImage(Exception):  # noqa: N818 - the state of one image, which loops expect; no error of the program
    """An image that cannot be decoded. Loops over images skip it, count it and list it."""

    def __init__(self, source_id: str, reason: str) -> None:
        super().__init__(source_id, reason)  # both as args, so that it can be pickled by a worker process
        self.source_id, self.reason = source_id, reason

    def __str__(self) -> str:
        return f"{self.source_id}: {self.reason}"


class ImageSplit:
    """A read-only sequence of images with ids and labels. Images are decoded by `image` only."""

    def __init__(
        self,
        store: ImageStore,
        labels: list[int] | None = None,
        positions: Sequence[int] | None = None,
        origin: str = "",
    ) -> None:
        """Create a split of some images of a store.

        Args:
            store: encoded images.
            labels: the label of each image of this split.
            positions: the position in the store of each image of this split; by default all positions.
            origin: the path or name that the user passed, for messages.
        """
        self._store = store
        self._labels = labels
        self._positions = range(len(store)) if positions is None else positions
        self._fingerprint: str | None = None
        self.origin = origin

    def __len__(self) -> int:
        return len(self._positions)

    @property
    def labels(self) -> list[int] | None:
        """The label of each image; None if the split is not labelled."""
        return self._labels

    def label(self, i: int) -> int | None:
        """Return the label of image i, an index into `ImageSource.label_names`."""
        return None if self._labels is None else self._labels[i]

    def source_id(self, i: int) -> str:
        """Return the id of image i: its path below the source's folder, the row's `source_id`, or `train/00012`."""
        return self._store.source_id(self._positions[i])

    def image(self, i: int, *, at_least: tuple[int, int] | None = None) -> ImageLike:
        """Decode image i in its own mode and orientation; the image processor makes it upright.

        Args:
            i: position in this split.
            at_least: (height, width). A JPEG may be decoded at 1/2, 1/4 or 1/8 of its size, but not below this size. This is
                several times faster. Pass `ImageProcessor.draft_size`.

        Raises:
            UnreadableImage: the image cannot be decoded, for any reason.
        """
        with self._wrap_read_errors(i):
            return decode_image(self._store.read_bytes(self._positions[i]), at_least)

    def size(self, i: int) -> tuple[int, int]:
        """Read the stored (height, width) of image i from its header; the pixels may still be broken.

        Raises:
            UnreadableImage: the header cannot be read.
        """
        with self._wrap_read_errors(i):
            image = open_image(self._store.read_bytes(self._positions[i]))
            if isinstance(image, np.ndarray):
                return image.shape[0], image.shape[1]
            return image.height, image.width

    def is_readable(self, i: int) -> bool:
        """Whether image i can be decoded."""
        try:
            self.image(i, at_least=(1, 1))
        except UnreadableImage:
            return False
        return True

    def select(self, indices: Sequence[int]) -> ImageSplit:
        """Return a split of the images at `indices`, in this order."""
        labels = None if self._labels is None else [self._labels[i] for i in indices]
        return ImageSplit(self._store, labels, [self._positions[i] for i in indices], self.origin)

    def fingerprint(self) -> str:
        """Hash all ids, the sizes of all files, and the bytes of at most 32 evenly spaced images: 16 hexadecimal digits."""
        if self._fingerprint is None:
            byte_sizes, digest = self._store.byte_sizes(), hashlib.sha256()
            for i, position in enumerate(self._positions):
                digest.update(f"{self.source_id(i)}\0{byte_sizes[position]}\0".encode())
            self._hash_sampled_images(digest)
            self._fingerprint = digest.hexdigest()[:16]
        return self._fingerprint

    def legacy_fingerprint(self) -> str:
        """Return the fingerprint stored in code caches of format 1, which does not include the sizes of files."""
        digest = hashlib.sha256("\0".join(map(self.source_id, range(len(self)))).encode())
        self._hash_sampled_images(digest)
        return digest.hexdigest()[:16]

    def _hash_sampled_images(self, digest: hashlib._Hash) -> None:
        for i in range(0, len(self), -(-len(self) // FINGERPRINT_IMAGES) or 1):
            with suppress(UnreadableImage), self._wrap_read_errors(i):
                digest.update(self._store.read_bytes(self._positions[i]))

    def map_labels(self, label_map: Sequence[int]) -> ImageSplit:
        """Return the same images with label i replaced by `label_map[i]`; −1 stays."""
        labels = None if self._labels is None else [label_map[label] if label >= 0 else -1 for label in self._labels]
        return ImageSplit(self._store, labels, self._positions, self.origin)

    @contextmanager
    def _wrap_read_errors(self, i: int) -> Iterator[None]:
        """Turn any error into UnreadableImage."""
        source_id = self.source_id(i)  # before the try: an index out of range is the caller's error
        try:
            yield
        except PIL.UnidentifiedImageError as error:
            raise UnreadableImage(source_id, "not an image that Pillow can read") from error
        except Exception as error:  # for broken files decoders raise OSError, SyntaxError, struct.error and others
            raise UnreadableImage(source_id, summarize_error(error)) from error


@dataclass(frozen=True)
class ImageSource:
    """The splits of one set of images."""

    name: str
    label_names: tuple[str, ...] | None
    train: ImageSplit
    validation: ImageSplit
    test: ImageSplit | None
    """The source's own test split, used for evaluation only."""
    unlabelled_reason: str = ""
    """Why there are no labels; empty if there are labels."""

    @property
    def held_out(self) -> ImageSplit:
        """The images for evaluation: the test split, or the validation split if there is no test split."""
        return self.validation if self.test is None else self.test

    @property
    def classes_without_images(self) -> tuple[str, ...]:
        """Names of the classes without training images."""
        with_images = set(self.train.labels or ())
        return tuple(name for i, name in enumerate(self.label_names or ()) if i not in with_images)

    def describe_classes(self) -> str:
        """Describe in one line how many classes there are, or why there are none."""
        names = self.label_names
        if names is None:
            line = f"no classes: {self.unlabelled_reason}"
        else:
            line = f"{len(names)} classes: {', '.join(names[:10])}{', …' if len(names) > 10 else ''}"
        return " ".join(line.split())

    def with_label_names(self, label_names: tuple[str, ...] | None) -> ImageSource:
        """Return the same images, labelled by the positions of their classes in `label_names`; −1 for other classes."""
        new_labels = {name: i for i, name in enumerate(label_names or ())}
        label_map = [new_labels.get(name, -1) for name in self.label_names or ()]
        train, validation = self.train.map_labels(label_map), self.validation.map_labels(label_map)
        test = self.test and self.test.map_labels(label_map)
        return replace(self, label_names=label_names, train=train, validation=validation, test=test)

    def with_label_order(self, label_names: Sequence[str] | None) -> ImageSource:
        """Return the same images with the labels of `label_names`, if it has the same classes; else return this source.

        Earlier versions sorted 10 before 2, and their models and code caches keep this order.
        """
        if label_names is None or self.label_names is None or sorted(label_names) != sorted(self.label_names):
            return self
        return self.with_label_names(tuple(label_names))


def open_source(data: str | Path, *, hold_out: bool = True) -> ImageSource:
    """Open the images at a path, or those of a data set on the Hub.

    Folders do not need `datasets`. Almost no image is decoded.

    Args:
        data: a folder, a Parquet file or a Hub name.
        hold_out: make a validation split if the source has none. Without it, all images are in `train`, and `validation` is
            empty.

    Raises:
        UserError: the path does not exist or has no image, there is no train split, or the Hub cannot be reached.
    """
    if not str(data).strip():
        raise UserError(f"the data set's name is {str(data)!r}; expected {EXPECTED_DATA}. Pass one of them")
    try:
        path = Path(data).expanduser()
        is_folder, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, a user without a known home folder
        raise UserError(
            f"{str(data)!r} is no path ({summarize_error(error)}); expected {EXPECTED_DATA}. Check the path"
        ) from error
    class_names: Sequence[str] | None = None
    if is_folder:
        name = escape_undecodable_name(path.resolve().name)
        splits, class_names = _open_folder(path, data)
    elif path.suffix.lower() == ".parquet" and path.is_file():
        name = escape_undecodable_name(path.stem)
        splits, class_names = build_row_splits(load_parquet({TRAIN: [str(path)]}, data), data)
    elif exists:
        raise UserError(f"{str(data)!r} is a file; expected {EXPECTED_DATA}. Pass its folder, or unpack the file")
    elif _looks_like_path(str(data)):
        raise UserError(f"there is nothing at {str(data)!r}; expected {EXPECTED_DATA}. Check the path")
    else:
        name = str(data)
        splits, class_names = build_row_splits(load_from_hub(name), data)
    return _build_source(name, splits, class_names, data, hold_out)


def _open_folder(path: Path, data: str | Path) -> tuple[dict[str, RawSplit], Sequence[str] | None]:
    """Open a saved data set, Parquet files or image files; class names only where the data set declares them."""
    if folders := find_saved_splits(path):
        return build_row_splits(load_saved(folders, data), data)
    files = list_files(path)
    images = select_image_files(path, files)
    if parquet := [file for file in files if file.lower().endswith(".parquet")]:
        if images:  # img2dataset writes a table of addresses next to each folder
            parquet = select_image_tables(path, parquet)
        if parquet:
            return build_row_splits(load_parquet(group_parquet_files(path, parquet), data), data)
    return build_folder_splits(path, images, data, files), None


def _build_source(
    name: str,
    raw_splits: Mapping[str, RawSplit],
    class_names: Sequence[str] | None,
    data: str | Path,
    hold_out: bool,
) -> ImageSource:
    """Number the classes equally in all splits, and make a validation split if there is none."""
    classes = _order_classes(raw_splits, class_names)
    is_labelled = raw_splits[TRAIN].classes is not None and len(classes) > 1
    class_ids = {value: i for i, value in enumerate(classes)}
    splits: dict[str, ImageSplit] = {}
    for role, raw in raw_splits.items():
        labels = [class_ids[value] for value in raw.classes] if is_labelled and raw.classes is not None else None
        splits[role] = ImageSplit(raw.store, labels, origin=str(data))
    if not len(splits[TRAIN]):
        raise UserError(
            f"the train split of {str(data)!r} is empty; expected at least one image. Check how it was written"
        )
    train, validation = splits[TRAIN], splits.get(VALIDATION)
    if not validation:
        train, validation = _split_validation(train) if hold_out else (train, train.select([]))
    one_class = f"all images are of one class, {classes[0]}" if classes else "no class is named"
    reason = "" if is_labelled else raw_splits[TRAIN].unlabelled_reason or one_class
    label_names = tuple(map(str, classes)) if is_labelled else None
    return ImageSource(name, label_names, train, validation, splits.get(TEST) or None, reason)


def _order_classes(splits: Mapping[str, RawSplit], class_names: Sequence[str] | None) -> list[Any]:
    """List the classes of all splits: the declared ones first; then numbers by value, or names in natural order."""
    undeclared = {value for split in splits.values() for value in split.classes or ()} - set(class_names or ())
    if all(isinstance(value, str) for value in undeclared):
        return [*(class_names or ()), *sort_naturally(undeclared)]
    return [*(class_names or ()), *sorted(undeclared)]


def _split_validation(split: ImageSplit) -> tuple[ImageSplit, ImageSplit]:
    """Return (train, validation) by the rule in this module's header; a single image is in both."""
    if len(split) == 1:
        return split, split
    digests = (hashlib.sha256(split.source_id(i).encode()).digest() for i in range(len(split)))
    hashes = np.fromiter((int.from_bytes(digest[:8], "big") for digest in digests), np.uint64, len(split))
    by_hash = np.argsort(hashes, kind="stable")
    below_share = int((hashes < np.uint64(int(VALIDATION_SHARE * 2**64))).sum())
    count = min(max(below_share, 1), MAX_VALIDATION_IMAGES, len(split) - 1)
    in_validation = np.zeros(len(split), dtype=bool)
    in_validation[by_hash[:count]] = True
    if split.labels is not None:
        labels = np.array(split.labels)
        for label in np.setdiff1d(labels, labels[~in_validation]):
            in_validation[max(np.flatnonzero(labels == label), key=lambda i: hashes[i])] = False
    in_train = ~in_validation
    if not in_validation.any():  # each class has one image
        in_validation[by_hash[0]] = True
    has_few_images = in_validation.sum() <= MAX_READ_ATTEMPTS
    if has_few_images and not any(map(split.is_readable, np.flatnonzero(in_validation).tolist())):
        for i in filter(split.is_readable, by_hash[count : count + MAX_READ_ATTEMPTS].tolist()):
            in_validation[i] = True
            is_last = in_train.sum() == 1 or (split.labels is not None and (labels[in_train] == labels[i]).sum() == 1)
            in_train[i] = is_last
            break
    return split.select(np.flatnonzero(in_train).tolist()), split.select(np.flatnonzero(in_validation).tolist())


def _looks_like_path(data: str) -> bool:
    # `images/cats` may also be a Hub name, but not if there is a folder `images` here.
    return (
        data.startswith((".", "/", "~", os.sep))
        or data.count(os.sep) > 1
        or os.path.isdir(os.path.dirname(data))
        or data.endswith((os.sep, ".parquet", *image_extensions()))
    )
