"""Configuration of the autoregressive prior, as it stands in a model's config.json."""

from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict

from training_harness.errors import ConfigError
from training_harness.pretrained import StrictConfig


@strict
class AutoregressivePriorConfig(StrictConfig):
    model_type: ClassVar[str] = "latentloom-autoregressive"

    codebook_size: int = 512
    levels: int = 1
    """Codes a place: those of residual quantisation are predicted one after another."""
    height: int = 8
    width: int = 8
    num_classes: int = 0
    hidden_size: int = 192
    num_layers: int = 4
    depth_layers: int = 2
    """Layers that predict the levels of a place; without levels there are none."""
    num_heads: int = 4
    num_key_value_heads: int | None = None
    """Grouped-query attention where fewer than the heads; none for as many."""
    intermediate_size: int = 512
    dropout: float = 0.0
    qk_norm: bool = True
    tie_embeddings: bool = False
    """Whether the head is the code embedding, scaled."""
    positions: Literal["none", "1d", "2d"] = "2d"
    """Rotary positions along the sequence, or along rows and columns."""
    learned_positions: bool = False
    """Adds a learnt vector of the place to be predicted, beside rotary positions or in their stead."""
    random_order: float = 0.0
    """Share of random orders at the end of training; above 0 the prior can be given codes at any places first."""
    rope_theta: float | int = 10_000.0
    rms_norm_eps: float = 1e-6
    tokenizer_id: str = ""
    """Of the tokenizer whose codes the prior was trained on."""

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        sizes = ("codebook_size", "levels", "height", "width", "hidden_size", "num_layers", "depth_layers", "num_heads")
        for name in (*sizes, "intermediate_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; expected a whole number of at least 1")
        for name in ("dropout", "random_order"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}; expected a share in [0, 1], such as 0.1")
        if self.positions == "none" and not self.learned_positions:
            raise ConfigError(
                "model.positions is none and model.learned_positions false, so no code would have a place; expected one of them; "
                "give 2d, or --model.learned-positions"
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

    @property
    def places(self) -> int:
        return self.height * self.width
