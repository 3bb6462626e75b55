"""Write plots as PNG files, without a display and with any characters in the labels."""

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from training_harness.files import atomic_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@contextmanager
def open_plot(
    path: Path, columns: int, width: float, height: float, **options: Any
) -> Iterator[tuple["Figure", Sequence["Axes"]]]:
    """Open a figure of `columns` plots side by side, and write it to `path` when the block ends.

    Args:
        width, height: size of the whole figure in inches.
        options: passed to `pyplot.subplots`.
    """
    with mock.patch.dict(os.environ, MPLBACKEND="agg"):  # an inherited backend may not exist on this machine
        from matplotlib import pyplot

    pyplot.switch_backend("agg")
    figure, [axes] = pyplot.subplots(
        1, columns, figsize=(width, height), layout="constrained", squeeze=False, **options
    )
    try:
        yield figure, axes
        with atomic_file(path) as temporary_path, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # a font shows a box for a character that it lacks
            figure.savefig(temporary_path, format="png", dpi=100)
    finally:
        pyplot.close(figure)
