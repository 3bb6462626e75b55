"""The page of an inspected prior: what surprises it, where, of which class, and how near its samples come to training images."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from latentloom.inspection.colours import coloured, legend
from latentloom.inspection.drawing import heat_map, histogram
from latentloom.inspection.layout import laid_out
from latentloom.inspection.prior_measure import LikelihoodExample, Neighbours, PriorInspection
from latentloom.inspection.sections import SMALL, Section, side_by_side
from latentloom.report.diagnostics import Diagnostic
from latentloom.report.numbers import count, number, percent
from latentloom.report.widgets import Tile, diagnostic_list, fact_list, table, tiles
from pipelines.evaluation.likelihood import likelihood_metrics
from pipelines.latent_generation import LatentGenerationPipeline

BINS = 20
COPY = 0.95  # share of codes from which a sample counts as a training image again


def prior_page(pipeline: LatentGenerationPipeline, found: PriorInspection, name: str, data: str) -> str:
    """HTML that depends on the pipeline and the images alone: the same ones give the same bytes."""
    spec = pipeline.tokenizer.latent_spec()
    size, pixels = spec.codebook_size or 1, math.prod(pipeline.tokenizer.config.image_processor.content_size)
    names = pipeline.label_names or ()
    figures = likelihood_metrics(found.bits, found.labels, names, size, pixels)
    parts = [surprises(found.examples, spec.levels * math.log2(size)), where_and_which(found, figures, size)]
    parts.append(memory(found.neighbours))
    facts = {
        "prior": pipeline.prior.describe(spec),
        "tokenizer id": spec.tokenizer_id,
        "data": f"{data}: {count(len(found.bits), 'held-out image')}, {count(found.neighbours.num_training, 'training image')}",
        "samples": f"{len(found.neighbours.samples)}, with what the pipeline was saved with: {pipeline.sampling}",
    }
    overview = tiles(list(key_metrics(figures, found.neighbours))) + diagnostic_list([copies(found.neighbours)])
    return laid_out(name=name, kind="a prior, inspected", overview=overview + fact_list(facts.items()), sections=parts)


def key_metrics(figures: dict[str, float], neighbours: Neighbours) -> Iterator[Tile]:
    uniform = figures["bits_per_token_uniform"]
    yield Tile("Bits a code", number(figures["bits_per_token"]), "", f"a uniform guess needs {number(uniform)}")
    yield Tile("Bits an image", number(figures["prior_bits_per_image"]), "", "to write down its codes")
    yield Tile("Bits a pixel", number(figures["prior_bits_per_pixel"]), "", "of the same")
    yield Tile(
        "Codes shared", percent(float(neighbours.samples.median())), "", "of a sample with the nearest training image; "
        f"held-out images: {percent(float(neighbours.held_out.median()))}",
    )  # fmt: skip


def copies(found: Neighbours) -> Diagnostic:
    copied, usual = (found.samples >= COPY).double().mean().item(), (found.held_out >= COPY).double().mean().item()
    if copied <= usual + 0.01:
        return Diagnostic(
            "good",
            "Samples are no copies of training images",
            f"{percent(copied)} of them share at least {percent(COPY)} of their codes with one; of held-out images "
            f"{percent(usual)} do.",
        )
    return Diagnostic(
        "bad",
        f"{percent(copied)} of the samples are training images again",
        f"They share at least {percent(COPY)} of their codes with one, which {percent(usual)} of held-out images do. Train for "
        "fewer steps, with a smaller model, or with --model.dropout 0.1.",
    )


def surprises(examples: list[LikelihoodExample], uniform: float) -> Section:
    top = max(uniform, *(float(example.bits.max()) for example in examples))
    small = max(examples[0].original.shape[-2:]) <= SMALL
    lead = (
        "What the prior finds surprising: bits of each place’s codes, given the class and all places before it. All maps have the "
        f"same scale; a uniform guess needs {number(uniform)} bits a place."
    )
    figures = "".join(pair(example, top) for example in examples)
    kind, least = ("examples small", 260) if small else ("examples", 420)
    return Section(
        "surprise",
        "What surprises it",
        f'<p class="lead">{lead}</p>{legend("0 bits", f"{number(top)} bits")}'
        f'<div class="{kind}" style="--least: {least}px">{figures}</div>',
    )


def pair(example: LikelihoodExample, top: float) -> str:
    return side_by_side(
        (example.kind, f"{number(float(example.bits.sum()))} bits"),
        {"image": example.original, "surprise": likelihood_map(example.bits, top, example.original)},
        example.source_id,
    )


def likelihood_map(bits: Tensor, top: float, like: Tensor) -> Tensor:
    """(rows, columns) of the code grid → uint8 (3, h, w), as large as the picture (C, h, w)."""
    coarse = coloured(bits / top).movedim(-1, 0)
    return F.interpolate(coarse[None].float(), like.shape[-2:], mode="nearest")[0].to(torch.uint8)


def where_and_which(found: PriorInspection, figures: dict[str, dict[str, float]], size: int) -> Section:
    means = found.bits.mean(0)
    levels = [means] if means.ndim == 2 else list(means)
    ends = min(float(level.min()) for level in levels), max(float(level.max()) for level in levels)
    maps = "".join(
        heat_map(f"Bits, level {i + 1}" if len(levels) > 1 else "Bits", "a code", level, ends)
        for i, level in enumerate(levels)
    )
    rows = [(name, number(bits)) for name, bits in figures["bits_per_token_by_class"].items()]
    by_class = f"<h3>By class</h3>{table(('class', 'bits a code'), rows, numeric=(1,))}" if rows else ""
    lead = (
        f"Means over held-out images. Places are predicted row by row; of K = {size:,} codes a uniform guess needs "
        f"{number(math.log2(size))} bits."
    )
    return Section(
        "where", "Where, and of which class", f'<p class="lead">{lead}</p><div class="charts">{maps}</div>{by_class}'
    )


def memory(found: Neighbours) -> Section:
    lead = (
        "For each sample, the training image that shares the most codes with it at the same places; beside it, the same of images "
        "that the prior has not seen. A prior that repeats what it was trained on has samples nearer than those."
    )
    cards = []
    for said, shares in (("Samples", found.samples), ("Held-out images", found.held_out)):
        bars = histogram(torch.histc(shares, BINS, 0, 1).tolist(), f"{said} by the share of codes in common")
        text = f"median {percent(float(shares.median()))}, most {percent(float(shares.max()))}"
        cards.append(
            f'<figure class="picture"><h4>{said}</h4>{bars}<figcaption>0 to 100 % of codes; {text}</figcaption></figure>'
        )
    pairs = "".join(
        side_by_side(
            ("Sample", percent(share)), {"sample": sample, "nearest training image": training}, "of its codes in common"
        )
        for share, sample, training in found.pairs
    )
    return Section(
        "memory",
        "Does it repeat what it was trained on?",
        f'<p class="lead">{lead}</p><div class="channels">{"".join(cards)}</div><h3>The nearest</h3>'
        f'<div class="examples small" style="--least: 260px">{pairs}</div>',
    )
