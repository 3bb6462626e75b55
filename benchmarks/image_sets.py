"""Small colour images for the benchmarks, made from public packages; the project does not contain them.

    emoji          npm `emoji-datasource-google` (Apache-2.0): about 1,900 images on a white background
    photographs    Debian `mate-backgrounds` (CC-BY-SA and GPL): about as many random square crops of its photographs

The test split has a tenth of the emoji and the crops of every eighth photograph.
"""

import random
import subprocess
import tarfile
from pathlib import Path

from PIL import Image

SIDE = 32  # pixels per side
TOTAL_CROPS = 2_000
EMOJI = "emoji-datasource-google@15.1.2"
PHOTOGRAPHS = "mate-backgrounds"


def prepare_colour_images(folder: Path) -> Path:
    """Download both kinds of images into `folder`/train and `folder`/test, unless they are there already."""
    download, complete_marker = folder.with_name(f"{folder.name}-download"), folder / "whole"
    if not complete_marker.exists():
        download.mkdir(parents=True, exist_ok=True)
        add_emoji(download, folder)
        add_photographs(download, folder)
        complete_marker.touch()
    return folder


def add_emoji(download: Path, folder: Path) -> None:
    fetch(["npm", "pack", "--silent", EMOJI], download)
    with tarfile.open(next(download.glob("emoji*.tgz"))) as archive:
        archive.extractall(download, filter="data")
    random_numbers = random.Random(0)
    for path in sorted((download / "package" / "img" / "google" / "64").glob("*.png")):
        image = Image.open(path).convert("RGBA")
        on_white = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
        small = on_white.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        save(small, folder / ("test" if random_numbers.random() < 0.1 else "train") / "emoji" / path.name)


def add_photographs(download: Path, folder: Path) -> None:
    fetch(["apt-get", "download", PHOTOGRAPHS], download)
    fetch(["dpkg-deb", "-x", next(download.glob("*.deb")).name, "."], download)
    paths = sorted(path for path in download.rglob("*.jp*g") if path.is_file() and not path.is_symlink())
    random_numbers = random.Random(0)
    for number, path in enumerate(paths):
        image = Image.open(path).convert("RGB")
        for crop in range(TOTAL_CROPS // len(paths)):
            side = random_numbers.randint(min(image.size) // 8, min(image.size) // 2)
            left, top = (random_numbers.randint(0, length - side) for length in image.size)
            small = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=(left, top, left + side, top + side))
            split = "test" if number % 8 == 7 else "train"
            save(small, folder / split / "photograph" / f"{number:02d}-{crop:04d}.png")


def save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def fetch(command: list[str], folder: Path) -> None:
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
