r"""U-Net: convolutions at falling and then rising resolution, with the time and the class as inputs of every block.

    c = SiLU(time(t) + class(y)),     (scale, shift) = W c + b
    x ← skip(x) + conv(SiLU((1 + scale) norm(conv(SiLU(norm(x)))) + shift))

Each block on the way up takes the output of its counterpart on the way down as additional channels. Ho, Jain, Abbeel 2020, arXiv
2006.11239. Scale and shift: Dhariwal, Nichol 2021, arXiv 2105.05233. It suits small images and pixels. The last layer starts at 0.
"""

from collections.abc import Iterable
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from stage1_tokenizer.networks.blocks import AttentionBlock, Downsample, Upsample, group_norm
from stage2_prior.diffusion.condition import Condition
from stage2_prior.diffusion.config import DiffusionPriorConfig, UNetModel


class UNet(nn.Module):
    def __init__(self, config: DiffusionPriorConfig, model: UNetModel) -> None:
        """Create the network; `model` is `config.model`."""
        super().__init__()
        sizes = [model.hidden_size * multiplier for multiplier in model.channel_multipliers]
        condition_size, deepest = 4 * model.hidden_size, sizes[-1]
        self.condition = Condition(config, condition_size)
        self.stem = nn.Conv2d(config.input_channels, sizes[0], 3, padding=1)

        def make_level(channels: int, skip_channels: int, level: int) -> nn.ModuleList:
            has_attention = 2**level in model.attention
            return nn.ModuleList(
                ConvolutionBlock(channels + skip_channels, channels, condition_size, has_attention)
                for _ in range(model.num_layers)
            )

        levels = range(len(sizes))
        self.down = nn.ModuleList(make_level(sizes[i], 0, i) for i in levels)
        self.up = nn.ModuleList(make_level(sizes[i], sizes[i], i) for i in levels)
        neighbors = list(pairwise(sizes))
        self.downsamples = nn.ModuleList(Downsample(fine, coarse) for fine, coarse in neighbors)
        self.upsamples = nn.ModuleList(Upsample(coarse, fine) for fine, coarse in neighbors)
        self.middle = nn.ModuleList(
            ConvolutionBlock(deepest, deepest, condition_size, has_attention) for has_attention in (True, False)
        )
        self.norm = group_norm(sizes[0])
        self.final = nn.Conv2d(sizes[0], config.channels, 3, padding=1)
        for parameter in self.final.parameters():
            nn.init.zeros_(parameter)

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
            ends: Not used, since a mean flow needs a DiT.
            guidance: Not used, since a mean flow needs a DiT.
        """
        condition = self.condition(times, classes, ends, guidance)
        x, skips = self.stem(latents), list[Tensor]()
        for level, blocks in enumerate(cast("Iterable[nn.ModuleList]", self.down)):
            if level > 0:
                x = self.downsamples[level - 1](x)
            for block in blocks:
                x = block(x, condition)
                skips.append(x)
        for block in self.middle:
            x = block(x, condition)
        for level, blocks in reversed(list(enumerate(cast("Iterable[nn.ModuleList]", self.up)))):
            for block in blocks:
                x = block(torch.cat([x, skips.pop()], dim=1), condition)
            if level > 0:
                x = self.upsamples[level - 1](x)
        return self.final(F.silu(self.norm(x)))


class ConvolutionBlock(GradientCheckpointingLayer):
    """Two convolutions with a residual connection, and optional attention; the second convolution starts at 0."""

    def __init__(self, channels: int, out_channels: int, condition_size: int, has_attention: bool) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(channels), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = group_norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(condition_size, 2 * out_channels)
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        self.attention = AttentionBlock(out_channels) if has_attention else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        hidden = torch.addcmul(shift, self.norm2(self.conv1(F.silu(self.norm1(x)))), 1 + scale)
        return self.attention(self.skip(x) + self.conv2(F.silu(hidden)))
