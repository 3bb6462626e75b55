"""What a set of images looks like, from a sample of it: enough to choose sizes, channels and a recipe."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from stage1_tokenizer.data.image_processor import ImageLike, orientation_of, with_eight_bits
from stage1_tokenizer.data.source_splits import one_line
from stage1_tokenizer.data.sources import ImageSplit, UnreadableImage
from training_harness.errors import UserError

COLOUR_SAMPLE = (256, 256)  # large JPEGs are decoded down to about this size: colour and alpha show there as well


@dataclass(frozen=True)
class DatasetStatistics:
    """Sizes are (height, width) of upright pictures; smallest and largest by their number of pixels."""

    images_read: int
    """Pictures that were read; the unreadable ones come on top."""
    unreadable_images: int
    most_common_size: tuple[int, int]
    smallest_size: tuple[int, int]
    largest_size: tuple[int, int]
    channels: int
    """1 when every picture shows greys only, whatever its file's mode, 4 when one uses transparency, else 3; of arrays more."""


def dataset_statistics(split: ImageSplit, limit: int = 256) -> DatasetStatistics:
    """Looks at up to `limit` pictures, evenly spaced over the split.

    Raises: UserError when none of them could be read; it names one."""
    sizes: Counter[tuple[int, int]] = Counter()
    channels = 1
    unreadable_images: list[UnreadableImage] = []
    count = min(limit, len(split))
    for index in (i * len(split) // count for i in range(count)):
        try:
            image = split.image(index, at_least=COLOUR_SAMPLE)
            height, width = split.size(index)
            shown = _channels_of(image)
        except UnreadableImage as error:
            unreadable_images.append(error)
            continue
        except Exception as error:  # of a kind that cannot be converted
            unreadable_images.append(UnreadableImage(split.source_id(index), one_line(error)))
            continue
        sizes[(width, height) if orientation_of(image) >= 5 else (height, width)] += 1
        channels = max(channels, shown)
    if not sizes:
        place = f" in {split.origin!r}" if split.origin else ""
        example = f"for example {unreadable_images[0]}" if unreadable_images else "there is none"
        raise UserError(
            f"none of {count} images{place} could be read ({example}); expected pictures. Check how the files were copied"
        )
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    commonest = max(by_area, key=lambda size: (sizes[size], size[0] * size[1]))
    return DatasetStatistics(sizes.total(), len(unreadable_images), commonest, by_area[0], by_area[-1], channels)


def _channels_of(image: ImageLike) -> int:
    """1, 3 or 4 for a picture of Pillow's, by what it shows rather than by its mode; all that an array has."""
    if isinstance(image, np.ndarray):
        return image.shape[2]
    image = with_eight_bits(image)
    pixels = np.asarray(image)
    if image.mode in ("LA", "RGBA") and (pixels[..., -1] < 255).any():
        return 4
    if image.mode in ("L", "LA"):
        return 1
    return 1 if (pixels[..., :1] == pixels[..., 1:3]).all() else 3
