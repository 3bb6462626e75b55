r"""Finite scalar quantisation: each channel is bounded and rounded to one of a few values; there is no codebook to learn.

    f(z) = h tanh(z + s) − o,    h = (L − 1)(1 + ε) / 2,    o = ½ for even L else 0,    s = atanh(o / h)
    q = round(f(z)) ∈ {−⌊L/2⌋, …, ⌈L/2⌉ − 1},    ẑ = q / ⌊L/2⌋ ∈ [−1, 1],    index = Σ_i (q_i + ⌊L_i/2⌋) Π_{j<i} L_j

Mentzer et al. 2023, arXiv 2309.15505, section 3.1. The gradient passes the rounding unchanged. No loss term of its own.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from stage1_tokenizer.quantizers.protocol import Quantizer, QuantizerConfig, QuantizerOutput
from training_harness.errors import ConfigError
from training_harness.precision import upcast

MARGIN = 1e-3  # ε: the outermost values can be reached


@dataclass(frozen=True, kw_only=True)
class FSQConfig(QuantizerConfig):
    name: Literal["fsq"] = "fsq"
    levels: tuple[int, ...]
    """Values that each channel takes, such as 8 5 5 5."""

    def __post_init__(self) -> None:
        if not self.levels or any(level < 2 for level in self.levels):
            raise ConfigError(
                f"model.quantizer.levels is {list(self.levels)}; expected two or more values a channel, such as 8 5 5 5"
            )

    def check(self, codebook_size: int, channels: int) -> None:
        size = math.prod(self.levels)
        if (codebook_size, channels) != (size, len(self.levels)):
            raise ConfigError(
                f"model.codebook_size is {codebook_size} and model.latent_channels {channels}; expected {size} and "
                f"{len(self.levels)}, which model.quantizer.levels {list(self.levels)} multiply and count to"
            )
        super().check(codebook_size, channels)


class FSQ(Quantizer):
    config: FSQConfig
    levels: Tensor
    strides: Tensor

    def __init__(self, config: FSQConfig, codebook_size: int, channels: int) -> None:
        super().__init__(config, codebook_size, channels)
        strides = [math.prod(config.levels[:i]) for i in range(channels)]
        # persistent: what is not, a model that was built without memory loses
        self.register_buffer("levels", torch.tensor(config.levels))
        self.register_buffer("strides", torch.tensor(strides))

    def forward(self, latents: Tensor) -> QuantizerOutput:
        with torch.autocast(latents.device.type, enabled=False):
            bounded = self._bounded(upcast(latents))
            values = bounded + (bounded.round() - bounded).detach()
            quantized = (values / self._half).to(latents.dtype)
        return QuantizerOutput(quantized, self._index(values.detach()), {})

    def quantize(self, latents: Tensor) -> Tensor:
        return self._index(self._bounded(upcast(latents)).round())

    def lookup(self, indices: Tensor) -> Tensor:
        digits = indices.unsqueeze(1) // self._by_channel(self.strides) % self._by_channel(self.levels)
        return (digits - self._half) / self._half

    def latents_of(self, indices: Tensor) -> Tensor:
        reach, offset = self._reach_and_offset()
        return ((self.lookup(indices) * self._half + offset) / reach).atanh() - (offset / reach).atanh()

    def _bounded(self, latents: Tensor) -> Tensor:
        reach, offset = self._reach_and_offset()
        return (latents + (offset / reach).atanh()).tanh() * reach - offset

    def _reach_and_offset(self) -> tuple[Tensor, Tensor]:
        """h and o of the module's header, by channel."""
        levels = self._by_channel(self.levels)
        return (levels - 1) * (1 + MARGIN) / 2, torch.where(levels % 2 == 0, 0.5, 0.0)

    def _index(self, values: Tensor) -> Tensor:
        """(B, c, h, w) whole numbers → (B, h, w)."""
        whole = values.round().nan_to_num().long()  # what is no number would be no index either
        return ((whole + self._half) * self._by_channel(self.strides)).sum(1)

    @property
    def _half(self) -> Tensor:
        return self._by_channel(self.levels) // 2

    @staticmethod
    def _by_channel(values: Tensor) -> Tensor:
        return values.view(-1, 1, 1)
