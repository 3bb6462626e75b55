"""Folders of generated images: `sample` lists the images that it wrote, so that `evaluate` leaves out `grid.png`."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SAMPLE_LIST = "samples.json"
NUMBERED_FILE = re.compile(r"\d{5}(-.+)?\.(png|npy)")  # names of the files that `sample` and `reconstruct` write


def build_sample_list(names: Sequence[str], class_names: Sequence[str | None], channels: int) -> dict[str, Any]:
    """Build the content of `samples.json` from PNG names and one class name per image.

    Images of more than four channels are listed as NumPy files, because their PNG files show only some of the channels.
    """
    files = [name if channels <= 4 else str(Path(name).with_suffix(".npy")) for name in names]
    return {"images": [{"file": file, "class": name} for file, name in zip(files, class_names, strict=True)]}


def read_sample_list(folder: Path) -> tuple[list[str], list[str | None]] | None:
    """Read the file names and class names of the generated images in a folder.

    Returns:
        None when neither `sample` nor `reconstruct` wrote the folder.
    """
    path = folder / SAMPLE_LIST
    if path.is_file():
        images = json.loads(path.read_text(encoding="utf-8"))["images"]
        return [image["file"] for image in images], [image["class"] for image in images]
    numbered = (
        sorted(path.name for path in folder.iterdir() if NUMBERED_FILE.fullmatch(path.name)) if folder.is_dir() else []
    )
    names = [name for name in numbered if name.endswith(".npy")] or numbered
    return (names, [None] * len(names)) if names and (folder / "grid.png").is_file() else None
