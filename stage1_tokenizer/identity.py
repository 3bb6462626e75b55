"""A tokenizer without compression: the latents are the pixels, normalized per channel, so stage two works on pixels."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from torch import Tensor

from stage1_tokenizer.tokenizer import Tokenizer, TokenizerConfig, TokenizerModel, TokenizerOutput
from training_harness.pretrained import WeightlessModel, strict_config


@dataclass(frozen=True, kw_only=True)
class IdentityModel(TokenizerModel):
    name: Literal["identity"] = "identity"

    @property
    def downsampling_factor(self) -> int:
        return 1

    @property
    def is_trainable(self) -> bool:
        return False


@strict_config
class IdentityConfig(TokenizerConfig):
    model_type: ClassVar[str] = "latentloom-identity"
    model_options: ClassVar[Any] = IdentityModel

    model: IdentityModel = field(default_factory=IdentityModel)


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
