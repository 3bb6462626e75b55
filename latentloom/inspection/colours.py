"""The colour scale of the pages, its legend, and error maps."""

from collections.abc import Sequence
from html import escape

import numpy as np
import torch
from torch import Tensor

SCALE = ("#0a0a23", "#45197a", "#9c2f6b", "#dd5f3e", "#f6b04b", "#fdf7cd")  # dark to light, evenly spaced
ERROR_LIMITS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 255)


def map_to_colours(values: Tensor) -> Tensor:
    """Map values to the colour scale.

    Args:
        values: Float tensor of any shape; values outside [0, 1] get the colour of the nearest end.

    Returns:
        uint8 RGB colours, the shape of `values` with a last axis of 3.
    """
    anchors = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in SCALE])
    anchor_values = np.linspace(0, 1, len(SCALE))
    channels = [np.interp(values.double().numpy(), anchor_values, anchors[:, channel]) for channel in range(3)]
    return torch.from_numpy(np.stack(channels, -1).round().astype(np.uint8))


def colour_legend(low: str, high: str) -> str:
    """Return the colour scale as HTML, with a label at each end."""
    gradient = f"linear-gradient(to right, {', '.join(SCALE)})"
    return f'<p class="scale">{escape(low)}<i style="background: {gradient}"></i>{escape(high)}</p>'


def absolute_error(original: Tensor, reconstruction: Tensor) -> Tensor:
    """Return the absolute error of two uint8 images (C, h, w), averaged over channels, as (h, w) float64."""
    return (original.double() - reconstruction.double()).abs().mean(0)


def choose_error_limit(errors: Sequence[Tensor]) -> int:
    """Return a round upper end for the colour scale of `errors`: at most 1 % of all pixels lie above it."""
    pooled = np.concatenate([error.flatten().numpy() for error in errors])
    quantile = float(np.quantile(pooled, 0.99))
    return next(limit for limit in ERROR_LIMITS if limit >= quantile)


def error_map(error: Tensor, limit: float) -> Tensor:
    """Map errors (h, w) to a uint8 image (3, h, w): the darkest colour is 0, the lightest is `limit` or more."""
    return map_to_colours(error / limit).movedim(-1, 0)
