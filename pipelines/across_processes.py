"""Sampling on every process that `accelerate launch` started: each draws its share, and all have all images."""

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
    """One image for each class id of (N,), uint8 (N, C, h, w) on the CPU; image i is the same on any number of processes.

    Every process calls it with the same arguments, `generator` of the same state among them.
    """
    state = join_processes()
    generators = image_generators(generator, len(labels))
    count, processes = len(labels), state.num_processes
    share = -(-count // processes)
    # whose share ends early draws the last image again: what is gathered must be of one size
    mine = [min(state.process_index + i * processes, count - 1) for i in range(share)]
    images = to_uint8(pipeline.sample_pixels(labels[mine], [generators[i] for i in mine], batch_size, **options))
    if processes == 1:
        return images
    gathered = gather(images.to(state.device)).cpu()  # process after process
    return gathered.unflatten(0, (processes, share)).transpose(0, 1).flatten(0, 1)[:count]
