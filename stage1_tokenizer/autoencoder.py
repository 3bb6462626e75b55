"""Base classes of the convolutional autoencoders, independent of their bottleneck.

`channels`, `blocks` and `attention` configure encoder and decoder level by level, from full resolution to the latents.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from stage1_tokenizer.migration import SHAPE_OPTIONS
from stage1_tokenizer.networks.decoder import Decoder
from stage1_tokenizer.networks.encoder import Encoder
from stage1_tokenizer.networks.tiling import apply_tiled
from stage1_tokenizer.tokenizer import Tokenizer, TokenizerConfig, TokenizerModel
from training_harness.configuration import non_default_values
from training_harness.errors import ConfigError
from training_harness.pretrained import strict_config


@dataclass(frozen=True, kw_only=True)
class AutoencoderModel(TokenizerModel):
    """Widths and depths per level, from full resolution to the code grid; f = 2^(levels − 1)."""

    channels: tuple[int, ...] = (32, 64, 128)
    """Channels at each level, from full resolution to the code grid."""
    blocks: tuple[int, ...] = (0, 1, 2)
    """Number of residual blocks at each level, in the encoder and in the decoder."""
    attention: tuple[int, ...] = ()
    """Downsampling factors with self-attention after the residual blocks: at factor 16 a 256×256 image is 16×16."""
    latent_channels: int = 16
    """Number of channels of the latents."""

    def __post_init__(self) -> None:
        channels, blocks = self.channels, self.blocks
        if len(channels) != len(blocks) or not channels:
            raise ConfigError(
                f"model.channels has {len(channels)} entries and model.blocks has {len(blocks)}; expected one entry per level "
                "in both"
            )
        if min(channels) < 1 or min(blocks) < 0:
            raise ConfigError(
                f"model.channels is {list(channels)} and model.blocks is {list(blocks)}; expected at least 1 channel and "
                "0 or more blocks at each level"
            )
        factors = [2**level for level in range(len(channels))]
        if invalid := [factor for factor in self.attention if isinstance(factor, bool) or factor not in factors]:
            raise ConfigError(
                f"model.attention contains {invalid[0]}, and a model of {len(channels)} levels has no such downsampling "
                f"factor; expected factors out of {', '.join(map(str, factors))}"
            )
        if self.latent_channels < 1:
            raise ConfigError(f"model.latent_channels is {self.latent_channels}; expected at least 1")

    @property
    def downsampling_factor(self) -> int:
        return 2 ** (len(self.channels) - 1)


@strict_config
class AutoencoderConfig(TokenizerConfig):
    format_1_options: ClassVar[tuple[str, ...]] = ("name", *SHAPE_OPTIONS)
    """Model options of format 1. Their names never change."""

    model: AutoencoderModel

    def id_fields(self) -> dict[str, Any]:
        shape = {name: getattr(self.model, name) for name in SHAPE_OPTIONS}
        newer = non_default_values(self.model, self.format_1_options)
        return super().id_fields() | shape | {f"model.{name}": value for name, value in newer.items()}

    def build_encoder(self, output_channels: int) -> Encoder:
        return Encoder(self.image_channels, *self._level_options, output_channels)

    def build_decoder(self) -> Decoder:
        return Decoder(self.image_channels, *self._level_options, self.model.latent_channels)

    @property
    def _level_options(self) -> tuple[list[int], list[int], list[int]]:
        return list(self.model.channels), list(self.model.blocks), list(self.model.attention)


class Autoencoder(Tokenizer):
    config: AutoencoderConfig
    end_layers = ("encoder.0", "decoder.0")  # input layers: the optimizer does not treat them as hidden matrices
    tile_size: int | None = None  # set by `enable_tiling`, in pixels; not saved

    encoder: Encoder
    decoder: Decoder

    @property
    def latent_channels(self) -> int:
        return self.config.model.latent_channels

    def enable_tiling(self, tile_size: int = 512) -> None:
        """Encode and decode images of more than `tile_size`² pixels tile by tile.

        The result equals encoding and decoding the whole image, up to float rounding. In training mode images are never tiled.

        Args:     tile_size: side of a tile in pixels, a multiple of f. A larger tile needs more memory and less time.
        Raises:   ConfigError when `tile_size` is not a multiple of f. Later calls raise UserError when an image has to be
                  tiled while gradients are enabled.
        """
        factor = self.config.downsampling_factor
        if not isinstance(tile_size, int) or tile_size < 1 or tile_size % factor:
            raise ConfigError(
                f"tile_size is {tile_size!r}; expected a positive multiple of the downsampling factor {factor}, such as "
                f"{-(-512 // factor) * factor}"
            )
        self.tile_size = tile_size

    def disable_tiling(self) -> None:
        """Encode and decode every image as a whole."""
        self.tile_size = None

    def _encode(self, pixel_values: Tensor) -> Tensor:
        self._check_size(pixel_values)
        if self.tile_size is None or self.training:
            return self.encoder(pixel_values)
        return apply_tiled(self.encoder, pixel_values, self.tile_size)

    def _decode(self, raw: Tensor) -> Tensor:
        if self.tile_size is None or self.training:
            return self.decoder(raw)
        return apply_tiled(self.decoder, raw, self.tile_size // self.config.downsampling_factor)
