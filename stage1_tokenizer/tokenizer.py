r"""What every tokenizer offers: the calls that stage two and the pipeline use, and nothing of how its networks look.

    pixels (B, C, H, W) in [-1, 1]  →  indices (B, h, w) or latents (B, c, h, w)  →  pixels

Normalised latents are (z − μ) / σ with mean and standard deviation by channel over the training set, kept in the
configuration: users of the latents need no scale of their own.
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
    """The section `model` of a configuration. Each kind of tokenizer has a dataclass of its own, beside its class."""

    name: str
    """Kind of tokenizer: vqgan (codes), kl (continuous latents of a Gaussian) or identity (the pixels themselves)."""

    @property
    def downsampling_factor(self) -> int:
        raise NotImplementedError

    @property
    def learns(self) -> bool:
        return True

    @property
    def samples_alone(self) -> bool:
        """Whether the run leaves a pipeline that samples without a stage two."""
        return False


@strict_config
class TokenizerConfig(StrictConfig):
    migration: ClassVar[Migration] = MODEL

    model: TokenizerModel
    image_channels: int = 3
    image_size: list[int] | tuple[int, ...] = (64, 64)
    """Height and width that the network sees: multiples of f."""
    content_size: list[int] | tuple[int, ...] | None = None
    """Height and width of the pictures, when they are padded to `image_size`; none: the same."""
    latent_mean: list[float] | None = None
    latent_std: list[float] | None = None
    tokenizer_id: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if any(size % self.downsampling_factor for size in self.image_size):
            height, width = self.image_size
            raise ConfigError(
                f"image_size is {height}×{width}; expected multiples of the downsampling factor {self.downsampling_factor}"
            )

    @property
    def downsampling_factor(self) -> int:
        return self.model.downsampling_factor

    def id_fields(self) -> dict[str, Any]:
        """What the id is made of beside the weights, by the names of the first format: stored ids depend on them.

        A field that was added later enters where its value is not its default, so that the ids of others stay.
        """
        first = ("image_channels", "image_size", "content_size", "latent_mean", "latent_std")
        library = StrictConfig.__dataclass_fields__
        return {name: getattr(self, name) for name in first} | non_default_values(
            self, {*first, *library, "tokenizer_id", "model"}
        )

    @property
    def image_processor(self) -> ImageProcessor:
        height, width = self.image_size
        rows, columns = self.content_size or self.image_size
        return ImageProcessor(channels=self.image_channels, content_size=(rows, columns), image_size=(height, width))


class TokenizerOutput(NamedTuple):
    reconstruction: Tensor  # (B, C, H, W)
    indices: Tensor | None  # (B, h, w) int64 in [0, K), (B, levels, h, w) of residual codes; none without a codebook
    losses: dict[str, Tensor]  # float32 scalars, unweighted, by the names of `ReconstructionConfig`


class Tokenizer(StrictModel):
    """Subclasses say how pixels become raw latents and back; those with a codebook give the three `indices` calls too."""

    config: TokenizerConfig
    config_class: type[TokenizerConfig]

    def forward(self, pixel_values: Tensor) -> TokenizerOutput:
        """pixel_values: (B, C, H, W) in [-1, 1]; in training mode a codebook learns from the batch, and latents are drawn."""
        raise NotImplementedError

    def encode_indices(self, pixel_values: Tensor) -> Tensor:
        """Index of the nearest codebook entry at each latent position.

        Args:     pixel_values (B, C, H, W) float in [-1, 1]; H and W multiples of f.
        Returns:  (B, h, w) int64 in [0, K); (B, levels, h, w) of residual codes.
        Raises:   UserError when f does not divide H or W, or when there is no codebook.
        """
        self._refuse_indices()

    def decode_indices(self, indices: Tensor, known: Tensor | None = None) -> Tensor:
        """(B, h, w) int64 in [0, K) → (B, C, H, W), near [-1, 1].

        Args:
            known: (B, h, w) bool; elsewhere, whatever the index, the mean latent stands. By default all are.
        """
        self._refuse_indices()

    def indices_to_latents(self, indices: Tensor) -> Tensor:
        """(B, h, w) → the codes' vectors (B, c, h, w), normalised as `encode_latents` does."""
        self._refuse_indices()

    def encode_latents(self, pixel_values: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """(B, C, H, W) → (B, c, h, w), zero mean and unit variance by channel over the training set.

        Latents that have a distribution are drawn from it with `generator`, and are its mean without one.
        """
        return self._normalized(self._encode(pixel_values))

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, c, h, w) → raw latents → pixels (B, C, H, W); a codebook takes the nearest codes between."""
        mean, std = self._statistics(latents)
        return self._decode(latents * std + mean)

    def latent_moments(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """First and second moment of the raw latents of (B, C, H, W), elementwise: both (B, c, h, w)."""
        raw = self._encode(pixel_values)
        return raw, raw.square()

    @property
    def latent_channels(self) -> int:
        raise NotImplementedError

    @property
    def codebook_size(self) -> int | None:
        return None

    @property
    def levels(self) -> int:
        return 1

    def latent_spec(self, height: int | None = None, width: int | None = None) -> LatentSpec:
        """The codes' shape for images of `height` × `width`; by default the size that the tokenizer was trained at."""
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
        """A hash of the float32 weights and the model's own fields: 16 hexadecimal digits."""
        digest = hashlib.sha256(json.dumps(self.config.id_fields(), sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    def _encode(self, pixel_values: Tensor) -> Tensor:
        """Raw latents (B, c, h, w) of pixels whose size was checked."""
        raise NotImplementedError

    def _decode(self, raw: Tensor) -> Tensor:
        """Pixels of raw latents (B, c, h, w)."""
        raise NotImplementedError

    def _check_size(self, pixel_values: Tensor) -> None:
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

    def _refuse_indices(self) -> NoReturn:
        raise UserError(
            f"a tokenizer of the kind {type(self).__name__} has no codebook, so its images have latents and no indices; expected "
            "one with a codebook, such as --recipe vqgan-f4 trains"
        )

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.latent_mean is None or self.config.latent_std is None:
            raise UserError("the tokenizer has no latent statistics; train it with `latentloom train-tokenizer`")
        mean, std = (like.new_tensor(v).view(-1, 1, 1) for v in (self.config.latent_mean, self.config.latent_std))
        return mean, std

    def _normalized(self, raw: Tensor) -> Tensor:
        mean, std = self._statistics(raw)
        return (raw - mean) / std
