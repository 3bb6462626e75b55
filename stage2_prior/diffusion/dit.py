r"""DiT: a transformer over patches of noisy latents, conditioned on the time and the class by adaptive norms.

    c = SiLU(time(t) + class(y)),     (shift, scale, gate) × 2 = W c + b
    x ← x + gate₁ · attention((1 + scale₁) norm(x) + shift₁),     x ← x + gate₂ · feed_forward((1 + scale₂) norm(x) + shift₂)

W, b and the last layer start at 0 (adaLN-zero), so each block starts as the identity and the network predicts 0. Peebles, Xie
2022, arXiv 2212.09748. Optional RMSNorm, SwiGLU, norms of queries and keys, and rotary positions: LightningDiT, Yao et al. 2025,
arXiv 2501.01423.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from stage2_prior.diffusion.condition import Condition
from stage2_prior.diffusion.config import DiffusionPriorConfig, DiTModel
from stage2_prior.layers.activations import GELU
from stage2_prior.layers.attention import has_forward_tangent, plain_attention, prefers_plain_attention
from stage2_prior.layers.feed_forward import SwiGLU
from stage2_prior.layers.normalization import RMSNorm
from stage2_prior.layers.rotary import RotaryFactors, rotary_angles, rotary_factors, rotate

EPS = 1e-6


class DiT(nn.Module):
    def __init__(self, config: DiffusionPriorConfig, model: DiTModel) -> None:
        """Create the network; `model` is `config.model`."""
        super().__init__()
        self.model, size, width = model, model.patch_size, model.hidden_size
        self.channels = config.channels
        self.grid = config.height // size, config.width // size
        self.patch = nn.Linear(config.input_channels * size**2, width)
        self.condition = Condition(config, width)
        self.blocks = nn.ModuleList(DiTBlock(model) for _ in range(model.num_layers))
        self.norm = norm_layer(model)
        self.modulation = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, config.channels * size**2)
        self._set_initial_weights()

    def forward(
        self,
        latents: Tensor,
        times: Tensor,
        classes: Tensor,
        ends: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """Predict (B, c, h, w) from noisy latents.

        Args:
            latents: (B, c, h, w); (B, 2c, h, w) with the latents of degraded images.
            times: (B,) times in [0, 1].
            classes: (B,) int64 class ids.
            ends: (B,) ends of the spans, for a mean flow.
            guidance: (B,) guidance scales, for a mean flow.
        """
        x = self.patch(self.patchify(latents))
        rotary = None
        if self.model.positions == "sincos":
            x = x + sincos_positions(*self.grid, x.shape[-1]).to(x)
        else:
            head_dim = self.model.hidden_size // self.model.num_heads
            angles = rotary_angles(*self.grid, head_dim, 2, self.model.rope_theta)
            rotary = rotary_factors(angles[1:].to(x.device))  # row 0 would be a class prefix
        condition = self.condition(times, classes, ends, guidance)
        for block in self.blocks:
            x = block(x, condition, rotary)
        shift, scale = self.modulation(condition)[:, None].chunk(2, dim=-1)
        return self.unpatchify(self.final(modulate(self.norm(x), shift, scale)))

    def patchify(self, latents: Tensor) -> Tensor:
        """Cut latents (B, c, h, w) into patches (B, tokens, c · p²), in raster order."""
        size, (rows, columns) = self.model.patch_size, self.grid
        x = latents.unflatten(2, (rows, size)).unflatten(4, (columns, size))  # (B, c, rows, p, columns, p)
        return x.permute(0, 2, 4, 1, 3, 5).reshape(len(latents), rows * columns, -1)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Invert `patchify`: (B, tokens, c · p²) → (B, c, h, w)."""
        size, (rows, columns) = self.model.patch_size, self.grid
        x = patches.view(len(patches), rows, columns, self.channels, size, size)
        return x.permute(0, 3, 1, 4, 2, 5).reshape(len(patches), self.channels, rows * size, columns * size)

    def _set_initial_weights(self) -> None:
        for module in (self.patch, self.modulation, self.final, *self.blocks.modules()):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for name, parameter in self.named_parameters():
            if name.endswith("modulation.weight") or name == "final.weight":
                nn.init.zeros_(parameter)


class DiTBlock(GradientCheckpointingLayer):
    def __init__(self, model: DiTModel) -> None:
        super().__init__()
        width, inner = model.hidden_size, model.intermediate_size
        self.attention_norm, self.feed_forward_norm = norm_layer(model), norm_layer(model)
        self.attention = SelfAttention(model)
        self.feed_forward = (
            SwiGLU(width, inner)
            if model.feed_forward == "swiglu"
            else nn.Sequential(nn.Linear(width, inner), GELU(), nn.Linear(inner, width))
        )
        self.modulation = nn.Linear(width, 6 * width)

    def forward(self, x: Tensor, condition: Tensor, rotary: RotaryFactors | None) -> Tensor:
        """Transform x (B, tokens, hidden), given the condition (B, hidden)."""
        shift, scale, gate, shift_after, scale_after, gate_after = self.modulation(condition)[:, None].chunk(6, dim=-1)
        x = torch.addcmul(x, gate, self.attention(modulate(self.attention_norm(x), shift, scale), rotary))
        return torch.addcmul(
            x, gate_after, self.feed_forward(modulate(self.feed_forward_norm(x), shift_after, scale_after))
        )


class SelfAttention(nn.Module):
    """Self-attention between all tokens."""

    def __init__(self, model: DiTModel) -> None:
        super().__init__()
        width = model.hidden_size
        self.head_dim = width // model.num_heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.query_norm, self.key_norm = (
            RMSNorm(self.head_dim, eps=EPS) if model.qk_norm else nn.Identity() for _ in range(2)
        )

    def forward(self, x: Tensor, rotary: RotaryFactors | None) -> Tensor:
        # (B, heads, tokens, head_dim) each
        query, key, value = self.qkv(x).unflatten(-1, (3, -1, self.head_dim)).permute(2, 0, 3, 1, 4)
        query, key = self.query_norm(query), self.key_norm(key)
        if rotary is not None:
            query, key = rotate(query, *rotary), rotate(key, *rotary)
        use_plain = prefers_plain_attention(x.shape[1], x.device) or has_forward_tangent(x)
        attend = plain_attention if use_plain else F.scaled_dot_product_attention
        return self.out(attend(query, key, value).transpose(1, 2).flatten(2))


def norm_layer(model: DiTModel) -> nn.Module:
    if model.norm == "rms":
        return RMSNorm(model.hidden_size, eps=EPS)
    return nn.LayerNorm(model.hidden_size, eps=EPS, elementwise_affine=False)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return torch.addcmul(shift, x, 1 + scale)


def sincos_positions(rows: int, columns: int, width: int) -> Tensor:
    """Compute position embeddings (rows · columns, width): sines and cosines of the row, then of the column."""
    frequencies = 10_000.0 ** -(torch.arange(width // 4) / (width // 4))
    row_angles, column_angles = (torch.arange(count)[:, None] * frequencies for count in (rows, columns))
    grid_angles = [row_angles.repeat_interleave(columns, 0), column_angles.repeat(rows, 1)]
    return torch.cat([wave for angles in grid_angles for wave in (angles.sin(), angles.cos())], dim=1)
