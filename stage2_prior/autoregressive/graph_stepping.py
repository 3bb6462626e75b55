"""The prior, one place at a time on a GPU: a step recorded once as a CUDA graph and played back at every place.

A step of one image is some hundreds of kernels of a few microseconds each, which take longer to launch one by one than to run.
What is recorded reads and writes the same memory each time: the slot is a tensor, and attention reads the whole cache, with the
slots that are still to come masked.
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
    """A cache written at the slot that a tensor (1,) int64 names, and read in full."""

    def __init__(self, cache: KVCache, slot: Tensor) -> None:
        self.data, self.slot = cache.data, slot
        self.data.zero_()  # a masked value still meets its weight of 0, so it must be finite
        self.slots = torch.arange(cache.max_tokens, device=slot.device)

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        self.data.index_copy_(3, self.slot, torch.stack([keys, values]))
        return self.data[0], self.data[1], (self.slots <= self.slot)[None]


class GraphStepper:
    """Any device and type; on a GPU the step is recorded.

    Args:
        caches: empty; those that the prefix is read into.
    """

    def __init__(self, prior: CodeTransformer, caches: Sequence[KVCache], orders: Tensor | None) -> None:
        self.prior, self.caches = prior, caches
        like = caches[0].data
        self.inputs = like.new_zeros(like.shape[1], 1, prior.config.model.hidden_size)
        self.slot = torch.zeros(1, dtype=torch.int64, device=like.device)
        self.slot_caches = [SlotCache(cache, self.slot) for cache in caches]
        angles = prior.position_angles(like.device)  # (1 + places, head_dim / 2)
        self.rotary_factors = rotary_factors(angles if orders is None else angles[F.pad(orders + 1, (1, 0))][:, None])
        self.positions = None
        if prior.position_embedding is not None:
            order = torch.arange(prior.config.num_positions, device=like.device) if orders is None else orders
            self.positions = prior.position_embedding(order)  # (places, hidden), or (rows, places, hidden)
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
        """From `inputs` at `slot` to what the head is given (rows, hidden); asks the device for nothing."""
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
    """The same step, played back from a CUDA graph; its result is overwritten by the next one."""
    try:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # libraries set themselves up in a first run, which cannot be recorded
            step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = step()
    except RuntimeError as error:
        logger.warning("a step could not be recorded as a CUDA graph and runs kernel by kernel: %s", error)
        return step

    def play() -> Tensor:
        graph.replay()
        return result

    return play
