"""Which figures share a chart, and how each is drawn; a figure that no panel knows gets a chart of its own."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from latentloom.report.diagnostics import best_of, validation_name
from latentloom.report.numbers import count, number
from latentloom.report.reading import RunRecord
from latentloom.report.svg_charts import Chart, Points


@dataclass(frozen=True, kw_only=True)
class Panel:
    title: str
    figures: dict[str, str]
    """Names in the log, each with its name in the legend."""
    unit: str = ""
    log: bool = False
    note: str = ""


PANELS = (
    Panel(
        title="Losses",
        figures={
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
        figures={"nats_per_token": "training", "validation_nats_per_token": "validation"},
        unit="nats a token",
        note="log K is a uniform guess. Validation is measured with the averaged weights, training with those of the step.",
    ),
    Panel(
        title="Squared error",
        figures={"squared_error": "training", "validation_squared_error": "validation"},
        note="Of the network’s predictions, over all times. Validation is measured with the averaged weights.",
    ),
    Panel(
        title="Squared error by time",
        figures={f"validation_squared_error_t0.{tenth}": f"around t = 0.{tenth}" for tenth in (1, 3, 5, 7, 9)},
        note="t = 0 is data, t = 1 is noise.",
    ),
    Panel(title="Validation PSNR", figures={"validation_psnr": "PSNR"}, unit="dB"),
    Panel(title="Codebook", figures={"codes_used": "codes used", "perplexity": "perplexity"}),
    Panel(title="Adversarial losses", figures={"generator": "generator", "discriminator": "discriminator"}),
    Panel(title="Discriminator’s logits", figures={"logits_real": "real images", "logits_fake": "reconstructions"}),
    Panel(title="Adaptive weight", figures={"adaptive_weight": "λ of the adversarial loss"}, log=True),
    Panel(title="Validation", figures={"validation_bits_per_image": "codes of one image"}, unit="bits an image"),
    Panel(title="Learning rate", figures={"learning_rate": "learning rate"}),
    Panel(title="Gradient norm", figures={"gradient_norm": "gradient norm"}, log=True),
    Panel(title="Discriminator’s gradient norm", figures={"discriminator_gradient_norm": "gradient norm"}, log=True),
    Panel(
        title="Throughput",
        figures={"images_per_second": "throughput"},
        unit="images/s",
        note="The mean since the run began or was taken up again.",
    ),
)


def marks_something(name: str) -> bool:
    """Whether a figure is that of a row that marks a step, and no curve."""
    return name == "resumed_from" or name.endswith("_spike") or name.startswith("usual_")


def charts(run: RunRecord) -> Iterator[Chart]:
    """A chart for each panel that has figures, then one for every other figure."""
    for panel in PANELS:
        curves = [(label, run.figures[name]) for name, label in panel.figures.items() if name in run.figures]
        if curves or spikes(run, panel):
            yield chart(run, panel, curves)
    known = {name for panel in PANELS for name in panel.figures}
    for name, points in run.figures.items():
        if name not in known and not marks_something(name):
            title = name.replace("_", " ")
            yield chart(run, Panel(title=title[:1].upper() + title[1:], figures={name: title}), [(title, points)])


def chart(run: RunRecord, panel: Panel, curves: list[tuple[str, Points]]) -> Chart:
    zeros = [label for label, points in curves if len(curves) > 1 and not any(value for _, value in points)]
    lost = sum(run.not_finite.get(name, 0) for name in panel.figures)
    notes = [panel.note] if panel.note else []
    notes += [f"Always 0: {', '.join(zeros)}."] if zeros else []
    notes += [f"{count(lost, 'value')} that {'is' if lost == 1 else 'are'} no finite number left out."] if lost else []
    best = validation_name(run)
    return Chart(
        title=panel.title,
        unit=panel.unit,
        curves=same_as_one([(label, points) for label, points in curves if label not in zeros] or curves),
        log=panel.log,
        from_zero="codes_used" in panel.figures or "learning_rate" in panel.figures,
        levels=levels(run, panel),
        best=best_of(best, run.figures[best]) if best in panel.figures else None,
        marks=spikes(run, panel),
        resumed=run.resumed,
        note=" ".join(notes),
    )


def spikes(run: RunRecord, panel: Panel) -> Points:
    return [point for name in panel.figures for point in run.figures.get(f"{name}_spike", [])]


def levels(run: RunRecord, panel: Panel) -> list[tuple[str, float]]:
    size, clip = run.codebook_size, run.setting("optimizer", "max_grad_norm")
    if "codes_used" in panel.figures and size:
        return [(f"K = {number(size, 9)}", size)]
    if "nats_per_token" in panel.figures and size:
        return [(f"log K = {number(math.log(size), 3)}", math.log(size))]
    if "gradient_norm" in panel.figures and isinstance(clip, int | float) and clip > 0:
        return [(f"clipped above {number(clip)}", clip)]
    return []


def same_as_one(curves: list[tuple[str, Points]]) -> list[tuple[str, Points]]:
    """Curves that lie on one another as one curve with both names, so that none is hidden."""
    merged: list[tuple[str, Points]] = []
    for label, points in curves:
        twin = next((i for i, (_, held) in enumerate(merged) if held == points), None)
        if twin is None:
            merged.append((label, points))
        else:
            merged[twin] = (f"{merged[twin][0]} = {label}", points)
    return merged
