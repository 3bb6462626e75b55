"""Rows of a data set as parts: Parquet, saved data sets and the Hub, through `datasets`.

`datasets` is imported where it is used, so that a plain folder of images does without it. Its own decoding is switched
off: there a corrupt picture ends the loop, here it is one unreadable picture. Cells are read as Arrow holds them, whatever
format a data set was saved with: pictures as bytes of any Arrow type, alone, beside a path, or as the one element of a list."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from stage1_tokenizer.data.folder_sources import begins_as_image
from stage1_tokenizer.data.source_splits import (
    EXPECTED,
    SPLIT_NAMES,
    TRAIN,
    Part,
    one_line,
    printable,
    roles_of,
    split_roles,
)
from training_harness.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset

IMAGE_COLUMN_NAMES = ("image", "img", "picture", "photo", "jpg", "jpeg", "png", "webp", "bytes")
LABEL_NAMES = ("label", "labels", "class")
ID_NAME = "source_id"


@dataclass(frozen=True)
class RowStore:
    """One column of undecoded pictures; the id is the row's own, or split name and row number."""

    pictures: Dataset  # one column, read as Arrow
    split: str
    ids: list[str] | None

    def __len__(self) -> int:
        return len(self.pictures)

    def source_id(self, i: int) -> str:
        return self.ids[i] if self.ids is not None else f"{self.split}/{i:05d}"

    def read_bytes(self, i: int) -> bytes:
        cell = self.pictures[i].column(0)[0].as_py()
        if isinstance(cell, list):
            if len(cell) > 1:
                raise ValueError(f"the row holds {len(cell)} images; expected one")
            cell = cell[0] if cell else None
        if isinstance(cell, dict):
            content, path = cell.get("bytes"), cell.get("path")
            cell = content if content is not None or path is None else Path(path).read_bytes()
        if cell is None:
            raise ValueError("the row holds no picture")
        return bytes(cell)

    def byte_sizes(self) -> list[int]:
        column = self.pictures[:].column(0)
        return [size for chunk in column.chunks for size in _byte_lengths(chunk).tolist()]


def _byte_lengths(array: Any) -> np.ndarray:
    """Bytes in each cell of an Arrow array of any type that holds images; 0 for a cell without."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_dictionary(kind):
        return _byte_lengths(array.dictionary_decode())
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return _byte_lengths(pc.struct_field(array, "bytes"))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        parents = pc.list_parent_indices(array).to_numpy(zero_copy_only=False)
        return np.bincount(parents, _byte_lengths(pc.list_flatten(array)), len(array)).astype(np.int64)
    if pa.types.is_binary_view(kind):
        array = array.cast(pa.large_binary())
    elif not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)):
        return np.zeros(len(array), np.int64)
    return np.asarray(pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False), np.int64)


def parquet_splits(root: Path, paths: list[str]) -> dict[str, list[str]]:
    """Split → files, by a file's name or the nearest folder named so; the rest is the train split where nothing is."""
    stems = {path: PurePosixPath(path).stem for path in paths}
    of_files = split_roles(set(stems.values()))
    if len(set(stems.values())) > 1:
        by_any_lead = split_roles(set(stems.values()), any_lead=True)  # photos-train, drawings-train, photos-test
        if len(by_any_lead) == len(set(stems.values())) and TRAIN in by_any_lead.values():
            of_files = by_any_lead
    of_folders = split_roles({part for path in paths for part in PurePosixPath(path).parts[:-1]})
    splits: dict[str, list[str]] = {}
    rest: list[str] = []
    for path in paths:
        names = [stems[path], *reversed(PurePosixPath(path).parts[:-1])]
        found = (
            roles[name]
            for roles, name in zip([of_files, *[of_folders] * len(names)], names, strict=False)
            if name in roles
        )
        role = next(found, None)
        (rest if role is None else splits.setdefault(role, [])).append(str(root / path))
    if rest:
        splits.setdefault(TRAIN, rest)
    return splits


def saved_splits(path: Path) -> dict[str, Path]:
    """Split → folder that `save_to_disk` wrote; empty where there is none."""
    if (path / "state.json").exists():
        return {TRAIN: path}
    if (path / "dataset_dict.json").exists():
        try:
            return {name: path / name for name in json.loads((path / "dataset_dict.json").read_text("utf-8"))["splits"]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{str(path / 'dataset_dict.json')!r} does not list the splits ({one_line(error)}); expected what save_to_disk "
                "wrote. Save the data set again"
            ) from error
    folders = [info.parent for info in sorted(path.glob("*/dataset_info.json"))]
    return {folder.name: folder for folder in folders if (folder / "state.json").exists()}


def tables_with_images(root: Path, paths: list[str]) -> list[str]:
    """The Parquet files that hold pictures; those that cannot be read count when others do."""
    held: dict[str, bool | None] = {}
    for path in paths:
        try:
            held[path] = _holds_images(root / path)
        except Exception:  # Arrow raises errors of many classes on broken files
            held[path] = None
    return [path for path in paths if held[path] is not False] if True in held.values() else []


def _holds_images(path: Path) -> bool:
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        parquet = pq.ParquetFile(file)
        for column in _columns_of_bytes(parquet.schema_arrow):
            for batch in parquet.iter_batches(batch_size=1, columns=[column]):
                cell = batch.column(0)[0].as_py()
                cell = cell[0] if isinstance(cell, list) and cell else cell
                content = cell.get("bytes") if isinstance(cell, dict) else cell
                if isinstance(content, bytes) and begins_as_image(content[:32]):
                    return True
                break
    return False


# Loading


def load_saved(folders: Mapping[str, Path], data: str | Path) -> Mapping[str, Dataset]:
    """What `save_to_disk` wrote, by the name of its split."""
    with _one_line_errors(f"{str(data)!r} could not be read as a saved data set"):
        return {split: _load_folder(folder) for split, folder in folders.items()}


def _load_folder(folder: Path) -> Dataset:
    import datasets

    try:
        return datasets.load_from_disk(folder)
    except Exception:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        if state.get("_format_type") is None and "::" not in str(folder):
            raise
        # Saved with the format of a library that is not installed here, which does not matter, or in a folder whose name
        # `datasets` takes for an address.
        parts = [datasets.Dataset.from_file(str(folder / part["filename"])) for part in state["_data_files"]]
        return datasets.concatenate_datasets(parts)


def load_parquet(splits: Mapping[str, list[str]], data: str | Path) -> Mapping[str, Dataset]:
    """Parquet files by the name of their split; of their columns those that matter here."""
    import pyarrow.parquet as pq

    loaded = {}
    for split, paths in splits.items():
        schemas = {}
        for path in paths:
            with _one_line_errors(f"{printable(path)!r} could not be read as Parquet"), open(path, "rb") as file:
                parquet = pq.ParquetFile(file)  # a name may look like an address
                if parquet.metadata.num_rows:
                    schemas[path] = parquet.schema_arrow
        if schemas:
            with _one_line_errors(f"{printable(paths[0])!r}, or a file beside it, could not be read as Parquet"):
                loaded[split] = _load_tables(schemas, data)
    if TRAIN not in loaded and TRAIN in splits:
        raise UserError(
            f"the train split of {str(data)!r} is empty; expected at least one image. Check how it was written"
        )
    return loaded


def _load_tables(schemas: Mapping[str, pa.Schema], data: str | Path) -> Dataset:
    """The columns of pictures, labels and ids that all files have."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets.data_files import DataFilesList

    schema = next(iter(schemas.values()))
    common = [name for name in schema.names if all(name in other.names for other in schemas.values())]
    own = _features(schema)
    picture = _image_column(schema, own, data, common)
    read = (ID_NAME, *LABEL_NAMES)
    names = [
        name
        for name in common
        if name == picture or _class_names(own.get(name)) or (name in read and _may_name(schema.field(name).type))
    ]
    narrow = pa.schema([(name, _of_any_length(schema.field(name).type)) for name in names])
    features = datasets.Features.from_arrow_schema(narrow.remove_metadata())
    features.update({name: own[name] for name in names if name in own})
    paths = list(schemas)
    # `datasets` would take these names for addresses, or fail to write them.
    if any("::" in path or "://" in path or printable(path) != path for path in paths):
        tables = [pq.read_table(io.BytesIO(Path(path).read_bytes()), columns=names).cast(narrow) for path in paths]
        return datasets.Dataset(pa.concat_tables(tables).replace_schema_metadata()).cast(features)
    files = DataFilesList(paths, [(path, str(Path(path).stat().st_mtime_ns)) for path in paths])  # no patterns of names
    loaded = datasets.load_dataset("parquet", data_files={TRAIN: files}, columns=names, features=features)
    return loaded[TRAIN]


def load_from_hub(name: str) -> Mapping[str, Dataset]:
    """The data set `name`, by the name of its split; from the cache where the Hub cannot be reached."""
    import datasets

    found = f"{name!r} is no file or folder here, and could not be loaded from the Hub either"
    was_offline = datasets.config.HF_HUB_OFFLINE
    with _one_line_errors(found):
        datasets.config.HF_HUB_OFFLINE = was_offline or not _hub_answers(name)
        try:
            loaded = datasets.load_dataset(name)
            return loaded if isinstance(loaded, dict) else {TRAIN: loaded}
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


# Parts


def row_parts(tables: Mapping[str, Dataset], data: str | Path) -> tuple[dict[str, Part], Sequence[str] | None]:
    """The parts, and the class names in the order of their numbers where the data set itself gives them."""
    roles = roles_of(list(tables), data)
    by_role: dict[str, str] = {}
    for name in sorted(roles, key=lambda name: name.lower() not in SPLIT_NAMES):  # `train` before `train_small`
        by_role.setdefault(roles[name], name)
    train = tables[by_role[TRAIN]]
    names = _class_names(train.features[label]) if (label := _label_column(train)) else None
    parts = {role: _row_part(tables[name], name, label, names, data) for role, name in by_role.items()}
    kinds = {type(value) for part in parts.values() for value in part.classes or ()}
    if len(kinds) > 1:
        parts = {
            role: Part(part.store, part.classes and [str(value) for value in part.classes], part.unlabelled_reason)
            for role, part in parts.items()
        }
    return parts, names


def _row_part(rows: Dataset, split: str, label: str | None, names: Sequence[str] | None, data: str | Path) -> Part:
    schema = rows.features.arrow_schema
    picture = _image_column(schema, rows.features, data, rows.column_names)
    ids = [str(value) for value in _values(rows, ID_NAME)] if ID_NAME in rows.column_names else None
    store = RowStore(rows.select_columns([picture]).with_format("arrow"), split, ids)
    if label is None or label not in rows.column_names:
        return Part(store, None, f"no column of labels is named {', '.join(LABEL_NAMES[:-1])} or {LABEL_NAMES[-1]}")
    classes = _values(rows, label)
    if any(isinstance(value, list) and len(value) > 1 for value in classes):
        return Part(store, None, f"the column {label!r} holds several labels a row")
    classes = [(value[0] if value else None) if isinstance(value, list) else value for value in classes]
    classes = [None if value != value else value for value in classes]  # NaN
    if any(isinstance(value, float) and not value.is_integer() for value in classes):
        return Part(store, None, f"the column {label!r} holds fractions, which are no classes")
    classes = [int(value) if isinstance(value, float) else value for value in classes]
    own = _class_names(rows.features[label]) or names
    if own is not None and not any(isinstance(value, str) for value in classes):
        if wrong := [i for i, value in enumerate(classes) if value is not None and value >= len(own)]:
            raise UserError(
                f"row {store.source_id(wrong[0])!r} of {str(data)!r} has the {label!r} {classes[wrong[0]]}; expected 0 to "
                f"{len(own) - 1}, the classes that it names. Mend that column"
            )
        classes = [None if value is None or value < 0 else own[value] for value in classes]
    elif split != TRAIN and set(classes) == {-1}:
        classes = [None] * len(classes)
    if None not in classes:
        return Part(store, classes)
    if any(value is not None for value in classes):
        first = store.source_id(classes.index(None))
        raise UserError(
            f"row {first!r} of {str(data)!r} has no {label!r}; expected a label in every row or in none. Fill or drop that column"
        )
    return Part(
        store, None, f"the column {label!r} holds no labels"
    )  # test splits of public data sets hide theirs as -1


def _values(rows: Dataset, column: str) -> list[Any]:
    return rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()


# Columns


def _features(schema: pa.Schema) -> Mapping[str, Any]:
    """The features that `datasets` wrote into a file's schema; empty where it did not."""
    import datasets

    try:
        written = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        features = datasets.Features.from_dict(written)
        stored = features.arrow_schema
        return {n: features[n] for n in features if n in schema.names and stored.field(n).type == schema.field(n).type}
    except Exception:  # absent, or written by another version
        return {}


def _image_column(schema: pa.Schema, features: Mapping[str, Any], data: str | Path, names: Sequence[str]) -> str:
    """The column of type Image; in files written without that type, one of encoded bytes."""
    import datasets

    images = [name for name in names if isinstance(_element(features.get(name)), datasets.Image)]
    candidates = images or [name for name in _columns_of_bytes(schema) if name in names]
    if not candidates:
        columns = ", ".join(schema.names)
        raise UserError(
            f"{str(data)!r} has the columns {columns}; expected a column of images. Cast one to datasets.Image()"
        )
    return next((name for name in IMAGE_COLUMN_NAMES if name in candidates), candidates[0])


def _columns_of_bytes(schema: pa.Schema) -> list[str]:
    import pyarrow as pa

    def holds_bytes(kind: pa.DataType) -> bool:
        while True:
            if isinstance(kind, pa.BaseExtensionType):
                kind = kind.storage_type
            elif pa.types.is_dictionary(kind) or _is_list(kind):
                kind = kind.value_type
            elif pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                kind = kind.field("bytes").type
            else:
                break
        is_bytes = (
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_fixed_size_binary,
            pa.types.is_binary_view,
        )
        return any(check(kind) for check in is_bytes)

    return [field.name for field in schema if holds_bytes(field.type)]


def _of_any_length(kind: pa.DataType) -> pa.DataType:
    """A type with bytes of fixed size as bytes of any size: `datasets` knows the former from version 5 on."""
    import pyarrow as pa

    if pa.types.is_fixed_size_binary(kind):
        return pa.binary()
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_of_any_length(kind.value_type), kind.list_size)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return (pa.list_ if pa.types.is_list(kind) else pa.large_list)(_of_any_length(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _of_any_length(field.type)) for field in kind])
    return kind


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(check(kind) for check in lists)


def _label_column(rows: Dataset) -> str | None:
    """The column of type ClassLabel (`label` first), else one of numbers or strings with a name for labels."""
    features = rows.features
    named = [name for name, feature in features.items() if _class_names(feature)]
    usual = [name for name in LABEL_NAMES if name in features]
    if named:
        return next((name for name in usual if name in named), named[0])
    return next((name for name in usual if _may_name(features.arrow_schema.field(name).type)), None)


def _may_name(kind: pa.DataType) -> bool:
    """Whether cells of a type can be classes or ids: numbers or strings, alone or in lists."""
    import pyarrow as pa

    while pa.types.is_dictionary(kind) or _is_list(kind):
        kind = kind.value_type
    numbers = pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind)
    strings = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return numbers or strings


def _element(feature: Any) -> Any:
    """What a list is of; other features as they are."""
    while True:
        if isinstance(feature, list) and len(feature) == 1:
            (feature,) = feature
        elif type(feature).__name__ in ("List", "LargeList", "Sequence"):
            feature = feature.feature
        else:
            return feature


def _class_names(feature: Any) -> list[str] | None:
    """The names of a ClassLabel, alone or as the element of a list."""
    import datasets

    feature = _element(feature)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) and feature.names else None


@contextmanager
def _one_line_errors(found: str) -> Iterator[None]:
    """Whatever `datasets` raises becomes a UserError; its progress bars and notices stay quiet."""
    import datasets

    logger = datasets.utils.logging.get_logger("datasets")
    level, showing = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL + 1)
    if showing:
        datasets.disable_progress_bars()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error  # `datasets` wraps what went wrong
        raise UserError(f"{found} ({one_line(cause)}); expected {EXPECTED}. Check the name or the path") from error
    finally:
        logger.setLevel(level)
        if showing:
            datasets.enable_progress_bars()
