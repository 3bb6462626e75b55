"""Building blocks of the encoder and the decoder. They use GroupNorm, because BatchNorm's statistics differ by rank under DDP."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from training_harness.matmul_precision import uses_bf16_convolution


def group_norm(channels: int) -> nn.GroupNorm:
    """Create a GroupNorm with at most 32 groups of at least 4 channels each."""
    groups = max(g for g in (1, 2, 4, 8, 16, 32) if channels % g == 0 and (channels // g >= 4 or g == 1))
    return nn.GroupNorm(groups, channels, eps=1e-6)


class ResidualBlock(GradientCheckpointingLayer):
    """x + conv(SiLU(norm(conv(SiLU(norm(x)))))); the last convolution's weights are initialized to 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(channels), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm2, self.conv2 = group_norm(channels), nn.Conv2d(channels, channels, 3, padding=1)
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv1(F.silu(self.norm1(x)))
        return x + self.conv2(F.silu(self.norm2(hidden)))


class AttentionBlock(GradientCheckpointingLayer):
    """x + single-head self-attention over all positions of a feature map; the output weights are initialized to 0."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor) -> Tensor:
        # Contiguous: with a last stride other than 1, torch materializes all h·w × h·w scores.
        qkv = self.qkv(self.norm(x)).flatten(2).mT.unsqueeze(1).contiguous()
        query, key, value = qkv.chunk(3, dim=-1)  # (B, 1, h·w, c)
        attended = F.scaled_dot_product_attention(query, key, value)
        return x + self.out(attended.squeeze(1).mT.reshape(x.shape))


class Downsample(nn.Module):
    """Halve the resolution with a strided convolution."""

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Double the resolution with nearest-neighbour upsampling and a convolution, which avoids checkerboard artefacts.

    Both steps together equal one transposed convolution with sums of neighbouring weights. It needs 16 products per value
    instead of 36, and no enlarged feature map. On CPUs it is up to twice as fast in full float32 precision.
    """

    def __init__(self, channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not uses_bf16_convolution(x.device):
            kernel = (
                F.avg_pool2d(F.pad(self.conv.weight.flip(-2, -1), (1, 1, 1, 1)), 2, stride=1) * 4
            )  # (out, in, 4, 4)
            return F.conv_transpose2d(x, kernel.transpose(0, 1), self.conv.bias, stride=2, padding=1)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
