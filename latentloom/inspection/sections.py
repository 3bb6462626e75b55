"""Sections of a tokenizer's page: reconstructions with their errors, decoded codes, code usage, latents by channel."""

import io
from collections.abc import Iterator, Mapping
from html import escape
from typing import NamedTuple

from torch import Tensor

from latentloom.inspection.charts import code_usage_chart, heat_map, histogram
from latentloom.inspection.codes import (
    TILE_GRID,
    LevelUsage,
    complete_residual_codes,
    decode_code_tiles,
    usage_by_position,
)
from latentloom.inspection.colours import absolute_error, choose_error_limit, colour_legend, error_map
from latentloom.inspection.latents import LatentStatistics
from latentloom.inspection.measure import ReconstructionExample, ReconstructionExamples
from latentloom.report.numbers import format_count, format_number, format_percent
from latentloom.report.reading import PNGImage
from latentloom.report.widgets import fact_list, image_tag, table
from stage1_tokenizer.data.image_processor import to_pil
from stage1_tokenizer.tokenizer import Tokenizer

MAX_PIXELATED_SIDE = 96  # pixels: images up to this size are enlarged without interpolation
MAX_TILES = 256  # code tiles on the page, all levels together
RANK_PREFIXES = ("", "2nd ", "3rd ")
MAX_PIXELATED_TILE = 64  # pixels: code tiles up to this size are enlarged without interpolation


class Section(NamedTuple):
    """A section of a page."""

    anchor: str
    title: str
    html: str


def encode_png(pixels: Tensor) -> PNGImage:
    """Encode an image (C, h, w) uint8 as PNG."""
    (image,), buffer = to_pil(pixels[None]), io.BytesIO()
    image.save(buffer, format="PNG")
    return PNGImage(buffer.getvalue(), *image.size)


# -- reconstructions --------------------------------------------------------------------------------------------------


def reconstruction_section(examples: ReconstructionExamples) -> Section:
    """Show the worst, the best and random images with their reconstructions and error maps."""
    labelled = [
        (f"{prefix}worst".capitalize(), example) for prefix, example in zip(RANK_PREFIXES, examples.worst, strict=False)
    ]
    labelled += [
        (f"{prefix}best".capitalize(), example) for prefix, example in zip(RANK_PREFIXES, examples.best, strict=False)
    ]
    labelled += [("Random", example) for example in examples.random]
    limit = choose_error_limit([absolute_error(example.original, example.reconstruction) for _, example in labelled])
    is_small = max(labelled[0][1].original.shape[-2:]) <= MAX_PIXELATED_SIDE
    css_class, min_width = ("examples small", 350) if is_small else ("examples", 520)
    larger_errors = " Larger errors have the lightest colour." if limit < 255 else ""
    lead = (
        "The images with the lowest and the highest PSNR, and some random ones. The error of a pixel is the absolute difference "
        f"of its values, averaged over channels. All error maps have the same scale, from 0 to {limit} of 255.{larger_errors}"
    )
    figures = "".join(reconstruction_figure(label, example, limit) for label, example in labelled)
    return Section(
        "reconstructions",
        "Reconstructions",
        f'<p class="lead">{lead}</p>{colour_legend("0", f"{limit} of 255")}'
        f'<div class="{css_class}" style="--least: {min_width}px">{figures}</div>',
    )


def reconstruction_figure(label: str, example: ReconstructionExample, limit: int) -> str:
    error = absolute_error(example.original, example.reconstruction)
    images = {
        "original": example.original,
        "reconstruction": example.reconstruction,
        "error": error_map(error, limit),
    }
    caption = f"{example.source_id}; largest error {float(error.max()):.0f}"
    return side_by_side((label, f"{example.psnr:.2f} dB"), images, caption)


def side_by_side(headings: tuple[str, str], images: Mapping[str, Tensor], caption: str) -> str:
    """Return two or three images in a row as an HTML figure.

    Args:
        headings: Texts above the images, on the left and on the right.
        images: Label of each image → pixels (C, h, w) uint8.
        caption: Text below the images.
    """
    left, right = map(escape, headings)
    css_class = "trio" if len(images) == 3 else "trio two"
    columns = "".join(
        f"<div>{image_tag(encode_png(pixels), label)}<small>{label}</small></div>" for label, pixels in images.items()
    )
    return (
        f'<figure class="image"><h4><span>{left}</span><span>{right}</span></h4><div class="{css_class}">{columns}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


# -- codes ------------------------------------------------------------------------------------------------------------


def level_name(i: int, levels: list[LevelUsage]) -> str:
    return f"Level {i + 1}" if len(levels) > 1 else "Codes"


def code_tile_section(tokenizer: Tokenizer, codes: Tensor, levels: list[LevelUsage]) -> Section:
    """Show what the most used codes decode to."""
    num_tiles = min(levels[0].codebook_size, max(1, MAX_TILES // len(levels)))
    side = tokenizer.config.downsampling_factor
    other_levels = " The codes of the other levels are those that occur with it most often." if len(levels) > 1 else ""
    unused = (
        " Unused codes are pale and have a red bar."
        if any(level.usage.codes_used < num_tiles for level in levels)
        else ""
    )
    lead = (
        f"{describe_selection(levels, num_tiles)}, sorted by use. Each is decoded as a grid of {TILE_GRID} × {TILE_GRID} positions "
        f"with the same code, and the tile shows the middle {side} × {side} pixels. Next to other codes it looks different."
        f"{other_levels} The bar below a tile is the code’s count, relative to the most used code.{unused} Move the pointer over "
        "a code to see its index and count."
    )
    parts = [f'<p class="lead">{lead}</p>']
    for i, level in enumerate(levels):
        selected = level.codes_by_count[:num_tiles]
        tiles = decode_code_tiles(
            tokenizer, complete_residual_codes(codes, i, selected) if codes.ndim == 4 else selected
        )
        spans = "".join(code_tile(int(code), pixels, level) for code, pixels in zip(selected, tiles, strict=True))
        css_class = "codes small" if side <= MAX_PIXELATED_TILE else "codes"
        parts.append(f"<h3>{level_name(i, levels)}</h3>" if len(levels) > 1 else "")
        parts.append(f'<div class="{css_class}" style="--tile: {42 if num_tiles > 64 else 60}px">{spans}</div>')
    return Section("codes", "What the codes look like", "".join(parts))


def describe_selection(levels: list[LevelUsage], num_tiles: int) -> str:
    size, each_level = levels[0].codebook_size, " of each level" if len(levels) > 1 else ""
    if num_tiles == size:
        return f"All codes{each_level}"
    return f"The {num_tiles} most used codes{each_level}, of {size:,}"


def code_tile(code: int, pixels: Tensor, level: LevelUsage) -> str:
    count, largest = int(level.counts[code]), int(level.counts.max())
    title = (
        f"code {code}: {format_count(count, 'time')}, {format_percent(count / level.num_tokens)}"
        if count
        else f"code {code}: never"
    )
    return (
        f'<span class="{"used" if count else "dead"}" title="{title}" style="--share: {count / largest:.3f}">'
        f"{image_tag(encode_png(pixels), title)}</span>"
    )


def code_usage_section(levels: list[LevelUsage]) -> Section:
    """Plot how often each code is used, and how evenly codes are used at each position."""
    num_images = len(levels[0].codes)
    lead = (
        "The maps show, for each position of the code grid over all images, the perplexity of its codes and the share of its most "
        "common code. At a perplexity of 1 every image has the same code there, so the position carries no information. With "
        f"{format_count(num_images, 'image')} the perplexity is at most {min(num_images, levels[0].codebook_size):,}."
    )
    curves = [(level_name(i, levels).lower(), level.counts) for i, level in enumerate(levels)]
    charts = code_usage_chart(curves, dead_code_note(levels)) + "".join(position_maps(levels))
    by_level = f"<h3>By level</h3>{level_table(levels)}" if len(levels) > 1 else ""
    return Section(
        "use",
        "How often and where codes are used",
        f'<p class="lead">{lead}</p><div class="charts">{charts}</div>{by_level}',
    )


def dead_code_note(levels: list[LevelUsage]) -> str:
    if not any(level.num_dead for level in levels):
        return "Every code is used."
    counts = [f"{level.num_dead:,}{f' on level {i + 1}' if len(levels) > 1 else ''}" for i, level in enumerate(levels)]
    return f"Dead codes: {', '.join(counts)}."


def position_maps(levels: list[LevelUsage]) -> Iterator[str]:
    """Yield the maps of perplexity and of the most common code; the maps of all levels have the same colour scale."""
    usages = [usage_by_position(level.codes) for level in levels]
    for title, unit, maps, digits in (
        ("Perplexity", "codes", [usage.perplexity for usage in usages], 3),
        ("Most common code", "% of images", [100 * usage.most_common_share for usage in usages], 2),
    ):
        limits = min(float(values.min()) for values in maps), max(float(values.max()) for values in maps)
        for i, values in enumerate(maps):
            yield heat_map(f"{title}, level {i + 1}" if len(levels) > 1 else title, unit, values, limits, digits)


def level_table(levels: list[LevelUsage]) -> str:
    rows = [
        (
            str(i + 1),
            f"{level.usage.codes_used:,}",
            format_percent(level.usage.codes_used / level.codebook_size),
            format_number(level.usage.perplexity),
            format_percent(level.usage.perplexity / level.codebook_size),
            f"{level.num_dead:,}",
        )
        for i, level in enumerate(levels)
    ]
    heads = ("level", "codes used", "of K", "perplexity", "of K", "dead")
    return table(heads, rows, numeric=range(len(heads)))


# -- latents ----------------------------------------------------------------------------------------------------------


def latent_section(tokenizer: Tokenizer, latents: LatentStatistics) -> Section:
    """Show the statistics of each latent channel."""
    low, high = (format_number(end, 3) for end in latents.histogram_range)
    lead = (
        f"The tokenizer ({type(tokenizer).__name__}) has no codebook, so this page shows latents instead of codes. For each "
        "channel over all images: mean and standard deviation of the raw latents, the values from training, and a histogram. "
        f"All histograms range from {low} to {high}."
    )
    if latents.collapsed_share is not None:
        lead += " A position is collapsed if less than 1 % of its variance comes from the image."
    cards = "".join(channel_card(tokenizer, latents, i) for i in range(len(latents.mean)))
    return Section("latents", "Latents by channel", f'<p class="lead">{lead}</p><div class="channels">{cards}</div>')


def channel_card(tokenizer: Tokenizer, latents: LatentStatistics, i: int) -> str:
    config = tokenizer.config
    facts = {"mean": format_number(float(latents.mean[i]), 3), "std": format_number(float(latents.std[i]), 3)}
    if config.latent_mean is not None and config.latent_std is not None:
        facts["in training"] = f"{format_number(config.latent_mean[i], 3)}, {format_number(config.latent_std[i], 3)}"
    if latents.collapsed_share is not None:
        facts["collapsed"] = format_percent(float(latents.collapsed_share[i]))
    bars = histogram(latents.histograms[i].tolist(), f"Histogram of channel {i + 1}")
    return f'<figure class="image"><h4>Channel {i + 1}</h4>{bars}{fact_list(facts.items())}</figure>'
