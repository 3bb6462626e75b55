"""`latentloom sample --show-steps`: images at each step of sampling."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import latentloom
from PIL import Image
from tiny_models import diffusion_pipeline, tiny_pipeline

SIDE, GAP = 14 * 5, 2  # 14 pixels, enlarged


def cell(step_grid: np.ndarray, row: int, column: int) -> np.ndarray:
    column %= step_grid.shape[1] // (SIDE + GAP)
    top, left = (GAP + index * (SIDE + GAP) for index in (row, column))
    return step_grid[top : top + SIDE, left : left + SIDE]


@pytest.mark.parametrize("make", [tiny_pipeline, diffusion_pipeline])
def test_the_last_column_of_a_step_grid_shows_the_samples(make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "pipeline")
    words = ["sample", "--pipeline", tmp_path / "pipeline", "--num-images", 3, "--output", tmp_path / "out"]
    assert latentloom(*words, "--show-steps") == 0
    step_grid, grid = (
        np.asarray(Image.open(tmp_path / "out" / name).convert("L")) for name in ("steps.png", "grid.png")
    )
    for row in range(3):
        image = cell(grid, 0, row)
        assert np.array_equal(cell(step_grid, row, -1), image)
        assert not np.array_equal(cell(step_grid, row, 0), image)


def test_show_steps_with_an_edit_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", "--pipeline", tmp_path, "--output", tmp_path / "out", "--show-steps", "--interpolate-to", 3]
    assert latentloom(*words) == 2
    assert "expected one of them" in capsys.readouterr().err
