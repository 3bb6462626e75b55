"""Rotary positions: attention scores depend only on differences of positions."""

import pytest
import torch
from tiny_models import seeded
from torch import Tensor
from torch.testing import assert_close

from stage2_prior.layers.rotary import rotary_angles, rotary_factors, rotate

HEIGHT, WIDTH, HEAD_DIM = 5, 4, 8


def compute_scores(axes: int) -> Tensor:
    """Compute q·k for one query and one key at all pairs of positions: (1 + h·w, 1 + h·w)."""
    angles = rotary_angles(HEIGHT, WIDTH, HEAD_DIM, axes, theta=100.0)
    factors = rotary_factors(angles)
    query, key = (torch.randn(HEAD_DIM, generator=seeded(i)).expand(1, 1, len(angles), HEAD_DIM) for i in range(2))
    return (rotate(query, *factors) @ rotate(key, *factors).mT)[0, 0]


def make_positions(axes: int) -> list[tuple[int, ...]]:
    if axes == 1:
        return [(i,) for i in range(1 + HEIGHT * WIDTH)]
    return [(0, 0), *((row + 1, column + 1) for row in range(HEIGHT) for column in range(WIDTH))]


@pytest.mark.parametrize("axes", [1, 2])
def test_scores_depend_only_on_the_differences_of_positions(axes: int) -> None:
    by_difference: dict[tuple[int, ...], list[Tensor]] = {}
    table = compute_scores(axes)
    for i, query_position in enumerate(make_positions(axes)):
        for j, key_position in enumerate(make_positions(axes)):
            difference = tuple(a - b for a, b in zip(query_position, key_position, strict=True))
            by_difference.setdefault(difference, []).append(table[i, j])
    for same in by_difference.values():
        assert_close(torch.stack(same), same[0].expand(len(same)), rtol=0, atol=1e-5)
    gaps = torch.stack([same[0] for same in by_difference.values()]).sort().values.diff()
    assert gaps.min() > 1e-5, "two differences have the same score"
    assert len(by_difference) == {1: 41, 2: 79}[axes]


def test_the_class_prefix_is_at_the_origin_and_the_first_code_at_row_1_column_1() -> None:
    angles = rotary_angles(HEIGHT, WIDTH, HEAD_DIM, 2, theta=100.0)
    frequencies = torch.tensor([1.0, 0.1])  # 100^(−i/2)
    assert angles[0].eq(0).all()
    assert_close(angles[1], torch.cat([frequencies, frequencies]))
    assert_close(angles[1 + 2 * WIDTH + 3], torch.cat([3 * frequencies, 4 * frequencies]))  # row 2, column 3 from 0


def test_one_dimensional_angles_count_the_sequence() -> None:
    angles = rotary_angles(2, 2, HEAD_DIM, 1, theta=10_000.0)
    assert_close(angles, torch.arange(5)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001]))


def test_rotation_preserves_lengths_and_the_dtype() -> None:
    angles = rotary_angles(HEIGHT, WIDTH, HEAD_DIM, 2, theta=100.0)
    x = torch.randn(2, 3, len(angles), HEAD_DIM, generator=seeded(0))
    rotated = rotate(x, *rotary_factors(angles))
    assert_close(rotated.norm(dim=-1), x.norm(dim=-1))
    assert not torch.equal(rotated[:, :, 1:], x[:, :, 1:])
    assert rotate(x.bfloat16(), *rotary_factors(angles)).dtype == torch.bfloat16
