r"""VQGAN: a convolutional autoencoder with a discrete bottleneck.

    z = E(x),   ẑ = e_k(z),   x̂ = G(ẑ)

Esser, Rombach, Ommer 2021, arXiv 2012.09841. Trained without a discriminator and with plain vector quantisation it is a
VQ-VAE (van den Oord, Vinyals, Kavukcuoglu 2017, arXiv 1711.00937).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from stage1_tokenizer.autoencoder import Autoencoder, AutoencoderConfig, AutoencoderModel
from stage1_tokenizer.migration import FIRST_QUANTIZER, SHAPE, without_unused
from stage1_tokenizer.quantizers import QUANTIZERS, AnyQuantizerConfig, EMAVectorQuantizerConfig, QuantizerConfig
from stage1_tokenizer.tokenizer import TokenizerOutput
from training_harness.configuration import changed_values, section, to_mapping
from training_harness.errors import ConfigError, UserError
from training_harness.pretrained import stored_config


@dataclass(frozen=True, kw_only=True)
class VQGANModel(AutoencoderModel):
    name: Literal["vqgan"] = "vqgan"
    codebook_size: int = 512
    """Number of codes."""
    quantizer: AnyQuantizerConfig = field(default_factory=EMAVectorQuantizerConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codebook_size < 1:
            raise ConfigError(f"model.codebook_size is {self.codebook_size}; expected at least 1")
        self.quantizer.check(self.codebook_size, self.latent_channels)


@stored_config
class VQGANConfig(AutoencoderConfig):
    model_type: ClassVar[str] = "latentloom-vqgan"
    model_options: ClassVar[Any] = VQGANModel
    first_options: ClassVar[tuple[str, ...]] = ("name", *SHAPE, "codebook_size", "quantizer")

    model: VQGANModel = field(default_factory=VQGANModel)
    id_quantizer: dict[str, Any] | None = None
    """The quantizer's section as a file of the first format had it, where the id was made of it; none: of all its fields."""

    @classmethod
    def present_values(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        found = super().present_values(values)
        stored = found.get("id_quantizer")
        if stored and json.dumps(stored, sort_keys=True) == json.dumps(
            first_section(found["model"].quantizer), sort_keys=True
        ):
            del found["id_quantizer"]
        return found

    def id_fields(self) -> dict[str, Any]:
        quantizer, stored = self.model.quantizer, self.id_quantizer
        if stored is not None:
            used = without_unused(stored, stored.get("name", FIRST_QUANTIZER["name"]))
            if section(AnyQuantizerConfig, used, "id_quantizer") != quantizer:
                stored = None  # the model has been given another one since
        added = changed_values(quantizer, FIRST_QUANTIZER)
        fields = super().id_fields() | {f"model.quantizer.{name}": value for name, value in added.items()}
        fields.pop("id_quantizer", None)
        return fields | {"codebook_size": self.model.codebook_size, "quantizer": stored or first_section(quantizer)}


def first_section(quantizer: QuantizerConfig) -> dict[str, Any]:
    """A quantizer's section as format 1 had it, with the options of all quantizers."""
    own = to_mapping(quantizer)
    return {name: own.get(name, default) for name, default in FIRST_QUANTIZER.items()}


class VQGAN(Autoencoder):
    config_class = VQGANConfig
    config: VQGANConfig
    embedding_tables = ("quantizer.codebook", "quantizer.basis")

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config)
        self.encoder = config.encoder(config.model.latent_channels)
        model = config.model
        self.quantizer = QUANTIZERS[model.quantizer.name](model.quantizer, model.codebook_size, model.latent_channels)
        self.decoder = config.decoder()
        self.post_init()

    def forward(self, pixel_values: Tensor) -> TokenizerOutput:
        quantized = self.quantizer(self._encode(pixel_values))
        return TokenizerOutput(super()._decode(quantized.quantized), quantized.indices, quantized.losses)

    def encode_indices(self, pixel_values: Tensor) -> Tensor:
        return self.quantizer.quantize(self._encode(pixel_values))

    def decode_indices(self, indices: Tensor, known: Tensor | None = None) -> Tensor:
        if known is None:
            return super()._decode(self.quantizer.lookup(self._checked(indices)))
        indices = indices.where(known[:, None] if indices.ndim > known.ndim else known, 0)
        vectors = self.quantizer.lookup(self._checked(indices))
        mean, _ = self._statistics(vectors)
        return super()._decode(torch.where(known[:, None], vectors, mean))

    def indices_to_latents(self, indices: Tensor) -> Tensor:
        return self._normalized(self.quantizer.latents_of(self._checked(indices)))

    @property
    def codebook_size(self) -> int:
        return self.config.model.codebook_size

    @property
    def levels(self) -> int:
        return self.quantizer.depth

    def _checked(self, indices: Tensor) -> Tensor:
        low, high = indices.min(), indices.max()
        if low < 0 or high >= self.codebook_size:
            raise UserError(
                f"codes from {low} to {high} were given; expected 0 to {self.codebook_size - 1}; take codes of this tokenizer"
            )
        return indices

    def _decode(self, raw: Tensor) -> Tensor:
        return super()._decode(self.quantizer.lookup(self.quantizer.quantize(raw)))
