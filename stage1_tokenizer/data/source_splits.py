"""What `folder_sources` and `row_sources` hand to `sources`: splits whose classes have no numbers yet, and split names.

A name stands for a split when one of its words does (`train`, `val`, `test_set`, `train2017`, `DIV2K_train_HR`). Its other
words must say nothing of the content: numbers, single letters, and words such as `set` or `images`. Words before the split's
may also be those of the data set, which another split's name then starts with too (`seg_train`, `seg_test`). So `trains`,
`testimonials` and `training shoes` are no splits.
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
CONTENT_HASH = re.compile(r"[-_.](?=[0-9a-f]*\d)[0-9a-f]{8,}$")  # train-00000-of-00001-a09b74b3ef9c3b56
EXPECTED = "a folder of images, of class folders or of train/val/test folders, Parquet, a saved data set or a Hub name"


class ImageStore(Protocol):
    """Encoded pictures in a fixed order."""

    def __len__(self) -> int: ...
    def source_id(self, i: int) -> str: ...
    def read_bytes(self, i: int) -> bytes: ...
    def byte_sizes(self) -> Sequence[int]:
        """Bytes of every encoded image, without reading them; 0 where it cannot be told."""


@dataclass(frozen=True)
class Part:
    """One split before classes have numbers: a class for each picture, or none for all of them and the reason."""

    store: ImageStore
    classes: Sequence[Any] | None
    unlabelled_reason: str = ""


def words_of(name: str) -> list[str]:
    """Lower-case words and numbers: `TrainingSet_2017b` is training, set, 2017, b."""
    apart = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", CONTENT_HASH.sub("", name))
    return [word.lower() for word in re.findall(r"[^\W\d_]+|\d+", apart)]


def is_neutral(name: str) -> bool:
    """Whether a name says nothing of the content, such as `images` or `JPEGs_1`."""
    return all(word in NEUTRAL_WORDS or word.isdecimal() or len(word) == 1 for word in words_of(name))


def split_roles(names: Iterable[str], *, any_lead: bool = False) -> dict[str, str]:
    """Name → role of the names that stand for a split, by the rule in this module's header.

    With `any_lead`, the words before the split's need no other name that starts with them."""
    roles: dict[str, str] = {}
    led: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        words = words_of(name)
        places = [i for i, word in enumerate(words) if word in SPLIT_WORDS]
        found = {SPLIT_WORDS[words[i]] for i in places}
        if found == {TRAIN, VALIDATION} and places == [places[0], places[0] + 1]:
            found = {TRAIN}  # train_val: all that is not the test split
        if len(found) != 1 or not is_neutral(" ".join(words[places[-1] + 1 :])):
            continue
        lead, role = tuple(words[: places[0]]), found.pop()
        if any_lead or is_neutral(" ".join(lead)):
            roles[name] = role
        else:
            led.setdefault(lead, {})[name] = role
    for named in led.values():
        if TRAIN in named.values() and len(set(named.values())) > 1:
            roles |= named
    evaluation = [name for name in roles if {"eval", "evaluation"} & set(words_of(name))]
    others = {role for name, role in roles.items() if name not in evaluation}
    if VALIDATION in others and TEST not in others:  # training, validation and evaluation
        roles |= dict.fromkeys(evaluation, TEST)
    return roles


def are_splits(names: Sequence[str], roles: dict[str, str]) -> bool:
    """Whether folders of these names are splits: all are named so, or `train` lies beside another split."""
    known = set(roles.values())
    if TRAIN in known and len(known) > 1:
        return True
    exact = all(name.lower() in SPLIT_NAMES for name in names)  # `test 1` and `test 2` may be anything
    return bool(names) and len(roles) == len(names) and (TRAIN in known or exact)


def roles_of(names: Sequence[str], data: str | Path) -> dict[str, str]:
    """Split's name → role, for those that have one; at least one name is a train split."""
    if len(names) == 1:
        return {names[0]: TRAIN}
    roles = split_roles(names)
    if TRAIN not in roles.values():
        found = ", ".join(sorted(names)[:8]) or "nothing"
        raise UserError(
            f"{str(data)!r} has the splits {found}; expected one named 'train'. Rename one, or give its folder alone"
        )
    return roles


def in_natural_order(names: Iterable[str]) -> list[str]:
    """Sorted, numbers by their value: 2 comes before 10, and -1 before 0."""
    distinct = set(names)
    if all(re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", name) for name in distinct):
        return sorted(distinct, key=lambda name: (float(name), name))
    return sorted(distinct, key=_natural_key)


def _natural_key(name: str) -> tuple[list[tuple[str, int, str]], str]:
    parts = re.split(r"([0-9]+)", name)
    digits = [number.lstrip("0") for number in (*parts[1::2], "")]
    return [(text, len(number), number) for text, number in zip(parts[::2], digits, strict=True)], name


def printable(name: str) -> str:
    """A file's name as text: one that is no UTF-8 holds surrogates, which neither Arrow, JSON nor a terminal takes."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def one_line(error: Exception) -> str:
    """Its message without line breaks; of the system's errors the reason alone, without the machine's path."""
    message = getattr(error, "strerror", None) or str(error)
    return " ".join(message.split())[:200] or type(error).__name__
