"""The shape of a tokenizer's codes. Stage two needs nothing else from stage one."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training_harness.configuration import from_mapping


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """Shape of the codes and the images, stored in the code cache so that stage two reads it from there."""

    channels: int
    """c, number of channels of the continuous latents."""
    height: int
    """h, number of rows of the code grid."""
    width: int
    """w, number of columns of the code grid."""
    codebook_size: int | None
    """K, or none for a tokenizer without a codebook."""
    levels: int
    """Number of codes at each grid position: more than 1 for residual quantization only."""
    image_channels: int
    """C, number of channels of the images."""
    image_height: int
    """H, height of the tokenizer's input in pixels, a multiple of f."""
    image_width: int
    """W, width of the tokenizer's input in pixels, a multiple of f."""
    downsampling_factor: int
    """f = H / h."""
    tokenizer_id: str
    """Hash of the tokenizer's weights and configuration."""

    @property
    def tokens(self) -> int:
        """Number of codes per image."""
        return self.levels * self.height * self.width

    def differences(self, other: "LatentSpec") -> list[str]:
        """List every field that differs, as `field a ≠ b`."""
        return [
            f"{field.name} {getattr(self, field.name)} ≠ {getattr(other, field.name)}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "LatentSpec":
        return from_mapping(cls, values, "spec.")
