r"""Finite scalar quantization: each channel is bounded and rounded to one of a few values. No codebook is learned.

    f(z) = h tanh(z + s) − o,    h = (L − 1)(1 + ε) / 2,    o = ½ for even L else 0,    s = atanh(o / h)
    q = round(f(z)) ∈ {−⌊L/2⌋, …, ⌈L/2⌉ − 1},    ẑ = q / ⌊L/2⌋ ∈ [−1, 1],    index = Σ_i (q_i + ⌊L_i/2⌋) Π_{j<i} L_j

Mentzer et al. 2023, arXiv 2309.15505, section 3.1. The gradient passes through the rounding unchanged. There is no loss term.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stage1_tokenizer.quantizers.protocol import Quantizer, QuantizerConfig, QuantizerOutput
from training_harness.errors import ConfigError
from training_harness.precision import upcast

EPSILON = 1e-3  # ε: makes the outermost values reachable


@dataclass(frozen=True, kw_only=True)
class FSQConfig(QuantizerConfig):
    name: Literal["fsq"] = "fsq"
    levels: tuple[int, ...]
    """Number of values of each channel, such as 8 5 5 5."""

    def __post_init__(self) -> None:
        if not self.levels or any(level < 2 for level in self.levels):
            raise ConfigError(
                f"model.quantizer.levels is {list(self.levels)}; expected two or more values per channel, such as 8 5 5 5"
            )

    def check(self, codebook_size: int, channels: int) -> None:
        size = math.prod(self.levels)
        if (codebook_size, channels) != (size, len(self.levels)):
            raise ConfigError(
                f"model.codebook_size is {codebook_size} and model.latent_channels is {channels}; expected {size} and "
                f"{len(self.levels)}, the product and the number of model.quantizer.levels {list(self.levels)}"
            )
        super().check(codebook_size, channels)


class FSQ(Quantizer):
    config: FSQConfig
    levels: Tensor
    strides: Tensor

    def __init__(self, config: FSQConfig, codebook_size: int, channels: int) -> None:
        super().__init__(config, codebook_size, channels)
        strides = [math.prod(config.levels[:i]) for i in range(channels)]
        # Persistent, because a model that is built on the meta device loses buffers that are not.
        self.register_buffer("levels", torch.tensor(config.levels))
        self.register_buffer("strides", torch.tensor(strides))

    def forward(self, latents: Tensor) -> QuantizerOutput:
        with torch.autocast(latents.device.type, enabled=False):
            bounded = self._bound(upcast(latents))
            values = bounded + (bounded.round() - bounded).detach()
            quantized = (values / self._half_levels).to(latents.dtype)
        return QuantizerOutput(quantized, self._values_to_indices(values.detach()), {})

    def quantize(self, latents: Tensor) -> Tensor:
        return self._values_to_indices(self._bound(upcast(latents)).round())

    def lookup(self, indices: Tensor) -> Tensor:
        digits = indices.unsqueeze(1) // self._per_channel(self.strides) % self._per_channel(self.levels)
        return (digits - self._half_levels) / self._half_levels

    def indices_to_latents(self, indices: Tensor) -> Tensor:
        half_range, offset = self._half_range_and_offset()
        values = self.lookup(indices) * self._half_levels
        return ((values + offset) / half_range).atanh() - (offset / half_range).atanh()

    def _bound(self, latents: Tensor) -> Tensor:
        """Compute f(z) of the module's header."""
        half_range, offset = self._half_range_and_offset()
        return (latents + (offset / half_range).atanh()).tanh() * half_range - offset

    def _half_range_and_offset(self) -> tuple[Tensor, Tensor]:
        """Return h and o of the module's header for each channel, (c, 1, 1) each."""
        levels = self._per_channel(self.levels)
        return (levels - 1) * (1 + EPSILON) / 2, torch.where(levels % 2 == 0, 0.5, 0.0)

    def _values_to_indices(self, values: Tensor) -> Tensor:
        """Convert integer values (B, c, h, w) to indices (B, h, w)."""
        integers = values.round().nan_to_num().long()  # NaN would become an index out of range
        return ((integers + self._half_levels) * self._per_channel(self.strides)).sum(1)

    @property
    def _half_levels(self) -> Tensor:
        """⌊L/2⌋ for each channel, (c, 1, 1)."""
        return self._per_channel(self.levels) // 2

    @staticmethod
    def _per_channel(values: Tensor) -> Tensor:
        return values.view(-1, 1, 1)
