r"""The prior, one place at a time: as its modules compute it, or on a CPU with what does not change between steps done once.

    n(x) = x / √(mean x² + ε)
    q, k, v = [W_q; W_k; W_v] diag(g) n(x)                   one product, the norm's gains g in its columns
    rotate(g_q n(q)) = n(q) · (g_q cos) + roll(n(q)) · (roll(g_q) sin)     the gains of queries and keys in the turns

Products are packed for the number of rows (`packed_product`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior.autoregressive.blocks import Attention, Block
from stage2_prior.autoregressive.kv_cache import KVCache
from stage2_prior.autoregressive.packed_product import packed_product
from stage2_prior.autoregressive.rotary import turns

if TYPE_CHECKING:
    from stage2_prior.autoregressive.model import AutoregressivePrior


class Stepper(Protocol):
    caches: Sequence[KVCache]

    def hidden(self, inputs: Tensor) -> Tensor:
        """Embedded inputs (rows, 1, hidden) of the next slot → what the head is given (rows, hidden)."""

    def logits(self, states: Tensor, level: int) -> Tensor:
        """(rows, hidden) → (rows, K) of a level."""


class ModuleStepper:
    """Any device and type."""

    def __init__(self, prior: AutoregressivePrior, caches: Sequence[KVCache], orders: Tensor | None) -> None:
        self.prior, self.caches, self.orders = prior, caches, orders

    def hidden(self, inputs: Tensor) -> Tensor:
        return self.prior.hidden_states(inputs, self.orders, self.caches)[:, -1]

    def logits(self, states: Tensor, level: int) -> Tensor:
        return self.prior.level_logits(states, level)


class PackedStepper:
    """float32 on a CPU."""

    def __init__(
        self,
        prior: AutoregressivePrior,
        caches: Sequence[KVCache],
        orders: Tensor | None,
        rows: int,
        eight_bits: bool = False,
    ) -> None:
        self.caches, self.eps = caches, prior.config.rms_norm_eps
        self.gain, self.hidden_size = prior.norm.weight, prior.config.hidden_size
        turned = turns(prior.angles(torch.device("cpu")))  # (1 + places, head_dim) each
        places = prior.config.places
        order = torch.arange(places) if orders is None else orders
        self.slots = F.pad(order + 1, (1, 0))  # (1 + places,), or (rows, 1 + places): whose turns each slot has
        self.positions = None
        if prior.position_embedding is not None:
            self.positions = prior.position_embedding(order)  # (places, hidden), or (rows, places, hidden)
        self.blocks = [
            PackedBlock(block, turned, rows, self.eps, eight_bits) for block in cast("Iterable[Block]", prior.blocks)
        ]
        self.heads = [packed_product(prior.head_rows(level), rows) for level in range(prior.levels)]

    def hidden(self, inputs: Tensor) -> Tensor:
        slot, x = self.caches[0].tokens, inputs[:, 0]
        if self.positions is not None:
            x = x + self.positions[..., slot, :]
        where = self.slots[..., slot]
        for block, cache in zip(self.blocks, self.caches, strict=True):
            x = block(x, where, cache)
        return normalized(x, self.eps) * self.gain

    def logits(self, states: Tensor, level: int) -> Tensor:
        return self.heads[level](states)


class PackedBlock:
    def __init__(self, block: Block, turned: tuple[Tensor, Tensor], rows: int, eps: float, eight_bits: bool) -> None:
        attention, feed_forward = block.attention, block.feed_forward
        self.eps, self.head_dim, self.groups = eps, attention.head_dim, attention.groups
        self.heads, self.shared = (
            project.out_features // self.head_dim for project in (attention.query, attention.key)
        )
        self.qk_norm = not isinstance(attention.query_norm, nn.Identity)
        self.cos, self.sin = self._turns(attention, *turned)
        joined = torch.cat([attention.query.weight, attention.key.weight, attention.value.weight])
        gated = torch.cat([feed_forward.gate.weight, feed_forward.up.weight])
        self.qkv = packed_product(joined * block.attention_norm.weight, rows, eight_bits)
        self.out = packed_product(attention.out.weight, rows, eight_bits)
        self.gate_up = packed_product(gated * block.feed_forward_norm.weight, rows, eight_bits)
        self.down = packed_product(feed_forward.down.weight, rows, eight_bits)

    def _turns(self, attention: Attention, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(1 + places, heads + key heads, head_dim) each, with the gains of queries and keys."""
        counts = {"query_norm": self.heads, "key_norm": self.shared}
        ones = cos.new_ones(self.head_dim)
        gains = torch.cat(
            [
                (getattr(attention, name).weight if self.qk_norm else ones).expand(count, -1)
                for name, count in counts.items()
            ]
        )
        return cos[:, None] * gains, sin[:, None] * gains.roll(self.head_dim // 2, -1)

    def __call__(self, x: Tensor, where: Tensor, cache: KVCache) -> Tensor:
        """x (rows, hidden); `where` the slot's turns, () or (rows,)."""
        turning, half = self.heads + self.shared, self.head_dim // 2
        qkv = self.qkv(normalized(x, self.eps)).unflatten(
            1, (-1, self.head_dim)
        )  # (rows, heads + 2 key heads, head_dim)
        qk = normalized(qkv[:, :turning], self.eps) if self.qk_norm else qkv[:, :turning]
        qk = (qk * self.cos[where]).addcmul_(qk.roll(half, -1), self.sin[where])
        keys, values = cache.append(qk[:, self.heads :, None], qkv[:, turning:, None])
        query = qk[:, : self.heads, None]
        attended = F.scaled_dot_product_attention(query, keys, values, enable_gqa=self.groups > 1)
        x = x + self.out(attended.flatten(1))
        gate, up = self.gate_up(normalized(x, self.eps)).chunk(2, 1)
        return x + self.down(F.silu(gate).mul_(up))


def normalized(x: Tensor, eps: float) -> Tensor:
    scale = torch.linalg.vecdot(x, x).div_(x.shape[-1]).add_(eps).rsqrt_().unsqueeze(-1)
    return x * scale


def stepper_for(
    prior: AutoregressivePrior, caches: Sequence[KVCache], orders: Tensor | None, rows: int, eight_bits: bool
) -> Stepper:
    weight = prior.code_embedding.weight
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        return PackedStepper(prior, caches, orders, rows, eight_bits)
    return ModuleStepper(prior, caches, orders)
