"""Results of a search: the outcome of each trial, the best settings as a recipe, and both as text."""

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

MAX_TABLE_ROWS = 5
RUN_PATHS = ("output", "codes", "data")  # they belong to one run, not to a recipe


@dataclass(frozen=True)
class Metric:
    """The metric that a search improves.

    Optuna minimizes the objective, which is `sign` times the metric.
    """

    name: str
    """Column in metrics.jsonl."""
    unit: str
    sign: int
    """1 when a lower metric is better, -1 when a higher one is better."""

    def format_value(self, objective: float) -> str:
        return f"{self.sign * objective:.5g} {self.unit}"


METRICS = {
    "autoregressive": Metric("validation_nats_per_token", "nats per token", 1),
    "diffusion": Metric("validation_squared_error", "squared error", 1),
    "tokenizer": Metric("validation_psnr", "dB PSNR", -1),
}


@dataclass(frozen=True)
class TrialResult:
    """Outcome of a trial that has ended."""

    number: int
    """Number of the trial, from 1."""
    values: Mapping[str, Any]
    """Value of each searched field."""
    outcome: Literal["finished", "pruned", "failed"]
    objective: float
    """Lowest validated objective, NaN when a failed trial has none."""
    steps: int
    """Last validated step."""
    seconds: float
    reason: str = ""
    """Why the trial failed."""


def find_best_trial(results: Sequence[TrialResult]) -> TrialResult | None:
    """Return the finished trial with the lowest objective, the first one of equal trials, or None."""
    return min((r for r in results if r.outcome == "finished"), key=lambda r: r.objective, default=None)


def format_short(value: Any) -> str:
    """Format a value with four digits."""
    return f"{value:.4g}" if isinstance(value, float) else format_full(value)


def format_full(value: Any) -> str:
    """Format a value with all digits, nearly as in YAML."""
    return str(list(value) if isinstance(value, tuple) else value)


def describe_trial(result: TrialResult, metric: Metric, trials: int, steps: int, best: TrialResult | None) -> str:
    """Describe a trial that has ended, in one line.

    Args:
        trials: number of trials of the search.
        steps: number of steps of each trial.
        best: the best trial so far.
    """
    values = ", ".join(f"{field} {format_short(value)}" for field, value in result.values.items())
    if result.outcome == "finished":
        outcome = metric.format_value(result.objective)
    elif result.outcome == "pruned":
        outcome = f"{metric.format_value(result.objective)} after {result.steps} of {steps} steps, pruned"
    else:
        outcome = f"failed: {result.reason}"
    ranking = f"best {metric.sign * best.objective:.5g}, trial {best.number}" if best else "none finished yet"
    return f"trial {result.number} of {trials}: {values}: {outcome} ({ranking})"


def format_best_trials(results: Sequence[TrialResult], metric: Metric) -> str:
    """Format the best finished trials as a table, the best one first."""
    finished = sorted((r for r in results if r.outcome == "finished"), key=lambda r: r.objective)[:MAX_TABLE_ROWS]
    rows = [["trial", metric.name, *finished[0].values]] if finished else []
    rows += [
        [str(r.number), f"{metric.sign * r.objective:.5g}", *map(format_short, r.values.values())] for r in finished
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(f"{cell:>{n}}" for cell, n in zip(row, widths, strict=True)) for row in rows)


def write_trials(path: Path, results: Sequence[TrialResult], metric: Metric, space: Space) -> None:
    """Write `trials.csv` with one row per trial."""
    with atomic_file(path) as temporary_path, temporary_path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["trial", "outcome", metric.name, "steps", "seconds", *(p.field for p in space), "reason"])
        for r in results:
            metric_value = "" if math.isnan(r.objective) else f"{metric.sign * r.objective:.6g}"
            measurements = [metric_value, r.steps, f"{r.seconds:.1f}"]
            values = [format_full(r.values[p.field]) for p in space]
            rows.writerow([r.number, r.outcome, *measurements, *values, r.reason])


def write_recipe(path: Path, config: Training, header: Sequence[str]) -> None:
    """Write `config` without its input and output paths as a YAML recipe, below the lines of `header` as comments."""
    values = {name: value for name, value in to_stored_mapping(config).items() if name not in RUN_PATHS}
    comment = "".join(f"# {line}\n" for line in header)
    write_text(path, comment + yaml.safe_dump(values, sort_keys=False))
