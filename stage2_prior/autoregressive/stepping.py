r"""The prior, one place at a time: as its modules compute it, or on a CPU with what does not change between steps done once.

    u(x) = x / √(Σ x² + d ε) = n(x) / √d
    q, k, v = √d [W_q; W_k; W_v] diag(g) u(x)                     one product, the norm's gains g in its columns
    rotate(g_q n(q)) = u(q · (√d g_q cos) + roll(q) · (√d roll(g_q) sin))   the gains of queries and keys in the turns,
                                                                  u by the length of q before it is turned

Products are packed for the number of rows (`packed_product`). At one image half of a step would be calls of small operations: an
operation less in each block is a hundredth of the time.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior.autoregressive.blocks import Attention, Block
from stage2_prior.autoregressive.cached_attention import CachedAttention
from stage2_prior.autoregressive.graph_stepping import GraphStepper
from stage2_prior.autoregressive.kv_cache import KVCache
from stage2_prior.autoregressive.packed_linear import pack_gated_linear, pack_linear
from stage2_prior.autoregressive.transformer import CodeTransformer
from stage2_prior.layers.rotary import rotary_factors
from training_harness.errors import UserError


class Stepper(Protocol):
    caches: Sequence[KVCache]

    def step(self, inputs: Tensor) -> Tensor:
        """Embedded inputs (rows, 1, hidden) of the next slot → what the head is given (rows, hidden)."""

    def logits(self, states: Tensor, level: int) -> Tensor:
        """(rows, hidden) → (rows, K) of a level."""


class ModuleStepper:
    """Any device and type."""

    def __init__(self, prior: CodeTransformer, caches: Sequence[KVCache], orders: Tensor | None) -> None:
        self.prior, self.caches, self.orders = prior, caches, orders

    def step(self, inputs: Tensor) -> Tensor:
        return self.prior.hidden_states(inputs, self.orders, self.caches)[:, -1]

    def logits(self, states: Tensor, level: int) -> Tensor:
        return self.prior.level_logits(states, level)


class PackedStepper:
    """float32 on a CPU."""

    def __init__(
        self,
        prior: CodeTransformer,
        caches: Sequence[KVCache],
        orders: Tensor | None,
        rows: int,
        int8: bool = False,
    ) -> None:
        self.caches, self.length = caches, LengthNorm(prior.config.model.hidden_size, prior.config.model.rms_norm_eps)
        self.gain = prior.norm.weight * self.length.root
        rotary = rotary_factors(prior.position_angles(torch.device("cpu")))  # (1 + places, head_dim) each
        self.slots = (
            None if orders is None else F.pad(orders + 1, (1, 0))
        )  # (rows, 1 + places): whose turns each slot has
        self.positions = None
        if prior.position_embedding is not None:
            order = torch.arange(prior.config.num_positions) if orders is None else orders
            self.positions = prior.position_embedding(order)  # (places, hidden), or (rows, places, hidden)
        attention = CachedAttention(
            rows, prior.config.model.num_heads, prior.config.model.key_value_heads, prior.config.num_positions
        )
        self.blocks = [
            PackedBlock(block, attention, rotary, rows, prior.config.model.rms_norm_eps, int8)
            for block in cast("Iterable[Block]", prior.blocks)
        ]
        self.heads = [pack_linear(prior.head_weight(level), rows) for level in range(prior.levels)]

    def step(self, inputs: Tensor) -> Tensor:
        slot, x = self.caches[0].tokens, inputs[:, 0]
        if self.positions is not None:
            x = x + self.positions[..., slot, :]
        where = slot if self.slots is None else self.slots[:, slot]
        for block, cache in zip(self.blocks, self.caches, strict=True):
            x = block(x, where, cache)
        return self.length.divide(x) * self.gain

    def logits(self, states: Tensor, level: int) -> Tensor:
        return self.heads[level](states)


class PackedBlock:
    def __init__(
        self,
        block: Block,
        attend: CachedAttention,
        rotary: tuple[Tensor, Tensor],
        rows: int,
        eps: float,
        int8: bool,
    ) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        self.attend, self.head_dim, self.heads, self.shared = attend, attention.head_dim, attend.heads, attend.shared
        self.length = LengthNorm(attention.query.in_features, eps)
        self.head_length = None if isinstance(attention.query_norm, nn.Identity) else LengthNorm(self.head_dim, eps)
        self.cos, self.sin = self._rotary_factors(attention, *rotary)
        joined = torch.cat([attention.query.weight, attention.key.weight, attention.value.weight])
        gate, up = (
            project.weight * block.feed_forward_norm.weight * self.length.root
            for project in (feed_forward.gate, feed_forward.up)
        )
        self.qkv = pack_linear(joined * block.attention_norm.weight * self.length.root, rows, int8)
        self.out = pack_linear(attention.out.weight, rows, int8)
        self.gated = pack_gated_linear(gate, up, rows, int8)
        self.down = pack_linear(feed_forward.down.weight, rows, int8)

    def _rotary_factors(self, attention: Attention, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(1 + places, heads + key heads, head_dim) each, with the gains of queries and keys, and the scale of attention."""
        gains = cos.new_ones(self.heads + self.shared, self.head_dim)
        if self.head_length is not None:
            for part, norm in ((gains[: self.heads], "query_norm"), (gains[self.heads :], "key_norm")):
                part.copy_(getattr(attention, norm).weight.detach())
            gains *= self.head_length.root
        gains[: self.heads] *= self.head_dim**-0.5
        return cos[:, None] * gains, sin[:, None] * gains.roll(self.head_dim // 2, -1)

    def __call__(self, x: Tensor, where: int | Tensor, cache: KVCache) -> Tensor:
        """x (rows, hidden); `where` the slot's turns, one for all or (rows,)."""
        turning = self.heads + self.shared
        qkv = self.qkv(self.length.divide(x)).unflatten(1, (-1, self.head_dim))  # (rows, heads + 2 key heads, head_dim)
        qk = qkv.narrow(1, 0, turning)
        rolled = qk.roll(self.head_dim // 2, -1)
        length = None if self.head_length is None else self.head_length(qk)
        qk.mul_(self.cos[where]).addcmul_(rolled, self.sin[where])
        if length is not None:
            qk.div_(length)
        cache.append_one(qkv.narrow(1, self.heads, 2 * self.shared))
        x = x + self.out(self.attend(qkv.narrow(1, 0, self.heads), cache))
        return x + self.down(self.gated(self.length.divide(x)))


class LengthNorm:
    """√(Σ x² + d ε) over d channels, by which RMSNorm divides but for `root` = √d."""

    def __init__(self, channels: int, eps: float) -> None:
        self.root, self.least = math.sqrt(channels), torch.tensor(math.sqrt(channels * eps))

    def __call__(self, x: Tensor) -> Tensor:
        return torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.least)

    def divide(self, x: Tensor) -> Tensor:
        return x / self(x)


def build_stepper(
    prior: CodeTransformer, caches: Sequence[KVCache], orders: Tensor | None, rows: int, int8: bool
) -> Stepper:
    weight = prior.code_embedding.weight
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        return PackedStepper(prior, caches, orders, rows, int8)
    if int8:
        raise UserError(
            f"weights is int8 and the prior is on {weight.device.type} in {weight.dtype}; expected it on a CPU in float32, where "
            "eight bits are faster; leave it out"
        )
    if weight.is_cuda and not torch.distributed.is_initialized():  # a sharded prior gathers its weights as it goes
        return GraphStepper(prior, caches, orders)
    return ModuleStepper(prior, caches, orders)
