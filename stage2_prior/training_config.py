"""Configuration of a stage-two run. Codebook size, grid and classes come from the code cache and are no options."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from stage1_tokenizer.data.degradation import Degradation
from stage1_tokenizer.latent_spec import LatentSpec
from stage2_prior.autoregressive.config import AutoregressiveModel, AutoregressivePriorConfig
from stage2_prior.autoregressive.model import AutoregressivePrior
from stage2_prior.autoregressive.orders import OrderConfig
from stage2_prior.autoregressive.sampling import SamplingOptions
from stage2_prior.checks import check_share
from stage2_prior.diffusion.config import DiffusionModel, DiffusionPriorConfig, DiTModel
from stage2_prior.diffusion.model import DiffusionPrior
from stage2_prior.diffusion.sampling import DiffusionOptions
from stage2_prior.diffusion.times import TimesConfig
from stage2_prior.migration import TRAINING
from training_harness.configuration import from_mapping
from training_harness.ema import EMAConfig
from training_harness.errors import ConfigError
from training_harness.migration import Migration
from training_harness.optimization import OptimizerConfig, ScheduleConfig
from training_harness.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class StageTwoTraining(RunConfig):
    migration: ClassVar[Migration] = TRAINING

    codes: Path
    """Code cache written by `latentloom tokenize`."""
    validation_images: int = 1000
    """Number of validation images for each validation loss."""
    class_dropout: float = 0.1
    """Probability, in [0, 1], of replacing a label by the null class in training; guidance needs a value above 0."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "codes", self.codes.expanduser())
        if self.validation_images < 1:
            raise ConfigError(f"--validation-images is {self.validation_images}; expected a number of at least 1")
        check_share(self.class_dropout, "class_dropout")


@dataclass(frozen=True, kw_only=True)
class AutoregressiveTraining(StageTwoTraining):
    prior: Literal["autoregressive"] = "autoregressive"
    """Kind of prior; the recipe decides it."""
    model: AutoregressiveModel = field(default_factory=AutoregressiveModel)
    order: OrderConfig = field(default_factory=OrderConfig)
    """Orders in which codes are predicted during training."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """Default sampling options of the pipeline."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order.uses_random_orders and not self.model.learned_positions:
            raise ConfigError(
                "order.random or order.final is above 0 and model.learned_positions is false, so the prior would not know which "
                "position it predicts; expected learned positions. Pass `--model.learned-positions`."
            )

    def new_prior(self, spec: LatentSpec, num_classes: int) -> AutoregressivePrior:
        """Create an untrained prior for the codes of a tokenizer; raises ConfigError when the options do not fit them."""
        return AutoregressivePrior(self.prior_config(spec, num_classes))

    def prior_config(self, spec: LatentSpec, num_classes: int) -> AutoregressivePriorConfig:
        """Create the prior's configuration for the codes of a tokenizer; raises ConfigError when the options do not fit them."""
        return AutoregressivePriorConfig(
            model=self.model,
            codebook_size=spec.codebook_size or 0,
            levels=spec.levels,
            height=spec.height,
            width=spec.width,
            num_classes=num_classes,
            random_order=self.order.final,
            tokenizer_id=spec.tokenizer_id,
        )


@dataclass(frozen=True, kw_only=True)
class DiffusionTraining(StageTwoTraining):
    prior: Literal["diffusion"] = "diffusion"
    """Kind of prior; the recipe decides it."""
    model: DiffusionModel = field(default_factory=DiTModel)
    degradation: Degradation = "none"
    """What the prior learns to undo, such as noise or a lower resolution; with `none` it generates new images."""
    times: TimesConfig = field(default_factory=TimesConfig)
    """Distribution of the training times, and their loss weights."""
    sampling: DiffusionOptions = field(default_factory=DiffusionOptions)
    """Default sampling options of the pipeline."""

    def new_prior(self, spec: LatentSpec, num_classes: int) -> DiffusionPrior:
        """Create an untrained prior for the latents of a tokenizer; raises ConfigError when the options do not fit them."""
        return DiffusionPrior(self.prior_config(spec, num_classes))

    def prior_config(self, spec: LatentSpec, num_classes: int) -> DiffusionPriorConfig:
        """Create the prior's configuration for the latents of a tokenizer; raises ConfigError when the options do not fit."""
        return DiffusionPriorConfig(
            model=self.model,
            channels=spec.channels,
            height=spec.height,
            width=spec.width,
            num_classes=num_classes,
            degradation=self.degradation,
            tokenizer_id=spec.tokenizer_id,
        )


PriorTraining = AutoregressiveTraining | DiffusionTraining
TRAINING_CLASSES: dict[str, type[PriorTraining]] = {
    "autoregressive": AutoregressiveTraining,
    "diffusion": DiffusionTraining,
}


def select_training_class(values: Mapping[str, object]) -> type[PriorTraining]:
    """Return the configuration class for the key `prior` of a mapping; default: `autoregressive`."""
    kind = str(values.get("prior", "autoregressive"))
    if kind not in TRAINING_CLASSES:
        raise ConfigError(f"prior is {kind!r}; expected one of: {', '.join(TRAINING_CLASSES)}")
    return TRAINING_CLASSES[kind]


def parse_prior_training(values: Mapping[str, object]) -> PriorTraining:
    """Parse the configuration of a stage-two run; raises ConfigError for unknown fields and invalid values."""
    return from_mapping(select_training_class(values), values)
