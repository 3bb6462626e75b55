"""What `folder_sources` and `row_sources` return to `sources`: splits whose classes have no numbers yet, and their names.

A name is a split's name when one of its words is (`train`, `val`, `test_set`, `train2017`, `DIV2K_train_HR`). The words after
it must be neutral: numbers, single letters, and words such as `set` or `images`. The words before it may also be the name of
the data set, if the name of another split starts with the same words (`seg_train`, `seg_test`). So `trains`, `testimonials`
and `training shoes` are not names of splits.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from training_harness.errors import UserError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLIT_NAMES = {"train": TRAIN, "training": TRAIN, "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION}
SPLIT_NAMES |= {"dev": VALIDATION, "test": TEST, "testing": TEST}
SPLIT_WORDS = SPLIT_NAMES | {"trainset": TRAIN, "trainingset": TRAIN, "trainval": TRAIN, "testset": TEST}
SPLIT_WORDS |= {"valset": VALIDATION, "validationset": VALIDATION, "eval": VALIDATION, "evaluation": VALIDATION}
# fmt: off
NEUTRAL_WORDS = {
    "set", "sets", "data", "dataset", "datasets", "image", "images", "imgs", "img", "picture", "pictures", "pics",
    "photo", "photos", "jpg", "jpeg", "jpegs", "png", "split", "splits", "folder", "folders", "file", "files",
    "part", "parts", "shard", "shards", "of", "hr", "lr", "hq", "full", "partial", "public",
}
# fmt: on
CONTENT_HASH_SUFFIX = re.compile(r"[-_.](?=[0-9a-f]*\d)[0-9a-f]{8,}$")  # train-00000-of-00001-a09b74b3ef9c3b56
EXPECTED_DATA = (
    "a folder of images, of class folders or of train/val/test folders, Parquet, a saved data set or a Hub name"
)


class ImageStore(Protocol):
    """Encoded images in a fixed order."""

    def __len__(self) -> int: ...
    def source_id(self, i: int) -> str:
        """Return the id of image i."""

    def read_bytes(self, i: int) -> bytes:
        """Read the encoded image i."""

    def byte_sizes(self) -> Sequence[int]:
        """Return the bytes of every encoded image without reading it; 0 where the size is unknown."""


@dataclass(frozen=True)
class RawSplit:
    """One split before its classes have numbers."""

    store: ImageStore
    classes: Sequence[Any] | None
    """The class of each image; None if the split is not labelled."""
    unlabelled_reason: str = ""
    """Why there are no labels."""


def split_into_words(name: str) -> list[str]:
    """Split a name into lower-case words and numbers: `TrainingSet_2017b` is training, set, 2017, b."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", CONTENT_HASH_SUFFIX.sub("", name))
    return [word.lower() for word in re.findall(r"[^\W\d_]+|\d+", spaced)]


def is_neutral_name(name: str) -> bool:
    """Whether a name does not describe the content, such as `images` or `JPEGs_1`."""
    return all(word in NEUTRAL_WORDS or word.isdecimal() or len(word) == 1 for word in split_into_words(name))


def find_split_roles(names: Iterable[str], *, allow_any_prefix: bool = False) -> dict[str, str]:
    """Find the names of splits by the rule in this module's header.

    Args:
        names: names of files or folders.
        allow_any_prefix: accept any words before the split's word.

    Returns:
        The role (train, validation or test) of each split's name. Other names are left out.
    """
    roles: dict[str, str] = {}
    roles_by_prefix: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        words = split_into_words(name)
        positions = [i for i, word in enumerate(words) if word in SPLIT_WORDS]
        candidates = {SPLIT_WORDS[words[i]] for i in positions}
        if candidates == {TRAIN, VALIDATION} and positions == [positions[0], positions[0] + 1]:
            candidates = {TRAIN}  # train_val: everything except the test split
        if len(candidates) != 1 or not is_neutral_name(" ".join(words[positions[-1] + 1 :])):
            continue
        prefix, role = tuple(words[: positions[0]]), candidates.pop()
        if allow_any_prefix or is_neutral_name(" ".join(prefix)):
            roles[name] = role
        else:
            roles_by_prefix.setdefault(prefix, {})[name] = role
    for prefixed_roles in roles_by_prefix.values():
        if TRAIN in prefixed_roles.values() and len(set(prefixed_roles.values())) > 1:
            roles |= prefixed_roles
    evaluation = [name for name in roles if {"eval", "evaluation"} & set(split_into_words(name))]
    other_roles = {role for name, role in roles.items() if name not in evaluation}
    if VALIDATION in other_roles and TEST not in other_roles:  # training, validation and evaluation
        roles |= dict.fromkeys(evaluation, TEST)
    return roles


def are_split_folders(names: Sequence[str], roles: dict[str, str]) -> bool:
    """Whether folders are splits: `train` and another split are among them, or all have names of splits."""
    distinct_roles = set(roles.values())
    if TRAIN in distinct_roles and len(distinct_roles) > 1:
        return True
    are_exact = all(name.lower() in SPLIT_NAMES for name in names)  # `test 1` and `test 2` may be anything
    return bool(names) and len(roles) == len(names) and (TRAIN in distinct_roles or are_exact)


def assign_split_roles(names: Sequence[str], data: str | Path) -> dict[str, str]:
    """Assign roles to the names of splits; a single split is the train split.

    Raises:
        UserError: none of several names is a train split.
    """
    if len(names) == 1:
        return {names[0]: TRAIN}
    roles = find_split_roles(names)
    if TRAIN not in roles.values():
        listed = ", ".join(sorted(names)[:8]) or "nothing"
        raise UserError(
            f"{str(data)!r} has the splits {listed}; expected one named 'train'. Rename one, or pass the folder of one split"
        )
    return roles


def sort_naturally(names: Iterable[str]) -> list[str]:
    """Sort distinct names, with numbers by their value: 2 comes before 10, and -1 before 0."""
    distinct = set(names)
    if all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", name) for name in distinct):
        return sorted(distinct, key=lambda name: (float(name), name))
    return sorted(distinct, key=_natural_sort_key)


def _natural_sort_key(name: str) -> tuple[list[tuple[str, int, str]], str]:
    parts = re.split(r"([0-9]+)", name)
    digits = [number.lstrip("0") for number in (*parts[1::2], "")]
    return [(text, len(number), number) for text, number in zip(parts[::2], digits, strict=True)], name


def escape_undecodable_name(name: str) -> str:
    """Escape the bytes of a file's name that are not UTF-8: Arrow, JSON and terminals do not accept surrogates."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def summarize_error(error: Exception) -> str:
    """Return an error's message on one line; for errors of the operating system only the reason, without the path."""
    message = getattr(error, "strerror", None) or str(error)
    return " ".join(message.split())[:200] or type(error).__name__
