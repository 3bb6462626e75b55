"""A Python program in a process of its own, forked from a server that has imported what a command needs.

It starts in a tenth of the time of a new interpreter, and shares the modules with nothing else, as they are after their import.
A test of imports, or of what happens while Python starts, needs `command_line.run_python`.
"""

import importlib
import os
import sys
import tempfile
import traceback
from pathlib import Path
from subprocess import CompletedProcess

import torch
from command_line import CHECKOUT
from huggingface_hub import constants
from small_runs import start_processes

from latentloom.cli import main


def run_forked(
    *arguments: object, folder: Path = CHECKOUT, timeout: int = 180, **environment: str
) -> CompletedProcess[str]:
    """Run `-c PROGRAM ARGUMENTS…` or `-m latentloom ARGUMENTS…` in a folder, with one thread."""
    words = list(map(str, arguments))
    with tempfile.TemporaryDirectory() as output:
        (process,) = start_processes(_run, 1, words, folder, os.environ | environment, Path(output))
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
        stdout, stderr = ((Path(output) / name).read_text(encoding="utf-8") for name in ("stdout", "stderr"))
    assert process.exitcode is not None
    return CompletedProcess(words, process.exitcode, stdout, stderr)


def _run(
    rank: int, processes: int, port: int, words: list[str], folder: Path, environment: dict[str, str], output: Path
) -> None:
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(output / name, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    importlib.reload(constants)  # the Hub's client reads its address and folders when it is imported
    torch.set_num_threads(1)
    option, program, *sys.argv[1:] = words
    if option == "-m":
        assert program == "latentloom", program
        sys.exit(main(sys.argv[1:]))
    try:
        exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})
    except Exception:
        traceback.print_exc()
        sys.exit(1)
