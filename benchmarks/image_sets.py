"""Small colour pictures for the benchmarks, made from packages that anyone can fetch: nothing of them is kept in the project.

    emoji          npm `emoji-datasource-google` (Apache-2.0): about 1,900 pictures, laid on white
    photographs    Debian `mate-backgrounds` (CC-BY-SA and GPL): as many random square crops of its photographs

A tenth of the emoji and the crops of every eighth photograph are the test split.
"""

import random
import subprocess
import tarfile
from pathlib import Path

from PIL import Image

SIDE = 32  # pixels
CROPS = 2_000
EMOJI = "emoji-datasource-google@15.1.2"
PHOTOGRAPHS = "mate-backgrounds"


def colour(folder: Path) -> Path:
    """Fetches both kinds into `folder`/train and `folder`/test, unless they are there."""
    download, whole = folder.with_name(f"{folder.name}-download"), folder / "whole"
    if not whole.exists():
        download.mkdir(parents=True, exist_ok=True)
        add_emoji(download, folder)
        add_photographs(download, folder)
        whole.touch()
    return folder


def add_emoji(download: Path, folder: Path) -> None:
    fetch(["npm", "pack", "--silent", EMOJI], download)
    with tarfile.open(next(download.glob("emoji*.tgz"))) as archive:
        archive.extractall(download, filter="data")
    draw = random.Random(0)
    for path in sorted((download / "package" / "img" / "google" / "64").glob("*.png")):
        picture = Image.open(path).convert("RGBA")
        on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
        small = on_white.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        save(small, folder / ("test" if draw.random() < 0.1 else "train") / "emoji" / path.name)


def add_photographs(download: Path, folder: Path) -> None:
    fetch(["apt-get", "download", PHOTOGRAPHS], download)
    fetch(["dpkg-deb", "-x", next(download.glob("*.deb")).name, "."], download)
    paths = sorted(path for path in download.rglob("*.jp*g") if path.is_file() and not path.is_symlink())
    draw = random.Random(0)
    for number, path in enumerate(paths):
        picture = Image.open(path).convert("RGB")
        for crop in range(CROPS // len(paths)):
            side = draw.randint(min(picture.size) // 8, min(picture.size) // 2)
            left, top = (draw.randint(0, length - side) for length in picture.size)
            small = picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
            split = "test" if number % 8 == 7 else "train"
            save(small, folder / split / "photograph" / f"{number:02d}-{crop:04d}.png")


def save(picture: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def fetch(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
