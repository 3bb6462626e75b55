"""A job's figures: those one looks at first, then all of them beside what real images get, and those by class."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any, NamedTuple

from latentloom.report.numbers import number
from latentloom.report.reading import JobRecord, is_number
from latentloom.report.widgets import Cell, Tile, image_figure, machine_facts, table, tiles


class Figure(NamedTuple):
    name: str
    label: str
    says: str
    unit: str = ""


GROUPS = {
    "Samples": (
        Figure("frechet", "Fréchet distance", "fidelity and variety in one number; lower is better"),
        Figure("fid", "FID", "the same on the reference network; lower is better"),
        Figure("kid", "KID", "kernel distance, not biased by the number of images; lower is better"),
        Figure("precision", "Precision", "share of samples that lie among real images"),
        Figure("recall", "Recall", "share of real images that lie among samples: a dropped mode lowers it"),
        Figure("density", "Density", "precision that outliers do not sway"),
        Figure("coverage", "Coverage", "recall that outliers do not sway"),
        Figure("class_agreement", "Class agreement", "samples seen as their own class"),
        Figure("bits_per_token", "Bits a token", "what the prior needs for held-out codes; lower is better"),
    ),
    "Reconstructions": (
        Figure("psnr", "PSNR", "how near they are to their originals; higher is better", "dB"),
        Figure("ssim", "SSIM", "the same for structure; 1 is an exact copy"),
        Figure("lpips", "LPIPS", "how far they are as a network sees it; lower is better"),
        Figure("reconstruction_frechet", "Fréchet distance", "what the tokenizer alone loses; lower is better"),
        Figure("codes_used", "Codes used", "by the reference images"),
        Figure("perplexity", "Perplexity", "so many codes, used equally, would say as much", "codes"),
        Figure("bits_per_pixel", "Bits a pixel", "what the codes cost"),
    ),
}
PICTURES = {
    "Samples": ("samples.png", "Samples of the finished pipeline, as they come"),
    "Reconstructions": ("reconstructions.png", "Originals, each over its reconstruction by the tokenizer"),
}
SHARES = ("precision", "recall", "coverage", "class_agreement")


def results(job: JobRecord) -> str:
    """The section of a job that has figures or pictures; empty for one that has not come so far."""
    if not job.metrics and not job.pictures:
        return ""
    parts = ['<section id="results"><h2>Results</h2>', tiles(list(key_metrics(job.metrics))), '<div class="pair">']
    for group, figures in GROUPS.items():
        name, said = PICTURES[group]
        picture = image_figure(job.pictures[name], said) if name in job.pictures else ""
        parts.append(f"<div><h3>{group}</h3>{picture}{metric_table(job.metrics, group, figures)}</div>")
    parts += ["</div>", how_measured(job.metrics), by_class(job.metrics), "</section>"]
    return "".join(parts)


def key_metrics(metrics: Mapping[str, Any]) -> Iterator[Tile]:
    """Each with a second figure that it is read against, where there is one."""
    floor = mapping(metrics, "floor")
    for name, label, unit, beside, said in (
        ("psnr", "Reconstruction", "dB PSNR", metrics.get("ssim"), "SSIM {}"),
        ("frechet", "Fréchet distance", "", floor.get("frechet"), "real images get {}"),
        ("class_agreement", "Class agreement", "", floor.get("class_agreement"), "real images get {}"),
        ("recall", "Recall", "", floor.get("recall"), "real images get {}"),
        ("bits_per_token", "Prior", "bits a token", metrics.get("bits_per_token_uniform"), "a guess needs {}"),
    ):
        if is_number(value := metrics.get(name)):
            read_against = said.format(shown(name, beside, 3)) if is_number(beside) else ""
            yield Tile(label, shown(name, value, 4 if name == "psnr" else 3), unit, read_against)
    if is_number(value := metrics.get("seconds")):
        yield Tile("Time", duration(value), "", "from images to figures")


def metric_table(metrics: Mapping[str, Any], group: str, figures: tuple[Figure, ...]) -> str:
    floors = mapping(metrics, "floor") | {"reconstruction_frechet": metrics.get("reconstruction_frechet_floor")}
    rows: list[tuple[Cell, ...]] = []
    for figure in figures:
        if is_number(value := metrics.get(figure.name)):
            real = floors.get(figure.name)
            found = f"{shown(figure.name, value)} {figure.unit}".strip()
            rows.append(
                (
                    (figure.label, figure.says),
                    (found, spread(metrics, figure.name)),
                    shown(figure.name, real, 3) if is_number(real) else "",
                )
            )
    memorised = mapping(metrics, "memorisation").get("ratio")
    if group == "Samples" and is_number(memorised):
        said = "distance to the nearest training image, over that of held-out images; near 1 is right"
        rows.append((("Memorisation", said), f"× {number(memorised, 3)}", "× 1"))
    return table(("figure", "this job", "real images"), rows, numeric=(1, 2)) if rows else ""


def how_measured(metrics: Mapping[str, Any]) -> str:
    counts = [
        f"{number(metrics[name], 9)} {what}"
        for name, what in (("num_images", "samples"), ("num_reference_images", "reference images"))
        if is_number(metrics.get(name))
    ]
    if not counts:
        return ""
    features = f", in the features of {escape(str(metrics['features']))}" if metrics.get("features") else ""
    return (
        f'<p class="note">Measured on {" and ".join(counts)}{features}. Real images are as many training images in the '
        f"samples’ place: what a perfect generator would get.</p>"
        f"<details><summary>Where it was measured</summary>{machine_facts(metrics)}</details>"
    )


def by_class(metrics: Mapping[str, Any]) -> str:
    classes, bits = mapping(metrics, "by_class"), mapping(metrics, "bits_per_token_by_class")
    names = ("class_agreement", "frechet", "precision", "recall")
    rows = [
        (
            name,
            *(shown(figure, found[figure]) if is_number(found.get(figure)) else "" for figure in names),
            number(bits[name], 3) if is_number(bits.get(name)) else "",
        )
        for name, found in classes.items()
        if isinstance(found, dict)
    ]
    if not rows:
        return ""
    heads = ("class", "agreement", "Fréchet distance", "precision", "recall", "bits a token")
    return f"<details><summary>By class</summary>{table(heads, rows, numeric=range(1, len(heads)))}</details>"


def mapping(values: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def shown(name: str, value: float, digits: int = 4) -> str:
    return f"{100 * value:.1f}\N{NO-BREAK SPACE}%" if name in SHARES else number(value, digits)


def spread(metrics: Mapping[str, Any], name: str) -> str:
    interval, deviation = metrics.get(f"{name}_interval"), metrics.get(f"{name}_std")
    if name == "bits_per_token" and is_number(uniform := metrics.get("bits_per_token_uniform")):
        return f"a uniform guess: {number(uniform)}"
    if isinstance(interval, list) and len(interval) == 2 and all(map(is_number, interval)):
        return f"{number(interval[0], 3)} … {number(interval[1], 3)}"
    return f"± {number(deviation, 2)}" if is_number(deviation) and deviation else ""


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
