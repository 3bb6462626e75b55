"""A folder of images as parts: which files are pictures, which folders are splits and which are classes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import PIL.Image

from stage1_tokenizer.data.source_splits import EXPECTED, SPLIT_NAMES, TRAIN, Part, roles_of
from training_harness.errors import UserError

NEVER_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow registers these for opening and has no decoder for them


@dataclass(frozen=True)
class FileStore:
    """Files below one folder; the id is the path relative to it."""

    root: Path
    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def source_id(self, i: int) -> str:
        # A name that is no UTF-8 holds surrogates, which neither Arrow nor a terminal takes.
        return self.paths[i].encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")

    def encoded(self, i: int) -> bytes:
        return (self.root / self.paths[i]).read_bytes()

    def sizes(self) -> list[int]:
        return [_size_of(self.root / path) for path in self.paths]


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a link to nothing: reading it fails too, and says so
        return 0


@cache
def image_endings() -> frozenset[str]:
    endings = PIL.Image.registered_extensions().items()
    return frozenset(end for end, kind in endings if kind in PIL.Image.OPEN and kind not in NEVER_DECODED) | {".npy"}


def files_below(root: Path, endings: frozenset[str], besides: set[str] | None = None) -> list[str]:
    """Relative posix paths of the files below `root` with one of the endings, sorted."""
    found: list[str] = []
    pending: list[tuple[str, str, tuple[str, ...]]] = [("", os.path.realpath(root), ())]
    while pending:
        prefix, folder, above = pending.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise UserError(
                f"cannot list {folder!r} ({error.strerror}); expected a readable folder. Check its rights"
            ) from error
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX" or entry.name in (besides or ()):
                continue
            if entry.is_dir():
                target = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                if target not in (*above, folder):  # a link to a folder around it would never end
                    pending.append((f"{prefix}{entry.name}/", target, (*above, folder)))
            elif os.path.splitext(entry.name)[1].lower() in endings and (entry.is_file() or entry.is_symlink()):
                found.append(prefix + entry.name)
    return sorted(found)


def folder_parts(root: Path, paths: list[str], data: str | Path) -> dict[str, Part]:
    """Splits and classes from where the pictures lie, by the table in this module's header."""
    if not paths:
        found = "is empty" if not any(root.iterdir()) else "holds no image"
        raise UserError(
            f"the folder {str(data)!r} {found}; expected {EXPECTED}. Put images in it, or give another folder"
        )
    shared = os.path.commonpath([os.path.dirname(path) for path in (paths[0], paths[-1])])  # sorted: shared by all
    start = len(shared) + 1 if shared else 0
    folders = {_first_folder(path, start) for path in paths} - {""}
    known = {SPLIT_NAMES.get(folder.lower()) for folder in folders}
    are_splits = bool(folders) and (None not in known or (TRAIN in known and len(known - {None}) > 1))
    roles = roles_of(sorted(folders), data) if are_splits else {}

    members: dict[str, tuple[list[str], list[str]]] = {}
    for path in paths:
        folder = _first_folder(path, start)
        role = roles.get(folder) if are_splits else TRAIN
        if role is None:
            continue
        kind = _first_folder(path, start + len(folder) + 1) if are_splits else folder
        in_role = members.setdefault(role, ([], []))
        in_role[0].append(path)
        in_role[1].append(kind)
    return {
        role: Part(FileStore(root, files), classes if all(classes) else None)
        for role, (files, classes) in members.items()
    }


def _first_folder(path: str, start: int) -> str:
    """The folder whose name begins at `start` ("cat" in "train/cat/1.png" at 6), or "" where a file's name does."""
    end = path.find("/", start)
    return path[start:end] if end >= 0 else ""
