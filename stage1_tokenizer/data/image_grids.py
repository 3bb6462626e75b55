"""Sheets of pictures, as a person looks at them."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stage1_tokenizer.data.image_processor import to_pil
from training_harness.files import atomic_file

GAP = 2


def image_grid(
    images: Tensor, columns: int, row_labels: Sequence[str] | None = None, scale: int | None = None
) -> Image.Image:
    """One sheet of (N, C, h, w) uint8 images, row by row on white, with a label at the left of each row if given.

    `scale` is a whole magnification; by default small images are brought to about 64 pixels.
    """
    height, width = images.shape[-2:]
    scale = scale or max(1, round(64 / max(height, width)))
    cell_h, cell_w = height * scale + GAP, width * scale + GAP
    rows = -(-len(images) // columns)
    row_labels = [printable(label) for label in row_labels or ()]
    font = ImageFont.load_default(size=max(11, min(16, cell_h // 3)))
    margin = round(max((font.getlength(label) for label in row_labels), default=0)) + 2 * GAP + 4 if row_labels else GAP
    sheet = Image.new("RGB", (margin + columns * cell_w, GAP + rows * cell_h), "white")
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(row_labels):
        draw.text((GAP + 2, GAP + row * cell_h + cell_h / 2), label, fill="black", font=font, anchor="lm")
    for i, picture in enumerate(to_pil(images)):
        enlarged = picture.resize((width * scale, height * scale), Image.Resampling.NEAREST).convert("RGBA")
        place = (margin + i % columns * cell_w, GAP + i // columns * cell_h)
        sheet.paste(enlarged, place, enlarged)
    return sheet


def printable(label: str) -> str:
    """A label in one line, whatever characters a class's name has."""
    return " ".join(label.split()).encode("utf-8", "replace").decode()


def reconstruction_grid(originals: Tensor, reconstructions: Tensor, columns: int = 10) -> Image.Image:
    """Rows of originals, each over the row of their reconstructions; both (N, C, h, w) uint8."""
    rows = [row for pair in zip(originals.split(columns), reconstructions.split(columns), strict=True) for row in pair]
    labels = ["original", "reconstruction"] * (len(rows) // 2)
    if len(rows[-1]) < columns:  # fill up the last pair, so that the grid stays a grid
        missing = columns - len(rows[-1])
        rows[-2:] = [torch.cat([row, row.new_full((missing, *row.shape[1:]), 255)]) for row in rows[-2:]]
    return image_grid(torch.cat(rows), columns, labels)


def save_images(images: Tensor, paths: Iterable[Path]) -> None:
    """Writes (N, C, h, w) uint8 images as PNG files; of more than four channels also whole, as NumPy files beside them."""
    for pixels, picture, path in zip(images, to_pil(images), paths, strict=True):
        save_image(picture, path)
        if len(pixels) > 4:
            with atomic_file(path.with_suffix(".npy")) as beside, beside.open("wb") as file:
                np.save(file, pixels.permute(1, 2, 0).contiguous().numpy())


def save_image(picture: Image.Image, path: Path) -> None:
    with atomic_file(path) as beside:
        picture.save(beside, format="PNG")
