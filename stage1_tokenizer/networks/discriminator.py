"""PatchGAN: a convolutional classifier of overlapping patches. Isola et al. 2017, arXiv 1611.07004.

GroupNorm in place of its BatchNorm, whose statistics differ by rank under DDP and mislead at small batches.
"""

from torch import Tensor, nn

from stage1_tokenizer.networks.blocks import group_norm


def smallest_image_side(layers: int) -> int:
    """Pixels a side that are left at 3 by `layers` halvings, as its last two convolutions need."""
    return 3 * 2**layers


class PatchDiscriminator(nn.Sequential):
    """(B, C, H, W) in [-1, 1] → logits (B, 1, H / 2^layers − 2, W / 2^layers − 2), positive where a patch looks real."""

    def __init__(self, image_channels: int, channels: int = 64, layers: int = 3) -> None:
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        stack: list[nn.Module] = [nn.Conv2d(image_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            stack += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
                group_norm(widths[i]),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*stack, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)
