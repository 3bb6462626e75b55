"""What `source_folders` and `source_rows` hand to `sources`: splits whose classes have no numbers yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from training_harness.errors import UserError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
SPLIT_NAMES = {"train": TRAIN, "training": TRAIN, "validation": VALIDATION, "valid": VALIDATION, "val": VALIDATION}
SPLIT_NAMES |= {"dev": VALIDATION, "test": TEST, "testing": TEST}
EXPECTED = "a folder of images, of class folders or of train/val/test folders, Parquet, a saved data set or a Hub name"


class PictureStore(Protocol):
    """Encoded pictures in a fixed order."""

    def __len__(self) -> int: ...
    def source_id(self, i: int) -> str: ...
    def encoded(self, i: int) -> bytes: ...
    def sizes(self) -> Sequence[int]:
        """Bytes of every encoded image, without reading them; 0 where it cannot be told."""


@dataclass(frozen=True)
class Part:
    """One split before classes have numbers: a class for each picture, or none for all of them."""

    store: PictureStore
    classes: Sequence[Any] | None


def roles_of(names: Sequence[str], data: str | Path) -> dict[str, str]:
    """Split's name → role, for those that have one; exactly one name is the train split."""
    if len(names) == 1:
        return {names[0]: TRAIN}
    roles = {name: SPLIT_NAMES[name.lower()] for name in names if name.lower() in SPLIT_NAMES}
    if TRAIN not in roles.values():
        found = ", ".join(sorted(names)[:8]) or "nothing"
        raise UserError(
            f"{str(data)!r} has the splits {found}; expected one named 'train'. Rename one, or give its folder alone"
        )
    return roles


def one_line(error: Exception) -> str:
    """Its message without line breaks; of the system's errors the reason alone, without the machine's path."""
    message = getattr(error, "strerror", None) or str(error)
    return " ".join(message.split())[:200] or type(error).__name__
