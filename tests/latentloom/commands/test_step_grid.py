"""How images come about, step by step: `latentloom sample --show-steps`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import latentloom
from PIL import Image
from tiny_models import diffusion_pipeline, tiny_pipeline

SIDE, GAP = 14 * 5, 2  # 14 pixels, magnified


def cell(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    column %= sheet.shape[1] // (SIDE + GAP)
    top, left = (GAP + place * (SIDE + GAP) for place in (row, column))
    return sheet[top : top + SIDE, left : left + SIDE]


@pytest.mark.parametrize("make", [tiny_pipeline, diffusion_pipeline])
def test_the_last_column_of_a_step_grid_is_the_images_themselves(make: Any, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path / "pipeline")
    words = ["sample", "--pipeline", tmp_path / "pipeline", "--num-images", 3, "--output", tmp_path / "out"]
    assert latentloom(*words, "--show-steps") == 0
    sheet, grid = (np.asarray(Image.open(tmp_path / "out" / name).convert("L")) for name in ("steps.png", "grid.png"))
    for row in range(3):
        image = cell(grid, 0, row)
        assert np.array_equal(cell(sheet, row, -1), image)
        assert not np.array_equal(cell(sheet, row, 0), image)


def test_steps_of_an_edit_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["sample", "--pipeline", tmp_path, "--output", tmp_path / "out", "--show-steps", "--interpolate-to", 3]
    assert latentloom(*words) == 2
    assert "expected one of them" in capsys.readouterr().err
