r"""U-Net: convolutions at falling and rising resolution, told the time and the class in every block.

    c = SiLU(time(t) + class(y)),     (scale, shift) = W c + b
    x ← skip(x) + conv(SiLU((1 + scale) norm(conv(SiLU(norm(x)))) + shift))

What a block on the way down gives is laid beside the input of its partner on the way up. Ho, Jain, Abbeel 2020, arXiv 2006.11239;
scale and shift: Dhariwal, Nichol 2021, arXiv 2105.05233. For small images and pixels; the last layer starts at 0.
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
        """`model` is the configuration's own."""
        super().__init__()
        sizes = [model.hidden_size * multiplier for multiplier in model.channel_multipliers]
        wide, deepest = 4 * model.hidden_size, sizes[-1]
        self.condition = Condition(config, wide)
        self.stem = nn.Conv2d(config.input_channels, sizes[0], 3, padding=1)

        def stage(channels: int, beside: int, level: int) -> nn.ModuleList:
            attends = 2**level in model.attention
            return nn.ModuleList(
                ConvolutionBlock(channels + beside, channels, wide, attends) for _ in range(model.num_layers)
            )

        levels = range(len(sizes))
        self.down = nn.ModuleList(stage(sizes[i], 0, i) for i in levels)
        self.up = nn.ModuleList(stage(sizes[i], sizes[i], i) for i in levels)
        between = list(pairwise(sizes))
        self.downsamples = nn.ModuleList(Downsample(fine, coarse) for fine, coarse in between)
        self.upsamples = nn.ModuleList(Upsample(coarse, fine) for fine, coarse in between)
        self.middle = nn.ModuleList(ConvolutionBlock(deepest, deepest, wide, attends) for attends in (True, False))
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
        """(B, c, h, w) noisy latents, with those of degraded pictures (B, 2c, h, w), and what `Condition` takes → (B, c, h, w)."""
        condition = self.condition(times, classes, ends, guidance)
        x, seen = self.stem(latents), list[Tensor]()
        for level, blocks in enumerate(cast("Iterable[nn.ModuleList]", self.down)):
            if level > 0:
                x = self.downsamples[level - 1](x)
            for block in blocks:
                x = block(x, condition)
                seen.append(x)
        for block in self.middle:
            x = block(x, condition)
        for level, blocks in reversed(list(enumerate(cast("Iterable[nn.ModuleList]", self.up)))):
            for block in blocks:
                x = block(torch.cat([x, seen.pop()], dim=1), condition)
            if level > 0:
                x = self.upsamples[level - 1](x)
        return self.final(F.silu(self.norm(x)))


class ConvolutionBlock(GradientCheckpointingLayer):
    """Two convolutions, the second starting at 0, and attention where it is asked for."""

    def __init__(self, channels: int, out_channels: int, condition: int, attends: bool) -> None:
        super().__init__()
        self.norm1, self.conv1 = group_norm(channels), nn.Conv2d(channels, out_channels, 3, padding=1)
        self.norm2, self.conv2 = group_norm(out_channels), nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.modulation = nn.Linear(condition, 2 * out_channels)
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        self.attention = AttentionBlock(out_channels) if attends else nn.Identity()
        nn.init.zeros_(self.conv2.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.modulation(condition)[:, :, None, None].chunk(2, dim=1)
        hidden = torch.addcmul(shift, self.norm2(self.conv1(F.silu(self.norm1(x)))), 1 + scale)
        return self.attention(self.skip(x) + self.conv2(F.silu(hidden)))
