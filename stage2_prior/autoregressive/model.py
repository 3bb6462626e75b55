r"""The autoregressive prior: a decoder-only transformer over the codes in raster order.

    p(k | y) = Π_i p(k_i | y, k_1 … k_{i−1}),     L = −mean_i log p(k_i | …)

The sequence is the class prefix and then the codes; position i sees the prefix and codes before i and predicts code i, so
the last code is never an input. Blocks are pre-norm with RMSNorm and SwiGLU as in Llama (Touvron et al. 2023, arXiv
2302.13971), laid over image tokens as in LlamaGen (Sun et al. 2024, arXiv 2406.06525). log K is the loss of a uniform guess.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from stage1_tokenizer.latent_spec import LatentSpec
from stage2_prior.autoregressive.kv_cache import KVCache
from stage2_prior.autoregressive.rotary import rotary_angles, rotate, turns
from stage2_prior.autoregressive.sampling import SamplingOptions, decode
from stage2_prior.conditioning import ClassEmbedding
from stage2_prior.normalization import RMSNorm
from stage2_prior.prior import Prior, PriorLoss
from training_harness.errors import ConfigError
from training_harness.precision import widened
from training_harness.pretrained import StrictConfig, count_parameters

EMBEDDING_STD, HEAD_STD = 0.3, 0.05  # of what the blocks are given, and of a head that starts from the codes' vectors
SHORT = 256  # tokens up to which attention on a CPU is trained as two plain products
Turns = tuple[Tensor, Tensor]  # cosines and signed sines (tokens, head_dim)


@strict
class AutoregressivePriorConfig(StrictConfig):
    model_type: ClassVar[str] = "latentloom-autoregressive"

    codebook_size: int = 512
    height: int = 8
    width: int = 8
    num_classes: int = 0
    hidden_size: int = 192
    num_layers: int = 4
    num_heads: int = 4
    intermediate_size: int = 512
    dropout: float = 0.0
    qk_norm: bool = True
    positions: Literal["1d", "2d"] = "2d"
    learned_positions: bool = False
    """Adds a learnt vector to each place, beside the rotary positions."""
    rope_theta: float | int = 10_000.0
    rms_norm_eps: float = 1e-6
    tokenizer_id: str = ""
    """Of the tokenizer whose codes the prior was trained on."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        for name in ("codebook_size", "height", "width", "hidden_size", "num_layers", "num_heads", "intermediate_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; expected a whole number of at least 1")
        if not 0 <= self.dropout <= 1:
            raise ConfigError(f"model.dropout is {self.dropout}; expected a share in [0, 1], such as 0.1")
        axes = int(self.positions[0])
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % (2 * axes):
            raise ConfigError(
                f"model.hidden_size is {self.hidden_size} for {self.num_heads} heads; expected a multiple of "
                f"{2 * axes * self.num_heads}, for {self.positions} rotary positions"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads


class Attention(nn.Module):
    """Causal self-attention with rotary positions; with a cache, over all tokens so far."""

    def __init__(self, config: AutoregressivePriorConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.heads, self.dropout = config.num_heads, config.dropout
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.query_norm, self.key_norm = (
            RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor, turned: Turns, cache: KVCache | None) -> Tensor:
        query, key, value = (
            project(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, tokens, head_dim)
            for project in (self.query, self.key, self.value)
        )
        query, key = rotate(self.query_norm(query), *turned), rotate(self.key_norm(key), *turned)
        if cache is not None:
            key, value = cache.append(key, value)
        new, seen = query.shape[2], key.shape[2]
        causal, mask = 1 < new == seen, None  # one new token sees everything
        if 1 < new < seen:  # torch's `is_causal` would count from the first key, which is the oldest
            mask = torch.ones(new, seen, dtype=torch.bool, device=x.device).tril(seen - new)
        dropout = self.dropout if self.training else 0.0
        if causal and new <= SHORT and x.device.type == "cpu" and torch.is_grad_enabled():
            attended = causal_attention(query, key, value, dropout)
        else:
            attended = F.scaled_dot_product_attention(query, key, value, mask, dropout, is_causal=causal)
        return self.out(attended.transpose(1, 2).flatten(2))


def causal_attention(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    """softmax(QKᵀ / √d + mask) V of (B, heads, tokens, d), as plain products.

    torch's blocked kernel for CPUs is eight times as slow at 49 tokens where products round their factors.
    """
    tokens, width = query.shape[-2:]
    mask = query.new_full((tokens, tokens), -math.inf).triu(1)
    query, key, values = (x.reshape(-1, tokens, width) for x in (query, key, value))
    scores = torch.baddbmm(mask.expand(len(query), -1, -1), query, key.mT, alpha=width**-0.5)
    return (F.dropout(scores.softmax(-1), dropout) @ values).view(value.shape)


class FeedForward(nn.Module):
    """SwiGLU: down(SiLU(gate x) · up x). Shazeer 2020, arXiv 2002.05202."""

    def __init__(self, config: AutoregressivePriorConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Block(GradientCheckpointingLayer):
    def __init__(self, config: AutoregressivePriorConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.attention = Attention(config)
        self.feed_forward_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.feed_forward = FeedForward(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, turned: Turns, cache: KVCache | None) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), turned, cache))
        return x + self.dropout(self.feed_forward(self.feed_forward_norm(x)))


class AutoregressivePrior(Prior):
    config_class = AutoregressivePriorConfig
    config: AutoregressivePriorConfig
    options_class = SamplingOptions
    spec_fields = ("codebook_size", "height", "width", "tokenizer_id")
    draws = "tokens"
    _no_split_modules = ["Block"]  # noqa: RUF012 - as transformers has it; units of FSDP
    end_layers = ("head",)  # read and written by other rules than hidden matrices

    def __init__(self, config: AutoregressivePriorConfig) -> None:
        super().__init__(config)
        self.class_embedding = ClassEmbedding(config.num_classes, config.hidden_size)
        self.code_embedding = nn.Embedding(config.codebook_size, config.hidden_size)
        places = config.height * config.width
        self.position_embedding = nn.Embedding(places, config.hidden_size) if config.learned_positions else None
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.head = nn.Linear(config.hidden_size, config.codebook_size, bias=False)
        self._draw_weights()
        self.post_init()

    def forward(self, codes: Tensor, conditioning: Tensor) -> PriorLoss:
        """Loss of codes (B, h, w) int64 given class ids (B,) int64: nats a token."""
        tokens = codes.flatten(1)
        logits = widened(self.logits(tokens, conditioning))
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        return PriorLoss(loss, {"nats_per_token": loss})

    def logits(self, tokens: Tensor, conditioning: Tensor) -> Tensor:
        """(B, h·w) codes → (B, h·w, K); position i depends on the codes before i alone."""
        prefix = self.class_embedding(conditioning)[:, None]
        inputs = torch.cat([prefix, self.code_embedding(tokens[:, :-1])], dim=1)
        return self.head(self.hidden_states(inputs))

    def hidden_states(self, inputs: Tensor, caches: Sequence[KVCache] | None = None) -> Tensor:
        """Embedded inputs (B, tokens, hidden) → the same shape after all blocks and the last norm.

        With caches, the inputs follow the tokens that the caches hold.
        """
        first = caches[0].tokens if caches else 0
        places = slice(first, first + inputs.shape[1])
        turned = turns(self.angles(inputs.device)[places])
        if self.position_embedding is not None:  # of the place that is predicted
            inputs = inputs + self.position_embedding.weight[places]
        for i, block in enumerate(self.blocks):
            inputs = block(inputs, turned, caches[i] if caches else None)
        return self.norm(inputs)

    def angles(self, device: torch.device) -> Tensor:
        config = self.config
        axes = int(config.positions[0])
        return rotary_angles(config.height, config.width, config.head_dim, axes, config.rope_theta).to(device)

    def new_caches(self, batch: int) -> list[KVCache]:
        config = self.config
        tokens = config.height * config.width
        like = self.head.weight
        return [KVCache(batch, config.num_heads, tokens, config.head_dim, like) for _ in self.blocks]

    def sample(
        self,
        spec: LatentSpec,
        conditioning: Tensor,
        options: SamplingOptions,
        generators: Sequence[torch.Generator],
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        self.check_spec(spec)
        tokens = decode(self, conditioning, options, generators, on_step)
        return tokens.view(-1, spec.height, spec.width)

    def num_steps(self, spec: LatentSpec, options: SamplingOptions) -> int:
        return spec.tokens

    def describe(self, spec: LatentSpec) -> str:
        return (
            f"an autoregressive prior ({count_parameters(self):,} parameters) draws {spec.height}×{spec.width} codes of "
            f"{spec.codebook_size}"
        )

    @torch.no_grad()
    def start_from_code_vectors(self, vectors: Tensor) -> None:
        """Lets codes that look alike start alike: (K, c) vectors, near unit variance, randomly rotated into embeddings and head.

        Rows drawn at random would have to learn from which codes meet what the codebook knows already.
        """
        channels, hidden = vectors.shape[1], self.config.hidden_size
        rotation = nn.init.orthogonal_(vectors.new_empty(channels, hidden))
        rows = vectors @ rotation * math.sqrt(max(hidden / channels, 1))  # (K, hidden), near unit variance
        self.code_embedding.weight.copy_(EMBEDDING_STD * rows)
        self.head.weight.copy_(HEAD_STD * rows)

    def _draw_weights(self) -> None:
        """Normal: matrices with std 1/√fan-in, the last layer of each residual branch and the head smaller."""
        depth = math.sqrt(2 * self.config.num_layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and "embedding" not in name:
                std = parameter.shape[1] ** -0.5
                small = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=std / depth if small else 0.02 if name == "head.weight" else std)
            elif "embedding" in name:
                nn.init.normal_(parameter, std=EMBEDDING_STD)
