"""What a search found: each trial's outcome, the best as a recipe, and both as text."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from latentloom.search.space import Space, Training
from training_harness.configuration import to_stored_mapping
from training_harness.files import atomic_file, write_text

BEST_SHOWN = 5
RUN_PATHS = ("output", "codes", "data")  # of one run, no part of a recipe


@dataclass(frozen=True)
class Metric:
    """The figure that trials are judged by, under its name in metrics.jsonl; `sign` makes the lower one the better."""

    name: str
    unit: str
    sign: int

    def show(self, judged: float) -> str:
        return f"{self.sign * judged:.5g} {self.unit}"


METRICS = {
    "autoregressive": Metric("validation_nats_per_token", "nats a token", 1),
    "diffusion": Metric("validation_squared_error", "squared error", 1),
    "tokenizer": Metric("validation_psnr", "dB PSNR", -1),
}


@dataclass(frozen=True)
class TrialResult:
    """`figure` is the least one that the trial was judged by; a failed trial may have none."""

    number: int
    values: Mapping[str, Any]
    outcome: Literal["finished", "pruned", "failed"]
    figure: float
    steps: int
    seconds: float
    reason: str = ""


def best_of(results: Sequence[TrialResult]) -> TrialResult | None:
    """The first of the best among those that finished."""
    return min((r for r in results if r.outcome == "finished"), key=lambda r: r.figure, default=None)


def short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else plain(value)


def plain(value: Any) -> str:
    """As in YAML, or near enough to read."""
    return str(list(value) if isinstance(value, tuple) else value)


def describe(result: TrialResult, metric: Metric, trials: int, steps: int, best: TrialResult | None) -> str:
    """One line about a trial that is over."""
    values = ", ".join(f"{field} {short(value)}" for field, value in result.values.items())
    if result.outcome == "finished":
        outcome = metric.show(result.figure)
    elif result.outcome == "pruned":
        outcome = f"{metric.show(result.figure)} after {result.steps} of {steps} steps, pruned"
    else:
        outcome = f"failed: {result.reason}"
    standing = f"best {metric.sign * best.figure:.5g}, trial {best.number}" if best else "none finished yet"
    return f"trial {result.number} of {trials}: {values}: {outcome} ({standing})"


def table(results: Sequence[TrialResult], metric: Metric) -> str:
    """The best trials under one another."""
    finished = sorted((r for r in results if r.outcome == "finished"), key=lambda r: r.figure)[:BEST_SHOWN]
    rows = [["trial", metric.name, *finished[0].values]] if finished else []
    rows += [[str(r.number), f"{metric.sign * r.figure:.5g}", *map(short, r.values.values())] for r in finished]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:>{n}}" for cell, n in zip(row, widths, strict=True)) for row in rows)


def write_trials(path: Path, results: Sequence[TrialResult], metric: Metric, space: Space) -> None:
    """`trials.csv`: a row for each trial."""
    with atomic_file(path) as beside, beside.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["trial", "outcome", metric.name, "steps", "seconds", *(p.field for p in space), "reason"])
        for r in results:
            figure = "" if math.isnan(r.figure) else f"{metric.sign * r.figure:.6g}"
            measured = [figure, r.steps, f"{r.seconds:.1f}"]
            rows.writerow([r.number, r.outcome, *measured, *(plain(r.values[p.field]) for p in space), r.reason])


def write_recipe(path: Path, config: Training, header: Sequence[str]) -> None:
    """Everything of `config` but the places it reads and writes, below lines of comment."""
    values = {name: value for name, value in to_stored_mapping(config).items() if name not in RUN_PATHS}
    comment = "".join(f"# {line}\n" for line in header)
    write_text(path, comment + yaml.safe_dump(values, sort_keys=False))
