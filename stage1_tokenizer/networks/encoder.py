"""Pixels to latents: a pyramid of residual blocks, halved in resolution between its levels.

Level 0 works at full resolution, level i at 1 / 2ⁱ of it; the number of levels sets f = 2^(levels − 1). `channels` and
`blocks` are given by level, since the cost of a block falls fourfold from one to the next.
"""

from torch import Tensor, nn

from stage1_tokenizer.networks.blocks import AttentionBlock, Downsample, ResidualBlock, group_norm


def level_blocks(channels: int, blocks: int, attention: bool) -> list[nn.Module]:
    layers: list[nn.Module] = [ResidualBlock(channels) for _ in range(blocks)]
    return [*layers, AttentionBlock(channels)] if attention else layers


class Encoder(nn.Sequential):
    """(B, C, H, W) → (B, c, H / f, W / f)."""

    def __init__(
        self, image_channels: int, channels: list[int], blocks: list[int], attention: list[int], latent_channels: int
    ) -> None:
        layers: list[nn.Module] = [nn.Conv2d(image_channels, channels[0], 3, padding=1)]
        for level, width in enumerate(channels):
            if level:
                layers.append(Downsample(channels[level - 1], width))
            layers += level_blocks(width, blocks[level], 2**level in attention)
        layers += [group_norm(channels[-1]), nn.SiLU(), nn.Conv2d(channels[-1], latent_channels, 1)]
        super().__init__(*layers)

    def forward(self, pixel_values: Tensor) -> Tensor:
        return super().forward(pixel_values)
