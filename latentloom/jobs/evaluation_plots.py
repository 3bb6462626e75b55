"""Bar charts of the metrics by class: they show differences that a table of numbers hides."""

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


def plot_metrics_by_class(metrics: dict[str, Any], path: Path) -> bool:
    """Plot one bar chart per metric, with one bar per class and a line for the value over all classes.

    Returns:
        False when no metric has values by class; then no file is written.
    """
    rows = metrics["by_class"]
    titles = {
        key: title for key, title in METRIC_TITLES.items() if any(row.get(key) is not None for row in rows.values())
    }
    if not titles:
        return False
    class_names = [" ".join(name.split()).encode("utf-8", "replace").decode() for name in rows]
    width, height = 1.5 + 2.4 * len(titles), 1.0 + 0.24 * len(rows)
    with open_plot(path, len(titles), width, height, sharey=True) as (figure, axes):
        for axis, (key, title) in zip(axes, titles.items(), strict=True):
            axis.barh(range(len(rows)), [row.get(key) or 0.0 for row in rows.values()], color="tab:blue")
            if metrics.get(key) is not None:
                axis.axvline(metrics[key], color="black", lw=1, label="all classes")
            if (floor := (metrics.get("floor") or {}).get(key)) is not None:
                axis.axvline(floor, color="tab:green", ls="--", lw=1, label="real images, all classes")
            axis.set_title(title, fontsize=10)
        axes[0].set_yticks(range(len(rows)), class_names, parse_math=False)
        axes[0].invert_yaxis()  # all charts share it: the first class is on top
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    return True
