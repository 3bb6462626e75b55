"""Adapts terminals, launcher variables and libraries before a command runs."""

import io
import os
import sys
import tempfile
import warnings
from pathlib import Path

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LOCAL_LAUNCHER_VARIABLES = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")


def prepare_environment() -> None:
    escape_unprintable_characters()
    remove_incomplete_launcher_variables()
    silence_libraries()


def escape_unprintable_characters() -> None:
    """Print characters outside the encoding of a terminal or pipe as escapes. Otherwise they would end the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def remove_incomplete_launcher_variables() -> None:
    """Remove the variables of a distributed launcher unless they are complete.

    A launcher sets all four variables. With only some of them, this process would wait for other processes.
    """
    values = {name: os.environ[name] for name in LAUNCHER_VARIABLES if name in os.environ}
    if not values and not any(name in os.environ for name in LOCAL_LAUNCHER_VARIABLES):
        return
    rank, size = values.get("RANK", ""), values.get("WORLD_SIZE", "")
    if len(values) == len(LAUNCHER_VARIABLES) and rank.isdecimal() and size.isdecimal() and int(rank) < int(size):
        return
    incomplete = [name for name in (*LAUNCHER_VARIABLES, *LOCAL_LAUNCHER_VARIABLES) if name in os.environ]
    for name in incomplete:
        del os.environ[name]
    print(
        f"note: ignoring {', '.join(incomplete)} in the environment, because a launcher sets {', '.join(LAUNCHER_VARIABLES)} "
        "together; start several processes with `accelerate launch -m latentloom`",
        file=sys.stderr,
    )


def silence_libraries() -> None:
    """Turn off the progress bars and notices of other libraries."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about single images; we list the unreadable ones ourselves
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ["MPLBACKEND"] = "agg"  # a backend of a notebook or a desktop may be missing
    if "MPLCONFIGDIR" not in os.environ and not _is_writable(Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config")):
        os.environ["MPLCONFIGDIR"] = str(
            Path(tempfile.gettempdir()) / "latentloom-matplotlib"
        )  # else matplotlib prints a warning


def _is_writable(folder: Path) -> bool:
    try:
        folder = folder.expanduser()
    except RuntimeError:  # there is no home folder
        return False
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return os.access(existing, os.W_OK)
