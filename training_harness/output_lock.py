"""A lock on an output folder, so that no two commands write to it at the same time."""

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
    """Keeps a second command from writing to the same folder meanwhile. The lock ends with the process, also when it is killed.

    Raises UserError when another command holds it. Where the system or the file system knows no locks, nothing is locked.
    """
    if not is_main_process():
        yield
        return
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder.resolve() / LOCK_FILE
    descriptor = _acquire_lock(path, folder)
    try:
        yield
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)
        if made:
            with suppress(OSError):  # not empty: the command has left what it was called for
                folder.rmdir()


def _acquire_lock(path: Path, folder: Path) -> int | None:
    """An open file that holds the lock; none where there are no locks."""
    while fcntl is not None:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None  # whatever writes there next says why it cannot
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                f"another command is writing to {folder}; expected one at a time; wait until it ends, or choose another --output"
            ) from None
        except OSError:
            os.close(descriptor)
            return None
        os.close(descriptor)  # of a file that its last owner removed in between: try the new one
    return None
