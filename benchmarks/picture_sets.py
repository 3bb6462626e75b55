"""Small colour pictures for the benchmarks, made from packages that anyone can fetch: nothing of them is kept in the project.

    emoji          npm `emoji-datasource-google` (Apache-2.0): about 1,900 pictures on white, each in the folder of its category
    photographs    Debian `mate-backgrounds` (CC-BY-SA and GPL): 4,000 random square crops of its photographs

A tenth of the emoji, and the crops of every eighth photograph, are the test split.
"""

import json
import random
import subprocess
import tarfile
from pathlib import Path

from PIL import Image

SIDE = 32  # pixels
CROPS = 4_000
EMOJI = "emoji-datasource-google@15.1.2"
PHOTOGRAPHS = "mate-backgrounds"


def emoji(folder: Path) -> Path:
    """Fetches the emoji into `folder`/train and `folder`/test, unless they are there."""
    if (folder / "train").exists():
        return folder
    download = folder / "download"
    download.mkdir(parents=True, exist_ok=True)
    subprocess.run(["npm", "pack", "--silent", EMOJI], cwd=download, check=True, stdout=subprocess.DEVNULL)
    with tarfile.open(next(download.glob("*.tgz"))) as archive:
        archive.extractall(download, filter="data")
    package = download / "package"
    entries = json.loads((package / "emoji.json").read_text(encoding="utf-8"))
    order = random.Random(0)
    for entry in sorted(entries, key=lambda entry: entry["image"]):
        path = package / "img" / "google" / "64" / entry["image"]
        if path.exists():
            split = "test" if order.random() < 0.1 else "train"
            place = folder / split / entry["category"].replace(" ", "-").lower() / entry["image"]
            place.parent.mkdir(parents=True, exist_ok=True)
            picture = Image.open(path).convert("RGBA")
            on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
            on_white.resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(place)
    return folder


def photographs(folder: Path) -> Path:
    """Fetches the photographs and cuts them into `folder`/train and `folder`/test, unless they are there."""
    if (folder / "train").exists():
        return folder
    download = folder / "download"
    download.mkdir(parents=True, exist_ok=True)
    subprocess.run(["apt-get", "download", PHOTOGRAPHS], cwd=download, check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["dpkg-deb", "-x", next(download.glob("*.deb")).name, "."], cwd=download, check=True)
    paths = sorted(path for path in download.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg") and path.is_file())
    draw = random.Random(0)
    for number, path in enumerate(paths):
        place = folder / ("test" if number % 8 == 7 else "train")
        place.mkdir(parents=True, exist_ok=True)
        picture = Image.open(path).convert("RGB")
        for crop in range(CROPS // len(paths)):
            side = draw.randint(min(picture.size) // 8, min(picture.size) // 2)
            left, top = (draw.randint(0, length - side) for length in picture.size)
            cut = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
            cut.save(place / f"{number:02d}-{crop:04d}.png")
    return folder
