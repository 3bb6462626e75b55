"""Sampling on every process that `accelerate launch` started.

Each process generates its share of the images. All processes then exchange them, so that each process has all images.
"""

from typing import Any

import torch
from accelerate.utils import gather
from torch import Tensor

from pipelines.latent_generation import LatentGenerationPipeline, image_generators, to_uint8
from training_harness.processes import join_processes


def sample_across_processes(
    pipeline: LatentGenerationPipeline,
    labels: Tensor,
    generator: torch.Generator,
    batch_size: int | None = None,
    **options: Any,
) -> Tensor:
    """Sample one image for each class id; image i is the same on any number of processes.

    Every process must call this function with equal arguments. Its `generator` must have the same state on every process.

    Args:
        labels: (N,) int64 class ids, −1 for no class.
        options: sampling options of the prior.

    Returns:
        (N, C, h, w) uint8 on the CPU.
    """
    state = join_processes()
    generators = image_generators(generator, len(labels))
    count, num_processes = len(labels), state.num_processes
    share = -(-count // num_processes)
    # `gather` needs tensors of one size, so a process with a smaller share samples the last image again
    positions = [min(state.process_index + i * num_processes, count - 1) for i in range(share)]
    pixels = pipeline.sample_pixels(labels[positions], [generators[i] for i in positions], batch_size, **options)
    images = to_uint8(pixels)
    if num_processes == 1:
        return images
    gathered_images = gather(images.to(state.device)).cpu()  # ordered by process
    return gathered_images.unflatten(0, (num_processes, share)).transpose(0, 1).flatten(0, 1)[:count]
