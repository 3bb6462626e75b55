"""Configuration of a stage-two run. What the codes determine (K, grid, classes) is taken from them and not asked for."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from stage1_tokenizer.data.degradation import Degradation
from stage1_tokenizer.latent_spec import LatentSpec
from stage2_prior.autoregressive.config import AutoregressivePriorConfig
from stage2_prior.autoregressive.model import AutoregressivePrior
from stage2_prior.autoregressive.orders import OrderConfig
from stage2_prior.autoregressive.sampling import SamplingOptions
from stage2_prior.diffusion.config import DiffusionPriorConfig
from stage2_prior.diffusion.model import DiffusionPrior
from stage2_prior.diffusion.process import Prediction
from stage2_prior.diffusion.sampling import DiffusionOptions
from stage2_prior.diffusion.schedule import Schedule
from stage2_prior.diffusion.times import TimesConfig
from training_harness.configuration import from_mapping
from training_harness.ema import EMAConfig
from training_harness.errors import ConfigError
from training_harness.optimization import OptimizerConfig, ScheduleConfig
from training_harness.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class AutoregressiveModel:
    hidden_size: int = 192
    num_layers: int = 4
    depth_layers: int = 2
    """Layers that predict the levels of residual codes, place by place; other codes have none."""
    num_heads: int = 4
    num_key_value_heads: int | None = None
    """Fewer than the heads for grouped-query attention, which keeps a smaller cache; by default as many."""
    intermediate_size: int = 512
    """Width of SwiGLU; about 8 / 3 of the hidden size."""
    dropout: float = 0.0
    class_dropout: float = 0.1
    """How often a label is replaced by the null class in training; guidance needs it above 0."""
    qk_norm: bool = True
    tie_embeddings: bool = False
    """Whether the head shares the code embedding's weights."""
    positions: Literal["none", "1d", "2d"] = "2d"
    """Rotary positions along the sequence, or along rows and columns."""
    learned_positions: bool = False
    """Adds a learnt vector of the place to be predicted, beside rotary positions, which makes early training quicker, or in
    their stead."""
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        check_class_dropout(self.class_dropout)

    def for_spec(self, spec: LatentSpec, num_classes: int, random_order: float = 0.0) -> AutoregressivePriorConfig:
        own = dataclasses.asdict(self)
        del own["class_dropout"]  # of training alone
        return AutoregressivePriorConfig(
            **own,
            codebook_size=spec.codebook_size or 0,
            levels=spec.levels,
            height=spec.height,
            width=spec.width,
            num_classes=num_classes,
            random_order=random_order,
            tokenizer_id=spec.tokenizer_id,
        )


@dataclass(frozen=True, kw_only=True)
class DiffusionModel:
    denoiser: Literal["dit", "unet"] = "dit"
    """A transformer over patches, or a U-Net of convolutions, for small images and pixels."""
    patch_size: int = 1
    """Sides of the square of latents that is a token."""
    hidden_size: int = 384
    num_layers: int = 12
    num_heads: int = 6
    intermediate_size: int = 1536
    feed_forward: Literal["gelu", "swiglu"] = "gelu"
    norm: Literal["layer", "rms"] = "layer"
    qk_norm: bool = False
    positions: Literal["sincos", "2d"] = "sincos"
    """Sines and cosines added to the tokens, or rotary positions along rows and columns."""
    rope_theta: float = 10_000.0
    class_dropout: float = 0.1
    """How often a label is replaced by the null class in training; guidance needs it above 0."""
    channel_multipliers: tuple[int, ...] = ()
    """Of a U-Net: channels at each resolution, in multiples of hidden_size; its num_layers are blocks a resolution."""
    attention: tuple[int, ...] = ()
    """Of a U-Net: downsampling factors at which its blocks attend; the middle always does."""
    schedule: Schedule = "flow"
    """How the noise grows: `flow` along straight lines; linear, scaled-linear and cosine as in DDPM, in 1,000 levels."""
    prediction: Prediction = "flow"
    """What the network says of a noisy latent: its velocity, v, the noise, or the sample."""
    zero_terminal_snr: bool = False
    """Lets linear, scaled-linear and cosine end with noise alone."""
    mean_flow: bool = False
    """Whether the network tells the mean velocity between two times, for sampling in a few steps."""
    max_guidance: float = 4.0
    """Of a mean flow: up to which guidance scale it learns."""

    def __post_init__(self) -> None:
        check_class_dropout(self.class_dropout)

    def for_spec(self, spec: LatentSpec, num_classes: int, degradation: Degradation = "none") -> DiffusionPriorConfig:
        own = dataclasses.asdict(self)
        del own["class_dropout"]  # of training alone
        sizes = {name: getattr(spec, name) for name in ("channels", "height", "width", "tokenizer_id")}
        return DiffusionPriorConfig(**own, **sizes, num_classes=num_classes, degradation=degradation)


def check_class_dropout(rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ConfigError(f"model.class_dropout is {rate}; expected a share in [0, 1], such as 0.1")


@dataclass(frozen=True, kw_only=True)
class StageTwoTraining(RunConfig):
    codes: Path
    """Code cache written by `latentloom tokenize`."""
    validation_images: int = 1000
    """Images of the validation split that each validation loss is measured on."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "codes", self.codes.expanduser())
        if self.validation_images < 1:
            raise ConfigError(f"--validation-images is {self.validation_images}; expected a number of at least 1")


@dataclass(frozen=True, kw_only=True)
class AutoregressiveTraining(StageTwoTraining):
    prior: Literal["autoregressive"] = "autoregressive"
    model: AutoregressiveModel = field(default_factory=AutoregressiveModel)
    order: OrderConfig = field(default_factory=OrderConfig)
    """In which orders codes are predicted while training."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """What the pipeline samples with when it is told nothing else."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order.ever_random and not self.model.learned_positions:
            raise ConfigError(
                "order.random or order.final is above 0 and model.learned_positions is false, so the prior could not tell which "
                "place it predicts; expected model.learned_positions to be true"
            )

    def new_prior(self, spec: LatentSpec, num_classes: int) -> AutoregressivePrior:
        """An untrained prior for the codes of a tokenizer; ConfigError where the settings do not fit them."""
        return AutoregressivePrior(self.model.for_spec(spec, num_classes, self.order.final))


@dataclass(frozen=True, kw_only=True)
class DiffusionTraining(StageTwoTraining):
    prior: Literal["diffusion"] = "diffusion"
    model: DiffusionModel = field(default_factory=DiffusionModel)
    degradation: Degradation = "none"
    """What the prior learns to undo: noise, or what a smaller picture has lost; none draws pictures of its own."""
    times: TimesConfig = field(default_factory=TimesConfig)
    """At which times the network learns, and how much each counts."""
    sampling: DiffusionOptions = field(default_factory=DiffusionOptions)
    """What the pipeline samples with when it is told nothing else."""

    def new_prior(self, spec: LatentSpec, num_classes: int) -> DiffusionPrior:
        """An untrained prior for the latents of a tokenizer; ConfigError where the settings do not fit them."""
        return DiffusionPrior(self.model.for_spec(spec, num_classes, self.degradation))


PriorTraining = AutoregressiveTraining | DiffusionTraining
KINDS: dict[str, type[PriorTraining]] = {"autoregressive": AutoregressiveTraining, "diffusion": DiffusionTraining}


def training_class(values: Mapping[str, object]) -> type[PriorTraining]:
    """The configuration that a mapping's `prior` names; without one it is an autoregressive one."""
    kind = str(values.get("prior", "autoregressive"))
    if kind not in KINDS:
        raise ConfigError(f"prior is {kind!r}; expected one of: {', '.join(KINDS)}")
    return KINDS[kind]


def prior_training(values: Mapping[str, object]) -> PriorTraining:
    return from_mapping(training_class(values), values)
