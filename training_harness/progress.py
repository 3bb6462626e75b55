"""Progress of long work: a progress bar in a terminal or a notebook, otherwise a line every 30 seconds.

In a log file or a pipe, a redrawn bar would become one endless line.
"""

import sys
from typing import Any

from tqdm.auto import tqdm as auto_tqdm
from tqdm.std import tqdm

SECONDS_BETWEEN_LINES = 30.0
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s, {rate_fmt}, {elapsed} elapsed, {remaining} left{postfix}"


class LineProgress(tqdm):
    """A progress bar that prints a new line instead of redrawing the bar."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._lines = 0
        # miniters=1: each update checks the time. tqdm would otherwise skip updates, and lines would come late.
        line_options = {"mininterval": SECONDS_BETWEEN_LINES, "miniters": 1, "bar_format": LINE, "ascii": True}
        super().__init__(*arguments, **options | line_options)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        is_short = not self._lines and self.n >= (self.total or self.n)  # short work prints nothing
        if self.n > self.initial and not is_short:
            self._lines += 1
            print(self if msg is None else msg, file=self.fp, flush=True)
        return True

    def moveto(self, n: int) -> None:
        """Do nothing: there is no cursor to move."""

    def close(self) -> None:
        self.disable = True


def progress_bar(**options: Any) -> tqdm:
    """Create a progress bar with tqdm's options.

    Without `disable`, it is a bar in a terminal or a notebook, and otherwise a line every 30 seconds. `disable=True` shows
    nothing; `disable=False` always shows a bar.
    """
    in_notebook = "ipykernel" in sys.modules
    if options.get("disable") is not None or in_notebook or sys.stderr.isatty():
        return auto_tqdm(**{"dynamic_ncols": True} | options | {"disable": bool(options.get("disable"))})
    return LineProgress(**options | {"disable": False, "file": sys.stderr})
