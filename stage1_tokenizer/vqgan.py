r"""VQGAN: a convolutional autoencoder with a discrete bottleneck.

    z = E(x),   ẑ = e_k(z),   x̂ = G(ẑ)

Esser, Rombach, Ommer 2021, arXiv 2012.09841. Trained without a discriminator and with plain vector quantisation it is a
VQ-VAE (van den Oord, Vinyals, Kavukcuoglu 2017, arXiv 1711.00937).
"""

from dataclasses import field
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor

from stage1_tokenizer.autoencoder import Autoencoder, AutoencoderConfig
from stage1_tokenizer.quantizers import QUANTIZERS, QuantizerConfig
from stage1_tokenizer.tokenizer import TokenizerOutput
from training_harness.configuration import from_mapping
from training_harness.errors import UserError


@strict
class VQGANConfig(AutoencoderConfig):
    model_type: ClassVar[str] = "latentloom-vqgan"

    codebook_size: int = 512
    quantizer: dict[str, Any] = field(default_factory=dict)
    """Fields of `QuantizerConfig` that differ from its own."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        self.quantizer_config.check(self.codebook_size, self.latent_channels)

    @property
    def quantizer_config(self) -> QuantizerConfig:
        return from_mapping(QuantizerConfig, self.quantizer, "model.quantizer.")


class VQGAN(Autoencoder):
    config_class = VQGANConfig
    config: VQGANConfig
    embedding_tables = ("quantizer.codebook", "quantizer.basis")

    def __init__(self, config: VQGANConfig) -> None:
        super().__init__(config)
        self.encoder = config.encoder(config.latent_channels)
        quantizer = config.quantizer_config
        self.quantizer = QUANTIZERS[quantizer.name](quantizer, config.codebook_size, config.latent_channels)
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
        return self.config.codebook_size

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
