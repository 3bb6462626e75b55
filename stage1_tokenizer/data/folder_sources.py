"""A folder of images as parts: which files are images, which folders are splits and which are classes."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import PIL.Image

from stage1_tokenizer.data.image_decoding import NUMPY_MAGIC
from stage1_tokenizer.data.source_splits import (
    EXPECTED,
    SPLIT_WORDS,
    TEST,
    TRAIN,
    VALIDATION,
    Part,
    are_splits,
    is_neutral,
    printable,
    roles_of,
    split_roles,
    words_of,
)
from training_harness.errors import UserError

NEVER_DECODED = {"BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow registers these for opening and has no decoder for them
KNOWN_BY_CONTENT = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "AVIF", "QOI", "PSD", "DDS")
LOOKED_AT = 32  # bytes of a file without an ending
# What operating systems, NAS boxes and notebooks leave in folders; hidden files come on top.
# fmt: off
SYSTEM_FILES = {
    "@eadir", "@recycle", "@recently-snapshot", "@tmp", "@synoresource", "#recycle", "#snapshot", "__macosx",
    "__pycache__", "$recycle.bin", "recycler", "recycled", "lost+found", "found.000", "thumbs.db", "ehthumbs.db",
    "desktop.ini", "system volume information", "network trash folder", "temporary items", "icon\r",
}
# fmt: on


@dataclass(frozen=True)
class FileStore:
    """Files below one folder; the id is the path relative to it."""

    root: Path
    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def source_id(self, i: int) -> str:
        return printable(self.paths[i])

    def read_bytes(self, i: int) -> bytes:
        return (self.root / self.paths[i]).read_bytes()

    def byte_sizes(self) -> list[int]:
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


def files_below(root: Path, endings: frozenset[str] | None = None) -> list[str]:
    """Relative posix paths of the files below `root`, sorted: those with one of the endings, or all of them."""
    found: list[str] = []
    pending: list[tuple[str, str, tuple[str, ...]]] = [("", os.path.realpath(root), ())]
    while pending:
        prefix, folder, above = pending.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name.lower() in SYSTEM_FILES:
                        continue
                    if entry.is_dir():
                        target = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                        if target not in (*above, folder):  # a link to a folder around it would never end
                            pending.append((f"{prefix}{entry.name}/", target, (*above, folder)))
                    elif (endings is None or _ending(entry.name) in endings) and _may_be_read(entry):
                        found.append(prefix + entry.name)
        except OSError as error:
            raise UserError(
                f"cannot list {str(root / prefix)!r} ({error.strerror}); expected a readable folder. Check its rights"
            ) from error
    return sorted(found)


def _may_be_read(entry: os.DirEntry[str]) -> bool:
    """A file, or a link to nothing, which is listed as unreadable; a pipe or a device would never end."""
    return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))


def image_files(root: Path, files: list[str]) -> list[str]:
    """Those of the files below `root` that are images: by their endings, or without an ending by how they begin."""
    endings = image_endings()
    return [
        path
        for path in files
        if (end := _ending(path)) in endings or (_says_nothing(end, endings) and _file_begins_as_image(root / path))
    ]


def _ending(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _says_nothing(ending: str, endings: frozenset[str]) -> bool:
    """Whether it is no ending, a hash or a number in its place (`a.3f9c01d2`), or more than one (`a.jpg?w=64`)."""
    if re.fullmatch(r"(\.(?=[a-f]*\d)[0-9a-f]+)?", ending):
        return True
    known = re.match(r"\.[a-z0-9]+", ending)
    return known is not None and known[0] in endings


def _file_begins_as_image(path: Path) -> bool:
    """Whether a file begins as the formats do that people have images in; a text never does."""
    try:
        with path.open("rb") as file:
            begin = file.read(LOOKED_AT)
    except OSError:
        return False
    return begins_as_image(begin)


def begins_as_image(begin: bytes) -> bool:
    """Whether bytes begin as an image: some formats are known by two letters, with which a text may begin too."""
    if begin.startswith(NUMPY_MAGIC):
        return True
    if not any(byte < 9 or byte > 126 for byte in begin):
        return False
    PIL.Image.init()
    accepts = (PIL.Image.OPEN[kind][1] for kind in KNOWN_BY_CONTENT if kind in PIL.Image.OPEN)
    return any(accept is not None and accept(begin) is True for accept in accepts)


def folder_parts(root: Path, paths: list[str], data: str | Path, files: list[str]) -> dict[str, Part]:
    """Splits and classes from where the images lie, by the table in the header of `sources`.

    `files` are all files there, for the message where none is an image."""
    if not paths:
        endings = Counter(_ending(path) or "no ending" for path in files).most_common(3)
        kinds = f" (its files: {', '.join(f'{count} {end}' for end, count in endings)})" if endings else ""
        found = f"holds no image{kinds}" if any(root.iterdir()) else "is empty"
        raise UserError(
            f"the folder {str(data)!r} {found}; expected {EXPECTED}. Put images in it, or give another folder"
        )
    shared = os.path.commonpath([os.path.dirname(path) for path in (paths[0], paths[-1])])  # sorted: shared by all
    start = len(shared) + 1 if shared else 0
    folders = {_first_folder(path, start) for path in paths} - {""}
    roles = split_roles(folders)
    if are_splits(sorted(folders), roles):
        if TRAIN not in roles.values():
            roles = roles_of(sorted(folders), data)  # one split alone is trained on; of several one must be `train`
        return _parts_of_splits(root, paths, start, roles)
    inner = [_first_folder(path, start + len(_first_folder(path, start)) + 1) for path in paths]
    roles = split_roles(set(inner))
    if len(folders) > 1 and all(inner) and len(roles) == len(set(inner)) > 1 and TRAIN in roles.values():
        members = [(path, roles[split], _first_folder(path, start)) for path, split in zip(paths, inner, strict=True)]
        return _parts(root, members)
    return _parts(root, [(path, TRAIN, _first_folder(path, start)) for path in paths])


def _parts_of_splits(root: Path, paths: list[str], start: int, roles: dict[str, str]) -> dict[str, Part]:
    """What lies in the split folders `roles`; their classes are the folders below them."""
    begins = {folder: start + len(folder) + 1 for folder in roles}
    for folder, role in roles.items():
        inside = [path for path in paths if path.startswith(folder + "/", start)]
        while len(only := {_first_folder(path, begins[folder]) for path in inside}) == 1:
            (name,) = only
            if not name or not (is_neutral(name) or split_roles([name], any_lead=True).get(name) == role):
                break
            begins[folder] += len(name) + 1  # train/images/cat, training_set/training_set/cat
    members = []
    for path in paths:
        folder = _first_folder(path, start)
        if folder in roles:
            members.append((path, roles[folder], _first_folder(path, begins[folder])))
    if not any(kind for _, _, kind in members) and (domains := _domains(roles)):
        members = [(path, role, domains[_first_folder(path, start)]) for path, role, _ in members]
    return _parts(root, members)


def _domains(roles: dict[str, str]) -> dict[str, str]:
    """Folder → letter where all split folders have one and train has several: trainA, trainB, testA, testB."""
    letters = {
        folder: "".join(word for word in words_of(folder) if word not in SPLIT_WORDS).upper() for folder in roles
    }
    of_train = [letters[folder] for folder, role in roles.items() if role == TRAIN]
    single = all(len(letter) == 1 and letter.isalpha() for letter in letters.values())
    return letters if single and len(set(of_train)) > 1 else {}


def _parts(root: Path, members: list[tuple[str, str, str]]) -> dict[str, Part]:
    """(path, role, class or "") → the parts; a split with an image that has no class is unlabelled."""
    parts = {}
    for role in (TRAIN, VALIDATION, TEST):
        files = [path for path, own, _ in members if own == role]
        classes = [printable(kind) for _, own, kind in members if own == role]
        if not files:
            continue
        reason = ""
        if not any(classes):
            reason = "there are no class folders"
        elif not all(classes):
            loose, kind = files[classes.index("")], next(filter(None, classes))
            reason = f"{printable(loose)} lies beside class folders such as {kind}; move such images into class folders, or out"
        parts[role] = Part(FileStore(root, files), None if reason else classes, reason)
    return parts


def _first_folder(path: str, start: int) -> str:
    """The folder whose name begins at `start` ("cat" in "train/cat/1.png" at 6), or "" where a file's name does."""
    end = path.find("/", start)
    return path[start:end] if end >= 0 else ""
