"""The contract of a prior: it samples codes of a tokenizer and describes itself."""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from stage1_tokenizer.latent_spec import LatentSpec
from training_harness.errors import SpecMismatchError
from training_harness.pretrained import StrictConfig, StrictModel


class PriorLoss(NamedTuple):
    total: Tensor  # scalar float32, the loss to minimize
    terms: dict[str, Tensor]  # scalars by name, for the log


def randn_per_image(shape: tuple[int, ...], generators: Sequence[torch.Generator]) -> Tensor:
    """Return (B, *shape) float32 ~ N(0, I) on the CPU, with one generator for each image."""
    return torch.stack([torch.randn(shape, generator=g, device=g.device).cpu() for g in generators])


def rand_per_image(count: int, generators: Sequence[torch.Generator]) -> Tensor:
    """Return (B, count) float32 in [0, 1) on the CPU, with one generator for each image."""
    return torch.stack([torch.rand(count, generator=g, device=g.device).cpu() for g in generators])


UNKNOWN = -1  # marks positions of a code grid without a code


class KnownCodes(NamedTuple):
    """Known codes of images, as input for sampling."""

    codes: Tensor  # (B, h, w) or (B, levels, h, w) int64; (B, c, h, w) for a prior of latents
    known_mask: Tensor  # (B, h, w) bool, true at positions that do not change
    strength: float = 1.0
    """Noise level for latents at the other positions, in (0, 1]. At 1 these latents have no effect."""

    @classmethod
    def for_restoration(cls, latents: Tensor) -> Self:
        """Create the input for a restoration: latents (B, c, h, w) of degraded images, with no position marked as known."""
        return cls(latents, latents.new_zeros((len(latents), *latents.shape[2:]), dtype=torch.bool))


class Prior(StrictModel):
    config_class: type[StrictConfig]
    options_class: ClassVar[type[Any]]
    """Dataclass of the sampling options."""
    spec_fields: ClassVar[tuple[str, ...]]
    """Fields that must be equal in the configuration and in the LatentSpec of the codes."""
    output_kind: ClassVar[str]
    """What the prior samples and passes to `on_step`: "tokens" or "latents"."""

    @property
    def supports_any_order(self) -> bool:
        """Whether the known codes may be at any positions, and not only at the beginning."""
        return False

    @property
    def is_restoration(self) -> bool:
        """Whether the prior restores degraded images, passed as `known`, and generates no new ones."""
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
        """Sample codes or latents for class ids.

        Args:
            spec: Shape and tokenizer of the codes.
            conditioning: (B,) int64 class ids.
            options: Sampling options, an `options_class`.
            generators: One generator for each image.
            on_step: `on_step(i, codes)` is called after each of `num_steps` steps.
            known: Known codes or latents.
            noise: (B, c, h, w) ~ N(0, I), the initial noise of a prior of latents; by default it comes from the generators.

        Returns:
            Code indices (B, h, w) int64, or normalized latents (B, c, h, w).

        Raises:
            SpecMismatchError: `spec` differs from the training codes.
            UserError: The prior does not support the known codes or the noise.
        """
        raise NotImplementedError

    def num_steps(self, spec: LatentSpec, options: Any) -> int:
        """Return the number of steps that `sample` takes."""
        raise NotImplementedError

    def describe(self, spec: LatentSpec) -> str:
        """Describe the prior for a model card, as a sentence without its period."""
        raise NotImplementedError

    def check_spec(self, spec: LatentSpec) -> None:
        """Raise SpecMismatchError, with all differences, when `spec` differs from the training codes."""
        config = self.config
        differences = [
            f"{name} {getattr(config, name)} ≠ {getattr(spec, name)}"
            for name in self.spec_fields
            if getattr(config, name) != getattr(spec, name)
        ]
        if differences:
            raise SpecMismatchError(
                f"the prior was trained on codes of another tokenizer ({'; '.join(differences)}); expected codes of the tokenizer "
                "it was trained with. Use the tokenizer of the prior's pipeline, or train a prior on these codes."
            )
