"""The page of an inspected prior: likelihood by image, position and class, and the nearest training images of samples."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from latentloom.inspection.charts import heat_map, histogram
from latentloom.inspection.colours import colour_legend, map_to_colours
from latentloom.inspection.layout import inspection_page
from latentloom.inspection.prior_measure import LikelihoodExample, Neighbours, PriorInspection
from latentloom.inspection.sections import MAX_PIXELATED_SIDE, Section, side_by_side
from latentloom.report.diagnostics import Diagnostic
from latentloom.report.numbers import format_count, format_number, format_percent
from latentloom.report.widgets import Tile, diagnostic_list, fact_list, table, tiles
from pipelines.evaluation.likelihood import likelihood_metrics
from pipelines.latent_generation import LatentGenerationPipeline

BINS = 20
COPY_THRESHOLD = 0.95  # share of common codes from which a sample counts as a copy of a training image


def prior_page(pipeline: LatentGenerationPipeline, inspection: PriorInspection, name: str, data: str) -> str:
    """Return the page as HTML; the same pipeline and images give the same bytes.

    Args:
        pipeline: The inspected pipeline.
        inspection: What was measured.
        name: Title of the page.
        data: The images, as the user named them.
    """
    spec = pipeline.tokenizer.latent_spec()
    size, pixels = spec.codebook_size or 1, math.prod(pipeline.tokenizer.config.image_processor.content_size)
    class_names = pipeline.label_names or ()
    metrics = likelihood_metrics(inspection.bits, inspection.labels, class_names, size, pixels)
    neighbours = inspection.neighbours
    sections = [
        likelihood_section(inspection.examples, spec.levels * math.log2(size)),
        position_section(inspection, metrics, size),
        memorization_section(neighbours),
    ]
    held_out = format_count(len(inspection.bits), "held-out image")
    facts = {
        "prior": pipeline.prior.describe(spec),
        "tokenizer id": spec.tokenizer_id,
        "data": f"{data}: {held_out}, {format_count(neighbours.num_training, 'training image')}",
        "samples": f"{len(neighbours.samples)}, with the sampling options saved in the pipeline: {pipeline.sampling}",
    }
    overview = tiles(list(main_metrics(metrics, neighbours))) + diagnostic_list([copy_diagnostic(neighbours)])
    return inspection_page(
        name=name, kind="inspection of a prior", overview=overview + fact_list(facts.items()), sections=sections
    )


def main_metrics(metrics: dict[str, float], neighbours: Neighbours) -> Iterator[Tile]:
    uniform = metrics["bits_per_token_uniform"]
    yield Tile("Bits a code", format_number(metrics["bits_per_token"]), "", f"uniform guess: {format_number(uniform)}")
    yield Tile("Bits an image", format_number(metrics["prior_bits_per_image"]), "", "for its codes")
    yield Tile("Bits a pixel", format_number(metrics["prior_bits_per_pixel"]), "", "for its codes")
    yield Tile(
        "Codes shared", format_percent(float(neighbours.samples.median())), "",
        "with the nearest training image (median); "
        f"held-out images: {format_percent(float(neighbours.held_out.median()))}",
    )  # fmt: skip


def copy_diagnostic(neighbours: Neighbours) -> Diagnostic:
    """Compare how often samples are copies of training images with how often held-out images are."""
    copied = (neighbours.samples >= COPY_THRESHOLD).double().mean().item()
    expected = (neighbours.held_out >= COPY_THRESHOLD).double().mean().item()
    if copied <= expected + 0.01:
        return Diagnostic(
            "good",
            "Samples are no copies of training images",
            f"{format_percent(copied)} of the samples and {format_percent(expected)} of the held-out images share at least "
            f"{format_percent(COPY_THRESHOLD)} of their codes with a training image.",
        )
    return Diagnostic(
        "bad",
        f"{format_percent(copied)} of the samples are copies of training images",
        f"They share at least {format_percent(COPY_THRESHOLD)} of their codes with a training image, compared with "
        f"{format_percent(expected)} of the held-out images. Train for fewer steps, with a smaller model, or with "
        "--model.dropout 0.1.",
    )


def likelihood_section(examples: list[LikelihoodExample], uniform: float) -> Section:
    """Show example images with maps of the bits at each position.

    Args:
        examples: The images.
        uniform: Bits of a uniform guess at each position, all levels together.
    """
    limit = max(uniform, *(float(example.bits.max()) for example in examples))
    is_small = max(examples[0].original.shape[-2:]) <= MAX_PIXELATED_SIDE
    lead = (
        "Negative log-likelihood of held-out images under the prior. Each map shows the bits at each position, given the class and "
        "all positions before it. All maps have the same scale. A uniform guess needs "
        f"{format_number(uniform)} bits at each position."
    )
    figures = "".join(likelihood_figure(example, limit) for example in examples)
    css_class, min_width = ("examples small", 260) if is_small else ("examples", 420)
    return Section(
        "likelihood",
        "Likelihood of images",
        f'<p class="lead">{lead}</p>{colour_legend("0 bits", f"{format_number(limit)} bits")}'
        f'<div class="{css_class}" style="--least: {min_width}px">{figures}</div>',
    )


def likelihood_figure(example: LikelihoodExample, limit: float) -> str:
    return side_by_side(
        (example.kind, f"{format_number(float(example.bits.sum()))} bits"),
        {"image": example.original, "bits": likelihood_map(example.bits, limit, example.original)},
        example.source_id,
    )


def likelihood_map(bits: Tensor, limit: float, image: Tensor) -> Tensor:
    """Map the bits of a code grid to a uint8 image (3, h, w) of the size of `image`.

    Args:
        bits: (rows, columns) of the code grid.
        limit: Bits at the light end of the colour scale.
        image: (C, h, w).
    """
    grid = map_to_colours(bits / limit).movedim(-1, 0)
    return F.interpolate(grid[None].float(), image.shape[-2:], mode="nearest")[0].to(torch.uint8)


def position_section(inspection: PriorInspection, metrics: dict[str, dict[str, float]], size: int) -> Section:
    """Show the mean bits of a code by position and by class."""
    means = inspection.bits.mean(0)
    levels = [means] if means.ndim == 2 else list(means)
    limits = min(float(level.min()) for level in levels), max(float(level.max()) for level in levels)
    maps = "".join(
        heat_map(f"Bits, level {i + 1}" if len(levels) > 1 else "Bits", "a code", level, limits)
        for i, level in enumerate(levels)
    )
    rows = [(name, format_number(bits)) for name, bits in metrics["bits_per_token_by_class"].items()]
    by_class = f"<h3>By class</h3>{table(('class', 'bits a code'), rows, numeric=(1,))}" if rows else ""
    lead = (
        f"Means over held-out images. The prior predicts positions row by row. With K = {size:,} codes a uniform guess needs "
        f"{format_number(math.log2(size))} bits a code."
    )
    return Section(
        "positions",
        "Likelihood by position and class",
        f'<p class="lead">{lead}</p><div class="charts">{maps}</div>{by_class}',
    )


def memorization_section(neighbours: Neighbours) -> Section:
    """Compare samples and held-out images with their nearest training images."""
    lead = (
        "The nearest training image of a sample shares the most codes with it at the same positions. Held-out images are compared "
        "in the same way, because the prior has not seen them. If the prior memorizes training images, samples share more codes "
        "with training images than held-out images do."
    )
    cards = []
    for title, shares in (("Samples", neighbours.samples), ("Held-out images", neighbours.held_out)):
        bars = histogram(torch.histc(shares, BINS, 0, 1).tolist(), f"{title} by the share of codes in common")
        text = f"median {format_percent(float(shares.median()))}, maximum {format_percent(float(shares.max()))}"
        cards.append(
            f'<figure class="image"><h4>{title}</h4>{bars}<figcaption>0 to 100 % of codes; {text}</figcaption></figure>'
        )
    pairs = "".join(
        side_by_side(
            ("Sample", format_percent(share)),
            {"sample": sample, "nearest training image": training},
            "share of codes in common with the training image",
        )
        for share, sample, training in neighbours.pairs
    )
    return Section(
        "memorization",
        "Does the prior memorize training images?",
        f'<p class="lead">{lead}</p><div class="channels">{"".join(cards)}</div><h3>Samples with the nearest training images</h3>'
        f'<div class="examples small" style="--least: 260px">{pairs}</div>',
    )
