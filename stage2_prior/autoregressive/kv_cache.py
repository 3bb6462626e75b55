"""Keys and values of the tokens seen so far, in place: one allocation, no concatenation."""

from typing import Protocol

import torch
from torch import Tensor


class Cache(Protocol):
    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Adds (B, heads, new tokens, head_dim); all keys and values, and which a new token sees where it is not all so far."""


class KVCache:
    """Keys and values of one attention layer.

    Args:
        batch, heads, head_dim: shape of a token's keys.
        max_tokens: room; writing more is an error.
    """

    def __init__(self, batch: int, heads: int, max_tokens: int, head_dim: int, like: Tensor) -> None:
        shape = (2, batch, heads, max_tokens, head_dim)
        self.data = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.max_tokens, self.tokens = max_tokens, 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        new = keys.shape[2]
        begin = self.reserve_slots(new)
        self.data[0, :, :, begin : self.tokens] = keys
        self.data[1, :, :, begin : self.tokens] = values
        mask = None
        if begin > 0 and new > 1:  # torch's `is_causal` would count from the first key, which is the oldest
            mask = torch.ones(new, self.tokens, dtype=torch.bool, device=keys.device).tril(begin)
        return *self.keys_and_values(), mask

    def append_one(self, joined: Tensor) -> None:
        """`append` of one token, its keys and then its values: (B, 2 · heads, head_dim)."""
        slot = self.reserve_slots(1)
        self.data.select(3, slot).copy_(joined.unflatten(1, (2, -1)).transpose(0, 1))

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """All keys and all values so far (B, heads, tokens, head_dim), as views."""
        keys, values = self.data.narrow(3, 0, self.tokens).unbind()
        return keys, values

    def select_rows(self, rows: Tensor) -> None:
        """Row i goes on as row `rows[i]`; (B,) int64."""
        self.data[:, :, :, : self.tokens] = self.data[:, rows, :, : self.tokens]

    def reserve_slots(self, count: int) -> int:
        """Counts as many more tokens, and returns the slot of the first."""
        begin, end = self.tokens, self.tokens + count
        if end > self.max_tokens:
            raise ValueError(
                f"the KV cache was given token {end - 1} and holds {self.max_tokens}; build it with max_tokens={end}"
            )
        self.tokens = end
        return begin
