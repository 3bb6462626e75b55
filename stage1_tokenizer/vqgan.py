r"""VQGAN: a convolutional autoencoder with a discrete bottleneck.

    z = E(x),   ẑ = e_k(z),   x̂ = G(ẑ)

Esser, Rombach, Ommer 2021, arXiv 2012.09841. Without a discriminator and with plain vector quantization the model is a VQ-VAE
(van den Oord, Vinyals, Kavukcuoglu 2017, arXiv 1711.00937).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stage1_tokenizer.autoencoder import Autoencoder, AutoencoderConfig, AutoencoderModel
from stage1_tokenizer.migration import FORMAT_1_QUANTIZER, SHAPE_OPTIONS, drop_unused_options
from stage1_tokenizer.quantizers import QUANTIZERS, AnyQuantizerConfig, EMAVectorQuantizerConfig, QuantizerConfig
from stage1_tokenizer.tokenizer import TokenizerOutput
from training_harness.configuration import build_section, non_default_values, to_mapping
from training_harness.errors import ConfigError, UserError
from training_harness.pretrained import strict_config


@dataclass(frozen=True, kw_only=True)
class VQGANModel(AutoencoderModel):
    name: Literal["vqgan"] = "vqgan"
    codebook_size: int = 512
    """K, number of codes in the codebook."""
    quantizer: AnyQuantizerConfig = field(default_factory=EMAVectorQuantizerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codebook_size < 1:
            raise ConfigError(f"model.codebook_size is {self.codebook_size}; expected at least 1")
        self.quantizer.check(self.codebook_size, self.latent_channels)


@strict_config
class VQGANConfig(AutoencoderConfig):
    model_type: ClassVar[str] = "latentloom-vqgan"
    model_options: ClassVar[Any] = VQGANModel
    format_1_options: ClassVar[tuple[str, ...]] = ("name", *SHAPE_OPTIONS, "codebook_size", "quantizer")

    model: VQGANModel = field(default_factory=VQGANModel)
    id_quantizer: dict[str, Any] | None = None
    """The quantizer's section of a format 1 file, from which the id was computed. None computes it from all fields."""

    @classmethod
    def migrate_values(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        migrated = super().migrate_values(values)
        stored = migrated.get("id_quantizer")
        if stored and json.dumps(stored, sort_keys=True) == json.dumps(
            format_1_section(migrated["model"].quantizer), sort_keys=True
        ):
            del migrated["id_quantizer"]
        return migrated

    def id_fields(self) -> dict[str, Any]:
        quantizer, stored = self.model.quantizer, self.id_quantizer
        if stored is not None:
            used_options = drop_unused_options(stored, stored.get("name", FORMAT_1_QUANTIZER["name"]))
            if build_section(AnyQuantizerConfig, used_options, "id_quantizer") != quantizer:
                stored = None  # the quantizer was changed after loading
        newer = non_default_values(quantizer, FORMAT_1_QUANTIZER)
        fields = super().id_fields() | {f"model.quantizer.{name}": value for name, value in newer.items()}
        fields.pop("id_quantizer", None)
        return fields | {"codebook_size": self.model.codebook_size, "quantizer": stored or format_1_section(quantizer)}


def format_1_section(quantizer: QuantizerConfig) -> dict[str, Any]:
    """Return a quantizer's section in format 1, which has the options of all quantizers."""
    options = to_mapping(quantizer)
    return {name: options.get(name, default) for name, default in FORMAT_1_QUANTIZER.items()}


class VQGAN(Autoencoder):
    config_class = VQGANConfig
    config: VQGANConfig
    embedding_tables = ("quantizer.codebook", "quantizer.basis")

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config)
        self.encoder = config.build_encoder(config.model.latent_channels)
        model = config.model
        self.quantizer = QUANTIZERS[model.quantizer.name](model.quantizer, model.codebook_size, model.latent_channels)
        self.decoder = config.build_decoder()
        self.post_init()

    def forward(self, pixel_values: Tensor) -> TokenizerOutput:
        quantized = self.quantizer(self._encode(pixel_values))
        return TokenizerOutput(super()._decode(quantized.quantized), quantized.indices, quantized.losses)

    def encode_indices(self, pixel_values: Tensor) -> Tensor:
        return self.quantizer.quantize(self._encode(pixel_values))

    def decode_indices(self, indices: Tensor, known: Tensor | None = None) -> Tensor:
        if known is None:
            return super()._decode(self.quantizer.lookup(self._check_indices(indices)))
        indices = indices.where(known[:, None] if indices.ndim > known.ndim else known, 0)
        vectors = self.quantizer.lookup(self._check_indices(indices))
        mean, _ = self._latent_statistics(vectors)
        return super()._decode(torch.where(known[:, None], vectors, mean))

    def indices_to_latents(self, indices: Tensor) -> Tensor:
        return self._normalize(self.quantizer.indices_to_latents(self._check_indices(indices)))

    @property
    def codebook_size(self) -> int:
        return self.config.model.codebook_size

    @property
    def levels(self) -> int:
        return self.quantizer.depth

    def _check_indices(self, indices: Tensor) -> Tensor:
        """Return the indices, or raise UserError when one is not in [0, K)."""
        low, high = indices.min(), indices.max()
        if low < 0 or high >= self.codebook_size:
            raise UserError(
                f"the indices range from {low} to {high}; expected 0 to {self.codebook_size - 1}. Use indices that this "
                "tokenizer encoded"
            )
        return indices

    def _decode(self, raw: Tensor) -> Tensor:
        return super()._decode(self.quantizer.lookup(self.quantizer.quantize(raw)))
