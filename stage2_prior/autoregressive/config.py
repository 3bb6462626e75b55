"""Options of the autoregressive prior: the section `model` and the fields of config.json."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from stage2_prior.checks import check_share, check_sizes
from stage2_prior.migration import AUTOREGRESSIVE_MODEL
from training_harness.errors import ConfigError
from training_harness.migration import Migration
from training_harness.pretrained import StrictConfig, strict_config


@dataclass(frozen=True, kw_only=True)
class AutoregressiveModel:
    """The section `model` of a training configuration and of config.json."""

    hidden_size: int = 192
    """Width of the transformer."""
    num_layers: int = 4
    """Number of transformer blocks."""
    depth_layers: int = 2
    """Layers that predict the levels of a position one after another. Only residual codes use them."""
    num_heads: int = 4
    """Number of attention heads."""
    num_key_value_heads: int | None = None
    """Fewer than the heads for grouped-query attention, which needs a smaller cache. (default: as many as the heads)"""
    intermediate_size: int = 512
    """Width of SwiGLU, usually about 8 / 3 of the hidden size."""
    dropout: float = 0.0
    """Dropout rate in the blocks."""
    qk_norm: bool = True
    """Normalise queries and keys before attention."""
    tie_embeddings: bool = False
    """Whether the head shares the code embedding's weights."""
    positions: Literal["none", "1d", "2d"] = "2d"
    """Rotary positions along the sequence, or along rows and columns."""
    learned_positions: bool = False
    """Adds a learned vector for the position to predict, with or without rotary positions. It speeds up early training."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies."""
    rms_norm_eps: float = 1e-6
    """Added to the mean square in each RMS norm."""

    def check(self) -> None:
        """Raise ConfigError for values that do not give a valid network."""
        sizes = ("hidden_size", "num_layers", "depth_layers", "num_heads", "intermediate_size")
        check_sizes(self, sizes)
        check_share(self.dropout, "model.dropout")
        if self.positions == "none" and not self.learned_positions:
            raise ConfigError(
                "model.positions is none and model.learned_positions is false, so no code would have a position; expected at least "
                "one kind of position. Pass `--model.positions 2d` or `--model.learned-positions`."
            )
        axes = max(1, self.rotary_axes)
        if self.hidden_size % self.num_heads or (self.hidden_size // self.num_heads) % (2 * axes):
            raise ConfigError(
                f"model.hidden_size is {self.hidden_size} for {self.num_heads} heads; expected a multiple of "
                f"{2 * axes * self.num_heads}, for {self.positions} rotary positions"
            )
        if self.key_value_heads < 1 or self.num_heads % self.key_value_heads:
            raise ConfigError(
                f"model.num_key_value_heads is {self.num_key_value_heads} for {self.num_heads} heads; expected a number "
                "that divides the heads"
            )

    @property
    def rotary_axes(self) -> int:
        return {"none": 0, "1d": 1, "2d": 2}[self.positions]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def key_value_heads(self) -> int:
        return self.num_heads if self.num_key_value_heads is None else self.num_key_value_heads


@strict_config
class AutoregressivePriorConfig(StrictConfig):
    """Fields of config.json."""

    model_type: ClassVar[str] = "latentloom-autoregressive"
    migration: ClassVar[Migration] = AUTOREGRESSIVE_MODEL
    model_options: ClassVar[Any] = AutoregressiveModel

    model: AutoregressiveModel = field(default_factory=AutoregressiveModel)
    codebook_size: int = 512
    levels: int = 1
    """Codes at each position; above 1 for residual quantization."""
    height: int = 8
    width: int = 8
    num_classes: int = 0
    random_order: float = 0.0
    """Share of random orders at the end of training. Above 0, the prior accepts known codes at any positions."""
    tokenizer_id: str = ""
    """Id of the tokenizer that wrote the training codes."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        check_sizes(self, ("codebook_size", "levels", "height", "width"))
        check_share(self.random_order, "model.random_order")
        self.model.check()

    @property
    def num_positions(self) -> int:
        return self.height * self.width
