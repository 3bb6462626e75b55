"""Shared parts of all benchmarks: timing in turns, comparison with ours in each round, and the written report.

    ratio_r = seconds of the peer in round r / our seconds in round r        above 1: ours is faster

Each round runs every contender once, and the order changes from round to round. So a busy machine affects all contenders alike.
The result is the median of the ratios with their quartiles. A report is written to docs/benchmarks as NAME.json, NAME.md and,
if it has a chart, NAME.png.
"""

import dataclasses
import gc
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from latentloom.commands.arguments import training_values
from training_harness.configuration import from_mapping
from training_harness.provenance import describe_machine, library_versions

ROOT = Path(__file__).parents[1]
RESULTS_FOLDER = ROOT / "docs" / "benchmarks"
OURS = "latentloom"


@dataclass
class Report:
    """The results of one benchmark, which are written as JSON and as a Markdown page."""

    name: str
    title: str
    text: str
    results: dict[str, Any]
    peers: Sequence[str] = ()
    """Packages to report with their versions."""
    chart: Callable[[Path], None] | None = None
    provenance: dict[str, Any] = field(
        default_factory=lambda: {"date": date.today().isoformat(), "machine": describe_machine()}
    )

    def to_dict(self) -> dict[str, Any]:
        return self.provenance | {"versions": self.versions(), "results": self.results}

    def versions(self) -> dict[str, str]:
        return library_versions() | {name: version(name) for name in self.peers}

    def format_page(self) -> str:
        hardware, package_versions = self.provenance["machine"], self.versions()
        libraries = ", ".join(f"{name} {package_versions[name]}" for name in ("torch", *self.peers))
        device = "" if hardware["device"] == "cpu" else f"{hardware['device']}, "
        threads = f"{hardware['threads']} threads of {hardware['cores']} cores"
        setting = f"*{self.provenance['date']}: {device}{hardware['processor']}, {threads}; {libraries}.*"
        chart = "" if self.chart is None else f"\n\n![{self.title}]({self.name}.png)"
        return f"# {self.title}\n\n{setting}\n\n{self.text.strip()}{chart}\n"

    def publish(self) -> None:
        """Write the JSON file, the page and the chart."""
        RESULTS_FOLDER.mkdir(parents=True, exist_ok=True)
        (RESULTS_FOLDER / f"{self.name}.json").write_text(
            json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n"
        )
        (RESULTS_FOLDER / f"{self.name}.md").write_text(self.format_page(), encoding="utf-8")
        if self.chart is not None:
            self.chart(RESULTS_FOLDER / f"{self.name}.png")


def time_interleaved(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Time the contenders in turns.

    Returns:
        Seconds of each contender in each of `rounds` rounds. The first `warm_up` rounds are not timed.
    """
    names, seconds = list(contenders), {name: list[float]() for name in contenders}
    for number in range(-warm_up, rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            gc.collect()
            begin = time.perf_counter()
            contenders[name]()
            synchronize()
            if number >= 0:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def compare_times(seconds: Mapping[str, Sequence[float]], reference: str = OURS) -> dict[str, dict[str, Any]]:
    """Compute the median seconds of each contender, and median and quartiles of its ratios to `reference`."""
    comparison = {}
    for name, contender_seconds in seconds.items():
        pairs = zip(contender_seconds, seconds[reference], strict=True)
        low, middle, high = quartiles([contender / base for contender, base in pairs])
        comparison[name] = {
            "seconds": statistics.median(contender_seconds),
            "ratio": middle,
            "quartiles": [low, high],
        }
    return comparison


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def plot_bars(groups: Mapping[str, Mapping[str, float]], unit: str, path: Path) -> None:
    """Plot one panel per group with one bar per contender; ours is blue."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(4 * len(groups) + 2, 2.6), layout="constrained", squeeze=False
    )
    for axis, (title, rates) in zip(axes[0], groups.items(), strict=True):
        names = list(rates)[::-1]
        colours = ["tab:blue" if name.startswith(OURS) else "lightgrey" for name in names]
        plotted_bars = axis.barh(names, [rates[name] for name in names], color=colours)
        axis.bar_label(plotted_bars, fmt=lambda value: f"{value:,.0f}", padding=3)
        axis.set(title=title, xlabel=unit)
        axis.set_xlim(0, 1.18 * max(rates.values()))
        axis.spines[["top", "right"]].set_visible(False)
        if axis is not axes[0, 0]:
            axis.set_yticklabels([])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Format a Markdown table; floats have three significant digits."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(format_cell, row)) + " |" for row in rows)])


def format_cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def load_recipe(kind: type, stage: str, name: str, share: float, seed: int, **fields: object) -> Any:
    """Load a recipe with a share of its steps and without previews, because the peers have no previews.

    Args:
        kind: dataclass of the training configuration.
        fields: values that override those of the recipe.
    """
    values = training_values(stage, name, None, {key: str(value) for key, value in fields.items()} | {"seed": seed})
    config = from_mapping(kind, values)
    return dataclasses.replace(config, max_steps=round(config.max_steps * share), sample_every=10**9)
