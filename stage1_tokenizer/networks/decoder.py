"""The convolutional decoder: it mirrors the encoder and doubles the resolution between its levels."""

from torch import Tensor, nn

from stage1_tokenizer.networks.blocks import Upsample, group_norm
from stage1_tokenizer.networks.encoder import level_blocks


class Decoder(nn.Sequential):
    """Decode latents (B, c, h, w) to pixels (B, C, h · f, w · f), which are not clamped to [-1, 1]."""

    def __init__(
        self, image_channels: int, channels: list[int], blocks: list[int], attention: list[int], latent_channels: int
    ) -> None:
        layers: list[nn.Module] = [nn.Conv2d(latent_channels, channels[-1], 3, padding=1)]
        for level in reversed(range(len(channels))):
            layers += level_blocks(channels[level], blocks[level], 2**level in attention)
            if level:
                layers.append(Upsample(channels[level], channels[level - 1]))
        layers += [group_norm(channels[0]), nn.SiLU(), nn.Conv2d(channels[0], image_channels, 3, padding=1)]
        super().__init__(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        return super().forward(latents)

    @property
    def last_layer(self) -> nn.Parameter:
        """Weight of the last convolution; the adaptive adversarial weight uses its gradients."""
        return self[-1].weight  # type: ignore[return-value]
