r"""Rotary positions (Su et al. 2021, arXiv 2104.09864), along one axis or along rows and columns.

A pair (x_i, x_{i + d/2}) of the d channels of a head is rotated by the angle θ_i. In 1-D θ_i = p · b^(−2i/d) at sequence position
p. In 2-D the row rotates the first half of the pairs and the column the second half, with the frequencies of a head of half the
width. The class prefix is at row 0, column 0, and the grid starts at row 1, column 1. So no code has the position of the prefix,
and the distance to the prefix tells the position of a code.
"""

import torch
from torch import Tensor

RotaryFactors = tuple[Tensor, Tensor]  # cosines and signed sines, (tokens, head_dim) or (B, 1, tokens, head_dim)


def rotary_angles(height: int, width: int, head_dim: int, axes: int, theta: float) -> Tensor:
    """Compute the angles of the prefix and of the codes in raster order.

    Args:
        height: Rows of the code grid.
        width: Columns of the code grid.
        head_dim: Channels of a head.
        axes: 1 for sequence positions, 2 for rows and columns, 0 for no rotation.
        theta: Base b of the frequencies.

    Returns:
        (1 + h·w, head_dim / 2) float32.
    """
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
    """Compute the factors for `rotate`: cosines and signed sines (…, d) of angles (…, d / 2)."""
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate x (B, heads, tokens, d) by the factors of `rotary_factors`; computed in float32 or wider, returned in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    return (wide * cos).addcmul(wide.roll(x.shape[-1] // 2, -1), sin).to(x.dtype)
