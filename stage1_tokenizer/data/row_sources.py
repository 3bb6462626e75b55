"""Rows of a data set as parts: Parquet, saved data sets and the Hub, through `datasets`.

`datasets` is imported where it is used, so that a plain folder of images does without it. Its own decoding is switched
off: there a corrupt picture ends the loop, here it is one unreadable picture."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stage1_tokenizer.data.source_splits import EXPECTED, SPLIT_NAMES, TRAIN, Part, one_line, roles_of
from training_harness.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


@dataclass(frozen=True)
class RowStore:
    """One column of undecoded pictures; the id is the row's own, or split name and row number."""

    pictures: Dataset  # one column of {bytes, path}
    split: str
    ids: list[str] | None

    def __len__(self) -> int:
        return len(self.pictures)

    def source_id(self, i: int) -> str:
        return self.ids[i] if self.ids is not None else f"{self.split}/{i:05d}"

    def encoded(self, i: int) -> bytes:
        (cell,) = self.pictures[i].values()
        if cell is None or (cell["bytes"] is None and cell["path"] is None):
            raise ValueError("the row holds no picture")
        return cell["bytes"] if cell["bytes"] is not None else Path(cell["path"]).read_bytes()

    def sizes(self) -> list[int]:
        import pyarrow.compute as pc

        (name,) = self.pictures.column_names
        column = self.pictures.with_format("arrow")[:][name]
        lengths = pc.binary_length(pc.struct_field(column, "bytes")).to_pylist()
        return [length or 0 for length in lengths]


def parquet_splits(root: Path, paths: list[str]) -> dict[str, list[str]]:
    """Split → files, by how a file's name begins; the other files are the train split where no file is named so."""
    splits: dict[str, list[str]] = {}
    rest: list[str] = []
    for path in paths:
        begins = re.match(r"[a-z]+", path.rsplit("/", 1)[-1].lower())
        role = SPLIT_NAMES.get(begins[0]) if begins else None
        (rest if role is None else splits.setdefault(role, [])).append(str(root / path))
    if rest:
        splits.setdefault(TRAIN, rest)
    return splits


def load_saved(path: Path) -> Mapping[str, Dataset]:
    """What `save_to_disk` wrote, by the name of its split."""
    import datasets

    with _one_line_errors(f"{str(path)!r} could not be read as a saved data set"):
        return _by_split(datasets.load_from_disk(path))


def load_parquet(splits: Mapping[str, list[str]]) -> Mapping[str, Dataset]:
    """Parquet files by the name of their split."""
    import datasets

    first = next(iter(splits.values()))[0]
    with _one_line_errors(f"{first!r}, or a file beside it, could not be read as Parquet"):
        return _by_split(datasets.load_dataset("parquet", data_files=dict(splits)))


def load_from_hub(name: str) -> Mapping[str, Dataset]:
    """The data set `name`, by the name of its split; from the cache where the Hub cannot be reached."""
    import datasets

    found = f"{name!r} is no file or folder here, and could not be loaded from the Hub either"
    was_offline = datasets.config.HF_HUB_OFFLINE
    with _one_line_errors(found):
        datasets.config.HF_HUB_OFFLINE = was_offline or not _hub_answers(name)
        try:
            return _by_split(datasets.load_dataset(name))
        finally:
            datasets.config.HF_HUB_OFFLINE = was_offline


def _hub_answers(name: str) -> bool:
    """Whether the Hub can be reached: left to itself, `datasets` tries for half a minute, aloud."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(name, timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return True  # it may refuse this name: `datasets` says so too
    except Exception:  # no route, no name server, no answer in time: the classes differ between its HTTP clients
        return False
    return True


def _by_split(loaded: Any) -> Mapping[str, Dataset]:
    return loaded if isinstance(loaded, dict) else {TRAIN: loaded}


def row_parts(tables: Mapping[str, Dataset], data: str | Path) -> tuple[dict[str, Part], Sequence[str] | None]:
    """The parts, and the class names in the order of their numbers where the data set itself gives them."""
    roles = roles_of(list(tables), data)
    features = next(tables[name] for name, role in roles.items() if role == TRAIN).features
    picture, label = _picture_column(features, data), _label_column(features)
    names = getattr(features[label], "names", None) if label else None
    parts: dict[str, Part] = {}
    for name, role in roles.items():
        part = _row_part(tables[name], name, picture, label, names)
        parts.setdefault(role, part)
    return parts, names


def _row_part(rows: Dataset, split: str, picture: str, label: str | None, names: Sequence[str] | None) -> Part:
    import datasets

    ids = [str(value) for value in _values(rows, "source_id")] if "source_id" in rows.column_names else None
    pictures = rows.select_columns([picture]).cast_column(picture, datasets.Image(decode=False))
    store = RowStore(pictures, split, ids)
    if label is None or label not in rows.column_names:
        return Part(store, None)
    classes = _values(rows, label)
    if names is not None:
        classes = [None if value is None or value < 0 else names[value] for value in classes]
    if None not in classes:
        return Part(store, classes)
    if any(value is not None for value in classes):
        first = store.source_id(classes.index(None))
        raise UserError(
            f"row {first!r} has no {label!r}; expected a label in every row or in none. Fill or drop that column"
        )
    return Part(store, None)  # test splits of public data sets hide their labels as -1


def _values(rows: Dataset, column: str) -> list[Any]:
    return rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()


def _picture_column(features: Mapping[str, Any], data: str | Path) -> str:
    """The column of type Image; in files written without that type, the one of encoded bytes."""
    import datasets

    images = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    encoded = [
        name
        for name, feature in features.items()
        if getattr(feature, "dtype", None) == "binary"
        or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})
    ]
    if not images and not encoded:
        columns = ", ".join(features)
        raise UserError(
            f"{str(data)!r} has the columns {columns}; expected a column of images. Cast one to datasets.Image()"
        )
    candidates = images or encoded
    return "image" if "image" in candidates else candidates[0]


def _label_column(features: Mapping[str, Any]) -> str | None:
    """The column of type ClassLabel (`label` first), else one of whole numbers or strings with a name for labels."""
    import datasets

    named = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    usual = [name for name in ("label", "labels", "class") if name in features]
    if named:
        return next((name for name in usual if name in named), named[0])
    plain = re.compile(r"u?int\d+|(large_)?string|bool")
    return next((name for name in usual if plain.fullmatch(str(getattr(features[name], "dtype", None)))), None)


@contextmanager
def _one_line_errors(found: str) -> Iterator[None]:
    """Whatever `datasets` raises becomes a UserError, and its progress bars keep quiet where nobody watches."""
    import datasets

    silence = not sys.stderr.isatty() and not datasets.are_progress_bars_disabled()
    if silence:
        datasets.disable_progress_bars()
    try:
        yield
    except Exception as error:
        raise UserError(f"{found} ({one_line(error)}); expected {EXPECTED}. Check the name or the path") from error
    finally:
        if silence:
            datasets.enable_progress_bars()
