r"""Attention of one new token to those of a cache, in float32 on a CPU.

    y = Σ_t softmax(q Kᵀ)_t V_t          the sum a weighted bag of the cache's rows, read once from beginning to end

torch's own kernel takes as long as reading the cache twice to three times once several images are drawn; for one it is the best.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from stage2_prior.autoregressive.kv_cache import KVCache

MIN_ROWS = 4  # rows below which torch's kernel is as fast


class CachedAttention:
    """For all layers of a prior, whose caches are of one shape.

    Args:
        heads, shared: of queries, and of keys and values.
    """

    def __init__(self, rows: int, heads: int, shared: int, max_tokens: int) -> None:
        self.rows, self.heads, self.shared = rows, heads, shared
        # Where the values of each query's head stand among the rows of a cache, whose first half is keys.
        first = rows * shared * max_tokens + torch.arange(rows * shared, dtype=torch.int32) * max_tokens
        self._values = first.repeat_interleave(heads // shared)[:, None] + torch.arange(max_tokens, dtype=torch.int32)
        self._tokens, self._bags, self._begins = 0, first, first  # for the number of tokens that were last seen

    def __call__(self, query: Tensor, cache: KVCache) -> Tensor:
        """query (rows, heads, head_dim), scaled → (rows, heads · head_dim)."""
        if self.rows < MIN_ROWS:
            keys, values = cache.keys_and_values()
            grouped = self.heads > self.shared
            attended = F.scaled_dot_product_attention(query.unsqueeze(2), keys, values, scale=1.0, enable_gqa=grouped)
            return attended.flatten(1)
        if self._tokens != cache.tokens:
            self._tokens = cache.tokens
            self._bags = self._values[:, : self._tokens].flatten()
            self._begins = torch.arange(0, len(self._bags), self._tokens, dtype=torch.int32)
        keys = cache.data[0].flatten(0, 1).narrow(1, 0, self._tokens)
        weights = torch.bmm(query.reshape(len(keys), -1, query.shape[-1]), keys.mT).softmax(-1)
        rows = cache.data.view(-1, query.shape[-1])
        return torch.embedding_bag(rows, self._bags, self._begins, False, 0, False, weights.flatten())[0].view(
            self.rows, -1
        )
