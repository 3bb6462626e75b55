"""PatchGAN: a convolutional discriminator of overlapping patches. Isola et al. 2017, arXiv 1611.07004.

GroupNorm replaces BatchNorm: BatchNorm's statistics differ by rank under DDP and are unreliable for small batches.
"""

from torch import Tensor, nn

from stage1_tokenizer.networks.blocks import group_norm


def smallest_image_side(layers: int) -> int:
    """Return the smallest image side in pixels: after `layers` halvings the last two convolutions need 3 positions."""
    return 3 * 2**layers


class PatchDiscriminator(nn.Sequential):
    """Predict which patches of images (B, C, H, W) in [-1, 1] are real.

    Returns:  logits (B, 1, H / 2^layers − 2, W / 2^layers − 2), positive for a real patch.
    """

    def __init__(self, image_channels: int, channels: int = 64, layers: int = 3) -> None:
        widths = [channels * min(2**i, 8) for i in range(layers + 1)]
        modules: list[nn.Module] = [nn.Conv2d(image_channels, widths[0], 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, layers + 1):
            stride = 2 if i < layers else 1
            modules += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=stride, padding=1, bias=False),
                group_norm(widths[i]),
                nn.LeakyReLU(0.2),
            ]
        super().__init__(*modules, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)
