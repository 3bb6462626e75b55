"""The results of a job: the main metrics, all metrics next to the values of real images, and metrics by class."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, NamedTuple

from latentloom.report.numbers import format_number
from latentloom.report.reading import JobRecord, is_number
from latentloom.report.widgets import Cell, Tile, image_figure, machine_facts, table, tiles


class MetricDescription(NamedTuple):
    """How a metric of metrics.json is shown in a table."""

    name: str
    label: str
    meaning: str
    unit: str = ""


METRIC_GROUPS = {
    "Samples": (
        MetricDescription("frechet", "Fréchet distance", "fidelity and variety in one number; lower is better"),
        MetricDescription("fid", "FID", "Fréchet distance of Inception features; lower is better"),
        MetricDescription("kid", "KID", "kernel distance, not biased by the number of images; lower is better"),
        MetricDescription("precision", "Precision", "share of samples that lie among real images"),
        MetricDescription("recall", "Recall", "share of real images that lie among samples; a dropped mode lowers it"),
        MetricDescription("density", "Density", "like precision, but robust to outliers"),
        MetricDescription("coverage", "Coverage", "like recall, but robust to outliers"),
        MetricDescription("class_agreement", "Class agreement", "samples that a classifier assigns to their class"),
        MetricDescription("bits_per_token", "Bits a token", "cost of held-out codes under the prior; lower is better"),
    ),
    "Reconstructions": (
        MetricDescription("psnr", "PSNR", "similarity to the originals; higher is better", "dB"),
        MetricDescription("ssim", "SSIM", "structural similarity; 1 is an exact copy"),
        MetricDescription("lpips", "LPIPS", "perceptual distance to the originals; lower is better"),
        MetricDescription("reconstruction_frechet", "Fréchet distance", "loss by the tokenizer alone; lower is better"),
        MetricDescription("codes_used", "Codes used", "by the reference images"),
        MetricDescription("perplexity", "Perplexity", "number of equally used codes with the same entropy", "codes"),
        MetricDescription("bits_per_pixel", "Bits a pixel", "size of the codes"),
    ),
}
GROUP_IMAGES = {
    "Samples": ("samples.png", "Samples of the finished pipeline, not selected"),
    "Reconstructions": ("reconstructions.png", "Each original with its reconstruction below"),
}
SHARE_METRICS = ("precision", "recall", "coverage", "class_agreement")  # in [0, 1], shown in per cent


def results_section(job: JobRecord) -> str:
    """Return the section of a job's results as HTML; empty before there are metrics or images."""
    if not job.metrics and not job.images:
        return ""
    parts = ['<section id="results"><h2>Results</h2>', tiles(list(main_metrics(job.metrics))), '<div class="pair">']
    for group, descriptions in METRIC_GROUPS.items():
        name, caption = GROUP_IMAGES[group]
        image = image_figure(job.images[name], caption) if name in job.images else ""
        parts.append(f"<div><h3>{group}</h3>{image}{metric_table(job.metrics, group, descriptions)}</div>")
    parts += ["</div>", measurement_note(job.metrics), class_table(job.metrics), "</section>"]
    return "".join(parts)


def main_metrics(metrics: Mapping[str, Any]) -> Iterator[Tile]:
    """Yield the main metrics, each with a value to compare it with where there is one."""
    floor = get_mapping(metrics, "floor")
    for name, label, unit, reference, template in (
        ("psnr", "Reconstruction", "dB PSNR", metrics.get("ssim"), "SSIM {}"),
        ("frechet", "Fréchet distance", "", floor.get("frechet"), "real images: {}"),
        ("class_agreement", "Class agreement", "", floor.get("class_agreement"), "real images: {}"),
        ("recall", "Recall", "", floor.get("recall"), "real images: {}"),
        ("bits_per_token", "Prior", "bits a token", metrics.get("bits_per_token_uniform"), "uniform guess: {}"),
    ):
        if is_number(value := metrics.get(name)):
            below = template.format(format_metric(name, reference, 3)) if is_number(reference) else ""
            yield Tile(label, format_metric(name, value, 4 if name == "psnr" else 3), unit, below)
    if is_number(value := metrics.get("seconds")):
        yield Tile("Time", format_duration(value), "", "from images to metrics")


def metric_table(metrics: Mapping[str, Any], group: str, descriptions: tuple[MetricDescription, ...]) -> str:
    floors = get_mapping(metrics, "floor") | {"reconstruction_frechet": metrics.get("reconstruction_frechet_floor")}
    rows: list[tuple[Cell, ...]] = []
    for description in descriptions:
        if is_number(value := metrics.get(description.name)):
            real = floors.get(description.name)
            text = f"{format_metric(description.name, value)} {description.unit}".strip()
            rows.append(
                (
                    (description.label, description.meaning),
                    (text, format_spread(metrics, description.name)),
                    format_metric(description.name, real, 3) if is_number(real) else "",
                )
            )
    ratio = get_mapping(metrics, "memorisation").get("ratio")
    if group == "Samples" and is_number(ratio):
        meaning = "distance of samples to the nearest training image, divided by the distance of held-out images; near 1 is ideal"
        rows.append((("Memorization", meaning), f"× {format_number(ratio, 3)}", "× 1"))
    return table(("metric", "this job", "real images"), rows, numeric=(1, 2)) if rows else ""


def measurement_note(metrics: Mapping[str, Any]) -> str:
    """Say how many images, which features and which machine the metrics were measured with."""
    counts = [
        f"{format_number(metrics[name], 9)} {unit}"
        for name, unit in (("num_images", "samples"), ("num_reference_images", "reference images"))
        if is_number(metrics.get(name))
    ]
    if not counts:
        return ""
    features = f", with the features {escape(str(metrics['features']))}" if metrics.get("features") else ""
    return (
        f'<p class="note">Measured on {" and ".join(counts)}{features}. The column “real images” uses as many training images '
        f"instead of the samples: a perfect generator would reach these values.</p>"
        f"<details><summary>Where it was measured</summary>{machine_facts(metrics)}</details>"
    )


def class_table(metrics: Mapping[str, Any]) -> str:
    classes, bits = get_mapping(metrics, "by_class"), get_mapping(metrics, "bits_per_token_by_class")
    names = ("class_agreement", "frechet", "precision", "recall")
    rows = [
        (
            label,
            *(format_metric(name, values[name]) if is_number(values.get(name)) else "" for name in names),
            format_number(bits[label], 3) if is_number(bits.get(label)) else "",
        )
        for label, values in classes.items()
        if isinstance(values, dict)
    ]
    if not rows:
        return ""
    heads = ("class", "agreement", "Fréchet distance", "precision", "recall", "bits a token")
    return f"<details><summary>By class</summary>{table(heads, rows, numeric=range(1, len(heads)))}</details>"


def get_mapping(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the dictionary under `name`, or an empty one."""
    value = values.get(name)
    return value if isinstance(value, dict) else {}


def format_metric(name: str, value: float, digits: int = 4) -> str:
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%" if name in SHARE_METRICS else format_number(value, digits)


def format_spread(metrics: Mapping[str, Any], name: str) -> str:
    """Format the confidence interval or the standard deviation of a metric; empty without either."""
    interval, deviation = metrics.get(f"{name}_interval"), metrics.get(f"{name}_std")
    if name == "bits_per_token" and is_number(uniform := metrics.get("bits_per_token_uniform")):
        return f"uniform guess: {format_number(uniform)}"
    if isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval)):
        return f"{format_number(interval[0], 3)} … {format_number(interval[1], 3)}"
    return f"± {format_number(deviation, 2)}" if is_number(deviation) and deviation else ""


def format_duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
