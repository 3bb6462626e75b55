"""Atomic writes: a file or folder is written to a temporary path, flushed to disk, and renamed.

A reader sees either the complete old content or the complete new content. Symbolic links are followed: the files are written to
the target of the link.
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

LOCK_FILE = ".latentloom.lock"  # created by `output_lock`
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
    """Flush a file or a folder to disk if the file system supports it."""
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
    """Rename a file or folder; copy and delete it if renaming is not possible, as on overlay file systems."""
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
    """Yield a temporary path to write to; the file replaces `path` when the block ends without an error."""
    path = path.expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.partial")
    try:
        yield temporary
        _sync(temporary)
        _move(temporary, path)
        _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder to fill; it replaces `path` when the block ends without an error.

    The previous content of `path` is deleted, so `path` must not contain files of the user.
    """
    path = path.expanduser().resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name[:200]}.{os.getpid()}.partial")
    old = path.with_name(f".{path.name[:200]}.{os.getpid()}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if file.is_file():
                _sync(file)
        if path.exists():
            _move(path, old)
        try:
            _move(temporary, path)
        except OSError:
            if old.exists():
                _move(old, path)
            raise
        _sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def update_folder(folder: Path, last: str) -> Iterator[Path]:
    """Yield an empty temporary folder; its files replace those in `folder` one by one when the block ends without an error.

    Other files in `folder` are unchanged.

    Args:
        folder: Target folder; it may contain files of the user.
        last: Name of the file that is moved last. Readers look for it first and treat a folder without it as empty.
    """
    folder = folder.expanduser().resolve()
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{os.getpid()}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        files = sorted(path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file())
        for name in sorted(files, key=lambda name: name == Path(last)):
            target = (folder / name).resolve()  # follows a symbolic link
            target.parent.mkdir(parents=True, exist_ok=True)
            _sync(temporary / name)
            _move(temporary / name, target)
        _sync(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if created and not any(folder.iterdir()):
            folder.rmdir()


def remove_incomplete(folder: Path) -> None:
    """Remove the temporary files that a killed process left in a folder."""
    for path in folder.glob(".*.partial") if folder.is_dir() else ():
        shutil.rmtree(path, ignore_errors=True)


def holds_files(folder: Path) -> bool:
    """Return whether a folder contains files other than this package's lock and temporary files."""
    if not folder.exists():
        return False
    return any(path.name != LOCK_FILE and not path.name.endswith(".partial") for path in folder.iterdir())


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def compute_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_up_to_date(path: Path, source: Path) -> bool:
    """Return whether `path` exists and is not older than `source`, the file from which it is made."""
    return path.exists() and (not source.exists() or path.stat().st_mtime_ns >= source.stat().st_mtime_ns)
