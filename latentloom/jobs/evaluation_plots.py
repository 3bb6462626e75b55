"""The figures by class as bars, which a table of numbers hides."""

from pathlib import Path
from typing import Any

from latentloom.jobs.plotting import open_plot

METRIC_TITLES = {
    "frechet": "Fréchet distance",
    "class_agreement": "class agreement",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
}


def plot_metrics_by_class(figures: dict[str, Any], path: Path) -> bool:
    """Bars by class for each figure that is there, with the value over all classes as a line; false when there is none."""
    rows = figures["by_class"]
    shown = {key: name for key, name in METRIC_TITLES.items() if any(row.get(key) is not None for row in rows.values())}
    if not shown:
        return False
    names = [" ".join(name.split()).encode("utf-8", "replace").decode() for name in rows]
    with open_plot(path, len(shown), 1.5 + 2.4 * len(shown), 1.0 + 0.24 * len(rows), sharey=True) as (figure, axes):
        for axis, (key, name) in zip(axes, shown.items(), strict=True):
            axis.barh(range(len(rows)), [row.get(key) or 0.0 for row in rows.values()], color="tab:blue")
            if figures.get(key) is not None:
                axis.axvline(figures[key], color="black", lw=1, label="all classes")
            if (floor := (figures.get("floor") or {}).get(key)) is not None:
                axis.axvline(floor, color="tab:green", ls="--", lw=1, label="real images, all classes")
            axis.set_title(name, fontsize=10)
        axes[0].set_yticks(range(len(rows)), names, parse_math=False)
        axes[0].invert_yaxis()  # shared by all: the first class on top
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    return True
