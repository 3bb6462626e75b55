"""Key-value cache: keys and values of the tokens so far, written in place into one allocation."""

from typing import Protocol

import torch
from torch import Tensor


class Cache(Protocol):
    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Append keys and values (B, heads, new tokens, head_dim).

        Returns:
            All keys, all values, and the attention mask of the new tokens, or None where no mask is needed.
        """


class KVCache:
    """Keys and values of one attention layer.

    Args:
        batch: Number of rows.
        heads: Number of key and value heads.
        max_tokens: Number of slots. Appending more tokens raises ValueError.
        head_dim: Channels of a head.
        like: A tensor with the dtype and device of the cache.
    """

    def __init__(self, batch: int, heads: int, max_tokens: int, head_dim: int, like: Tensor) -> None:
        shape = (2, batch, heads, max_tokens, head_dim)
        self.data = torch.empty(shape, dtype=like.dtype, device=like.device)
        self.max_tokens, self.tokens = max_tokens, 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        new_tokens = keys.shape[2]
        begin = self.reserve_slots(new_tokens)
        self.data[0, :, :, begin : self.tokens] = keys
        self.data[1, :, :, begin : self.tokens] = values
        mask = None
        if begin > 0 and new_tokens > 1:  # torch's `is_causal` would align the new tokens with the first keys
            mask = torch.ones(new_tokens, self.tokens, dtype=torch.bool, device=keys.device).tril(begin)
        return *self.keys_and_values(), mask

    def append_one(self, joined: Tensor) -> None:
        """Append one token: its keys and then its values, (B, 2 · heads, head_dim)."""
        slot = self.reserve_slots(1)
        self.data.select(3, slot).copy_(joined.unflatten(1, (2, -1)).transpose(0, 1))

    def keys_and_values(self) -> tuple[Tensor, Tensor]:
        """Return views of all keys and all values so far, (B, heads, tokens, head_dim) each."""
        keys, values = self.data.narrow(3, 0, self.tokens).unbind()
        return keys, values

    def select_rows(self, rows: Tensor) -> None:
        """Replace row i by row `rows[i]`; `rows` is (B,) int64."""
        self.data[:, :, :, : self.tokens] = self.data[:, rows, :, : self.tokens]

    def reserve_slots(self, count: int) -> int:
        """Count `count` more tokens, and return the slot of the first."""
        begin, end = self.tokens, self.tokens + count
        if end > self.max_tokens:
            raise ValueError(
                f"the KV cache received token {end - 1} but has {self.max_tokens} slots; build it with max_tokens={end}"
            )
        self.tokens = end
        return begin
