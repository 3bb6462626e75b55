"""Atomic writes: a file or folder is written beside its place, flushed to disk, and renamed into place.

A reader sees the old content or the new one, never a part. Symbolic links are followed: what a link points to receives the files.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK_FILE = ".latentloom.lock"  # of `output_lock`
UNSUPPORTED_ERRORS = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EACCES,
    errno.EPERM,
    errno.EBADF,
}


def _sync(path: Path) -> None:
    """Flushes a file or a folder to disk, where the file system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError as error:
        if path.is_dir() and error.errno in UNSUPPORTED_ERRORS:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED_ERRORS:
            raise
    finally:
        os.close(descriptor)


def _move(source: Path, target: Path) -> None:
    """Renames; copies and removes where the file system refuses to rename, as overlays do with folders of a lower layer."""
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        if source.is_dir():
            shutil.copytree(source, target, symlinks=True)
            shutil.rmtree(source)
        else:
            shutil.copy2(source, target)
            source.unlink()


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives a path beside `path` to write to. It replaces `path` when the block ends without an error."""
    path = path.expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name[:200]}.{os.getpid()}.partial")
    try:
        yield beside
        _sync(beside)
        _move(beside, path)
        _sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Gives an empty folder beside `path` to fill. It replaces `path` when the block ends without an error.

    For folders that are ours alone: what `path` held before is removed.
    """
    path = path.expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name[:200]}.{os.getpid()}.partial")
    old = path.with_name(f".{path.name[:200]}.{os.getpid()}.old")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        for file in sorted(beside.rglob("*")):
            if file.is_file():
                _sync(file)
        if path.exists():
            _move(path, old)
        try:
            _move(beside, path)
        except OSError:
            if old.exists():
                _move(old, path)
            raise
        _sync(path.parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def update_folder(folder: Path, last: str) -> Iterator[Path]:
    """Gives an empty folder to fill, whose files then take their places in `folder` one by one, the file `last` at the end.

    Other files of `folder` stay as they are. Whoever reads the folder looks for `last` first: without it nothing is there.
    """
    folder = folder.expanduser().resolve()
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    beside = folder / f".{os.getpid()}.partial"
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        files = sorted(path.relative_to(beside) for path in beside.rglob("*") if path.is_file())
        for name in sorted(files, key=lambda name: name == Path(last)):
            target = (folder / name).resolve()  # through a link of the user's
            target.parent.mkdir(parents=True, exist_ok=True)
            _sync(beside / name)
            _move(beside / name, target)
        _sync(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if made and not any(folder.iterdir()):
            folder.rmdir()


def remove_incomplete(folder: Path) -> None:
    """Removes what a killed process left half written in a folder."""
    for path in folder.glob(".*.partial") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def holds_files(folder: Path) -> bool:
    """Whether a folder holds anything but what this package itself leaves in an unfinished one."""
    if not folder.exists():
        return False
    return any(path.name != LOCK_FILE and not path.name.endswith(".partial") for path in folder.iterdir())


def write_text(path: Path, text: str) -> None:
    with atomic_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def compute_sha256(path: Path) -> str:
    """64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_up_to_date(path: Path, made_from: Path) -> bool:
    """Whether `path` exists and was written after what it is made from."""
    return path.exists() and (not made_from.exists() or path.stat().st_mtime_ns >= made_from.stat().st_mtime_ns)
