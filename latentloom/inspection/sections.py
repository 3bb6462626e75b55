"""The page's sections: examples with their errors, what codes look like, how often and where they are used, latents."""

import io
from collections.abc import Iterator, Mapping
from html import escape
from typing import NamedTuple

from torch import Tensor

from latentloom.inspection.codes import GRID, LevelUsage, decoded_codes, in_company, usage_by_position
from latentloom.inspection.colours import absolute_error, error_map, error_top, legend
from latentloom.inspection.drawing import codes_by_use, heat_map, histogram
from latentloom.inspection.latents import LatentStatistics
from latentloom.inspection.measure import Example, Examples
from latentloom.report.numbers import count, number, percent
from latentloom.report.reading import PNGImage
from latentloom.report.widgets import fact_list, image, table
from stage1_tokenizer.data.image_processor import to_pil
from stage1_tokenizer.tokenizer import Tokenizer

SMALL = 96  # pixels of a side up to which pictures are shown pixel by pixel
TILES = 256  # codes shown, of all levels together
PLACES = ("", "2nd ", "3rd ")
TILE_SIDE = 64  # pixels up to which a code's tile is shown larger the more pixels it has


class Section(NamedTuple):
    place: str
    title: str
    html: str


def picture(pixels: Tensor) -> PNGImage:
    """uint8 (C, h, w)."""
    (drawn,), buffer = to_pil(pixels[None]), io.BytesIO()
    drawn.save(buffer, format="PNG")
    return PNGImage(buffer.getvalue(), *drawn.size)


# -- examples ---------------------------------------------------------------------------------------------------------


def examples(found: Examples) -> Section:
    named = [(f"{place}worst".capitalize(), example) for place, example in zip(PLACES, found.worst, strict=False)]
    named += [(f"{place}best".capitalize(), example) for place, example in zip(PLACES, found.best, strict=False)]
    named += [("At random", example) for example in found.drawn]
    top = error_top([absolute_error(example.original, example.reconstruction) for _, example in named])
    small = max(named[0][1].original.shape[-2:]) <= SMALL
    kind, least = ("examples small", 350) if small else ("examples", 520)
    beyond = "; a larger one has the colour of the largest" if top < 255 else ""
    lead = (
        "The worst and the best by PSNR, and some at random. The error is the absolute difference of a pixel’s values, the mean "
        f"over channels; all maps have the same scale, from 0 to {top} of 255{beyond}."
    )
    figures = "".join(trio(name, example, top) for name, example in named)
    return Section(
        "reconstructions",
        "Reconstructions",
        f'<p class="lead">{lead}</p>{legend("0", f"{top} of 255")}<div class="{kind}" style="--least: {least}px">{figures}</div>',
    )


def trio(name: str, example: Example, top: int) -> str:
    error = absolute_error(example.original, example.reconstruction)
    shown = {
        "original": example.original,
        "reconstruction": example.reconstruction,
        "error": error_map(error, top),
    }
    said = f"{example.source_id}; largest error {float(error.max()):.0f}"
    return side_by_side((name, f"{example.psnr:.2f} dB"), shown, said)


def side_by_side(heads: tuple[str, str], shown: Mapping[str, Tensor], caption: str) -> str:
    """Two or three pictures, uint8 (C, h, w), by the words below each; `heads` stand above them, left and right."""
    left, right = map(escape, heads)
    kind = "trio" if len(shown) == 3 else "trio two"
    images = "".join(
        f"<div>{image(picture(pixels), said)}<small>{said}</small></div>" for said, pixels in shown.items()
    )
    return (
        f'<figure class="picture"><h4><span>{left}</span><span>{right}</span></h4><div class="{kind}">{images}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


# -- codes ------------------------------------------------------------------------------------------------------------


def level_name(i: int, levels: list[LevelUsage]) -> str:
    return f"Level {i + 1}" if len(levels) > 1 else "Codes"


def codes_look(tokenizer: Tokenizer, codes: Tensor, levels: list[LevelUsage]) -> Section:
    shown, side = min(levels[0].codebook_size, max(1, TILES // len(levels))), tokenizer.config.downsampling_factor
    company = " With it stand the codes of the other levels that it most often comes with." if len(levels) > 1 else ""
    unused = (
        " What nothing chose is pale over a red bar." if any(level.usage.codes_used < shown for level in levels) else ""
    )
    lead = (
        f"{which_codes(levels, shown)}, by use, each as it decodes among its own kind: a grid of {GRID} × {GRID} of that code "
        f"alone, of which the middle {side} × {side} pixels are shown; beside others a code looks different.{company} The bar "
        f"below is its share of the choices, as part of the most used code’s.{unused} Resting the pointer on a code tells its "
        "index and count."
    )
    parts = [f'<p class="lead">{lead}</p>']
    for i, level in enumerate(levels):
        chosen = level.ranked[:shown]
        tiles = decoded_codes(tokenizer, in_company(codes, i, chosen) if codes.ndim == 4 else chosen)
        spans = "".join(code_tile(int(code), pixels, level) for code, pixels in zip(chosen, tiles, strict=True))
        kind = "codes small" if side <= TILE_SIDE else "codes"
        parts.append(f"<h3>{level_name(i, levels)}</h3>" if len(levels) > 1 else "")
        parts.append(f'<div class="{kind}" style="--tile: {42 if shown > 64 else 60}px">{spans}</div>')
    return Section("codes", "What the codes look like", "".join(parts))


def which_codes(levels: list[LevelUsage], shown: int) -> str:
    size, of = levels[0].codebook_size, " of each level" if len(levels) > 1 else ""
    return f"All codes{of}" if shown == size else f"The {shown} most used codes{of}, of {size:,}"


def code_tile(code: int, pixels: Tensor, level: LevelUsage) -> str:
    chosen, most = int(level.counts[code]), int(level.counts.max())
    title = (
        f"code {code}: {count(chosen, 'time')}, {percent(chosen / level.choices)}" if chosen else f"code {code}: never"
    )
    return (
        f'<span class="{"used" if chosen else "dead"}" title="{title}" style="--share: {chosen / most:.3f}">'
        f"{image(picture(pixels), title)}</span>"
    )


def codes_use(levels: list[LevelUsage]) -> Section:
    images = len(levels[0].codes)
    lead = (
        "Maps are over the grid, for each position over all images: the perplexity of its codes, and the share of the code that is "
        "most common there. Where the perplexity is 1, every image has the same code, and the position tells nothing. With "
        f"{count(images, 'image')} it is at most {min(images, levels[0].codebook_size):,}."
    )
    curves = [(level_name(i, levels).lower(), level.counts) for i, level in enumerate(levels)]
    charts = codes_by_use(curves, never_chosen(levels)) + "".join(maps(levels))
    by_level = f"<h3>By level</h3>{table_of(levels)}" if len(levels) > 1 else ""
    return Section(
        "use",
        "How often and where they are used",
        f'<p class="lead">{lead}</p><div class="charts">{charts}</div>{by_level}',
    )


def never_chosen(levels: list[LevelUsage]) -> str:
    if not any(level.dead for level in levels):
        return "Every code is chosen."
    where = [f"{level.dead:,}{f' on level {i + 1}' if len(levels) > 1 else ''}" for i, level in enumerate(levels)]
    return f"Codes never chosen: {', '.join(where)}."


def maps(levels: list[LevelUsage]) -> Iterator[str]:
    """By position, the levels' perplexities on one colour scale, and shares on another."""
    found = [usage_by_position(level.codes) for level in levels]
    for title, unit, values, digits in (
        ("Perplexity", "codes", [usage.perplexity for usage in found], 3),
        ("Most common code", "% of images", [100 * usage.most_common for usage in found], 2),
    ):
        ends = min(float(v.min()) for v in values), max(float(v.max()) for v in values)
        for i, value in enumerate(values):
            yield heat_map(f"{title}, level {i + 1}" if len(levels) > 1 else title, unit, value, ends, digits)


def table_of(levels: list[LevelUsage]) -> str:
    rows = [
        (
            str(i + 1),
            f"{level.usage.codes_used:,}",
            percent(level.usage.codes_used / level.codebook_size),
            number(level.usage.perplexity),
            percent(level.usage.perplexity / level.codebook_size),
            f"{level.dead:,}",
        )
        for i, level in enumerate(levels)
    ]
    heads = ("level", "codes used", "of K", "perplexity", "of K", "dead")
    return table(heads, rows, numeric=range(len(heads)))


# -- latents ----------------------------------------------------------------------------------------------------------


def latents_by_channel(tokenizer: Tokenizer, found: LatentStatistics) -> Section:
    low, high = (number(end, 3) for end in found.ends)
    lead = (
        f"A tokenizer of the kind {type(tokenizer).__name__} has no codebook: its latents are numbers, and there are no codes to "
        "show. By channel, over all images: mean and standard deviation of the raw latents, what they were in training, and how "
        f"the values are spread, all histograms from {low} to {high}."
    )
    if found.collapsed is not None:
        lead += " A position is collapsed where less than 1 % of its variance comes from the image."
    cards = "".join(channel(tokenizer, found, i) for i in range(len(found.mean)))
    return Section("latents", "Latents by channel", f'<p class="lead">{lead}</p><div class="channels">{cards}</div>')


def channel(tokenizer: Tokenizer, found: LatentStatistics, i: int) -> str:
    config = tokenizer.config
    entries = {"mean": number(float(found.mean[i]), 3), "std": number(float(found.std[i]), 3)}
    if config.latent_mean is not None and config.latent_std is not None:
        entries["in training"] = f"{number(config.latent_mean[i], 3)}, {number(config.latent_std[i], 3)}"
    if found.collapsed is not None:
        entries["collapsed"] = percent(float(found.collapsed[i]))
    bars = histogram(found.histograms[i].tolist(), f"Histogram of channel {i + 1}")
    return f'<figure class="picture"><h4>Channel {i + 1}</h4>{bars}{fact_list(entries.items())}</figure>'
