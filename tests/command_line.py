"""The command `latentloom` as tests call it: in this process, since a new one spends seconds on importing torch, or in another."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

from latentloom.cli import main

CHECKOUT = Path(__file__).parents[1]


def latentloom(*words: object) -> int:
    """Runs a verb here; returns its exit status."""
    return main([str(word) for word in words])


def in_new_process(*words: object, timeout: int = 120, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python with `words` in the checkout, with one thread as in conftest: results are compared bit by bit."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=CHECKOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, by its relative path; folders are listed too."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }
