"""The page of an inspected tokenizer: one file that loads nothing and runs nothing."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from latentloom.inspection.codes import LevelUsage, by_level
from latentloom.inspection.diagnostics import codebook_diagnostic, latents_diagnostic
from latentloom.inspection.layout import laid_out
from latentloom.inspection.measure import Inspection
from latentloom.inspection.sections import codes_look, codes_use, examples, latents_by_channel
from latentloom.report.numbers import count, number, percent
from latentloom.report.widgets import Tile, diagnostic_list, fact_list, tiles
from stage1_tokenizer.tokenizer import Tokenizer
from stage1_tokenizer.vqgan import VQGANConfig
from training_harness.pretrained import WeightlessModel, count_parameters

EXACT = 100.0  # dB that stand for infinity


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What was inspected, as its user calls it."""

    tokenizer: Tokenizer
    name: str
    data: str
    split: str
    available: int
    """Images of the split, of which the inspected ones were drawn."""
    seed: int


def page(subject: Subject, found: Inspection) -> str:
    """HTML that depends on the tokenizer and the images alone: the same ones give the same bytes."""
    tokenizer = subject.tokenizer
    levels = levels_of(tokenizer, found)
    parts = [examples(found.examples)]
    if found.codes is not None:
        parts += [codes_look(tokenizer, found.codes, levels), codes_use(levels)]
    if found.latents is not None:
        parts.append(latents_by_channel(tokenizer, found.latents))
    above = overview(subject, found, levels)
    return laid_out(name=subject.name, kind="a tokenizer, inspected", overview=above, sections=parts)


def levels_of(tokenizer: Tokenizer, found: Inspection) -> list[LevelUsage]:
    return [] if found.codes is None else by_level(found.codes, tokenizer.codebook_size or 0)


def overview(subject: Subject, found: Inspection, levels: list[LevelUsage]) -> str:
    verdicts = [codebook_diagnostic(subject.tokenizer, levels)] if levels else []
    if found.latents is not None and (said := latents_diagnostic(found.latents)) is not None:
        verdicts.append(said)
    figures = tiles(list(key_metrics(subject.tokenizer, found, levels)))
    return figures + diagnostic_list(verdicts) + fact_list(facts(subject, found))


def facts(subject: Subject, found: Inspection) -> Iterator[tuple[str, str]]:
    tokenizer, spec = subject.tokenizer, subject.tokenizer.latent_spec()
    config, processor = tokenizer.config, tokenizer.config.image_processor
    quantizer = f", quantizer {config.model.quantizer.name}" if isinstance(config, VQGANConfig) else ""
    yield "kind", type(tokenizer).__name__ + quantizer
    if spec.codebook_size is not None:
        levels = f", on each of {spec.levels} levels" if spec.levels > 1 else ""
        yield "codebook", f"K = {spec.codebook_size:,}{levels}"
    yield "latents", f"{spec.channels} × {spec.height} × {spec.width}, c × h × w; f = {spec.downsampling_factor}"
    (rows, columns), (height, width) = processor.content_size, processor.image_size
    padded = f", padded to {height}×{width}" if (rows, columns) != (height, width) else ""
    yield "images", f"{rows}×{columns}, {count(processor.channels, 'channel')}{padded}"
    yield "parameters", "none" if isinstance(tokenizer, WeightlessModel) else f"{count_parameters(tokenizer):,}"
    yield "tokenizer id", spec.tokenizer_id
    of = (
        f" of {subject.available:,}, drawn at random (seed {subject.seed})"
        if found.num_images < subject.available
        else ""
    )
    yield "data", f"{subject.data}, {subject.split} split: {count(found.num_images, 'image')}{of}"


def key_metrics(tokenizer: Tokenizer, found: Inspection, levels: list[LevelUsage]) -> Iterator[Tile]:
    low, high = float(found.psnr.min()), float(found.psnr.max())
    exact = "every image comes back as it was" if low == EXACT else f"from {low:.1f} to {high:.1f}"
    yield Tile("Mean PSNR", f"{found.psnr.mean():.2f}", "dB", exact)
    if found.ssim is not None:
        yield Tile("Mean SSIM", number(float(found.ssim.mean())), "", "1 is an exact copy")
    if levels:
        yield from codebook_metrics(tokenizer, levels)
    else:
        spec = tokenizer.latent_spec()
        values = spec.image_channels * spec.image_height * spec.image_width
        yield Tile(
            "An image’s latents",
            number(spec.channels * spec.height * spec.width, 9),
            "numbers",
            f"for {values:,} values",
        )


def codebook_metrics(tokenizer: Tokenizer, levels: list[LevelUsage]) -> Iterator[Tile]:
    """Codes of all levels together; the perplexity is that of the level that is used least well."""
    spec, size = tokenizer.latent_spec(), levels[0].codebook_size
    used, dead = sum(level.usage.codes_used for level in levels), sum(level.dead for level in levels)
    least = min(level.usage.perplexity for level in levels)
    yield Tile("Codes used", f"{used:,}", f"of {len(levels) * size:,}", percent(used / (len(levels) * size)))
    of_which = f", on the least used of {len(levels)} levels" if len(levels) > 1 else ""
    yield Tile("Perplexity", number(least), "codes", f"{percent(least / size)} of K{of_which}")
    yield Tile("Dead codes", f"{dead:,}", "", f"in {sum(level.choices for level in levels):,} choices")
    bits = math.log2(size)
    yield Tile("Bits an image", number(spec.tokens * bits), "", f"{count(spec.tokens, 'code')} of {number(bits)} bits")


def summary(tokenizer: Tokenizer, found: Inspection) -> str:
    """The main figures in a line."""
    line = f"{count(found.num_images, 'image')}, PSNR {found.psnr.mean():.2f} dB"
    for i, level in enumerate(levels := levels_of(tokenizer, found)):
        name = f"level {i + 1}: " if len(levels) > 1 else ""
        line += f", {name}{level.usage.codes_used} of {level.codebook_size} codes used, perplexity {level.usage.perplexity:.1f}"
    return line
