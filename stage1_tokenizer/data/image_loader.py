"""Load a split's images as uint8 tensors: decoded once into memory if they fit, else on every access.

Images that cannot be read are left out and listed with the reason.
"""

import copy
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import count
from typing import Self

import numpy as np
import torch
from torch import Tensor

from stage1_tokenizer.data.image_processor import ImageProcessor
from stage1_tokenizer.data.source_splits import summarize_error
from stage1_tokenizer.data.sources import ImageSource, ImageSplit, UnreadableImage
from training_harness.batch_order import BatchOrder
from training_harness.errors import UserError
from training_harness.progress import progress_bar

MEMORY_LIMIT = 4 << 30  # bytes of decoded images in memory
MAX_BATCH_PIXELS, MAX_BATCH_IMAGES = 1 << 20, 250  # of one batch outside training
# Threads cost more than they save if the first images take less time than this.
TIMED_IMAGES, FAST_READ_SECONDS = 32, 0.0005


def inference_batch_size(size: Sequence[int]) -> int:
    """Choose the batch size outside training for images of (height, width): memory does not grow with the resolution."""
    return max(1, min(MAX_BATCH_IMAGES, MAX_BATCH_PIXELS // (size[0] * size[1])))


class ImageLoader:
    """The images of a split: `loader[positions]` is uint8 (B, C, h, w) of the content size.

    A split that fits in `memory_limit` is decoded once, and positions count its readable images. Otherwise images are decoded
    on every access, positions are those of the split, and the next readable image replaces an unreadable one.

    Attributes:
        readable_positions: positions in the split of the images in memory, or of all images.
        read_errors: the error of each unreadable image, by its position in the split.
    """

    def __init__(self, split: ImageSplit, processor: ImageProcessor, memory_limit: int = MEMORY_LIMIT) -> None:
        """Decode a split if it fits in memory.

        Args:
            split: the images.
            processor: converts images to tensors.
            memory_limit: bytes; larger splits are decoded on every access.

        Raises:
            UserError: no image can be read.
        """
        self.split, self.processor = split, processor
        self.read_errors: dict[int, UnreadableImage] = {}
        self._reported = False
        height, width = processor.content_size
        self._images: Tensor | None = None
        if len(split) * processor.channels * height * width <= memory_limit:
            images, readable_positions = [], []
            for i, image in enumerate(self._read_all(range(len(split)), "reading images")):
                if image is not None:
                    images.append(image)
                    readable_positions.append(i)
            self.readable_positions: Sequence[int] = readable_positions
            self._images = torch.stack(images) if images else None
        else:
            self.readable_positions = range(len(split))
        if not self.readable_positions:
            raise no_readable_images_error(self.read_errors, split)

    def __len__(self) -> int:
        return len(self.readable_positions)

    def __getitem__(self, positions: Sequence[int] | np.ndarray) -> Tensor:
        if self._images is not None:
            return self._images[torch.as_tensor(positions)]
        return torch.stack([self._read_next_readable(int(i)) for i in positions])

    def labels(self) -> list[int] | None:
        """Return the label of each image; None if the split is not labelled."""
        labels = self.split.labels
        return None if labels is None else [labels[i] for i in self.readable_positions]

    def source_ids(self, positions: Iterable[int] | None = None) -> list[str]:
        """Return the ids of the images at `positions`; by default of all images."""
        positions = range(len(self)) if positions is None else positions
        return [self.split.source_id(self.readable_positions[i]) for i in positions]

    def batches(self, batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
        """Yield (positions, images) in order: each readable image once."""
        if self._images is not None:
            for start in range(0, len(self), batch_size):
                positions = list(range(start, min(start + batch_size, len(self))))
                yield positions, self._images[start : start + batch_size]
            return
        for start in range(0, len(self.split), batch_size):
            block = range(start, min(start + batch_size, len(self.split)))
            images = zip(block, self._read_all(block, None), strict=True)
            readable = [(i, image) for i, image in images if image is not None]
            if readable:
                yield [i for i, _ in readable], torch.stack([image for _, image in readable])

    def random_batches(self, order: BatchOrder, first: int) -> Iterator[Tensor]:
        """Yield the batches of `order` from number `first` without end; threads decode the next ones in advance."""
        if self._images is not None:
            yield from (self[order.batch_indices(number)] for number in count(first))
        with ThreadPoolExecutor(max_workers=2) as pool:
            queue = deque(pool.submit(self.__getitem__, order.batch_indices(first + i)) for i in range(3))
            for number in count(first + 3):
                yield queue.popleft().result()
                queue.append(pool.submit(self.__getitem__, order.batch_indices(number)))

    def _read_all(self, positions: range, describe: str | None) -> Iterator[Tensor | None]:
        disable = None if describe and len(positions) > 2000 else True
        bar = progress_bar(desc=describe, total=len(positions), unit="image", disable=disable)
        begin = time.perf_counter()
        with bar, ThreadPoolExecutor(max_workers=4) as pool:  # Pillow releases the interpreter's lock while it decodes
            for image in map(self._try_read, positions[:TIMED_IMAGES]):
                yield image
                bar.update()
            is_fast = time.perf_counter() - begin < FAST_READ_SECONDS * TIMED_IMAGES
            for image in (map if is_fast else pool.map)(self._try_read, positions[TIMED_IMAGES:]):
                yield image
                bar.update()

    def _try_read(self, position: int) -> Tensor | None:
        try:
            return self.processor.read(self.split.image(position, at_least=self.processor.draft_size))
        except UnreadableImage as error:
            self.read_errors[position] = error
            return None
        except Exception as error:  # other channels than the processor's, or an image that cannot be converted
            self.read_errors[position] = UnreadableImage(self.split.source_id(position), summarize_error(error))
            return None

    def _read_next_readable(self, position: int) -> Tensor:
        for offset in range(len(self.split)):
            image = self._try_read((position + offset) % len(self.split))
            if image is not None:
                return image
        raise no_readable_images_error(self.read_errors, self.split)

    def report_skipped(self) -> None:
        """Print one line on stderr, once, if images were left out."""
        if self.read_errors and not self._reported:
            self._reported = True
            first = self.read_errors[min(self.read_errors)]
            print(
                f"skipped {len(self.read_errors)} of {len(self.split)} images that cannot be read, such as "
                f"{first.source_id} ({first.reason})",
                file=sys.stderr,
            )


class LoadedSource:
    """The loaders of a source's splits for one image processor. Each loader is created once, when it is first used."""

    def __init__(self, source: ImageSource, processor: ImageProcessor) -> None:
        self.source, self.processor = source, processor

    @cached_property
    def train(self) -> ImageLoader:
        """The training images."""
        return ImageLoader(self.source.train, self.processor)

    @cached_property
    def validation(self) -> ImageLoader:
        """The validation images."""
        return ImageLoader(self.source.validation, self.processor)

    @cached_property
    def held_out(self) -> ImageLoader:
        """The images for evaluation: the test split, or the validation split if there is no test split."""
        return self.validation if self.source.test is None else ImageLoader(self.source.test, self.processor)

    def with_label_order(self, label_names: Sequence[str] | None) -> Self:
        """Return the same images with the labels of `label_names`; decoded images are shared."""
        reordered = type(self)(self.source.with_label_order(label_names), self.processor)
        for name in ("train", "validation", "held_out"):
            if name in self.__dict__:
                loader = reordered.__dict__[name] = copy.copy(self.__dict__[name])
                loader.split = getattr(reordered.source, name)
        return reordered


def no_readable_images_error(read_errors: dict[int, UnreadableImage], split: ImageSplit) -> UserError:
    """Create the error for a split without readable images; it names one image."""
    location = f" in {split.origin!r}" if split.origin else ""
    if not read_errors:
        return UserError(f"there are no images{location}; expected PNG, JPEG or other image files; check the folder")
    first = read_errors[min(read_errors)]
    return UserError(
        f"none of {len(split)} images{location} can be read, such as {first.source_id} ({first.reason}); expected PNG, JPEG or "
        "other image files; check the folder"
    )
