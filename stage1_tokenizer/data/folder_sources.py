"""Splits of a folder of images: which files are images, which folders are splits, and which are classes."""

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
    EXPECTED_DATA,
    SPLIT_WORDS,
    TEST,
    TRAIN,
    VALIDATION,
    RawSplit,
    are_split_folders,
    assign_split_roles,
    escape_undecodable_name,
    find_split_roles,
    is_neutral_name,
    split_into_words,
)
from training_harness.errors import UserError

UNDECODABLE_FORMATS = {"BUFR", "GRIB", "HDF5", "MPEG"}  # Pillow registers these for opening and has no decoder for them
SIGNATURE_FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "JPEG2000", "AVIF", "QOI", "PSD", "DDS")
SIGNATURE_BYTES = 32  # read from a file without an extension
# Files and folders that operating systems, NAS devices and notebooks create. Hidden files are ignored too.
# fmt: off
SYSTEM_FILES = {
    "@eadir", "@recycle", "@recently-snapshot", "@tmp", "@synoresource", "#recycle", "#snapshot", "__macosx",
    "__pycache__", "$recycle.bin", "recycler", "recycled", "lost+found", "found.000", "thumbs.db", "ehthumbs.db",
    "desktop.ini", "system volume information", "network trash folder", "temporary items", "icon\r",
}
# fmt: on


@dataclass(frozen=True)
class FileStore:
    """Files below one folder; the id of an image is its path relative to the folder."""

    root: Path
    paths: list[str]

    def __len__(self) -> int:
        return len(self.paths)

    def source_id(self, i: int) -> str:
        """Return the path of file i relative to the folder."""
        return escape_undecodable_name(self.paths[i])

    def read_bytes(self, i: int) -> bytes:
        """Read file i."""
        return (self.root / self.paths[i]).read_bytes()

    def byte_sizes(self) -> list[int]:
        """Return the size of each file in bytes; 0 for a broken link."""
        return [_file_size(self.root / path) for path in self.paths]


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a broken link: it is reported when it is read
        return 0


@cache
def image_extensions() -> frozenset[str]:
    """Return the lower-case extensions of image files, such as `.png`."""
    extensions = PIL.Image.registered_extensions().items()
    decodable = (end for end, kind in extensions if kind in PIL.Image.OPEN and kind not in UNDECODABLE_FORMATS)
    return frozenset((*decodable, ".npy"))


def list_files(root: Path, extensions: frozenset[str] | None = None) -> list[str]:
    """List the files below a folder as sorted relative posix paths.

    Hidden files and `SYSTEM_FILES` are left out.

    Args:
        root: the folder.
        extensions: list files with one of these extensions only.

    Raises:
        UserError: a folder cannot be listed.
    """
    paths: list[str] = []
    pending: list[tuple[str, str, tuple[str, ...]]] = [("", os.path.realpath(root), ())]
    while pending:
        prefix, folder, parents = pending.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name.lower() in SYSTEM_FILES:
                        continue
                    if entry.is_dir():
                        target = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
                        if target not in (*parents, folder):  # a link to a parent folder would never end
                            pending.append((f"{prefix}{entry.name}/", target, (*parents, folder)))
                    elif (extensions is None or _extension_of(entry.name) in extensions) and _is_listable(entry):
                        paths.append(prefix + entry.name)
        except OSError as error:
            raise UserError(
                f"cannot list {str(root / prefix)!r} ({error.strerror}); expected a readable folder. Check its permissions"
            ) from error
    return sorted(paths)


def _is_listable(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a file, or a broken link, which is reported as unreadable; reading a pipe would never end."""
    return entry.is_file() or (entry.is_symlink() and not os.path.exists(entry.path))


def select_image_files(root: Path, files: list[str]) -> list[str]:
    """Select image files by their extensions; a file without an extension by its first bytes."""
    extensions = image_extensions()
    return [
        path
        for path in files
        if (extension := _extension_of(path)) in extensions
        or (_is_uninformative_extension(extension, extensions) and _file_has_image_signature(root / path))
    ]


def _extension_of(path: str) -> str:
    return os.path.splitext(path)[1].lower()


def _is_uninformative_extension(extension: str, extensions: frozenset[str]) -> bool:
    """Whether it is empty, a hash or a number (`a.3f9c01d2`), or more than an extension (`a.jpg?w=64`)."""
    if re.fullmatch(r"(\.(?=[a-f]*\d)[0-9a-f]+)?", extension):
        return True
    start = re.match(r"\.[a-z0-9]+", extension)
    return start is not None and start[0] in extensions


def _file_has_image_signature(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            first_bytes = file.read(SIGNATURE_BYTES)
    except OSError:
        return False
    return has_image_signature(first_bytes)


def has_image_signature(first_bytes: bytes) -> bool:
    """Whether the first bytes of a file are an image's.

    Text is never an image here, although the signature of some formats is two letters.
    """
    if first_bytes.startswith(NUMPY_MAGIC):
        return True
    if not any(byte < 9 or byte > 126 for byte in first_bytes):
        return False
    PIL.Image.init()
    checks = (PIL.Image.OPEN[kind][1] for kind in SIGNATURE_FORMATS if kind in PIL.Image.OPEN)
    return any(check is not None and check(first_bytes) is True for check in checks)


def build_folder_splits(root: Path, paths: list[str], data: str | Path, files: list[str]) -> dict[str, RawSplit]:
    """Build splits and classes from the layout of a folder, by the table in the header of `sources`.

    Args:
        root: the folder.
        paths: its image files, as sorted relative paths.
        data: the path that the user passed, for messages.
        files: all its files, for the message if none is an image.

    Raises:
        UserError: there is no image, or no train split.
    """
    if not paths:
        extensions = Counter(_extension_of(path) or "no extension" for path in files).most_common(3)
        kinds = (
            f" (its files: {', '.join(f'{count} {extension}' for extension, count in extensions)})"
            if extensions
            else ""
        )
        problem = f"holds no image{kinds}" if any(root.iterdir()) else "is empty"
        raise UserError(
            f"the folder {str(data)!r} {problem}; expected {EXPECTED_DATA}. Put images in it, or pass another folder"
        )
    # Paths are sorted, so that the first and the last one have the folders in common that all have.
    shared = os.path.commonpath([os.path.dirname(path) for path in (paths[0], paths[-1])])
    start = len(shared) + 1 if shared else 0
    folders = {_folder_name_at(path, start) for path in paths} - {""}
    roles = find_split_roles(folders)
    if are_split_folders(sorted(folders), roles):
        if TRAIN not in roles.values():
            roles = assign_split_roles(sorted(folders), data)  # a single split is the train split
        return _build_from_split_folders(root, paths, start, roles)
    inner_folders = [_folder_name_at(path, start + len(_folder_name_at(path, start)) + 1) for path in paths]
    roles = find_split_roles(set(inner_folders))
    are_splits_in_classes = len(folders) > 1 and all(inner_folders) and len(roles) == len(set(inner_folders)) > 1
    if are_splits_in_classes and TRAIN in roles.values():
        members = [
            (path, roles[split], _folder_name_at(path, start)) for path, split in zip(paths, inner_folders, strict=True)
        ]
        return _build_splits(root, members)
    return _build_splits(root, [(path, TRAIN, _folder_name_at(path, start)) for path in paths])


def _build_from_split_folders(root: Path, paths: list[str], start: int, roles: dict[str, str]) -> dict[str, RawSplit]:
    """Build splits from the folders in `roles`; the folders below them are the classes."""
    class_starts = {folder: start + len(folder) + 1 for folder in roles}
    for folder, role in roles.items():
        members_of_folder = [path for path in paths if path.startswith(folder + "/", start)]
        while len(names := {_folder_name_at(path, class_starts[folder]) for path in members_of_folder}) == 1:
            (name,) = names
            repeats_split = find_split_roles([name], allow_any_prefix=True).get(name) == role
            if not name or not (is_neutral_name(name) or repeats_split):
                break
            class_starts[folder] += len(name) + 1  # train/images/cat, training_set/training_set/cat
    members = []
    for path in paths:
        folder = _folder_name_at(path, start)
        if folder in roles:
            members.append((path, roles[folder], _folder_name_at(path, class_starts[folder])))
    if not any(class_name for _, _, class_name in members) and (domains := _find_domains(roles)):
        members = [(path, role, domains[_folder_name_at(path, start)]) for path, role, _ in members]
    return _build_splits(root, members)


def _find_domains(roles: dict[str, str]) -> dict[str, str]:
    """Map folders to their letters if all have one, and train has several: trainA, trainB, testA, testB."""
    letters = {
        folder: "".join(word for word in split_into_words(folder) if word not in SPLIT_WORDS).upper()
        for folder in roles
    }
    train_letters = [letters[folder] for folder, role in roles.items() if role == TRAIN]
    are_single = all(len(letter) == 1 and letter.isalpha() for letter in letters.values())
    return letters if are_single and len(set(train_letters)) > 1 else {}


def _build_splits(root: Path, members: list[tuple[str, str, str]]) -> dict[str, RawSplit]:
    """Build splits from (path, role, class or ""); a split is unlabelled if one of its images has no class."""
    splits = {}
    for role in (TRAIN, VALIDATION, TEST):
        files = [path for path, image_role, _ in members if image_role == role]
        classes = [escape_undecodable_name(name) for _, image_role, name in members if image_role == role]
        if not files:
            continue
        reason = ""
        if not any(classes):
            reason = "there are no class folders"
        elif not all(classes):
            unsorted, class_name = files[classes.index("")], next(filter(None, classes))
            reason = (
                f"{escape_undecodable_name(unsorted)} is in no class folder, unlike the images in {class_name}; "
                "move such images into class folders, or remove them"
            )
        splits[role] = RawSplit(FileStore(root, files), None if reason else classes, reason)
    return splits


def _folder_name_at(path: str, start: int) -> str:
    """Return the folder's name that begins at `start` ("cat" in "train/cat/1.png" at 6); "" if a file's name begins there."""
    end = path.find("/", start)
    return path[start:end] if end >= 0 else ""
