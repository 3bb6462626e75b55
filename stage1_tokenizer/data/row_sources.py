"""Splits of rows: Parquet, saved data sets and the Hub, read through `datasets`.

`datasets` is imported where it is used, so that a folder of images works without it. Its own decoding is off: there, a corrupt
image ends the loop; here, it is one unreadable image. Cells are read as Arrow values, whatever format the data set was saved
with. An image is bytes of any Arrow type, either alone, with a path, or as the only element of a list.
"""

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

from stage1_tokenizer.data.folder_sources import has_image_signature
from stage1_tokenizer.data.source_splits import (
    EXPECTED_DATA,
    SPLIT_NAMES,
    TRAIN,
    RawSplit,
    assign_split_roles,
    escape_undecodable_name,
    find_split_roles,
    summarize_error,
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
    """One column of encoded images. The id is the row's `source_id`, or the split's name and the row's number."""

    images: Dataset  # one column, in the Arrow format
    split: str
    ids: list[str] | None

    def __len__(self) -> int:
        return len(self.images)

    def source_id(self, i: int) -> str:
        """Return the id of row i."""
        return self.ids[i] if self.ids is not None else f"{self.split}/{i:05d}"

    def read_bytes(self, i: int) -> bytes:
        """Read the encoded image of row i.

        Raises:
            ValueError: the row has no image, or several.
        """
        cell = self.images[i].column(0)[0].as_py()
        if isinstance(cell, list):
            if len(cell) > 1:
                raise ValueError(f"the row holds {len(cell)} images; expected one")
            cell = cell[0] if cell else None
        if isinstance(cell, dict):
            content, path = cell.get("bytes"), cell.get("path")
            cell = content if content is not None or path is None else Path(path).read_bytes()
        if cell is None:
            raise ValueError("the row holds no image")
        return bytes(cell)

    def byte_sizes(self) -> list[int]:
        """Return the bytes of the image in each row; 0 for a row without image bytes."""
        column = self.images[:].column(0)
        return [size for chunk in column.chunks for size in _cell_byte_sizes(chunk).tolist()]


def _cell_byte_sizes(array: Any) -> np.ndarray:
    """Measure the bytes in each cell of an Arrow array of any type that can hold images; 0 for a cell without bytes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = array.type
    if pa.types.is_dictionary(kind):
        return _cell_byte_sizes(array.dictionary_decode())
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        return _cell_byte_sizes(pc.struct_field(array, "bytes"))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        parents = pc.list_parent_indices(array).to_numpy(zero_copy_only=False)
        return np.bincount(parents, _cell_byte_sizes(pc.list_flatten(array)), len(array)).astype(np.int64)
    if pa.types.is_binary_view(kind):
        array = array.cast(pa.large_binary())
    elif not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)):
        return np.zeros(len(array), np.int64)
    return np.asarray(pc.fill_null(pc.binary_length(array), 0).to_numpy(zero_copy_only=False), np.int64)


def group_parquet_files(root: Path, paths: list[str]) -> dict[str, list[str]]:
    """Group Parquet files by split.

    A file's own name decides, or the name of the nearest folder that is a split's name. Files without such a name are the
    train split if no other file is.

    Args:
        root: the folder of the files.
        paths: relative posix paths.

    Returns:
        The full paths of each split.
    """
    stems = {path: PurePosixPath(path).stem for path in paths}
    file_roles = find_split_roles(set(stems.values()))
    if len(set(stems.values())) > 1:
        # photos-train, drawings-train, photos-test
        prefixed_roles = find_split_roles(set(stems.values()), allow_any_prefix=True)
        if len(prefixed_roles) == len(set(stems.values())) and TRAIN in prefixed_roles.values():
            file_roles = prefixed_roles
    folder_roles = find_split_roles({part for path in paths for part in PurePosixPath(path).parts[:-1]})
    splits: dict[str, list[str]] = {}
    unassigned: list[str] = []
    for path in paths:
        names = [stems[path], *reversed(PurePosixPath(path).parts[:-1])]
        matches = (
            roles[name]
            for roles, name in zip([file_roles, *[folder_roles] * len(names)], names, strict=False)
            if name in roles
        )
        role = next(matches, None)
        (unassigned if role is None else splits.setdefault(role, [])).append(str(root / path))
    if unassigned:
        splits.setdefault(TRAIN, unassigned)
    return splits


def find_saved_splits(path: Path) -> dict[str, Path]:
    """Find the folders of splits that `save_to_disk` wrote; empty if there are none.

    Raises:
        UserError: `dataset_dict.json` is broken.
    """
    if (path / "state.json").exists():
        return {TRAIN: path}
    if (path / "dataset_dict.json").exists():
        try:
            return {name: path / name for name in json.loads((path / "dataset_dict.json").read_text("utf-8"))["splits"]}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{str(path / 'dataset_dict.json')!r} does not list the splits ({summarize_error(error)}); expected a file of "
                "save_to_disk. Save the data set again"
            ) from error
    folders = [info.parent for info in sorted(path.glob("*/dataset_info.json"))]
    return {folder.name: folder for folder in folders if (folder / "state.json").exists()}


def select_image_tables(root: Path, paths: list[str]) -> list[str]:
    """Select the Parquet files that contain images; files that cannot be read are included if any other contains images."""
    contains_images: dict[str, bool | None] = {}
    for path in paths:
        try:
            contains_images[path] = _contains_images(root / path)
        except Exception:  # for broken files Arrow raises errors of many classes
            contains_images[path] = None
    if True not in contains_images.values():
        return []
    return [path for path in paths if contains_images[path] is not False]


def _contains_images(path: Path) -> bool:
    import pyarrow.parquet as pq

    with path.open("rb") as file:
        parquet = pq.ParquetFile(file)
        for column in _find_binary_columns(parquet.schema_arrow):
            for batch in parquet.iter_batches(batch_size=1, columns=[column]):
                cell = batch.column(0)[0].as_py()
                cell = cell[0] if isinstance(cell, list) and cell else cell
                content = cell.get("bytes") if isinstance(cell, dict) else cell
                if isinstance(content, bytes) and has_image_signature(content[:32]):
                    return True
                break
    return False


# Loading


def load_saved(folders: Mapping[str, Path], data: str | Path) -> Mapping[str, Dataset]:
    """Load the splits that `save_to_disk` wrote, by name."""
    with _wrap_dataset_errors(f"{str(data)!r} could not be read as a saved data set"):
        return {split: _load_folder(folder) for split, folder in folders.items()}


def _load_folder(folder: Path) -> Dataset:
    import datasets

    try:
        return datasets.load_from_disk(folder)
    except Exception:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        if state.get("_format_type") is None and "::" not in str(folder):
            raise
        # The format may be of a library that is not installed, which does not matter here. Or `datasets` takes the folder's
        # name for an address.
        parts = [datasets.Dataset.from_file(str(folder / part["filename"])) for part in state["_data_files"]]
        return datasets.concatenate_datasets(parts)


def load_parquet(splits: Mapping[str, list[str]], data: str | Path) -> Mapping[str, Dataset]:
    """Load the columns of images, labels and ids of Parquet files.

    Args:
        splits: the paths of each split's files.
        data: the path that the user passed, for messages.

    Raises:
        UserError: a file cannot be read, there is no column of images, or the train split has no rows.
    """
    import pyarrow.parquet as pq

    loaded = {}
    for split, paths in splits.items():
        schemas = {}
        for path in paths:
            message = f"{escape_undecodable_name(path)!r} could not be read as Parquet"
            # An open file, because a path may look like an address.
            with _wrap_dataset_errors(message), open(path, "rb") as file:
                parquet = pq.ParquetFile(file)
                if parquet.metadata.num_rows:
                    schemas[path] = parquet.schema_arrow
        if schemas:
            message = (
                f"{escape_undecodable_name(paths[0])!r}, or another file of its split, could not be read as Parquet"
            )
            with _wrap_dataset_errors(message):
                loaded[split] = _load_tables(schemas, data)
    if TRAIN not in loaded and TRAIN in splits:
        raise UserError(
            f"the train split of {str(data)!r} is empty; expected at least one image. Check how it was written"
        )
    return loaded


def _load_tables(schemas: Mapping[str, pa.Schema], data: str | Path) -> Dataset:
    """Load the columns of images, labels and ids that all files have."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets.data_files import DataFilesList

    schema = next(iter(schemas.values()))
    common = [name for name in schema.names if all(name in other.names for other in schemas.values())]
    stored = _stored_features(schema)
    image_column = _find_image_column(schema, stored, data, common)
    known_names = (ID_NAME, *LABEL_NAMES)
    names = [
        name
        for name in common
        if name == image_column
        or _class_label_names(stored.get(name))
        or (name in known_names and _can_hold_labels(schema.field(name).type))
    ]
    read_schema = pa.schema([(name, _to_variable_length(schema.field(name).type)) for name in names])
    features = datasets.Features.from_arrow_schema(read_schema.remove_metadata())
    features.update({name: stored[name] for name in names if name in stored})
    paths = list(schemas)
    # `datasets` takes these paths for addresses, or fails to write them.
    if any("::" in path or "://" in path or escape_undecodable_name(path) != path for path in paths):
        tables = [pq.read_table(io.BytesIO(Path(path).read_bytes()), columns=names).cast(read_schema) for path in paths]
        return datasets.Dataset(pa.concat_tables(tables).replace_schema_metadata()).cast(features)
    # A DataFilesList, so that `datasets` does not take a path for a pattern.
    files = DataFilesList(paths, [(path, str(Path(path).stat().st_mtime_ns)) for path in paths])
    loaded = datasets.load_dataset("parquet", data_files={TRAIN: files}, columns=names, features=features)
    return loaded[TRAIN]


def load_from_hub(name: str) -> Mapping[str, Dataset]:
    """Load the splits of a data set on the Hub, or from the local cache if the Hub cannot be reached.

    Raises:
        UserError: the data set could not be loaded.
    """
    import datasets

    was_offline = datasets.config.HF_HUB_OFFLINE
    with _wrap_dataset_errors(f"{name!r} is no file or folder here, and could not be loaded from the Hub either"):
        datasets.config.HF_HUB_OFFLINE = was_offline or not _is_hub_reachable(name)
        try:
            loaded = datasets.load_dataset(name)
            return loaded if isinstance(loaded, dict) else {TRAIN: loaded}
        finally:
            datasets.config.HF_HUB_OFFLINE = was_offline


def _is_hub_reachable(name: str) -> bool:
    """Whether the Hub answers. Without this check, `datasets` retries for half a minute and prints warnings."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        HfApi().dataset_info(name, timeout=10)
    except (HfHubHTTPError, HFValidationError):
        return True  # the Hub may refuse this name: `datasets` then reports it
    except Exception:  # no route, no name server, no answer in time: the classes differ between its HTTP clients
        return False
    return True


# Splits


def build_row_splits(
    tables: Mapping[str, Dataset], data: str | Path
) -> tuple[dict[str, RawSplit], Sequence[str] | None]:
    """Build splits from tables.

    Args:
        tables: the rows of each split, by the split's name.
        data: the path or name that the user passed, for messages.

    Returns:
        The splits by role, and the class names in the order of their numbers if the data set declares them.

    Raises:
        UserError: there is no train split, no column of images, or a label is missing or out of range.
    """
    roles = assign_split_roles(list(tables), data)
    names_by_role: dict[str, str] = {}
    for name in sorted(roles, key=lambda name: name.lower() not in SPLIT_NAMES):  # `train` before `train_small`
        names_by_role.setdefault(roles[name], name)
    train = tables[names_by_role[TRAIN]]
    class_names = _class_label_names(train.features[label]) if (label := _find_label_column(train)) else None
    splits = {
        role: _build_row_split(tables[name], name, label, class_names, data) for role, name in names_by_role.items()
    }
    types = {type(value) for split in splits.values() for value in split.classes or ()}
    if len(types) > 1:
        splits = {
            role: RawSplit(
                split.store, split.classes and [str(value) for value in split.classes], split.unlabelled_reason
            )
            for role, split in splits.items()
        }
    return splits, class_names


def _build_row_split(
    rows: Dataset, split: str, label: str | None, train_class_names: Sequence[str] | None, data: str | Path
) -> RawSplit:
    schema = rows.features.arrow_schema
    image_column = _find_image_column(schema, rows.features, data, rows.column_names)
    ids = [str(value) for value in _read_column(rows, ID_NAME)] if ID_NAME in rows.column_names else None
    store = RowStore(rows.select_columns([image_column]).with_format("arrow"), split, ids)
    if label is None or label not in rows.column_names:
        return RawSplit(store, None, f"no column of labels is named {', '.join(LABEL_NAMES[:-1])} or {LABEL_NAMES[-1]}")
    classes = _read_column(rows, label)
    if any(isinstance(value, list) and len(value) > 1 for value in classes):
        return RawSplit(store, None, f"the column {label!r} holds several labels a row")
    classes = [(value[0] if value else None) if isinstance(value, list) else value for value in classes]
    classes = [None if value != value else value for value in classes]  # NaN
    if any(isinstance(value, float) and not value.is_integer() for value in classes):
        return RawSplit(store, None, f"the column {label!r} holds fractions, which are no classes")
    classes = [int(value) if isinstance(value, float) else value for value in classes]
    class_names = _class_label_names(rows.features[label]) or train_class_names
    if class_names is not None and not any(isinstance(value, str) for value in classes):
        if too_large := [i for i, value in enumerate(classes) if value is not None and value >= len(class_names)]:
            raise UserError(
                f"row {store.source_id(too_large[0])!r} of {str(data)!r} has the {label!r} {classes[too_large[0]]}; expected 0 "
                f"to {len(class_names) - 1}, one of the named classes. Correct this column"
            )
        classes = [None if value is None or value < 0 else class_names[value] for value in classes]
    elif split != TRAIN and set(classes) == {-1}:  # public data sets hide the labels of the test split as -1
        classes = [None] * len(classes)
    if None not in classes:
        return RawSplit(store, classes)
    if any(value is not None for value in classes):
        first = store.source_id(classes.index(None))
        raise UserError(
            f"row {first!r} of {str(data)!r} has no {label!r}; expected a label in every row or in none. Fill or drop this column"
        )
    return RawSplit(store, None, f"the column {label!r} holds no labels")


def _read_column(rows: Dataset, column: str) -> list[Any]:
    return rows.select_columns([column]).with_format("arrow")[:][column].to_pylist()


# Columns


def _stored_features(schema: pa.Schema) -> Mapping[str, Any]:
    """Read the features that `datasets` wrote into a file's schema; empty if there are none."""
    import datasets

    try:
        metadata = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        features = datasets.Features.from_dict(metadata)
        stored = features.arrow_schema
        return {n: features[n] for n in features if n in schema.names and stored.field(n).type == schema.field(n).type}
    except Exception:  # absent, or written by another version
        return {}


def _find_image_column(schema: pa.Schema, features: Mapping[str, Any], data: str | Path, names: Sequence[str]) -> str:
    """Find the column of type Image, or a column of bytes if no column has this type."""
    import datasets

    images = [name for name in names if isinstance(_element_feature(features.get(name)), datasets.Image)]
    candidates = images or [name for name in _find_binary_columns(schema) if name in names]
    if not candidates:
        columns = ", ".join(schema.names)
        raise UserError(
            f"{str(data)!r} has the columns {columns}; expected a column of images. Cast one to datasets.Image()"
        )
    return next((name for name in IMAGE_COLUMN_NAMES if name in candidates), candidates[0])


def _find_binary_columns(schema: pa.Schema) -> list[str]:
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


def _to_variable_length(kind: pa.DataType) -> pa.DataType:
    """Replace bytes of fixed size in a type by bytes of variable size: before version 5 `datasets` does not know them."""
    import pyarrow as pa

    if pa.types.is_fixed_size_binary(kind):
        return pa.binary()
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_to_variable_length(kind.value_type), kind.list_size)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return (pa.list_ if pa.types.is_list(kind) else pa.large_list)(_to_variable_length(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _to_variable_length(field.type)) for field in kind])
    return kind


def _is_list(kind: pa.DataType) -> bool:
    import pyarrow as pa

    list_checks = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    return any(check(kind) for check in list_checks)


def _find_label_column(rows: Dataset) -> str | None:
    """Find the column of type ClassLabel (`label` first), or a column of numbers or strings with a name in LABEL_NAMES."""
    features = rows.features
    class_label_columns = [name for name, feature in features.items() if _class_label_names(feature)]
    usual_names = [name for name in LABEL_NAMES if name in features]
    if class_label_columns:
        return next((name for name in usual_names if name in class_label_columns), class_label_columns[0])
    return next((name for name in usual_names if _can_hold_labels(features.arrow_schema.field(name).type)), None)


def _can_hold_labels(kind: pa.DataType) -> bool:
    """Whether cells of a type can be classes or ids: numbers or strings, alone or in lists."""
    import pyarrow as pa

    while pa.types.is_dictionary(kind) or _is_list(kind):
        kind = kind.value_type
    is_number = pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_floating(kind)
    is_string = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return is_number or is_string


def _element_feature(feature: Any) -> Any:
    """Return the feature of a list's elements; return other features unchanged."""
    while True:
        if isinstance(feature, list) and len(feature) == 1:
            (feature,) = feature
        elif type(feature).__name__ in ("List", "LargeList", "Sequence"):
            feature = feature.feature
        else:
            return feature


def _class_label_names(feature: Any) -> list[str] | None:
    """Return the names of a ClassLabel, alone or as the element of a list; None for other features."""
    import datasets

    feature = _element_feature(feature)
    return list(feature.names) if isinstance(feature, datasets.ClassLabel) and feature.names else None


@contextmanager
def _wrap_dataset_errors(problem: str) -> Iterator[None]:
    """Turn any error of `datasets` into a UserError; suppress its progress bars and warnings."""
    import datasets

    logger = datasets.utils.logging.get_logger("datasets")
    level, had_progress_bars = logger.level, not datasets.are_progress_bars_disabled()
    logger.setLevel(logging.CRITICAL + 1)
    if had_progress_bars:
        datasets.disable_progress_bars()
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error  # `datasets` wraps the cause
        raise UserError(
            f"{problem} ({summarize_error(cause)}); expected {EXPECTED_DATA}. Check the name or the path"
        ) from error
    finally:
        logger.setLevel(level)
        if had_progress_bars:
            datasets.enable_progress_bars()
