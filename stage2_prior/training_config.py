"""Configuration of a stage-two run. What the codes determine (K, grid, classes) is taken from them and not asked for."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from stage1_tokenizer.latent_spec import LatentSpec
from stage2_prior.autoregressive.config import AutoregressivePriorConfig
from stage2_prior.autoregressive.orders import OrderConfig
from stage2_prior.autoregressive.sampling import SamplingOptions
from training_harness.ema import EMAConfig
from training_harness.errors import ConfigError
from training_harness.optimization import OptimizerConfig, ScheduleConfig
from training_harness.run import RunConfig


@dataclass(frozen=True, kw_only=True)
class PriorModel:
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
    positions: Literal["1d", "2d"] = "2d"
    learned_positions: bool = False
    """Adds a learnt vector of the place to be predicted, beside the rotary positions: early training is quicker."""
    rope_theta: float = 10_000.0

    def __post_init__(self) -> None:
        if not 0 <= self.class_dropout <= 1:
            raise ConfigError(f"model.class_dropout is {self.class_dropout}; expected a share in [0, 1], such as 0.1")

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
class PriorTraining(RunConfig):
    codes: Path
    """Code cache written by `latentloom tokenize`."""
    validation_images: int = 1000
    """Images of the validation split that each validation loss is measured on."""
    model: PriorModel = field(default_factory=PriorModel)
    order: OrderConfig = field(default_factory=OrderConfig)
    """In which orders codes are predicted while training."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """What the pipeline samples with when it is told nothing else."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EMAConfig = field(default_factory=EMAConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.validation_images < 1:
            raise ConfigError(f"--validation-images is {self.validation_images}; expected a number of at least 1")
        if self.order.ever_random and not self.model.learned_positions:
            raise ConfigError(
                "order.random or order.final is above 0 and model.learned_positions is false, so the prior could not tell which "
                "place it predicts; expected model.learned_positions to be true"
            )
