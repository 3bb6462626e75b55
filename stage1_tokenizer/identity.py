"""No compression at all: the latents are the pixels, normalised by channel, so that stage two works in pixel space."""

from typing import ClassVar

from huggingface_hub.dataclasses import strict
from torch import Tensor

from stage1_tokenizer.tokenizer import Tokenizer, TokenizerConfig, TokenizerOutput
from training_harness.pretrained import WeightlessModel


@strict
class IdentityConfig(TokenizerConfig):
    model_type: ClassVar[str] = "latentloom-identity"

    @property
    def downsampling_factor(self) -> int:
        return 1


class IdentityTokenizer(Tokenizer, WeightlessModel):
    config_class = IdentityConfig
    config: IdentityConfig

    def forward(self, pixel_values: Tensor) -> TokenizerOutput:
        return TokenizerOutput(pixel_values, None, {})

    @property
    def latent_channels(self) -> int:
        return self.config.image_channels

    def _encode(self, pixel_values: Tensor) -> Tensor:
        return pixel_values

    def _decode(self, raw: Tensor) -> Tensor:
        return raw
