"""A split's pictures as uint8 tensors: read once into memory when they fit, else decoded when asked for.

A picture that cannot be read is left out, and listed with the reason.
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
from stage1_tokenizer.data.source_splits import one_line
from stage1_tokenizer.data.sources import ImageSource, ImageSplit, UnreadableImage
from training_harness.batch_order import BatchOrder
from training_harness.errors import UserError
from training_harness.progress import progress_bar

MEMORY_LIMIT = 4 << 30  # bytes of decoded pictures kept
PIXELS_AT_ONCE, MOST_AT_ONCE = 1 << 20, 250  # that a network is given where nothing is learnt
TRIAL, QUICK = 32, 0.0005  # pictures read in less than so many seconds each cost more to hand to threads


def images_at_once(size: Sequence[int]) -> int:
    """How many images of a size a network is given outside training: memory does not grow with the resolution."""
    return max(1, min(MOST_AT_ONCE, PIXELS_AT_ONCE // (size[0] * size[1])))


class ImageLoader:
    """Indexed by position in the split: `pixels[indices]` is uint8 (B, C, height, width) of the content size.

    Positions whose picture cannot be read give the next readable one; `readable` lists those that can.
    """

    def __init__(self, split: ImageSplit, processor: ImageProcessor, memory_limit: int = MEMORY_LIMIT) -> None:
        self.split, self.processor = split, processor
        self.skipped: dict[int, UnreadableImage] = {}
        self._reported = False
        height, width = processor.content_size
        self._images: Tensor | None = None
        if len(split) * processor.channels * height * width <= memory_limit:
            images, readable = [], []
            for i, image in enumerate(self._read_all(range(len(split)), "reading images")):
                if image is not None:
                    images.append(image)
                    readable.append(i)
            self.readable: Sequence[int] = readable
            self._images = torch.stack(images) if images else None
        else:
            self.readable = range(len(split))
        if not self.readable:
            raise none_readable(self.skipped, split)

    def __len__(self) -> int:
        return len(self.readable)

    def __getitem__(self, positions: Sequence[int] | np.ndarray) -> Tensor:
        if self._images is not None:
            return self._images[torch.as_tensor(positions)]
        return torch.stack([self._readable_from(int(i)) for i in positions])

    def labels(self) -> list[int] | None:
        labels = self.split.labels
        return None if labels is None else [labels[i] for i in self.readable]

    def source_ids(self, positions: Iterable[int] | None = None) -> list[str]:
        """Of the pictures at `positions`; of all of them by default."""
        chosen = range(len(self)) if positions is None else positions
        return [self.split.source_id(self.readable[i]) for i in chosen]

    def batches(self, batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
        """(positions, pictures) in order, each picture once, those that cannot be read left out."""
        if self._images is not None:
            for start in range(0, len(self), batch_size):
                positions = list(range(start, min(start + batch_size, len(self))))
                yield positions, self._images[start : start + batch_size]
            return
        for start in range(0, len(self.split), batch_size):
            block = range(start, min(start + batch_size, len(self.split)))
            read = [
                (i, image) for i, image in zip(block, self._read_all(block, None), strict=True) if image is not None
            ]
            if read:
                yield [i for i, _ in read], torch.stack([image for _, image in read])

    def random_batches(self, order: BatchOrder, first: int) -> Iterator[Tensor]:
        """Batches of `order` from number `first` on, without end; what must be decoded is, while others are used."""
        if self._images is not None:
            yield from (self[order.batch_indices(number)] for number in count(first))
        with ThreadPoolExecutor(max_workers=2) as pool:
            ahead = deque(pool.submit(self.__getitem__, order.batch_indices(first + i)) for i in range(3))
            for number in count(first + 3):
                yield ahead.popleft().result()
                ahead.append(pool.submit(self.__getitem__, order.batch_indices(number)))

    def _read_all(self, positions: range, describe: str | None) -> Iterator[Tensor | None]:
        quiet = None if describe and len(positions) > 2000 else True
        bar = progress_bar(desc=describe, total=len(positions), unit="image", disable=quiet)
        begin = time.perf_counter()
        with bar, ThreadPoolExecutor(max_workers=4) as pool:  # PIL decodes outside the interpreter's lock
            for read in map(self._try_read, positions[:TRIAL]):
                yield read
                bar.update()
            quick = time.perf_counter() - begin < QUICK * TRIAL
            for read in (map if quick else pool.map)(self._try_read, positions[TRIAL:]):
                yield read
                bar.update()

    def _try_read(self, position: int) -> Tensor | None:
        try:
            return self.processor.read(self.split.image(position, at_least=self.processor.draft_size))
        except UnreadableImage as error:
            self.skipped[position] = error
            return None
        except Exception as error:  # of other channels than the rest, or of a kind that cannot be converted
            self.skipped[position] = UnreadableImage(self.split.source_id(position), one_line(error))
            return None

    def _readable_from(self, position: int) -> Tensor:
        for offset in range(len(self.split)):
            image = self._try_read((position + offset) % len(self.split))
            if image is not None:
                return image
        raise none_readable(self.skipped, self.split)

    def report_skipped(self) -> None:
        """Prints one line on stderr, once, when images were left out."""
        if self.skipped and not self._reported:
            self._reported = True
            first = self.skipped[min(self.skipped)]
            print(
                f"skipped {len(self.skipped)} of {len(self.split)} images that cannot be read, such as "
                f"{first.source_id} ({first.reason})",
                file=sys.stderr,
            )


class LoadedSource:
    """The splits of a source through one image processor. A split that fits in memory is decoded once for all its users."""

    def __init__(self, source: ImageSource, processor: ImageProcessor) -> None:
        self.source, self.processor = source, processor

    @cached_property
    def train(self) -> ImageLoader:
        return ImageLoader(self.source.train, self.processor)

    @cached_property
    def validation(self) -> ImageLoader:
        return ImageLoader(self.source.validation, self.processor)

    @cached_property
    def held_out(self) -> ImageLoader:
        """The images that metrics are measured on: the test split, else the validation split."""
        return self.validation if self.source.test is None else ImageLoader(self.source.test, self.processor)

    def numbered_as(self, label_names: Sequence[str] | None) -> Self:
        """The same images, whose classes have the ids that they have in `label_names`; what is decoded stays so."""
        numbered = type(self)(self.source.numbered_as(label_names), self.processor)
        for name in ("train", "validation", "held_out"):
            if name in self.__dict__:
                loader = numbered.__dict__[name] = copy.copy(self.__dict__[name])
                loader.split = getattr(numbered.source, name)
        return numbered


def none_readable(skipped: dict[int, UnreadableImage], split: ImageSplit) -> UserError:
    place = f" in {split.origin!r}" if split.origin else ""
    if not skipped:
        return UserError(f"there are no images{place}; expected PNG, JPEG or other pictures; check the folder")
    first = skipped[min(skipped)]
    return UserError(
        f"none of {len(split)} images{place} can be read, such as {first.source_id} ({first.reason}); expected PNG, JPEG or other "
        "pictures; check the folder"
    )
