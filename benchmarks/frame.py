"""What every benchmark stands on: contenders take turns, and each is compared with ours round by round.

    ratio_r = seconds of the peer in round r / our seconds in round r        above 1: ours is faster

A round runs each contender once, each time in another order, so that what a shared machine does to one it does to all; the
median of the ratios and their quartiles are what is reported. Results go to docs/benchmarks: NAME.json, the page NAME.md and
the chart NAME.png.
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
FOLDER = ROOT / "docs" / "benchmarks"
OURS = "latentloom"


@dataclass
class Report:
    """What one benchmark found: its JSON, and its page as Markdown."""

    name: str
    title: str
    text: str
    figures: dict[str, Any]
    peers: Sequence[str] = ()
    """Packages whose versions belong beside the figures."""
    chart: Callable[[Path], None] | None = None
    made: dict[str, Any] = field(
        default_factory=lambda: {"date": date.today().isoformat(), "machine": describe_machine()}
    )

    def described(self) -> dict[str, Any]:
        return self.made | {"versions": self.versions(), "figures": self.figures}

    def versions(self) -> dict[str, str]:
        return library_versions() | {name: version(name) for name in self.peers}

    def page(self) -> str:
        where, known = self.made["machine"], self.versions()
        libraries = ", ".join(f"{name} {known[name]}" for name in ("torch", *self.peers))
        device = "" if where["device"] == "cpu" else f"{where['device']}, "
        threads = f"{where['threads']} threads of {where['cores']} cores"
        setting = f"*{self.made['date']}: {device}{where['processor']}, {threads}; {libraries}.*"
        chart = "" if self.chart is None else f"\n\n![{self.title}]({self.name}.png)"
        return f"# {self.title}\n\n{setting}\n\n{self.text.strip()}{chart}\n"

    def publish(self) -> None:
        """Writes the JSON, the page, and the chart."""
        FOLDER.mkdir(parents=True, exist_ok=True)
        (FOLDER / f"{self.name}.json").write_text(json.dumps(self.described(), indent=2, ensure_ascii=False) + "\n")
        (FOLDER / f"{self.name}.md").write_text(self.page(), encoding="utf-8")
        if self.chart is not None:
            self.chart(FOLDER / f"{self.name}.png")


def interleaved(
    contenders: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each contender in each of `rounds` rounds, after `warm_up` rounds that do not count."""
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


def compared(seconds: Mapping[str, Sequence[float]], ours: str = OURS) -> dict[str, dict[str, Any]]:
    """For each contender its median seconds, and the median and quartiles of its ratios to ours."""
    found = {}
    for name, theirs in seconds.items():
        ratios = [other / own for other, own in zip(theirs, seconds[ours], strict=True)]
        low, middle, high = quartiles(ratios)
        found[name] = {"seconds": statistics.median(theirs), "ratio": middle, "quartiles": [low, high]}
    return found


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def bars(groups: Mapping[str, Mapping[str, float]], unit: str, path: Path) -> None:
    """A panel for each group, a bar for each contender, ours in colour."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(4 * len(groups) + 2, 2.6), layout="constrained", squeeze=False
    )
    for axis, (title, rates) in zip(axes[0], groups.items(), strict=True):
        names = list(rates)[::-1]
        colours = ["tab:blue" if name.startswith(OURS) else "lightgrey" for name in names]
        drawn = axis.barh(names, [rates[name] for name in names], color=colours)
        axis.bar_label(drawn, fmt=lambda value: f"{value:,.0f}", padding=3)
        axis.set(title=title, xlabel=unit)
        axis.set_xlim(0, 1.18 * max(rates.values()))
        axis.spines[["top", "right"]].set_visible(False)
        if axis is not axes[0, 0]:
            axis.set_yticklabels([])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; numbers with three significant digits."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(map(shown, row)) + " |" for row in rows)])


def shown(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def recipe(kind: type, stage: str, name: str, share: float, seed: int, **given: object) -> Any:
    """A named recipe's configuration with a share of its steps, without previews: what it is compared with draws none."""
    values = training_values(stage, name, None, {key: str(value) for key, value in given.items()} | {"seed": seed})
    config = from_mapping(kind, values)
    return dataclasses.replace(config, max_steps=round(config.max_steps * share), sample_every=10**9)
