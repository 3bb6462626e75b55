"""The page of an inspected tokenizer: one HTML file that loads nothing and runs no script."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from latentloom.inspection.codes import LevelUsage, usage_by_level
from latentloom.inspection.diagnostics import codebook_diagnostic, latents_diagnostic
from latentloom.inspection.layout import inspection_page
from latentloom.inspection.measure import TokenizerInspection
from latentloom.inspection.sections import (
    code_tile_section,
    code_usage_section,
    latent_section,
    reconstruction_section,
)
from latentloom.report.numbers import format_count, format_number, format_percent
from latentloom.report.widgets import Tile, diagnostic_list, fact_list, tiles
from stage1_tokenizer.tokenizer import Tokenizer
from stage1_tokenizer.vqgan import VQGANConfig
from training_harness.pretrained import WeightlessModel, count_parameters

PERFECT_PSNR = 100.0  # dB; the PSNR of equal images, instead of infinity


@dataclass(frozen=True, kw_only=True)
class InspectedTokenizer:
    """A tokenizer and the images that it is inspected with, as the user named them."""

    tokenizer: Tokenizer
    name: str
    data: str
    split: str
    num_available: int
    """Number of images in the split, from which the inspected ones were selected."""
    seed: int


def tokenizer_page(subject: InspectedTokenizer, inspection: TokenizerInspection) -> str:
    """Return the page as HTML; the same tokenizer and images give the same bytes."""
    tokenizer = subject.tokenizer
    levels = code_levels(tokenizer, inspection)
    sections = [reconstruction_section(inspection.examples)]
    if inspection.codes is not None:
        sections += [code_tile_section(tokenizer, inspection.codes, levels), code_usage_section(levels)]
    if inspection.latents is not None:
        sections.append(latent_section(tokenizer, inspection.latents))
    overview = render_overview(subject, inspection, levels)
    return inspection_page(name=subject.name, kind="inspection of a tokenizer", overview=overview, sections=sections)


def code_levels(tokenizer: Tokenizer, inspection: TokenizerInspection) -> list[LevelUsage]:
    """Return the code usage of each level; empty without a codebook."""
    return [] if inspection.codes is None else usage_by_level(inspection.codes, tokenizer.codebook_size or 0)


def render_overview(subject: InspectedTokenizer, inspection: TokenizerInspection, levels: list[LevelUsage]) -> str:
    diagnostics = [codebook_diagnostic(subject.tokenizer, levels)] if levels else []
    if inspection.latents is not None and (diagnostic := latents_diagnostic(inspection.latents)) is not None:
        diagnostics.append(diagnostic)
    metrics = tiles(list(main_metrics(subject.tokenizer, inspection, levels)))
    return metrics + diagnostic_list(diagnostics) + fact_list(list_facts(subject, inspection))


def list_facts(subject: InspectedTokenizer, inspection: TokenizerInspection) -> Iterator[tuple[str, str]]:
    tokenizer, spec = subject.tokenizer, subject.tokenizer.latent_spec()
    config, processor = tokenizer.config, tokenizer.config.image_processor
    quantizer = f", quantizer {config.model.quantizer.name}" if isinstance(config, VQGANConfig) else ""
    yield "kind", type(tokenizer).__name__ + quantizer
    if spec.codebook_size is not None:
        levels = f", on each of {spec.levels} levels" if spec.levels > 1 else ""
        yield "codebook", f"K = {spec.codebook_size:,}{levels}"
    yield "latents", f"{spec.channels} × {spec.height} × {spec.width}, c × h × w; f = {spec.downsampling_factor}"
    (rows, columns), (height, width) = processor.content_size, processor.image_size
    padding = f", padded to {height}×{width}" if (rows, columns) != (height, width) else ""
    yield "images", f"{rows}×{columns}, {format_count(processor.channels, 'channel')}{padding}"
    yield "parameters", "none" if isinstance(tokenizer, WeightlessModel) else f"{count_parameters(tokenizer):,}"
    yield "tokenizer id", spec.tokenizer_id
    selection = (
        f" of {subject.num_available:,}, selected at random (seed {subject.seed})"
        if inspection.num_images < subject.num_available
        else ""
    )
    images = format_count(inspection.num_images, "image")
    yield "data", f"{subject.data}, {subject.split} split: {images}{selection}"


def main_metrics(tokenizer: Tokenizer, inspection: TokenizerInspection, levels: list[LevelUsage]) -> Iterator[Tile]:
    low, high = float(inspection.psnr.min()), float(inspection.psnr.max())
    psnr_range = "all reconstructions are exact" if low == PERFECT_PSNR else f"from {low:.1f} to {high:.1f}"
    yield Tile("Mean PSNR", f"{inspection.psnr.mean():.2f}", "dB", psnr_range)
    if inspection.ssim is not None:
        yield Tile("Mean SSIM", format_number(float(inspection.ssim.mean())), "", "1 is an exact copy")
    if levels:
        yield from codebook_metrics(tokenizer, levels)
    else:
        spec = tokenizer.latent_spec()
        pixel_values = spec.image_channels * spec.image_height * spec.image_width
        yield Tile(
            "Latents of an image",
            format_number(spec.channels * spec.height * spec.width, 9),
            "numbers",
            f"for {pixel_values:,} pixel values",
        )


def codebook_metrics(tokenizer: Tokenizer, levels: list[LevelUsage]) -> Iterator[Tile]:
    """Yield code counts summed over levels, and the perplexity of the least used level."""
    spec, size = tokenizer.latent_spec(), levels[0].codebook_size
    used, num_dead = sum(level.usage.codes_used for level in levels), sum(level.num_dead for level in levels)
    lowest_perplexity = min(level.usage.perplexity for level in levels)
    yield Tile("Codes used", f"{used:,}", f"of {len(levels) * size:,}", format_percent(used / (len(levels) * size)))
    level_note = f", on the least used of {len(levels)} levels" if len(levels) > 1 else ""
    share = format_percent(lowest_perplexity / size)
    yield Tile("Perplexity", format_number(lowest_perplexity), "codes", f"{share} of K{level_note}")
    yield Tile("Dead codes", f"{num_dead:,}", "", f"in {sum(level.num_tokens for level in levels):,} tokens")
    bits = math.log2(size)
    codes = format_count(spec.tokens, "code")
    yield Tile("Bits an image", format_number(spec.tokens * bits), "", f"{codes} of {format_number(bits)} bits")


def summarize(tokenizer: Tokenizer, inspection: TokenizerInspection) -> str:
    """Return the main metrics in one line of text."""
    line = f"{format_count(inspection.num_images, 'image')}, PSNR {inspection.psnr.mean():.2f} dB"
    for i, level in enumerate(levels := code_levels(tokenizer, inspection)):
        name = f"level {i + 1}: " if len(levels) > 1 else ""
        line += f", {name}{level.usage.codes_used} of {level.codebook_size} codes used, perplexity {level.usage.perplexity:.1f}"
    return line
