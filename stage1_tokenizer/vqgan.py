r"""VQGAN: a convolutional autoencoder with a discrete bottleneck.

    z = E(x),   ẑ = e_k(z),   x̂ = G(ẑ)

Esser, Rombach, Ommer 2021, arXiv 2012.09841. Normalised latents are (z − μ) / σ with mean and standard deviation by
channel over the training set, kept in the configuration: users of the latents need no scale of their own.
"""

import hashlib
import json
from dataclasses import field
from typing import Any, ClassVar, NamedTuple

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from stage1_tokenizer.decoder import Decoder
from stage1_tokenizer.encoder import Encoder
from stage1_tokenizer.image_processor import ImageProcessor
from stage1_tokenizer.latent_spec import LatentSpec
from stage1_tokenizer.quantizers import QUANTIZERS, QuantizerConfig
from training_harness.configuration import from_mapping
from training_harness.errors import ConfigError, UserError
from training_harness.pretrained import StrictConfig, StrictModel


@strict
class VQGANConfig(StrictConfig):
    """Channels, blocks and attention are given by level, from full resolution to the code grid; f = 2^(levels − 1)."""

    model_type: ClassVar[str] = "latentloom-vqgan"

    image_channels: int = 3
    image_size: list[int] | tuple[int, ...] = (64, 64)
    """Height and width that the network sees: multiples of f."""
    content_size: list[int] | tuple[int, ...] | None = None
    """Height and width of the pictures, when they are padded to `image_size`; none: the same."""
    channels: list[int] | tuple[int, ...] = (32, 64, 128)
    blocks: list[int] | tuple[int, ...] = (0, 1, 2)
    attention: list[bool] | tuple[bool, ...] = (False, False, False)
    latent_channels: int = 16
    codebook_size: int = 512
    quantizer: dict[str, Any] = field(default_factory=dict)
    """Fields of `QuantizerConfig` that differ from its own."""
    latent_mean: list[float] | None = None
    latent_std: list[float] | None = None
    tokenizer_id: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        levels = len(self.channels)
        for name in ("blocks", "attention"):
            if len(getattr(self, name)) != levels:
                raise ConfigError(
                    f"model.{name} has {len(getattr(self, name))} entries and model.channels {levels}; expected one a level"
                )
        self.quantizer_config.check(self.codebook_size, self.latent_channels)
        if any(size % self.downsampling_factor for size in self.image_size):
            height, width = self.image_size
            raise ConfigError(
                f"image_size is {height}×{width}; expected multiples of the downsampling factor {self.downsampling_factor}"
            )

    @property
    def quantizer_config(self) -> QuantizerConfig:
        return from_mapping(QuantizerConfig, self.quantizer, "model.quantizer.")

    @property
    def downsampling_factor(self) -> int:
        return 2 ** (len(self.channels) - 1)

    @property
    def image_processor(self) -> ImageProcessor:
        height, width = self.image_size
        rows, columns = self.content_size or self.image_size
        return ImageProcessor(channels=self.image_channels, content_size=(rows, columns), image_size=(height, width))


class TokenizerOutput(NamedTuple):
    reconstruction: Tensor  # (B, C, H, W)
    indices: Tensor  # (B, h, w) int64 in [0, K); (B, levels, h, w) of residual codes
    losses: dict[
        str, Tensor
    ]  # float32 scalars, unweighted: those of codebook, commitment, entropy that the quantizer has


class VQGAN(StrictModel):
    config_class = VQGANConfig
    config: VQGANConfig

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config)
        shape = (list(config.channels), list(config.blocks), list(config.attention), config.latent_channels)
        self.encoder = Encoder(config.image_channels, *shape)
        quantizer = config.quantizer_config
        self.quantizer = QUANTIZERS[quantizer.name](quantizer, config.codebook_size, config.latent_channels)
        self.decoder = Decoder(config.image_channels, *shape)
        self.post_init()

    end_layers = ("encoder.0", "decoder.0")  # read and written by other rules than hidden matrices
    embedding_tables = ("quantizer.codebook", "quantizer.basis")

    def forward(self, pixel_values: Tensor) -> TokenizerOutput:
        """pixel_values: (B, C, H, W) in [-1, 1]; in training mode the codebook learns from the batch."""
        quantized = self.quantizer(self._encode(pixel_values))
        return TokenizerOutput(self.decoder(quantized.quantized), quantized.indices, quantized.losses)

    def encode_indices(self, pixel_values: Tensor) -> Tensor:
        """Index of the nearest codebook entry at each latent position.

        Args:     pixel_values (B, C, H, W) float in [-1, 1]; H and W multiples of f.
        Returns:  (B, h, w) int64 in [0, K); (B, levels, h, w) of residual codes.
        Raises:   UserError when f does not divide H or W.
        """
        return self.quantizer.quantize(self._encode(pixel_values))

    def decode_indices(self, indices: Tensor) -> Tensor:
        """(B, h, w) int64 in [0, K) → (B, C, H, W), near [-1, 1]."""
        return self.decoder(self.quantizer.lookup(indices))

    def encode_latents(self, pixel_values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, C, H, W) → (B, c, h, w) before quantisation, zero mean and unit variance by channel over the training set.

        `generator` is of use to tokenizers whose latents are drawn; here there is nothing to draw.
        """
        return self._normalized(self._encode(pixel_values))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, c, h, w) → raw latents → the nearest codes → pixels (B, C, H, W)."""
        mean, std = self._statistics(latents)
        return self.decode_indices(self.quantizer.quantize(latents * std + mean))

    def indices_to_latents(self, indices: Tensor) -> Tensor:
        """(B, h, w) → the codes' vectors (B, c, h, w), normalised as `encode_latents` does."""
        return self._normalized(self.quantizer.lookup(indices))

    def latent_spec(self, height: int | None = None, width: int | None = None) -> LatentSpec:
        """The codes' shape for images of `height` × `width`; by default the size that the tokenizer was trained at."""
        config, factor = self.config, self.config.downsampling_factor
        height, width = height or config.image_size[0], width or config.image_size[1]
        return LatentSpec(
            channels=config.latent_channels,
            height=height // factor,
            width=width // factor,
            codebook_size=config.codebook_size,
            levels=self.quantizer.depth,
            image_channels=config.image_channels,
            image_height=height,
            image_width=width,
            downsampling_factor=factor,
            tokenizer_id=config.tokenizer_id or self.compute_id(),
        )

    def compute_id(self) -> str:
        """A hash of the float32 weights and the model's own fields: 16 hexadecimal digits."""
        own = VQGANConfig.__dataclass_fields__.keys() - StrictConfig.__dataclass_fields__.keys() - {"tokenizer_id"}
        fields = {name: value for name, value in self.config.to_dict().items() if name in own}
        digest = hashlib.sha256(json.dumps(fields, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _encode(self, pixel_values: Tensor) -> Tensor:
        factor = self.config.downsampling_factor
        height, width = pixel_values.shape[-2:]
        if height % factor or width % factor:
            down, up = (
                [n // factor * factor for n in (height, width)],
                [-(-n // factor) * factor for n in (height, width)],
            )
            raise UserError(
                f"the image is {height}×{width}; expected multiples of {factor}, such as {down[0]}×{down[1]} or {up[0]}×{up[1]}"
            )
        return self.encoder(pixel_values)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.latent_mean is None or self.config.latent_std is None:
            raise UserError("the tokenizer has no latent statistics; train it with `latentloom train-tokenizer`")
        mean, std = (like.new_tensor(v).view(-1, 1, 1) for v in (self.config.latent_mean, self.config.latent_std))
        return mean, std

    def _normalized(self, raw: Tensor) -> Tensor:
        mean, std = self._statistics(raw)
        return (raw - mean) / std
