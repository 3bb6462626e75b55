"""Progress of long work: a bar in a terminal or a notebook, and elsewhere a line every 30 seconds.

A log file or a pipe would hold every redrawn bar as one endless line, and says nothing at all when bars are switched off.
"""

import sys
from typing import Any

from tqdm.auto import tqdm as auto_tqdm
from tqdm.std import tqdm

SECONDS_BETWEEN_LINES = 30.0
LINE = "{desc}: {n_fmt} of {total_fmt} {unit}s, {rate_fmt}, {elapsed} gone, {remaining} left{postfix}"


class LineProgress(tqdm):
    """A progress bar that prints a line where a bar would be redrawn."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._lines = 0
        # Every update looks at the clock: tqdm would skip more and more of them, and with them the line that is due.
        every = {"mininterval": SECONDS_BETWEEN_LINES, "miniters": 1, "bar_format": LINE, "ascii": True}
        super().__init__(*arguments, **options | every)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if self.n > self.initial and (self._lines or self.n < (self.total or self.n)):  # short work prints nothing
            self._lines += 1
            print(self if msg is None else msg, file=self.fp, flush=True)
        return True

    def moveto(self, n: int) -> None:
        """Stays where it is: there is no cursor to move."""

    def close(self) -> None:
        self.disable = True


def progress_bar(**options: Any) -> tqdm:
    """A progress bar with tqdm's options; `disable=True` shows nothing, `disable=False` a bar also where there is no terminal.

    By default it prints there a line every 30 seconds, with what `set_postfix` was given.
    """
    in_notebook = "ipykernel" in sys.modules
    if options.get("disable") is not None or in_notebook or sys.stderr.isatty():
        return auto_tqdm(**{"dynamic_ncols": True} | options | {"disable": bool(options.get("disable"))})
    return LineProgress(**options | {"disable": False, "file": sys.stderr})
