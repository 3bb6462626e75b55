r"""The interface of every tokenizer: the calls that stage two and the pipeline use, independent of the networks.

    pixels (B, C, H, W) in [-1, 1]  →  indices (B, h, w) or latents (B, c, h, w)  →  pixels

Normalized latents are (z − μ) / σ, with the mean and standard deviation of each channel over the training set. Both are stored
in the configuration, so users of the latents need no scale factor.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, NoReturn

import torch
from torch import Tensor

from stage1_tokenizer.data.image_processor import ImageProcessor
from stage1_tokenizer.latent_spec import LatentSpec
from stage1_tokenizer.migration import MODEL
from training_harness.configuration import non_default_values
from training_harness.errors import ConfigError, UserError
from training_harness.migration import Migration
from training_harness.pretrained import StrictConfig, StrictModel, strict_config


@dataclass(frozen=True, kw_only=True)
class TokenizerModel:
    """The section `model` of a configuration. Each type of tokenizer has its own dataclass."""

    name: str
    """Type of tokenizer: vqgan (codes), kl (continuous latents of a Gaussian) or identity (the pixels themselves)."""

    @property
    def downsampling_factor(self) -> int:
        raise NotImplementedError

    @property
    def is_trainable(self) -> bool:
        """Whether the tokenizer has weights to train."""
        return True

    @property
    def samples_without_prior(self) -> bool:
        """Whether the run also saves a pipeline that needs no stage two."""
        return False


@strict_config
class TokenizerConfig(StrictConfig):
    migration: ClassVar[Migration] = MODEL

    model: TokenizerModel
    image_channels: int = 3
    image_size: list[int] | tuple[int, ...] = (64, 64)
    """Height and width of the network's input, multiples of f."""
    content_size: list[int] | tuple[int, ...] | None = None
    """Height and width of the images before padding to `image_size`. None means that they are not padded."""
    latent_mean: list[float] | None = None
    """Mean of each channel of the raw latents over the training set."""
    latent_std: list[float] | None = None
    """Standard deviation of each channel of the raw latents over the training set."""
    tokenizer_id: str | None = None
    """Result of `Tokenizer.compute_id` when the model was saved."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if any(size % self.downsampling_factor for size in self.image_size):
            height, width = self.image_size
            raise ConfigError(
                f"image_size is {height}×{width}; expected multiples of the downsampling factor {self.downsampling_factor}. "
                "Pad or resize the images"
            )

    @property
    def downsampling_factor(self) -> int:
        return self.model.downsampling_factor

    def id_fields(self) -> dict[str, Any]:
        """Return the configuration values that enter the tokenizer id, under the names of format 1.

        A field that was added later enters only when its value is not the default. So existing ids do not change.
        """
        format_1_fields = ("image_channels", "image_size", "content_size", "latent_mean", "latent_std")
        library_fields = StrictConfig.__dataclass_fields__
        return {name: getattr(self, name) for name in format_1_fields} | non_default_values(
            self, {*format_1_fields, *library_fields, "tokenizer_id", "model"}
        )

    @property
    def image_processor(self) -> ImageProcessor:
        height, width = self.image_size
        content_height, content_width = self.content_size or self.image_size
        return ImageProcessor(
            channels=self.image_channels, content_size=(content_height, content_width), image_size=(height, width)
        )


class TokenizerOutput(NamedTuple):
    reconstruction: Tensor  # (B, C, H, W)
    indices: Tensor | None  # (B, h, w) int64 in [0, K); (B, levels, h, w) for residual codes; None without a codebook
    losses: dict[str, Tensor]  # unweighted float32 scalars; the keys are fields of `ReconstructionConfig`


class Tokenizer(StrictModel):
    """Base class of all tokenizers.

    Subclasses implement `_encode` and `_decode`. Tokenizers with a codebook also implement the three `indices` methods.
    """

    config: TokenizerConfig
    config_class: type[TokenizerConfig]

    def forward(self, pixel_values: Tensor) -> TokenizerOutput:
        """Encode and decode images, and compute the losses of the bottleneck.

        In training mode the codebook may be updated from the batch, and Gaussian latents are sampled.

        Args:     pixel_values (B, C, H, W) float in [-1, 1].
        """
        raise NotImplementedError

    def encode_indices(self, pixel_values: Tensor) -> Tensor:
        """Encode images as the indices of the nearest codebook entries.

        Args:     pixel_values (B, C, H, W) float in [-1, 1]; H and W multiples of f.
        Returns:  (B, h, w) int64 in [0, K); (B, levels, h, w) for residual codes.
        Raises:   UserError when H or W is not a multiple of f, or when the tokenizer has no codebook.
        """
        self._raise_no_codebook()

    def decode_indices(self, indices: Tensor, known: Tensor | None = None) -> Tensor:
        """Decode indices to images.

        Args:
            indices: (B, h, w) int64 in [0, K); (B, levels, h, w) for residual codes.
            known: (B, h, w) bool. Where it is False, the mean latent replaces the code. By default it is True everywhere.
        Returns:  (B, C, H, W) float, approximately in [-1, 1].
        """
        self._raise_no_codebook()

    def indices_to_latents(self, indices: Tensor) -> Tensor:
        """Look up the vectors of indices (B, h, w) and normalize them as `encode_latents` does, to (B, c, h, w)."""
        self._raise_no_codebook()

    def encode_latents(self, pixel_values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode images as normalized latents.

        Args:
            pixel_values: (B, C, H, W) float in [-1, 1].
            generator: samples Gaussian latents. Without it their mean is returned. Other tokenizers ignore it.
        Returns:  (B, c, h, w), with zero mean and unit variance per channel over the training set.
        """
        return self._normalize(self._encode(pixel_values))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Decode normalized latents (B, c, h, w) to images (B, C, H, W); with a codebook, decode their nearest codes."""
        mean, std = self._latent_statistics(latents)
        return self._decode(latents * std + mean)

    def latent_moments(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the elementwise mean of z and of z² of the raw latents of images (B, C, H, W), both (B, c, h, w)."""
        raw = self._encode(pixel_values)
        return raw, raw.square()

    @property
    def latent_channels(self) -> int:
        raise NotImplementedError

    @property
    def codebook_size(self) -> int | None:
        """K, or None without a codebook."""
        return None

    @property
    def levels(self) -> int:
        """Number of codes at each position."""
        return 1

    def latent_spec(self, height: int | None = None, width: int | None = None) -> LatentSpec:
        """Return the shape of the codes for images of `height` × `width` pixels, by default the training size."""
        config, factor = self.config, self.config.downsampling_factor
        height, width = height or config.image_size[0], width or config.image_size[1]
        return LatentSpec(
            channels=self.latent_channels,
            height=height // factor,
            width=width // factor,
            codebook_size=self.codebook_size,
            levels=self.levels,
            image_channels=config.image_channels,
            image_height=height,
            image_width=width,
            downsampling_factor=factor,
            tokenizer_id=config.tokenizer_id or self.compute_id(),
        )

    def compute_id(self) -> str:
        """Compute a hash of the float32 weights and the model's fields, as 16 hexadecimal digits."""
        digest = hashlib.sha256(json.dumps(self.config.id_fields(), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _encode(self, pixel_values: Tensor) -> Tensor:
        """Encode images (B, C, H, W) as raw latents (B, c, h, w)."""
        raise NotImplementedError

    def _decode(self, raw: Tensor) -> Tensor:
        """Decode raw latents (B, c, h, w) to images (B, C, H, W)."""
        raise NotImplementedError

    def _check_size(self, pixel_values: Tensor) -> None:
        factor = self.config.downsampling_factor
        height, width = pixel_values.shape[-2:]
        if height % factor or width % factor:
            smaller = [n // factor * factor for n in (height, width)]
            larger = [-(-n // factor) * factor for n in (height, width)]
            raise UserError(
                f"the image is {height}×{width}; expected multiples of {factor}, such as {smaller[0]}×{smaller[1]} or "
                f"{larger[0]}×{larger[1]}"
            )

    def _raise_no_codebook(self) -> NoReturn:
        raise UserError(
            f"{type(self).__name__} has no codebook, so it encodes images as latents and not as indices; expected a tokenizer "
            "with a codebook. Train one with --recipe vqgan-f4"
        )

    def _latent_statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and standard deviation of each channel, (c, 1, 1) each, with the dtype and device of `like`."""
        if self.config.latent_mean is None or self.config.latent_std is None:
            raise UserError("the tokenizer has no latent statistics; train it with `latentloom train-tokenizer`")
        mean, std = (like.new_tensor(v).view(-1, 1, 1) for v in (self.config.latent_mean, self.config.latent_std))
        return mean, std

    def _normalize(self, raw: Tensor) -> Tensor:
        mean, std = self._latent_statistics(raw)
        return (raw - mean) / std
