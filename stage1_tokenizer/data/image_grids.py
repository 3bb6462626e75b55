"""Grids of images for people to look at, and image files."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stage1_tokenizer.data.image_processor import to_pil
from training_harness.files import atomic_file

GAP = 2  # pixels between images


def image_grid(
    images: Tensor, columns: int, row_labels: Sequence[str] | None = None, scale: int | None = None
) -> Image.Image:
    """Arrange images in rows on white, with optional labels at the left of the rows.

    Args:
        images: (N, C, h, w) uint8.
        columns: images in a row.
        row_labels: one label for each row.
        scale: a whole magnification; by default small images are enlarged to about 64 pixels.
    """
    height, width = images.shape[-2:]
    scale = scale or max(1, round(64 / max(height, width)))
    cell_h, cell_w = height * scale + GAP, width * scale + GAP
    rows = -(-len(images) // columns)
    row_labels = [to_single_line(label) for label in row_labels or ()]
    font = ImageFont.load_default(size=max(11, min(16, cell_h // 3)))
    margin = round(max((font.getlength(label) for label in row_labels), default=0)) + 2 * GAP + 4 if row_labels else GAP
    grid = Image.new("RGB", (margin + columns * cell_w, GAP + rows * cell_h), "white")
    draw = ImageDraw.Draw(grid)
    for row, label in enumerate(row_labels):
        draw.text((GAP + 2, GAP + row * cell_h + cell_h / 2), label, fill="black", font=font, anchor="lm")
    for i, image in enumerate(to_pil(images)):
        enlarged = image.resize((width * scale, height * scale), Image.Resampling.NEAREST).convert("RGBA")
        position = (margin + i % columns * cell_w, GAP + i // columns * cell_h)
        grid.paste(enlarged, position, enlarged)
    return grid


def to_single_line(label: str) -> str:
    """Remove line breaks from a label, and replace the characters that cannot be encoded."""
    return " ".join(label.split()).encode("utf-8", "replace").decode()


def reconstruction_grid(originals: Tensor, reconstructions: Tensor, columns: int = 10) -> Image.Image:
    """Arrange each row of originals above the row of their reconstructions; both are (N, C, h, w) uint8."""
    rows = [row for pair in zip(originals.split(columns), reconstructions.split(columns), strict=True) for row in pair]
    labels = ["original", "reconstruction"] * (len(rows) // 2)
    if len(rows[-1]) < columns:  # both rows of the last pair get white images, so that all rows are equally long
        missing = columns - len(rows[-1])
        rows[-2:] = [torch.cat([row, row.new_full((missing, *row.shape[1:]), 255)]) for row in rows[-2:]]
    return image_grid(torch.cat(rows), columns, labels)


def save_images(images: Tensor, paths: Iterable[Path]) -> None:
    """Save (N, C, h, w) uint8 images as PNG files; with more than four channels also as NumPy files (h, w, C)."""
    for pixels, image, path in zip(images, to_pil(images), paths, strict=True):
        save_image(image, path)
        if len(pixels) > 4:
            with atomic_file(path.with_suffix(".npy")) as temporary, temporary.open("wb") as file:
                np.save(file, pixels.permute(1, 2, 0).contiguous().numpy())


def save_image(image: Image.Image, path: Path) -> None:
    """Save an image as a PNG file, atomically."""
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG")
