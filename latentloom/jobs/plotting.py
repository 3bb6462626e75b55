"""Plots as PNG files, without a display and with labels of any characters."""

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
    """Gives a figure with `columns` plots side by side, and writes it to `path` at the end. Sizes are in inches."""
    with mock.patch.dict(os.environ, MPLBACKEND="agg"):  # an inherited one may not exist on this machine
        from matplotlib import pyplot

    pyplot.switch_backend("agg")
    figure, [axes] = pyplot.subplots(
        1, columns, figsize=(width, height), layout="constrained", squeeze=False, **options
    )
    try:
        yield figure, axes
        with atomic_file(path) as beside, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph")  # a font without some character shows a box
            figure.savefig(beside, format="png", dpi=100)
    finally:
        pyplot.close(figure)
