"""What convolutional autoencoders share, whatever lies between encoder and decoder.

`channels`, `blocks` and `attention` give the shape of both, level by level from full resolution to the latents.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from stage1_tokenizer.migration import SHAPE
from stage1_tokenizer.networks.decoder import Decoder
from stage1_tokenizer.networks.encoder import Encoder
from stage1_tokenizer.networks.tiling import apply_tiled
from stage1_tokenizer.tokenizer import Tokenizer, TokenizerConfig, TokenizerModel
from training_harness.configuration import changed_values
from training_harness.errors import ConfigError
from training_harness.pretrained import stored_config


@dataclass(frozen=True, kw_only=True)
class AutoencoderModel(TokenizerModel):
    """Widths and depths by level, from full resolution to the code grid; f = 2^(levels − 1)."""

    channels: tuple[int, ...] = (32, 64, 128)
    """Channels of each level; each level after the first halves the resolution."""
    blocks: tuple[int, ...] = (0, 1, 2)
    """Residual blocks a level, in the encoder and in the decoder."""
    attention: tuple[int, ...] = ()
    """Downsampling factors of the levels whose blocks end in self-attention: 16 is where a 256×256 image is 16×16."""
    latent_channels: int = 16
    """Channels of the latents."""

    def __post_init__(self) -> None:
        channels, blocks = self.channels, self.blocks
        if len(channels) != len(blocks) or not channels:
            raise ConfigError(
                f"model.channels has {len(channels)} entries and model.blocks {len(blocks)}; expected one a level in each"
            )
        if min(channels) < 1 or min(blocks) < 0:
            raise ConfigError(
                f"model.channels is {list(channels)} and model.blocks {list(blocks)}; expected channels of at least 1 and no "
                "negative number of blocks"
            )
        factors = [2**level for level in range(len(channels))]
        if absent := [factor for factor in self.attention if isinstance(factor, bool) or factor not in factors]:
            raise ConfigError(
                f"model.attention names {absent[0]}, a resolution that never occurs with {len(channels)} levels; expected "
                f"factors by which the image is reduced, any of {', '.join(map(str, factors))}"
            )
        if self.latent_channels < 1:
            raise ConfigError(f"model.latent_channels is {self.latent_channels}; expected at least 1")

    @property
    def downsampling_factor(self) -> int:
        return 2 ** (len(self.channels) - 1)


@stored_config
class AutoencoderConfig(TokenizerConfig):
    first_options: ClassVar[tuple[str, ...]] = ("name", *SHAPE)
    """Options of the model that the first format had, by names that never change."""

    model: AutoencoderModel

    def id_fields(self) -> dict[str, Any]:
        shape = {name: getattr(self.model, name) for name in SHAPE}
        added = changed_values(self.model, self.first_options)
        return super().id_fields() | shape | {f"model.{name}": value for name, value in added.items()}

    def encoder(self, encoded_channels: int) -> Encoder:
        return Encoder(self.image_channels, *self._shape, encoded_channels)

    def decoder(self) -> Decoder:
        return Decoder(self.image_channels, *self._shape, self.model.latent_channels)

    @property
    def _shape(self) -> tuple[list[int], list[int], list[int]]:
        return list(self.model.channels), list(self.model.blocks), list(self.model.attention)


class Autoencoder(Tokenizer):
    config: AutoencoderConfig
    end_layers = ("encoder.0", "decoder.0")  # read and written by other rules than hidden matrices
    tile_size: int | None = None  # of `enable_tiling`; not part of what is saved

    encoder: Encoder
    decoder: Decoder

    @property
    def latent_channels(self) -> int:
        return self.config.model.latent_channels

    def enable_tiling(self, tile_size: int = 512) -> None:
        """Encodes and decodes images of more than `tile_size`² pixels tile by tile, with the result of the whole image.

        Args:     tile_size: side of a tile in pixels, a multiple of f. Memory grows with it, and time falls: see `tiling`.
        Raises:   ConfigError when f does not divide it. Later calls raise UserError where an image is tiled while gradients
                  are on; in training mode all images stay whole.
        """
        factor = self.config.downsampling_factor
        if not isinstance(tile_size, int) or tile_size < 1 or tile_size % factor:
            raise ConfigError(
                f"tile_size is {tile_size!r}; expected a positive multiple of the downsampling factor {factor}, such as "
                f"{-(-512 // factor) * factor}"
            )
        self.tile_size = tile_size

    def disable_tiling(self) -> None:
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
