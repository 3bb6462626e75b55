"""Diagnostics of an inspected tokenizer: what its metrics mean, in sentences, and which option to change."""

import math

from latentloom.inspection.codes import LevelUsage
from latentloom.inspection.latents import LatentStatistics
from latentloom.report.diagnostics import Diagnostic, codebook_recommendation, codebook_usage_diagnostic
from latentloom.report.numbers import format_count, format_percent
from stage1_tokenizer.health import MIN_ASSIGNMENTS_PER_CODE
from stage1_tokenizer.tokenizer import Tokenizer
from stage1_tokenizer.vqgan import VQGANConfig

MOSTLY_COLLAPSED = 0.5  # of the latents' dimensions


def codebook_diagnostic(tokenizer: Tokenizer, levels: list[LevelUsage]) -> Diagnostic:
    """Assess the codebook usage of the least used level."""
    worst = min(range(len(levels)), key=lambda i: levels[i].usage.perplexity)
    level, config = levels[worst], tokenizer.config
    quantizer, threshold = None, None
    if isinstance(config, VQGANConfig):
        quantizer = config.model.quantizer.name
        threshold = getattr(config.model.quantizer, "restart_threshold", None)
    recommendation = codebook_recommendation(quantizer, threshold, level.codebook_size)
    diagnostic = codebook_usage_diagnostic(*level.usage, level.codebook_size, recommendation)
    prefix = f"Level {worst + 1} of {len(levels)} is the least used. " if len(levels) > 1 else ""
    if diagnostic.level == "bad" and level.num_tokens < MIN_ASSIGNMENTS_PER_CODE * level.codebook_size:
        positions = level.num_tokens // len(level.codes)
        return Diagnostic(
            "note",
            "Too few images to assess the codebook",
            f"{prefix}{format_count(level.usage.codes_used, 'code')} of {level.codebook_size:,} in {level.num_tokens:,} tokens. "
            f"Pass --num-images {math.ceil(MIN_ASSIGNMENTS_PER_CODE * level.codebook_size / positions)} or more.",
        )
    return diagnostic._replace(text=prefix + diagnostic.text)


def latents_diagnostic(latents: LatentStatistics) -> Diagnostic | None:
    """Assess how many latent dimensions are collapsed; None for latents without a posterior."""
    if latents.collapsed_share is None:
        return None
    share = float(latents.collapsed_share.mean())
    if share == 0:
        return Diagnostic("good", "All latent dimensions depend on the image", "No dimension is collapsed.")
    title = f"{format_percent(share)} of the latent dimensions are collapsed"
    text = "Their posterior is nearly the same for every image, so they carry no information about it."
    if share > MOSTLY_COLLAPSED:
        text += " Train with a smaller --reconstruction.kl, or with fewer --model.latent-channels."
    return Diagnostic("note", title, text)
