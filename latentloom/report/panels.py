"""Group logged metrics into charts; a metric that no panel lists gets its own chart."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from latentloom.report.diagnostics import best_point, validation_name
from latentloom.report.numbers import format_count, format_number
from latentloom.report.reading import RunRecord
from latentloom.report.svg_charts import Chart, Points


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Metrics that share a chart."""

    title: str
    metrics: dict[str, str]
    """Column in metrics.jsonl → name in the legend."""
    unit: str = ""
    log: bool = False
    note: str = ""


PANELS = (
    Panel(
        title="Losses",
        metrics={
            "l1": "L1",
            "l2": "L2",
            "perceptual": "perceptual",
            "codebook": "codebook",
            "commitment": "commitment",
        },
        log=True,
    ),
    Panel(
        title="Cross-entropy",
        metrics={"nats_per_token": "training", "validation_nats_per_token": "validation"},
        unit="nats a token",
        note="log K is the cost of a uniform guess. Validation uses the EMA weights, training the weights of the step.",
    ),
    Panel(
        title="Squared error",
        metrics={"squared_error": "training", "validation_squared_error": "validation"},
        note="Error of the network’s predictions, averaged over all times. Validation uses the EMA weights.",
    ),
    Panel(
        title="Squared error by time",
        metrics={f"validation_squared_error_t0.{tenth}": f"around t = 0.{tenth}" for tenth in (1, 3, 5, 7, 9)},
        note="t = 0 is data, t = 1 is noise.",
    ),
    Panel(title="Validation PSNR", metrics={"validation_psnr": "PSNR"}, unit="dB"),
    Panel(title="Codebook", metrics={"codes_used": "codes used", "perplexity": "perplexity"}),
    Panel(title="Adversarial losses", metrics={"generator": "generator", "discriminator": "discriminator"}),
    Panel(title="Discriminator’s logits", metrics={"logits_real": "real images", "logits_fake": "reconstructions"}),
    Panel(title="Adaptive weight", metrics={"adaptive_weight": "λ of the adversarial loss"}, log=True),
    Panel(title="Validation", metrics={"validation_bits_per_image": "codes of one image"}, unit="bits an image"),
    Panel(title="Learning rate", metrics={"learning_rate": "learning rate"}),
    Panel(title="Gradient norm", metrics={"gradient_norm": "gradient norm"}, log=True),
    Panel(title="Discriminator’s gradient norm", metrics={"discriminator_gradient_norm": "gradient norm"}, log=True),
    Panel(
        title="Throughput",
        metrics={"images_per_second": "throughput"},
        unit="images/s",
        note="Mean since the run started or was resumed.",
    ),
)


def is_marker(name: str) -> bool:
    """Whether a column marks steps on the charts, and is no curve itself."""
    return name == "resumed_from" or name.endswith("_spike") or name.startswith("usual_")


def run_charts(run: RunRecord) -> Iterator[Chart]:
    """Yield a chart for each panel with logged metrics, then one for each remaining metric."""
    for panel in PANELS:
        curves = [(label, run.metrics[name]) for name, label in panel.metrics.items() if name in run.metrics]
        if curves or spike_points(run, panel):
            yield panel_chart(run, panel, curves)
    panel_metrics = {name for panel in PANELS for name in panel.metrics}
    for name, points in run.metrics.items():
        if name not in panel_metrics and not is_marker(name):
            title = name.replace("_", " ")
            panel = Panel(title=title[:1].upper() + title[1:], metrics={name: title})
            yield panel_chart(run, panel, [(title, points)])


def panel_chart(run: RunRecord, panel: Panel, curves: list[tuple[str, Points]]) -> Chart:
    zeros = [label for label, points in curves if len(curves) > 1 and not any(value for _, value in points)]
    num_nonfinite = sum(run.nonfinite_counts.get(name, 0) for name in panel.metrics)
    notes = [panel.note] if panel.note else []
    notes += [f"Always 0: {', '.join(zeros)}."] if zeros else []
    notes += [f"{format_count(num_nonfinite, 'non-finite value')} left out."] if num_nonfinite else []
    validation_metric = validation_name(run)
    return Chart(
        title=panel.title,
        unit=panel.unit,
        curves=merge_equal_curves([(label, points) for label, points in curves if label not in zeros] or curves),
        log=panel.log,
        from_zero="codes_used" in panel.metrics or "learning_rate" in panel.metrics,
        levels=reference_levels(run, panel),
        best=best_point(validation_metric, run.metrics[validation_metric])
        if validation_metric in panel.metrics
        else None,
        marks=spike_points(run, panel),
        resumed_steps=run.resumed_steps,
        note=" ".join(notes),
    )


def spike_points(run: RunRecord, panel: Panel) -> Points:
    return [point for name in panel.metrics for point in run.metrics.get(f"{name}_spike", [])]


def reference_levels(run: RunRecord, panel: Panel) -> list[tuple[str, float]]:
    """Return the named horizontal lines of a panel: K, log K or the clipping threshold."""
    size, clip = run.codebook_size, run.setting("optimizer", "max_grad_norm")
    if "codes_used" in panel.metrics and size:
        return [(f"K = {format_number(size, 9)}", size)]
    if "nats_per_token" in panel.metrics and size:
        return [(f"log K = {format_number(math.log(size), 3)}", math.log(size))]
    if "gradient_norm" in panel.metrics and isinstance(clip, int | float) and clip > 0:
        return [(f"clipped above {format_number(clip)}", clip)]
    return []


def merge_equal_curves(curves: list[tuple[str, Points]]) -> list[tuple[str, Points]]:
    """Merge curves with equal points into one curve with all their names, so that no curve hides another."""
    merged: list[tuple[str, Points]] = []
    for label, points in curves:
        equal = next((i for i, (_, merged_points) in enumerate(merged) if merged_points == points), None)
        if equal is None:
            merged.append((label, points))
        else:
            merged[equal] = (f"{merged[equal][0]} = {label}", points)
    return merged
