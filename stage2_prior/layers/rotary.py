r"""Rotary positions (Su et al. 2021, arXiv 2104.09864), along one axis or along rows and columns.

A pair (x_i, x_{i + d/2}) of a head's d channels is turned by the angle θ_i: in 1-D θ_i = p · b^(−2i/d) at sequence
position p. In 2-D the first half of the pairs turns with the row, the second with the column, each with the frequencies of
a head of half the width. The class prefix stands at row 0, column 0 and the grid begins at row 1, column 1, so that no
code shares the prefix's place and each knows its own from its distance to the prefix.
"""

import torch
from torch import Tensor

RotaryFactors = tuple[Tensor, Tensor]  # cosines and signed sines, (tokens, head_dim) or (B, 1, tokens, head_dim)


def rotary_angles(height: int, width: int, head_dim: int, axes: int, theta: float) -> Tensor:
    """Angles (1 + h·w, head_dim / 2) float32 of the prefix and the codes in raster order; without axes nothing is turned."""
    if axes == 0:
        return torch.zeros(1 + height * width, head_dim // 2)
    if axes == 1:
        positions = torch.arange(1 + height * width)[:, None]  # (tokens, 1)
    else:
        rows, columns = torch.meshgrid(torch.arange(height) + 1, torch.arange(width) + 1, indexing="ij")
        grid = torch.stack([rows.flatten(), columns.flatten()], dim=1)
        positions = torch.cat([torch.zeros(1, 2, dtype=grid.dtype), grid])  # (tokens, 2)
    pairs = head_dim // 2 // axes
    frequencies = theta ** -(torch.arange(pairs, dtype=torch.float32) / pairs)
    return (positions[:, :, None] * frequencies).flatten(1)


def rotary_factors(angles: Tensor) -> RotaryFactors:
    """Cosines and signed sines (…, d) of angles (…, d / 2), as `rotate` takes them."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: (B, heads, tokens, d); cos, sin: those of `turns`. Computed in float32 or wider, returned in x's type."""
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    return (wide * cos).addcmul(wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)
