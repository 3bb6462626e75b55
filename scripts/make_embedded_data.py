"""Make the embedded image set: 10,000 + 2,000 images of Fashion-MNIST, balanced over the classes, as PNG in Parquet.

    python scripts/make_embedded_data.py                    # needs the Debian package dataset-fashion-mnist

The selection does not depend on any library's random numbers. For each class it takes the images with the smallest SHA-256 of
"SEED/source_id", in the order of the original file.
Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747.
"""

import argparse
import gzip
import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import ClassLabel, Features, Image, Value
from numpy.typing import NDArray
from PIL import Image as PILImage

from training_harness.files import atomic_file

SEED = 0
CLASS_NAMES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
FEATURES = Features({"image": Image(), "label": ClassLabel(names=CLASS_NAMES), "source_id": Value("string")})
FILE_PREFIXES = {"train": "train", "test": "t10k"}
IMAGES_PER_CLASS = {"train": 1000, "test": 200}
DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
EMBEDDED_FOLDER = Path(__file__).parents[1] / "latentloom" / "data" / "fashion-mnist-mini"


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an array from a gzipped IDX file: two zero bytes, type 8 (uint8), rank r, then r big-endian uint32 sizes."""
    if not path.is_file():
        raise SystemExit(
            f"error: {path} is missing; expected the IDX files of Fashion-MNIST there. "
            "Install the Debian package dataset-fashion-mnist, or pass their folder with --source"
        )
    content = gzip.decompress(path.read_bytes())
    if content[:3] != b"\0\0\x08":
        raise SystemExit(
            f"error: {path} starts with bytes {content[:3].hex(' ')}; expected 00 00 08, an IDX file of uint8"
        )
    rank = content[3]
    shape = np.frombuffer(content, ">u4", count=rank, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * rank).reshape(shape)


def read_split(source: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return images (N, 28, 28) uint8 and class ids (N,) uint8 of the original "train" or "test" split."""
    prefix = FILE_PREFIXES[split]
    return read_idx(source / f"{prefix}-images-idx3-ubyte.gz"), read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")


def select_images(labels: NDArray[np.uint8], source_ids: list[str], images_per_class: int) -> list[int]:
    """Return the ascending indices of `images_per_class` images of each class."""

    def sha256_rank(index: int) -> str:
        return hashlib.sha256(f"{SEED}/{source_ids[index]}".encode()).hexdigest()

    class_indices = [np.flatnonzero(labels == label).tolist() for label in range(len(CLASS_NAMES))]
    return sorted(index for indices in class_indices for index in sorted(indices, key=sha256_rank)[:images_per_class])


def encode_png(image: NDArray[np.uint8]) -> bytes:
    """Encode an (H, W) uint8 image as an optimized grey PNG."""
    buffer = io.BytesIO()
    PILImage.fromarray(image).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def make_split(source: Path, split: str, path: Path) -> int:
    """Write one split to `path`; return the number of images."""
    images, labels = read_split(source, split)
    source_ids = [f"{split}/{index:05d}" for index in range(len(images))]
    selected = select_images(labels, source_ids, IMAGES_PER_CLASS[split])
    rows = [
        {"image": {"bytes": encode_png(images[i]), "path": None}, "label": int(labels[i]), "source_id": source_ids[i]}
        for i in selected
    ]
    table = pa.Table.from_pylist(rows, schema=FEATURES.arrow_schema)  # the schema carries the features of `datasets`
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", use_dictionary=False, row_group_size=1000)
    return len(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the embedded Fashion-MNIST subset.")
    parser.add_argument("--source", type=Path, default=DEBIAN_FOLDER, help="folder with the four *.gz files")
    parser.add_argument("--output", type=Path, default=EMBEDDED_FOLDER)
    arguments = parser.parse_args()
    for split in IMAGES_PER_CLASS:
        path = arguments.output / f"{split}.parquet"
        count = make_split(arguments.source, split, path)
        print(f"{path}: {count} images, {path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
