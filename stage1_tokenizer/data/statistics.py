"""Statistics of a split's images, measured on a sample: enough to choose sizes, channels and a recipe."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from stage1_tokenizer.data.image_processor import ImageLike, get_exif_orientation, to_8bit_image
from stage1_tokenizer.data.source_splits import summarize_error
from stage1_tokenizer.data.sources import ImageSplit, UnreadableImage
from training_harness.errors import UserError

COLOUR_SAMPLE_SIZE = (256, 256)  # large JPEGs are decoded near this size: enough to detect colour and alpha


@dataclass(frozen=True)
class DatasetStatistics:
    """Sizes and channels of a sample of images. Sizes are (height, width) of upright images."""

    images_read: int
    """Number of images in the sample that could be read."""
    unreadable_images: int
    """Number of images in the sample that could not be read."""
    most_common_size: tuple[int, int]
    smallest_size: tuple[int, int]
    """The size with the fewest pixels."""
    largest_size: tuple[int, int]
    """The size with the most pixels."""
    channels: int
    """1 if all images are grey, whatever their mode; 4 if an image uses transparency; else 3; more for arrays."""


def dataset_statistics(split: ImageSplit, limit: int = 256) -> DatasetStatistics:
    """Measure up to `limit` images, evenly spaced over the split.

    Raises:
        UserError: none of them can be read; the message names one.
    """
    sizes: Counter[tuple[int, int]] = Counter()
    channels = 1
    errors: list[UnreadableImage] = []
    count = min(limit, len(split))
    for index in (i * len(split) // count for i in range(count)):
        try:
            image = split.image(index, at_least=COLOUR_SAMPLE_SIZE)
            height, width = split.size(index)
            image_channels = _count_channels(image)
        except UnreadableImage as error:
            errors.append(error)
            continue
        except Exception as error:  # an image that cannot be converted
            errors.append(UnreadableImage(split.source_id(index), summarize_error(error)))
            continue
        sizes[(width, height) if get_exif_orientation(image) >= 5 else (height, width)] += 1
        channels = max(channels, image_channels)
    if not sizes:
        location = f" in {split.origin!r}" if split.origin else ""
        example = f"for example {errors[0]}" if errors else "there is none"
        raise UserError(
            f"none of {count} images{location} could be read ({example}); expected image files. Check how the files were copied"
        )
    by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
    most_common_size = max(by_area, key=lambda size: (sizes[size], size[0] * size[1]))
    return DatasetStatistics(sizes.total(), len(errors), most_common_size, by_area[0], by_area[-1], channels)


def _count_channels(image: ImageLike) -> int:
    """Return 1, 3 or 4 by an image's pixels rather than its mode; for an array all its channels."""
    if isinstance(image, np.ndarray):
        return image.shape[2]
    image = to_8bit_image(image)
    pixels = np.asarray(image)
    if image.mode in ("LA", "RGBA") and (pixels[..., -1] < 255).any():
        return 4
    if image.mode in ("L", "LA"):
        return 1
    return 1 if (pixels[..., :1] == pixels[..., 1:3]).all() else 3
