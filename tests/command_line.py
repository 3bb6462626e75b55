"""The command `latentloom` as tests call it: in this process, since a new one spends seconds on importing torch, or in another."""

import ctypes
import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from latentloom.cli import main

CHECKOUT = Path(__file__).parents[1]


def latentloom(*words: object) -> int:
    """Runs a verb here; returns its exit status."""
    return main([str(word) for word in words])


def run_python(*words: object, timeout: int = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with `words` in the checkout, with one thread as in conftest: results are compared bit by bit."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=CHECKOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its relative path; folders are listed too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@contextmanager
def without_root_access() -> Iterator[None]:
    """Root may write anywhere; within this, not: the thread goes without CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH."""
    if os.geteuid() != 0:
        yield
        return
    libc, version = ctypes.CDLL(None, use_errno=True), 0x20080522
    header, held = (
        (ctypes.c_uint32 * 2)(version, 0),
        (ctypes.c_uint32 * 6)(),
    )  # effective, permitted, inheritable; twice
    assert libc.capget(header, held) == 0
    fewer = (ctypes.c_uint32 * 6)(*held)
    fewer[0] &= ~0b110
    assert libc.capset(header, fewer) == 0
    try:
        yield
    finally:
        assert libc.capset(header, held) == 0
