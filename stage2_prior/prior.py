"""What every prior offers to the pipeline: samples for a tokenizer's codes, and words about itself."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from stage1_tokenizer.latent_spec import LatentSpec
from training_harness.errors import SpecMismatchError
from training_harness.pretrained import StrictConfig, StrictModel


class PriorLoss(NamedTuple):
    total: Tensor  # scalar float32: what is minimised
    terms: dict[str, Tensor]  # its parts by name, scalars


def randn_per_image(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    """(B, *shape) float32 ~ N(0, I) on the CPU, each image's from its own generator."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device).cpu() for g in generators])


def rand_per_image(count: int, generators: Sequence[torch.Generator]) -> Tensor:
    """(B, count) float32 in [0, 1) on the CPU, each image's from its own generator."""
    return torch.stack([torch.rand(count, generator=g, device=g.device).cpu() for g in generators])


UNKNOWN = -1  # stands in a grid of codes where there is none yet


class KnownCodes(NamedTuple):
    """What is given of images before they are drawn."""

    codes: Tensor  # (B, h, w) or (B, levels, h, w) int64; of a prior of latents (B, c, h, w)
    known_mask: Tensor  # (B, h, w) bool: places that stay as they are
    strength: float = 1.0
    """Of a prior of latents: how much noise is laid on `codes` at the other places; at 1 they are not used."""

    @classmethod
    def for_restoration(cls, latents: Tensor) -> Self:
        """Pictures (B, c, h, w) of which nothing stays as it is: those that a prior restores."""
        return cls(latents, latents.new_zeros((len(latents), *latents.shape[2:]), dtype=torch.bool))


class Prior(StrictModel):
    config_class: type[StrictConfig]
    options_class: ClassVar[type[Any]]
    """Dataclass of the options that `sample` takes."""
    spec_fields: ClassVar[tuple[str, ...]]
    """Fields in which the configuration and the spec of a tokenizer's codes must agree."""
    output_kind: ClassVar[str]
    """What `on_step` is shown: "tokens" or "latents"."""

    @property
    def supports_any_order(self) -> bool:
        """Whether it can be given any part of an image to go on from, not only the beginning."""
        return False

    @property
    def is_restoration(self) -> bool:
        """Whether it makes better pictures of given ones, which are then `known`, and draws none of its own."""
        return False

    def sample(
        self,
        spec: LatentSpec,
        conditioning: Tensor,
        options: Any,
        generators: Sequence[torch.Generator],
        on_step: Callable[[int, Tensor], None] | None = None,
        known: KnownCodes | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Indices (B, h, w) int64, or normalised latents (B, c, h, w), for class ids (B,); one generator an image.

        `on_step(i, codes)` is called after each of `num_steps` steps. Raises SpecMismatchError when `spec` is not that of the
        codes the prior was trained on, UserError when it cannot go on from what is known.

        Args:
            noise: (B, c, h, w) ~ N(0, I) that a prior of latents begins with, in place of the first that the generators give.
        """
        raise NotImplementedError

    def num_steps(self, spec: LatentSpec, options: Any) -> int:
        raise NotImplementedError

    def describe(self, spec: LatentSpec) -> str:
        """What it does, for a model card."""
        raise NotImplementedError

    def check_spec(self, spec: LatentSpec) -> None:
        own = self.config
        wrong = [
            f"{name} {getattr(own, name)} ≠ {getattr(spec, name)}"
            for name in self.spec_fields
            if getattr(own, name) != getattr(spec, name)
        ]
        if wrong:
            raise SpecMismatchError(
                f"the prior was trained on codes of another tokenizer ({'; '.join(wrong)}); expected those it was "
                "trained on; use the tokenizer of its own pipeline, or train a prior on these codes"
            )
