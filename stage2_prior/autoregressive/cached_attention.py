r"""Attention of one new token to the cached tokens, in float32 on a CPU.

    y = Σ_t softmax(q Kᵀ)_t V_t          the sum is an embedding bag over the rows of the cache, read once from start to end

For several images, torch's own kernel takes the time of two to three reads of the cache. For one image it is the fastest.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.autoregressive.kv_cache import KVCache

MIN_ROWS = 4  # torch's kernel is as fast for fewer rows


class CachedAttention:
    """Attention for all layers of a prior; their caches have the same shape.

    Args:
        rows: Batch size.
        heads: Number of query heads.
        key_heads: Number of key and value heads.
        max_tokens: Size of the caches.
    """

    def __init__(self, rows: int, heads: int, key_heads: int, max_tokens: int) -> None:
        self.rows, self.heads, self.key_heads = rows, heads, key_heads
        # Row numbers of the values of each query head. The first half of a cache's rows are keys.
        first = rows * key_heads * max_tokens + torch.arange(rows * key_heads, dtype=torch.int32) * max_tokens
        groups = heads // key_heads
        self._value_rows = first.repeat_interleave(groups)[:, None] + torch.arange(max_tokens, dtype=torch.int32)
        self._tokens, self._bag_rows, self._bag_starts = 0, first, first  # for the last number of tokens

    def __call__(self, query: Tensor, cache: KVCache) -> Tensor:
        """Attend from scaled queries (rows, heads, head_dim); returns (rows, heads · head_dim)."""
        if self.rows < MIN_ROWS:
            keys, values = cache.keys_and_values()
            grouped = self.heads > self.key_heads
            attended = F.scaled_dot_product_attention(query.unsqueeze(2), keys, values, scale=1.0, enable_gqa=grouped)
            return attended.flatten(1)
        if self._tokens != cache.tokens:
            self._tokens = cache.tokens
            self._bag_rows = self._value_rows[:, : self._tokens].flatten()
            self._bag_starts = torch.arange(0, len(self._bag_rows), self._tokens, dtype=torch.int32)
        keys = cache.data[0].flatten(0, 1).narrow(1, 0, self._tokens)
        weights = torch.bmm(query.reshape(len(keys), -1, query.shape[-1]), keys.mT).softmax(-1)
        table = cache.data.view(-1, query.shape[-1])
        attended = torch.embedding_bag(table, self._bag_rows, self._bag_starts, False, 0, False, weights.flatten())[0]
        return attended.view(self.rows, -1)
