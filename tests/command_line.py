"""Helpers that run the command `latentloom`, in this process (a new one needs seconds to import torch) or in a new one."""

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


def latentloom(*arguments: object) -> int:
    """Run a command in this process; return its exit status."""
    return main([str(argument) for argument in arguments])


def run_python(*arguments: object, timeout: int = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the checkout, with one thread as conftest sets it: tests compare results bit by bit."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=CHECKOUT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def hash_files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder by its relative path; subfolders are listed as "folder"."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


@contextmanager
def without_root_access() -> Iterator[None]:
    """Apply file permissions to root too, within the block.

    The thread drops CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH.
    """
    if os.geteuid() != 0:
        yield
        return
    libc, version = ctypes.CDLL(None, use_errno=True), 0x20080522
    header = (ctypes.c_uint32 * 2)(version, 0)
    capabilities = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, in two groups of 32 bits
    assert libc.capget(header, capabilities) == 0
    reduced = (ctypes.c_uint32 * 6)(*capabilities)
    reduced[0] &= ~0b110
    assert libc.capset(header, reduced) == 0
    try:
        yield
    finally:
        assert libc.capset(header, capabilities) == 0
