r"""The transformer of the autoregressive prior: from codes to the hidden state that predicts the next code.

The sequence is a class prefix followed by the codes. Slot i attends to the prefix and the first i codes and predicts the next code,
so the last code is never an input. The blocks are Llama blocks over image tokens, as in LlamaGen (Sun et al. 2024, arXiv
2406.06525).

Residual codes have several levels at each position. The input of a position is the sum of the embeddings of its codes. A small
transformer (`depth`) predicts the codes of a position one after another. The levels of a position are adjacent in a token sequence.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stage2_prior.autoregressive.blocks import Block
from stage2_prior.autoregressive.config import AutoregressivePriorConfig
from stage2_prior.autoregressive.depth import DepthTransformer
from stage2_prior.autoregressive.kv_cache import KVCache
from stage2_prior.autoregressive.orders import invert_order
from stage2_prior.conditioning.classes import ClassEmbedding
from stage2_prior.layers.normalization import RMSNorm
from stage2_prior.layers.rotary import rotary_angles, rotary_factors
from stage2_prior.prior import Prior
from training_harness.errors import SpecMismatchError

EMBEDDING_STD = 0.3
HEAD_STD = 0.05  # for a head that starts from the code vectors of the tokenizer
RANDOM_HEAD_STD = 0.02


class CodeTransformer(Prior):
    """The network of an `AutoregressivePrior`, without loss and sampling."""

    config_class = AutoregressivePriorConfig
    config: AutoregressivePriorConfig
    _no_split_modules = ["Block"]  # noqa: RUF012 - name and type of transformers; the units of FSDP
    end_layers = ("head",)  # the optimizer treats them differently from hidden matrices

    def __init__(self, config: AutoregressivePriorConfig) -> None:
        super().__init__(config)
        model, codes = config.model, config.levels * config.codebook_size
        self.class_embedding = ClassEmbedding(config.num_classes, model.hidden_size)
        self.code_embedding = nn.Embedding(codes, model.hidden_size)
        self.position_embedding = (
            nn.Embedding(config.num_positions, model.hidden_size) if model.learned_positions else None
        )
        self.blocks = nn.ModuleList(Block(model) for _ in range(model.num_layers))
        self.norm = RMSNorm(model.hidden_size, eps=model.rms_norm_eps)
        self.depth = DepthTransformer(config) if config.levels > 1 else None
        self.head = None if model.tie_embeddings else nn.Linear(model.hidden_size, codes, bias=False)
        self._set_initial_weights()
        self.post_init()

    @property
    def levels(self) -> int:
        return self.config.levels

    @property
    def grid_shape(self) -> tuple[int, ...]:
        """Shape of the codes of an image: (h, w), or (levels, h, w)."""
        levels = (self.levels,) if self.levels > 1 else ()
        return (*levels, self.config.height, self.config.width)

    def codes_to_tokens(self, codes: Tensor, orders: Tensor | None = None) -> Tensor:
        """Flatten codes (B, h, w) or (B, levels, h, w) to a sequence (B, h·w·levels), in raster order or `orders` (B, h·w).

        Raises:
            SpecMismatchError: The grid has another shape than the training codes.
        """
        if codes.shape[1:] != self.grid_shape:
            shape, expected = ("×".join(map(str, sizes)) for sizes in (codes.shape[1:], self.grid_shape))
            raise SpecMismatchError(
                f"the grid of codes is {shape}; expected {expected}, which the prior was trained on. Tokenize images of the "
                "training size, or train a prior on these codes."
            )
        by_position = codes.flatten(-2).view(len(codes), self.levels, -1).mT  # (B, h·w, levels)
        if orders is not None:
            by_position = by_position.gather(1, orders[:, :, None].expand_as(by_position))
        return by_position.flatten(1)

    def tokens_to_codes(self, tokens: Tensor, orders: Tensor | None = None) -> Tensor:
        """Invert `codes_to_tokens`: (B, h·w·levels) → (B, h, w), or (B, levels, h, w)."""
        by_position = tokens.unflatten(1, (-1, self.levels))
        if orders is not None:
            by_position = by_position.gather(1, invert_order(orders)[:, :, None].expand_as(by_position))
        return by_position.mT.reshape(len(tokens), *self.grid_shape)

    def logits(self, tokens: Tensor, conditioning: Tensor, orders: Tensor | None = None) -> Tensor:
        """Compute logits (B, n, K) for tokens (B, n) in the order `orders`; logits i depend only on the tokens before i."""
        states = self.head_inputs(tokens, conditioning, orders)
        return torch.stack([self.level_logits(states[:, :, n], n) for n in range(self.levels)], dim=2).flatten(1, 2)

    def head_inputs(self, tokens: Tensor, conditioning: Tensor, orders: Tensor | None = None) -> Tensor:
        """Compute the head's input for each token: (B, h·w, levels, hidden)."""
        embeddings = self.embed_levels(tokens.unflatten(1, (-1, self.levels)))  # (B, h·w, levels, hidden)
        prefix = self.class_embedding(conditioning)[:, None]
        hidden = self.hidden_states(torch.cat([prefix, embeddings[:, :-1].sum(2)], dim=1), orders)
        if self.depth is None:
            return hidden.unsqueeze(2)
        return self.depth(hidden.flatten(0, 1), embeddings[:, :, :-1].flatten(0, 1)).unflatten(0, hidden.shape[:2])

    def embed_levels(self, codes: Tensor) -> Tensor:
        """Embed the codes (B, positions, n) of the first n levels: (B, positions, n, hidden)."""
        if self.levels > 1:  # each level has its own rows of the table
            codes = codes + self.config.codebook_size * torch.arange(codes.shape[2], device=codes.device)
        return self.code_embedding(codes)

    def embed_codes(self, codes: Tensor) -> Tensor:
        """Embed positions (B, positions, hidden) as the sum of the embeddings of their codes (B, positions, n)."""
        return self.embed_levels(codes).sum(2)

    def hidden_states(
        self, inputs: Tensor, orders: Tensor | None = None, caches: Sequence[KVCache] | None = None
    ) -> Tensor:
        """Apply all blocks and the last norm to embedded inputs (B, n, hidden).

        With caches, the inputs follow the cached slots.
        """
        first = caches[0].tokens if caches else 0
        slots = slice(first, first + inputs.shape[1])
        order = torch.arange(self.config.num_positions, device=inputs.device) if orders is None else orders
        # Row 0 belongs to the prefix, row i + 1 to position i.
        angles = self.position_angles(inputs.device)[F.pad(order + 1, (1, 0))[..., slots]]
        rotary = rotary_factors(angles if orders is None else angles[:, None])
        if self.position_embedding is not None:
            inputs = inputs + self.position_embedding(order[..., slots])
        for i, block in enumerate(self.blocks):
            inputs = block(inputs, rotary, caches[i] if caches else None)
        return self.norm(inputs)

    def head_weight(self, level: int) -> Tensor:
        """Return the head's weight (K, hidden) for a level."""
        size = self.config.codebook_size
        rows = slice(level * size, (level + 1) * size)
        if self.head is not None:
            return self.head.weight[rows]
        return self.code_embedding.weight[rows] * (RANDOM_HEAD_STD / EMBEDDING_STD)

    def level_logits(self, states: Tensor, level: int) -> Tensor:
        return F.linear(states, self.head_weight(level))

    def position_angles(self, device: torch.device) -> Tensor:
        """Return the rotary angles (1 + h·w, head_dim / 2) of the prefix and all positions."""
        config, model = self.config, self.config.model
        angles = rotary_angles(config.height, config.width, model.head_dim, model.rotary_axes, model.rope_theta)
        return angles.to(device)

    def new_caches(self, batch: int) -> list[KVCache]:
        return self._caches(batch, self.config.num_positions, len(self.blocks))

    def new_level_caches(self, batch: int) -> list[KVCache]:
        return [] if self.depth is None else self._caches(batch, self.levels, len(self.depth.blocks))

    def _caches(self, batch: int, tokens: int, layers: int) -> list[KVCache]:
        model, like = self.config.model, self.code_embedding.weight
        return [KVCache(batch, model.key_value_heads, tokens, model.head_dim, like) for _ in range(layers)]

    @torch.no_grad()
    def initialize_from_code_vectors(self, vectors: Tensor) -> None:
        """Initialize embeddings and head from the tokenizer's code vectors, rotated at random.

        Similar codes then start with similar embeddings. With random rows the prior would have to learn this similarity.

        Args:
            vectors: (K, c), or (levels · K, c), near unit variance.
        """
        channels, hidden = vectors.shape[1], self.config.model.hidden_size
        rotation = nn.init.orthogonal_(vectors.new_empty(channels, hidden))
        rows = vectors @ rotation * math.sqrt(max(hidden / channels, 1))  # (K, hidden), near unit variance
        self.code_embedding.weight.copy_(EMBEDDING_STD * rows)
        if self.head is not None:
            self.head.weight.copy_(HEAD_STD * rows)

    def _set_initial_weights(self) -> None:
        """Initialize with normal numbers: std 1/√fan-in, smaller for the head and the last layer of a residual branch."""
        depth = math.sqrt(2 * self.config.model.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and "embedding" not in name:
                std = parameter.shape[1] ** -0.5
                is_branch_end = name.endswith(("out.weight", "down.weight"))
                is_head = name == "head.weight"
                nn.init.normal_(parameter, std=std / depth if is_branch_end else RANDOM_HEAD_STD if is_head else std)
            elif "embedding" in name:
                nn.init.normal_(parameter, std=EMBEDDING_STD)
