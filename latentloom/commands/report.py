"""latentloom report: one HTML page of a run, which opens without a network."""

import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from latentloom.checks import check_page
from latentloom.commands.arguments import parse
from latentloom.report.page import page
from latentloom.report.reading import read_job
from training_harness.files import write_text


@dataclass(frozen=True, kw_only=True)
class Arguments:
    run: tyro.conf.Positional[Path] = Path()
    """Folder of a run, finished or not, or of a job of `train` or `quickstart`. (default: the current folder)"""
    output: Path | None = None
    """HTML file to write. (default: report.html in that folder)"""

    def __post_init__(self) -> None:
        if self.output is not None:
            check_page(self.output, "report.html")


GROUPS = {"run": ("run",), "output": ("output",)}


def main(words: list[str]) -> None:
    a = parse(Arguments, "report", words, GROUPS)
    if os.environ.get("RANK", "0") == "0":  # torch, which would say so, is not imported here
        output = a.output or a.run / "report.html"
        write_text(output, page(read_job(a.run)))
        print(f"report: {output}")
