"""latentloom report: write an HTML report for a run, which opens without a network."""

import os
from dataclasses import dataclass
from pathlib import Path

import tyro

from latentloom.checks import check_html_output
from latentloom.commands.arguments import parse
from latentloom.report.page import report_page
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
            check_html_output(self.output, "report.html")


GROUPS = {"run": ("run",), "output": ("output",)}


def main(argv: list[str]) -> None:
    arguments = parse(Arguments, "report", argv, GROUPS)
    if os.environ.get("RANK", "0") == "0":  # read directly, because this verb does not import torch
        output = arguments.output or arguments.run / "report.html"
        write_text(output, report_page(read_job(arguments.run)))
        print(f"report: {output}")
