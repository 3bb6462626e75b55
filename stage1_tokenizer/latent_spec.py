"""The shape of a tokenizer's codes: all that stage two needs to know of stage one."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training_harness.configuration import from_mapping


@dataclass(frozen=True, kw_only=True)
class LatentSpec:
    """Carried by the code cache, so that no shape is copied by hand between the stages."""

    channels: int
    """c, channels of the continuous latents."""
    height: int
    """h, rows of the code grid."""
    width: int
    """w, columns of the code grid."""
    codebook_size: int | None
    """K, or none for a tokenizer without a codebook."""
    levels: int
    """Codes a grid position; 1 but for residual quantisation."""
    image_channels: int
    image_height: int
    """H, as the tokenizer sees it: a multiple of f."""
    image_width: int
    downsampling_factor: int
    """f = H / h."""
    tokenizer_id: str

    @property
    def tokens(self) -> int:
        """Codes an image."""
        return self.levels * self.height * self.width

    def differences(self, other: "LatentSpec") -> list[str]:
        """`field a ≠ b` for every field in which the two differ."""
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
