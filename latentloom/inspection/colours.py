"""The page's colour scale, its legend, and maps of errors in it."""

from collections.abc import Sequence
from html import escape

import numpy as np
import torch
from torch import Tensor

SCALE = ("#0a0a23", "#45197a", "#9c2f6b", "#dd5f3e", "#f6b04b", "#fdf7cd")  # dark to light, evenly spaced
ERROR_TOPS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 255)


def coloured(shares: Tensor) -> Tensor:
    """Values in [0, 1], of any shape; others count as the nearest end → uint8 colours, with a last axis of 3."""
    anchors = np.array([[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in SCALE])
    at = np.linspace(0, 1, len(SCALE))
    channels = [np.interp(shares.double().numpy(), at, anchors[:, channel]) for channel in range(3)]
    return torch.from_numpy(np.stack(channels, -1).round().astype(np.uint8))


def legend(low: str, high: str) -> str:
    """The scale between the words for its ends."""
    gradient = f"linear-gradient(to right, {', '.join(SCALE)})"
    return f'<p class="scale">{escape(low)}<i style="background: {gradient}"></i>{escape(high)}</p>'


def absolute_error(original: Tensor, reconstruction: Tensor) -> Tensor:
    """uint8 (C, h, w) each → (h, w) float64, the mean over channels."""
    return (original.double() - reconstruction.double()).abs().mean(0)


def error_top(errors: Sequence[Tensor]) -> int:
    """Where the scale that maps share ends: a round number that at most a hundredth of all their pixels lie above."""
    pooled = np.concatenate([error.flatten().numpy() for error in errors])
    wanted = float(np.quantile(pooled, 0.99))
    return next(top for top in ERROR_TOPS if top >= wanted)


def error_map(error: Tensor, top: float) -> Tensor:
    """(h, w) → uint8 (3, h, w): the darkest colour is no error, the lightest `top` or more."""
    return coloured(error / top).movedim(-1, 0)
