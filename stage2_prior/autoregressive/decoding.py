r"""Decoding: one place after another, each code drawn given all before it.

Known codes are forced, not drawn. Those that begin the order of all images are read in one pass (prefill), so that in the order
`known_first` a hole is filled from all around it. In raster order what is known below a hole comes too late to be seen; there
several candidates are drawn and weighed by it (`candidates`). The uniform numbers that draw codes are taken up front from the
image's own generator and belong to places: they depend neither on the batch nor on what is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from stage2_prior.autoregressive.candidates import Candidates
from stage2_prior.autoregressive.sampling import SamplingOptions, sample_codes, truncate_logits
from stage2_prior.autoregressive.stepping import Stepper, build_stepper
from stage2_prior.autoregressive.transformer import CodeTransformer
from stage2_prior.conditioning.classes import apply_guidance, has_class
from stage2_prior.prior import UNKNOWN, KnownCodes


class SampledPosition(NamedTuple):
    """The codes of one place, drawn or forced."""

    codes: Tensor  # (B, levels) int64
    logits: list[Tensor]  # (B, K) float32 of each level, guided and tempered


@torch.no_grad()
def decode(
    prior: CodeTransformer,
    conditioning: Tensor,
    options: SamplingOptions,
    generators: Sequence[torch.Generator],
    on_step: Callable[[int, Tensor], None] | None = None,
    known: KnownCodes | None = None,
    orders: Tensor | None = None,
) -> Tensor:
    """Codes (B, h, w) int64, or (B, levels, h, w), for class ids (B,).

    With guidance both halves run in one batch of 2 B rows; at scale 1, or without classes, the null half is left out.
    `on_step(i, codes)` is called after the i-th place with the codes so far, `UNKNOWN` where there is none.

    Args:
        orders: (B, h·w) int64, the place that is drawn i-th; none is raster order.
    """
    batch, num_positions, levels = len(conditioning), prior.config.num_positions, prior.levels
    forced, tokens = known_tokens(prior, conditioning, known, orders)
    start = int(forced.all(0).int().cumprod(0).sum())  # places that need no draw in any image
    if start == num_positions:
        return prior.tokens_to_codes(tokens.flatten(1), orders)
    late = (forced & (~forced).cumsum(1).bool()).any(1)  # (B,): something known comes after something drawn
    count = options.num_candidates if late.any() else 1
    candidates = Candidates(batch, count, num_positions, levels, generators, conditioning.device)
    uniform = candidates.uniform
    if orders is not None:
        orders = orders.repeat_interleave(count, 0)
        uniform = uniform.gather(1, orders[:, :, None].expand_as(uniform))
    tokens, conditioning = (
        x.repeat_interleave(count, 0) for x in (tokens, conditioning)
    )  # candidates of an image in turn
    null = prior.class_embedding.null_class
    guidance = options.guidance_scale != 1 and bool(has_class(conditioning, null).any())
    if guidance:
        conditioning = torch.cat([conditioning, torch.full_like(conditioning, null)])
    both = duplicate_for_guidance(orders, guidance) if orders is not None else None
    caches = prior.new_caches(len(conditioning))
    prefix = prior.class_embedding(conditioning)[:, None]
    inputs = torch.cat([prefix, prior.embed_codes(duplicate_for_guidance(tokens[:, :start], guidance))], dim=1)
    stepper = build_stepper(prior, caches, both, len(conditioning), options.weights == "int8")
    hidden = prior.hidden_states(inputs, both, caches)[:, -1]

    def choose_codes() -> Tensor:
        best = candidates.choose_rows(late)
        return prior.tokens_to_codes(tokens[best].flatten(1), None if orders is None else orders[best])

    for i in range(start, num_positions):
        if i > start:
            hidden = stepper.step(prior.embed_codes(duplicate_for_guidance(tokens[:, i - 1 : i], guidance)))
        position = sample_position(
            prior, stepper, hidden, tokens[:, i], uniform[:, i], options, options.guidance_scale_at(i, num_positions)
        )
        tokens[:, i] = position.codes
        chosen = candidates.reweight(i, position.codes, position.logits, forced[:, i]) if count > 1 else None
        if chosen is not None:
            tokens = tokens[chosen]
            rows = torch.cat([chosen, chosen + len(chosen)]) if guidance else chosen
            for cache in caches:
                cache.select_rows(rows)
        if on_step is not None:
            on_step(i, choose_codes())
    return choose_codes()


def known_tokens(
    prior: CodeTransformer, conditioning: Tensor, known: KnownCodes | None, orders: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What is known, in the order of drawing: whether (B, places), and the codes (B, places, levels) or `UNKNOWN`."""
    batch, num_positions = len(conditioning), prior.config.num_positions
    nothing = torch.full((batch, num_positions, prior.levels), UNKNOWN, device=conditioning.device)
    if known is None:
        return torch.zeros(batch, num_positions, dtype=torch.bool, device=conditioning.device), nothing
    forced = known.known_mask.flatten(1)
    if orders is not None:
        forced = forced.gather(1, orders)
    return forced, torch.where(forced[:, :, None], prior.codes_to_tokens(known.codes, orders).view_as(nothing), nothing)


def sample_position(
    prior: CodeTransformer,
    stepper: Stepper,
    hidden: Tensor,
    known: Tensor,
    uniform: Tensor,
    options: SamplingOptions,
    scale: float,
) -> SampledPosition:
    """The codes of one place, level after level.

    Args:
        hidden: (B, hidden), or (2 B, hidden) with guidance.
        known: (B, levels), codes that are forced, or `UNKNOWN`.
        uniform: (B, levels) in [0, 1).
    """
    guidance, codes, seen = len(hidden) > len(known), known.clone(), []
    caches = prior.new_level_caches(len(hidden))
    inputs = hidden[:, None]
    for level in range(prior.levels):
        states = inputs if prior.depth is None else prior.depth.hidden_states(inputs, caches)
        logits = stepper.logits(states[:, -1], level).float()
        if guidance:
            conditional, without = logits.chunk(2)
            logits = apply_guidance(conditional, without, scale)
        logits = logits / options.temperature
        drawn = sample_codes(truncate_logits(logits, options.top_k, options.top_p, options.min_p), uniform[:, level])
        codes[:, level] = torch.where(known[:, level] == UNKNOWN, drawn, known[:, level])
        seen.append(logits)
        if level + 1 < prior.levels:
            inputs = prior.embed_codes(duplicate_for_guidance(codes[:, None, : level + 1], guidance))
    return SampledPosition(codes, seen)


def duplicate_for_guidance(tokens: Tensor, guidance: bool) -> Tensor:
    """The same for both halves of a guided batch."""
    return torch.cat([tokens, tokens]) if guidance else tokens
