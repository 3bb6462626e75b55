"""Base classes of all models and configurations: strict versions of those in transformers.

Loading fails for unknown keys in a configuration and for weights that do not match the model by name and shape. transformers
itself keeps unknown keys and initializes missing weights at random. Configurations of earlier formats are migrated when they are
read.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial, wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, TypeVar, dataclass_transform

import torch
from huggingface_hub.dataclasses import strict
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from training_harness.configuration import build_section, field_names, suggest_nearest, to_mapping
from training_harness.errors import ConfigError, UserError
from training_harness.migration import MODEL_FORMAT_KEY, Migration

# Keys that transformers writes into a config.json or passes to a configuration.
TRANSFORMERS_KEYS = {"torch_dtype", "num_labels", "name_or_path", "attn_implementation", "model_type", "_name_or_path"}
Configuration = TypeVar("Configuration", bound="StrictConfig")


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Hide the progress bars of transformers within the block; our models load in a moment."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


class StrictConfig(PreTrainedConfig):
    """A `PreTrainedConfig` that rejects unknown keys. Subclasses are decorated with `strict_config`.

    The options in the section `model` of a training configuration are a field `model` here; both share its dataclass.
    """

    migration: ClassVar[Migration] = Migration("model's config.json", key=MODEL_FORMAT_KEY)
    model_options: ClassVar[Any] = None
    """Type of the field `model`: a dataclass or a union of variants."""

    def __post_init__(self, **kwargs: Any) -> None:
        fields = type(self).__dataclass_fields__
        for key in kwargs:
            if key not in TRANSFORMERS_KEYS and not key.startswith("_"):
                choices = [name for name in fields if name not in PreTrainedConfig.__dataclass_fields__]
                choices += field_names(self.model_options)  # format 1 has them at the top level
                raise ConfigError(f"unknown field '{key}' in a {type(self).__name__}; {suggest_nearest(key, choices)}")
        super().__post_init__(**kwargs)

    @classmethod
    def migrate_values(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Convert keyword arguments or the content of a config.json from any format to the current fields."""
        migrated = cls.migration.migrate(values)
        if isinstance(migrated.get("model"), Mapping):
            migrated["model"] = build_section(cls.model_options, migrated["model"], "model")
        return migrated

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        plain = {name: to_mapping(value) for name, value in values.items() if dataclasses.is_dataclass(value)}
        return self.migration.add_format_number(values | plain)


@dataclass_transform(kw_only_default=True, field_specifiers=(dataclasses.field,))
def strict_config(cls: type[Configuration]) -> type[Configuration]:
    """Decorate a `StrictConfig`: check the types of its fields, and accept the field names of earlier formats."""
    strict_class: Any = strict(cls)
    initialize = strict_class.__init__

    @wraps(initialize)
    def __init__(self: Configuration, **values: Any) -> None:  # noqa: N807 - replaces the class's __init__
        initialize(self, **cls.migrate_values(values))

    strict_class.__init__ = __init__
    return strict_class


class StrictModel(PreTrainedModel):
    """A `PreTrainedModel` that loads only safetensors whose names and shapes match the model."""

    if TYPE_CHECKING:

        def to(self, *args: Any, **kwargs: Any) -> Self: ...  # type: ignore[override]

    def get_input_embeddings(self) -> nn.Module | None:  # type: ignore[override]
        """Return None: no embedding is tied to another layer or wrapped separately by FSDP."""
        return None

    get_output_embeddings = get_input_embeddings

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the activations of each block in the backward pass to save memory."""
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
                module.gradient_checkpointing = True

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: each module initializes its weights in its constructor, and loading sets all of them."""

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write config.json and model.safetensors into a folder."""
        with hide_progress_bars():
            super().save_pretrained(Path(save_directory).expanduser(), **kwargs)

    @classmethod
    def from_pretrained(cls, source: str | Path, **kwargs: Any) -> Self:  # type: ignore[override]
        """Load a model from a folder or a Hub repository, in evaluation mode.

        Raises:
            UserError: A file is missing or corrupt, or the weights do not match the model.
        """
        source = Path(source).expanduser() if str(source).startswith("~") else source
        try:
            with hide_progress_bars():
                result: Any = super().from_pretrained(source, output_loading_info=True, use_safetensors=True, **kwargs)
        except ConfigError as error:
            raise ConfigError(f"{source} contains another kind of model: {error}") from error
        except UserError:
            raise
        except (OSError, SafetensorError, StrictDataclassError, RuntimeError, ValueError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"no {cls.__name__} could be loaded from {source} ({reason[:200]}); expected config.json and an intact "
                "model.safetensors; copy or save the folder again"
            ) from error
        model, loading_info = result
        mismatches = {kind: sorted(map(str, names)) for kind, names in loading_info.items() if names}
        if mismatches:
            listed = "; ".join(
                f"{kind.replace('_', ' ')}: {', '.join(names[:3])}" for kind, names in mismatches.items()
            )
            raise UserError(f"the weights in {source} do not match a {cls.__name__} ({listed}); save the model again")
        return model.eval()


class WeightlessModel(StrictModel):
    """A model without learned weights. transformers reads device and dtype from the weights, so it has one scalar `place`."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.post_init()


def count_parameters(model: nn.Module) -> int:
    """Return the number of parameters of a model."""
    return sum(p.numel() for p in model.parameters())


def parameter_device(model: nn.Module) -> torch.device:
    """Return the device of the first parameter of a model."""
    return next(model.parameters()).device
