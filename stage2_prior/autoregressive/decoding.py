r"""Decoding: samples the codes of an image one position after another, each given all codes before it.

Known codes are copied and not sampled. The known codes at the beginning of the order are read in one pass (prefill). The order
`order_known_first` puts all known codes there, so a masked region is filled from its whole surroundings. In raster order the codes
below a masked region come after it. The loop then samples several candidates and weights them by these codes (`candidates`).

The uniform random numbers are drawn once at the start, from the generator of each image, and each belongs to one position. They
depend neither on the batch nor on the known codes.
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
    """The codes of one position, sampled or known."""

    codes: Tensor  # (B, levels) int64
    logits: list[Tensor]  # (B, K) float32 for each level, after guidance and temperature


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
    """Sample codes for class ids.

    Guidance runs both halves in one batch of 2 B rows. At scale 1, or without classes, only the conditional half runs.

    Args:
        conditioning: (B,) int64 class ids.
        generators: One generator for each image.
        on_step: `on_step(i, codes)` is called after the i-th position with the codes so far, `UNKNOWN` where there is none.
        known: Codes that are copied instead of sampled.
        orders: (B, h·w) int64, the i-th position to sample; None means raster order.

    Returns:
        (B, h, w) int64, or (B, levels, h, w).
    """
    batch, num_positions, levels = len(conditioning), prior.config.num_positions, prior.levels
    known_mask, tokens = known_tokens(prior, conditioning, known, orders)
    start = int(known_mask.all(0).int().cumprod(0).sum())  # the first positions, known in every image
    if start == num_positions:
        return prior.tokens_to_codes(tokens.flatten(1), orders)
    known_late = (known_mask & (~known_mask).cumsum(1).bool()).any(1)  # (B,): a known code follows a sampled one
    count = options.num_candidates if known_late.any() else 1
    candidates = Candidates(batch, count, num_positions, levels, generators, conditioning.device)
    uniform = candidates.uniform
    if orders is not None:
        orders = orders.repeat_interleave(count, 0)
        uniform = uniform.gather(1, orders[:, :, None].expand_as(uniform))
    # The candidates of an image are adjacent rows.
    tokens, conditioning = (x.repeat_interleave(count, 0) for x in (tokens, conditioning))
    null = prior.class_embedding.null_class
    guidance = options.guidance_scale != 1 and bool(has_class(conditioning, null).any())
    if guidance:
        conditioning = torch.cat([conditioning, torch.full_like(conditioning, null)])
    batch_orders = duplicate_for_guidance(orders, guidance) if orders is not None else None
    caches = prior.new_caches(len(conditioning))
    prefix = prior.class_embedding(conditioning)[:, None]
    inputs = torch.cat([prefix, prior.embed_codes(duplicate_for_guidance(tokens[:, :start], guidance))], dim=1)
    stepper = build_stepper(prior, caches, batch_orders, len(conditioning), options.weights == "int8")
    hidden = prior.hidden_states(inputs, batch_orders, caches)[:, -1]

    def choose_codes() -> Tensor:
        rows = candidates.choose_rows(known_late)
        return prior.tokens_to_codes(tokens[rows].flatten(1), None if orders is None else orders[rows])

    for i in range(start, num_positions):
        if i > start:
            hidden = stepper.step(prior.embed_codes(duplicate_for_guidance(tokens[:, i - 1 : i], guidance)))
        sampled = sample_position(
            prior, stepper, hidden, tokens[:, i], uniform[:, i], options, options.guidance_scale_at(i, num_positions)
        )
        tokens[:, i] = sampled.codes
        parents = candidates.reweight(i, sampled.codes, sampled.logits, known_mask[:, i]) if count > 1 else None
        if parents is not None:
            tokens = tokens[parents]
            cache_rows = torch.cat([parents, parents + len(parents)]) if guidance else parents
            for cache in caches:
                cache.select_rows(cache_rows)
        if on_step is not None:
            on_step(i, choose_codes())
    return choose_codes()


def known_tokens(
    prior: CodeTransformer, conditioning: Tensor, known: KnownCodes | None, orders: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return the known mask (B, h·w) and the known codes (B, h·w, levels), in sampling order.

    Codes at other positions are `UNKNOWN`.
    """
    batch, num_positions = len(conditioning), prior.config.num_positions
    unknown = torch.full((batch, num_positions, prior.levels), UNKNOWN, device=conditioning.device)
    if known is None:
        return torch.zeros(batch, num_positions, dtype=torch.bool, device=conditioning.device), unknown
    mask = known.known_mask.flatten(1)
    if orders is not None:
        mask = mask.gather(1, orders)
    return mask, torch.where(mask[:, :, None], prior.codes_to_tokens(known.codes, orders).view_as(unknown), unknown)


def sample_position(
    prior: CodeTransformer,
    stepper: Stepper,
    hidden: Tensor,
    known: Tensor,
    uniform: Tensor,
    options: SamplingOptions,
    scale: float,
) -> SampledPosition:
    """Sample the codes of one position, level after level.

    Args:
        hidden: (B, hidden), or (2 B, hidden) with guidance.
        known: (B, levels) int64 known codes, or `UNKNOWN`.
        uniform: (B, levels) in [0, 1).
        scale: Guidance scale at this position.
    """
    guidance, codes, level_logits = len(hidden) > len(known), known.clone(), []
    caches = prior.new_level_caches(len(hidden))
    inputs = hidden[:, None]
    for level in range(prior.levels):
        states = inputs if prior.depth is None else prior.depth.hidden_states(inputs, caches)
        logits = stepper.logits(states[:, -1], level).float()
        if guidance:
            conditional, null = logits.chunk(2)
            logits = apply_guidance(conditional, null, scale)
        logits = logits / options.temperature
        sampled = sample_codes(truncate_logits(logits, options.top_k, options.top_p, options.min_p), uniform[:, level])
        codes[:, level] = torch.where(known[:, level] == UNKNOWN, sampled, known[:, level])
        level_logits.append(logits)
        if level + 1 < prior.levels:
            inputs = prior.embed_codes(duplicate_for_guidance(codes[:, None, : level + 1], guidance))
    return SampledPosition(codes, level_logits)


def duplicate_for_guidance(tokens: Tensor, guidance: bool) -> Tensor:
    """Repeat the rows for the conditional and the null half of a batch with guidance."""
    return torch.cat([tokens, tokens]) if guidance else tokens
