"""The convolutional encoder: levels of residual blocks, with half the resolution from one level to the next.

Level 0 has the full resolution and level i has 1 / 2ⁱ of it, so f = 2^(levels − 1). `channels` and `blocks` have one entry per
level, because a block of the same width costs a quarter as much at the next level.
"""

from torch import Tensor, nn

from stage1_tokenizer.networks.blocks import AttentionBlock, Downsample, ResidualBlock, group_norm


def level_blocks(channels: int, blocks: int, attention: bool) -> list[nn.Module]:
    """Create the residual blocks of a level, and its attention block if it has one."""
    layers: list[nn.Module] = [ResidualBlock(channels) for _ in range(blocks)]
    return [*layers, AttentionBlock(channels)] if attention else layers


class Encoder(nn.Sequential):
    """Encode pixels (B, C, H, W) as latents (B, c, H / f, W / f)."""

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
