"""Decode steps on a GPU: one step is recorded as a CUDA graph and replayed at every position.

A step for one image has some hundreds of kernels of a few microseconds each. Launching them one by one takes longer than running
them. A recorded step reads and writes the same memory each time. Therefore the slot is a tensor, and attention reads the whole
cache with a mask over the empty slots.
"""

import logging
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.autoregressive.kv_cache import KVCache
from stage2_prior.autoregressive.transformer import CodeTransformer
from stage2_prior.layers.rotary import rotary_factors

logger = logging.getLogger(__name__)


class SlotCache:
    """A cache that is written at the slot in a tensor (1,) int64 and is read in full."""

    def __init__(self, cache: KVCache, slot: Tensor) -> None:
        self.data, self.slot = cache.data, slot
        self.data.zero_()  # masked values are multiplied by a weight of 0, so they must be finite
        self.slots = torch.arange(cache.max_tokens, device=slot.device)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.data.index_copy_(3, self.slot, torch.stack([keys, values]))
        return self.data[0], self.data[1], (self.slots <= self.slot)[None]


class GraphStepper:
    """Decode steps on any device and in any dtype; on a GPU the step is recorded.

    Args:
        caches: Empty caches of the layers. The prefix is read into them before the first step.
        orders: (rows, h·w) int64, the i-th position to sample; None means raster order.
    """

    def __init__(self, prior: CodeTransformer, caches: Sequence[KVCache], orders: Tensor | None) -> None:
        self.prior, self.caches = prior, caches
        like = caches[0].data
        self.inputs = like.new_zeros(like.shape[1], 1, prior.config.model.hidden_size)
        self.slot = torch.zeros(1, dtype=torch.int64, device=like.device)
        self.slot_caches = [SlotCache(cache, self.slot) for cache in caches]
        angles = prior.position_angles(like.device)  # (1 + h·w, head_dim / 2)
        self.rotary_factors = rotary_factors(angles if orders is None else angles[F.pad(orders + 1, (1, 0))][:, None])
        self.positions = None
        if prior.position_embedding is not None:
            order = torch.arange(prior.config.num_positions, device=like.device) if orders is None else orders
            self.positions = prior.position_embedding(order)  # (h·w, hidden), or (rows, h·w, hidden)
        self._run: Callable[[], Tensor] | None = None

    def step(self, inputs: Tensor) -> Tensor:
        self.inputs.copy_(inputs)
        self.slot.fill_(self.caches[0].tokens)
        for cache in self.caches:
            cache.reserve_slots(1)
        if self._run is None:
            self._run = record_cuda_graph(self.compute_step) if self.slot.is_cuda else self.compute_step
        return self._run()

    def compute_step(self) -> Tensor:
        """Compute the head's input (rows, hidden) from `inputs` at `slot`, without waiting for the device."""
        x = self.inputs
        if self.positions is not None:
            x = x + self.positions.index_select(-2, self.slot)
        cos, sin = (part.index_select(-2, self.slot) for part in self.rotary_factors)
        for block, cache in zip(self.prior.blocks, self.slot_caches, strict=True):
            x = block(x, (cos, sin), cache)
        return self.prior.norm(x)[:, -1]

    def logits(self, states: Tensor, level: int) -> Tensor:
        return self.prior.level_logits(states, level)


def record_cuda_graph(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record a step as a CUDA graph, and return a function that replays it.

    Each replay overwrites the result of the one before. A step that cannot be recorded is returned unchanged, with a warning.
    """
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries are set up in a first run, which cannot be recorded
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()
    except RuntimeError as error:
        logger.warning("a step could not be recorded as a CUDA graph and runs kernel by kernel: %s", error)
        return step

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
