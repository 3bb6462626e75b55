r"""Decode steps, one position at a time: with the prior's modules, or on a CPU with precomputed weights.

    u(x) = x / √(Σ x² + d ε) = n(x) / √d
    q, k, v = √d [W_q; W_k; W_v] diag(g) u(x)                     one matmul; its columns include the gains g of the norm
    rotate(g_q n(q)) = u(q · (√d g_q cos) + roll(q) · (√d roll(g_q) sin))   the rotary factors include the gains of queries and
                                                                  keys; u uses the length of q before the rotation

Weights are packed for the number of rows (`packed_linear`). For one image, calls of small operations would take half of a step, so
one operation less in each block saves about 1 % of the time.
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
    """Computes one decode step at a time."""

    caches: Sequence[KVCache]

    def step(self, inputs: Tensor) -> Tensor:
        """Compute the head's input (rows, hidden) from embedded inputs (rows, 1, hidden) of the next slot."""

    def logits(self, states: Tensor, level: int) -> Tensor:
        """Compute the logits (rows, K) of a level from the head's input (rows, hidden)."""


class ModuleStepper:
    """Decode steps with the prior's modules, on any device and in any dtype."""

    def __init__(self, prior: CodeTransformer, caches: Sequence[KVCache], orders: Tensor | None) -> None:
        self.prior, self.caches, self.orders = prior, caches, orders

    def step(self, inputs: Tensor) -> Tensor:
        return self.prior.hidden_states(inputs, self.orders, self.caches)[:, -1]

    def logits(self, states: Tensor, level: int) -> Tensor:
        return self.prior.level_logits(states, level)


class PackedStepper:
    """Decode steps with packed weights, in float32 on a CPU."""

    def __init__(
        self,
        prior: CodeTransformer,
        caches: Sequence[KVCache],
        orders: Tensor | None,
        rows: int,
        int8: bool = False,
    ) -> None:
        self.caches, self.norm = caches, LengthNorm(prior.config.model.hidden_size, prior.config.model.rms_norm_eps)
        self.gain = prior.norm.weight * self.norm.root
        rotary = rotary_factors(prior.position_angles(torch.device("cpu")))  # (1 + h·w, head_dim) each
        # (rows, 1 + h·w): row of the rotary factors for each slot. In raster order it is the slot itself.
        self.factor_rows = None if orders is None else F.pad(orders + 1, (1, 0))
        self.positions = None
        if prior.position_embedding is not None:
            order = torch.arange(prior.config.num_positions) if orders is None else orders
            self.positions = prior.position_embedding(order)  # (h·w, hidden), or (rows, h·w, hidden)
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
        factor_rows = slot if self.factor_rows is None else self.factor_rows[:, slot]
        for block, cache in zip(self.blocks, self.caches, strict=True):
            x = block(x, factor_rows, cache)
        return self.norm.normalize(x) * self.gain

    def logits(self, states: Tensor, level: int) -> Tensor:
        return self.heads[level](states)


class PackedBlock:
    """A transformer block with packed weights, for one new token of each row."""

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
        self.attend, self.head_dim = attend, attention.head_dim
        self.heads, self.key_heads = attend.heads, attend.key_heads
        self.norm = LengthNorm(attention.query.in_features, eps)
        self.head_norm = None if isinstance(attention.query_norm, nn.Identity) else LengthNorm(self.head_dim, eps)
        self.cos, self.sin = self._rotary_factors(attention, *rotary)
        qkv_weight = torch.cat([attention.query.weight, attention.key.weight, attention.value.weight])
        gate, up = (
            project.weight * block.feed_forward_norm.weight * self.norm.root
            for project in (feed_forward.gate, feed_forward.up)
        )
        self.qkv = pack_linear(qkv_weight * block.attention_norm.weight * self.norm.root, rows, int8)
        self.out = pack_linear(attention.out.weight, rows, int8)
        self.gated = pack_gated_linear(gate, up, rows, int8)
        self.down = pack_linear(feed_forward.down.weight, rows, int8)

    def _rotary_factors(self, attention: Attention, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Multiply rotary factors by the gains of queries and keys and the attention scale.

        Returns:
            Cosines and signed sines, (1 + h·w, heads + key heads, head_dim) each.
        """
        gains = cos.new_ones(self.heads + self.key_heads, self.head_dim)
        if self.head_norm is not None:
            for part, norm in ((gains[: self.heads], "query_norm"), (gains[self.heads :], "key_norm")):
                part.copy_(getattr(attention, norm).weight.detach())
            gains *= self.head_norm.root
        gains[: self.heads] *= self.head_dim**-0.5
        return cos[:, None] * gains, sin[:, None] * gains.roll(self.head_dim // 2, -1)

    def __call__(self, x: Tensor, factor_rows: int | Tensor, cache: KVCache) -> Tensor:
        """Transform x (rows, hidden) and append its keys and values to the cache.

        Args:
            x: (rows, hidden).
            factor_rows: Row of the rotary factors, one for all or (rows,).
            cache: Cache of this layer.
        """
        qk_heads = self.heads + self.key_heads
        # (rows, heads + 2 · key heads, head_dim)
        qkv = self.qkv(self.norm.normalize(x)).unflatten(1, (-1, self.head_dim))
        qk = qkv.narrow(1, 0, qk_heads)
        rolled = qk.roll(self.head_dim // 2, -1)
        length = None if self.head_norm is None else self.head_norm.length(qk)
        qk.mul_(self.cos[factor_rows]).addcmul_(rolled, self.sin[factor_rows])
        if length is not None:
            qk.div_(length)
        cache.append_one(qkv.narrow(1, self.heads, 2 * self.key_heads))
        x = x + self.out(self.attend(qkv.narrow(1, 0, self.heads), cache))
        return x + self.down(self.gated(self.norm.normalize(x)))


class LengthNorm:
    """Division by √(Σ x² + d ε) over d channels: RMSNorm without its gains and without its factor `root` = √d."""

    def __init__(self, channels: int, eps: float) -> None:
        self.root, self.min_length = math.sqrt(channels), torch.tensor(math.sqrt(channels * eps))

    def length(self, x: Tensor) -> Tensor:
        return torch.hypot(torch.linalg.vector_norm(x, dim=-1, keepdim=True), self.min_length)

    def normalize(self, x: Tensor) -> Tensor:
        return x / self.length(x)


def build_stepper(
    prior: CodeTransformer, caches: Sequence[KVCache], orders: Tensor | None, rows: int, int8: bool
) -> Stepper:
    """Choose the fastest stepper for the prior's device and dtype.

    Args:
        prior: The prior.
        caches: Caches of its layers.
        orders: (rows, h·w) int64, the i-th position to sample; None means raster order.
        rows: Batch size, with both halves of guidance.
        int8: Use 8-bit weights.

    Raises:
        UserError: `int8` is true and the prior is not in float32 on a CPU.
    """
    weight = prior.code_embedding.weight
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        return PackedStepper(prior, caches, orders, rows, int8)
    if int8:
        raise UserError(
            f"weights is int8 and the prior is on {weight.device.type} in {weight.dtype}; expected a prior on a CPU in float32. "
            "Leave out `weights`."
        )
    if weight.is_cuda and not torch.distributed.is_initialized():  # a sharded prior gathers weights during the step
        return GraphStepper(prior, caches, orders)
    return ModuleStepper(prior, caches, orders)
