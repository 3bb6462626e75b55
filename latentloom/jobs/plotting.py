"""Write plots as PNG files, without a display and with any characters in the labels."""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
        options: passed to `Figure.subplots`.
    """
    import_matplotlib()
    from matplotlib.figure import Figure

    # Without pyplot: the caller's backend and open figures stay as they are, as in a notebook.
    figure = Figure(figsize=(width, height), layout="constrained")
    [axes] = figure.subplots(1, columns, squeeze=False, **options)
    yield figure, axes
    with atomic_file(path) as temporary_path, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # a font shows a box for a character that it lacks
        figure.savefig(temporary_path, format="png", dpi=100)


def import_matplotlib() -> None:
    """Import matplotlib, also where MPLBACKEND names a backend that it does not know."""
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    import matplotlib

    if backend is not None:
        os.environ["MPLBACKEND"] = backend
        with suppress(ValueError):  # unknown; the plots of this module need no backend
            matplotlib.rcParams["backend"] = backend
