"""Keys and values of the tokens seen so far, in place: one allocation, no concatenation."""

import torch
from torch import Tensor


class KVCache:
    """Keys and values of one attention layer.

    Args:
        batch, heads, head_dim: shape of a token's keys.
        max_tokens: room; writing more is an error.
    """

    def __init__(self, batch: int, heads: int, max_tokens: int, head_dim: int, like: Tensor) -> None:
        shape = (batch, heads, max_tokens, head_dim)
        self._keys, self._values = (torch.empty(shape, dtype=like.dtype, device=like.device) for _ in range(2))
        self.max_tokens, self.tokens = max_tokens, 0

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Adds (B, heads, new tokens, head_dim) and returns all keys and values so far, as views."""
        end = self.tokens + keys.shape[2]
        if end > self.max_tokens:
            raise ValueError(
                f"the KV cache was given token {end - 1} and holds {self.max_tokens}; build it with max_tokens={end}"
            )
        self._keys[:, :, self.tokens : end] = keys
        self._values[:, :, self.tokens : end] = values
        self.tokens = end
        return self._keys[:, :, :end], self._values[:, :, :end]

    def select(self, rows: Tensor) -> None:
        """Row i goes on as row `rows[i]`; (B,) int64."""
        for held in (self._keys, self._values):
            held[:, :, : self.tokens] = held[rows, :, : self.tokens]
