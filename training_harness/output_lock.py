"""A lock on an output folder: only one command may write to it at a time."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from training_harness.errors import UserError
from training_harness.files import LOCK_FILE
from training_harness.processes import is_main_process

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def output_lock(folder: Path) -> Iterator[None]:
    """Lock `folder` within the block. The system releases the lock when the process ends, even if it is killed.

    Nothing is locked if the system or the file system does not support locks.

    Raises:
        UserError: Another command holds the lock.
    """
    if not is_main_process():
        yield
        return
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / LOCK_FILE
    descriptor = _acquire_lock(path, folder)
    try:
        yield
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)
        if created:
            with suppress(OSError):  # the folder is not empty: the command wrote its output
                folder.rmdir()


def _acquire_lock(path: Path, folder: Path) -> int | None:
    """Return an open file that holds the lock, or None if locks are not supported."""
    while fcntl is not None:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None  # the first write to the folder reports the reason
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                f"another command is writing to {folder}; expected one command at a time; "
                "wait until it ends, or choose another --output"
            ) from None
        except OSError:
            os.close(descriptor)
            return None
        os.close(descriptor)  # the previous owner removed this file in the meantime: lock the new one
    return None
