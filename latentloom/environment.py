"""What a command does to its surroundings before anything else: terminals, launchers and libraries as users have them."""

import io
import os
import sys
import tempfile
import warnings
from pathlib import Path

LAUNCHER = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LAUNCHER_LOCAL = ("LOCAL_RANK", "LOCAL_WORLD_SIZE")


def prepare_environment() -> None:
    print_any_character()
    ignore_incomplete_launcher()
    quiet_libraries()


def print_any_character() -> None:
    """Lets a terminal or a pipe that knows few characters show the others as escapes, in place of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def ignore_incomplete_launcher() -> None:
    """Removes what a distributed launcher left in the environment when it is not what a launcher sets.

    A launcher sets all four variables. Some of them alone would make this process wait for others, or take it for one of them.
    """
    given = {name: os.environ[name] for name in LAUNCHER if name in os.environ}
    if not given and not any(name in os.environ for name in LAUNCHER_LOCAL):
        return
    rank, size = given.get("RANK", ""), given.get("WORLD_SIZE", "")
    if len(given) == len(LAUNCHER) and rank.isdecimal() and size.isdecimal() and int(rank) < int(size):
        return
    left_over = [name for name in (*LAUNCHER, *LAUNCHER_LOCAL) if name in os.environ]
    for name in left_over:
        del os.environ[name]
    print(
        f"note: ignoring {', '.join(left_over)} in the environment, since a launcher sets {', '.join(LAUNCHER)} together; "
        "start several processes with `accelerate launch -m latentloom`",
        file=sys.stderr,
    )


def quiet_libraries() -> None:
    """Turns off other libraries' progress bars and notices."""
    warnings.filterwarnings("ignore", module=r"PIL\.")  # about single images: those that cannot be read are listed
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ["MPLBACKEND"] = "agg"  # that of a notebook or a desktop may be missing here
    if "MPLCONFIGDIR" not in os.environ and not _writable(Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config")):
        os.environ["MPLCONFIGDIR"] = str(Path(tempfile.gettempdir()) / "latentloom-matplotlib")  # or it says so


def _writable(folder: Path) -> bool:
    try:
        folder = folder.expanduser()
    except RuntimeError:  # there is no home
        return False
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    return os.access(existing, os.W_OK)
