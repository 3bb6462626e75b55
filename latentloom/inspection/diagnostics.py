"""What a tokenizer's figures on a set of images mean, in sentences, with the option to change where something is wrong."""

import math

from latentloom.inspection.codes import LevelUsage
from latentloom.inspection.latents import LatentStatistics
from latentloom.report.diagnostics import Diagnostic, codebook_recommendation, codebook_use
from latentloom.report.numbers import count, percent
from stage1_tokenizer.health import MIN_ASSIGNMENTS_PER_CODE
from stage1_tokenizer.tokenizer import Tokenizer
from stage1_tokenizer.vqgan import VQGANConfig

MOSTLY = 0.5  # of the latents' dimensions


def codebook_diagnostic(tokenizer: Tokenizer, levels: list[LevelUsage]) -> Diagnostic:
    """On the level that is used least well."""
    worst = min(range(len(levels)), key=lambda i: levels[i].usage.perplexity)
    level, config = levels[worst], tokenizer.config
    name, threshold = None, None
    if isinstance(config, VQGANConfig):
        name, threshold = config.model.quantizer.name, getattr(config.model.quantizer, "restart_threshold", None)
    recommendation = codebook_recommendation(name, threshold, level.codebook_size)
    found = codebook_use(*level.usage, level.codebook_size, recommendation)
    where = f"Level {worst + 1} of {len(levels)}, the least used: " if len(levels) > 1 else ""
    if found.level == "bad" and level.choices < MIN_ASSIGNMENTS_PER_CODE * level.codebook_size:
        places = level.choices // len(level.codes)
        return Diagnostic(
            "note",
            "Too few images to judge the codebook",
            f"{where}{count(level.usage.codes_used, 'code')} of {level.codebook_size:,} in {level.choices:,} choices. Give "
            f"--num-images {math.ceil(MIN_ASSIGNMENTS_PER_CODE * level.codebook_size / places)} or more.",
        )
    return found._replace(text=where + found.text)


def latents_diagnostic(latents: LatentStatistics) -> Diagnostic | None:
    """Whether latents with a posterior carry the image; none for latents without."""
    if latents.collapsed is None:
        return None
    share = float(latents.collapsed.mean())
    if share == 0:
        return Diagnostic("good", "Every dimension of the latents carries the image", "None is collapsed.")
    title = f"{percent(share)} of the latents’ dimensions are collapsed"
    text = "Their posterior is nearly the same for every image, so they carry nothing of it."
    if share > MOSTLY:
        text += " Train with a smaller --reconstruction.kl, or with fewer --model.latent-channels."
    return Diagnostic("note", title, text)
