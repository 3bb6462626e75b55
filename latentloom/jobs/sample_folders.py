"""Folders of generated images: `sample` lists what it wrote, so that `evaluate` measures those and not the grid beside them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SAMPLE_LIST = "samples.json"
NUMBERED_FILE = re.compile(r"\d{5}(-.+)?\.(png|npy)")  # names that `sample` and `reconstruct` give


def build_sample_list(names: Sequence[str], class_names: Sequence[str | None], channels: int) -> dict[str, Any]:
    """The content of `samples.json`. Images of more than four channels are whole in the NumPy files only."""
    files = [name if channels <= 4 else str(Path(name).with_suffix(".npy")) for name in names]
    return {"images": [{"file": file, "class": name} for file, name in zip(files, class_names, strict=True)]}


def read_sample_list(folder: Path) -> tuple[list[str], list[str | None]] | None:
    """Files and classes of the generated images in a folder; none when `sample` or `reconstruct` did not write it."""
    path = folder / SAMPLE_LIST
    if path.is_file():
        images = json.loads(path.read_text(encoding="utf-8"))["images"]
        return [image["file"] for image in images], [image["class"] for image in images]
    numbered = (
        sorted(path.name for path in folder.iterdir() if NUMBERED_FILE.fullmatch(path.name)) if folder.is_dir() else []
    )
    whole = [name for name in numbered if name.endswith(".npy")] or numbered
    return (whole, [None] * len(whole)) if whole and (folder / "grid.png").is_file() else None
