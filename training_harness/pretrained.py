"""What every model of the project adds to transformers' base classes: strictness.

A configuration with a key that it does not know is refused, and so are weights that do not match the model name by name;
transformers alone would keep the first and initialise what is missing at random. Configurations of earlier formats are
brought to the present one as they are read.
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

# Keys that transformers itself writes into a config.json or passes to a configuration.
TRANSFORMERS_KEYS = {"torch_dtype", "num_labels", "name_or_path", "attn_implementation", "model_type", "_name_or_path"}
Configuration = TypeVar("Configuration", bound="StrictConfig")


@contextmanager
def hide_progress_bars() -> Iterator[None]:
    """Keeps transformers from showing bars for models that load in a moment."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


class StrictConfig(PreTrainedConfig):
    """A `PreTrainedConfig` that refuses unknown keys. Subclasses are decorated with `stored_config`.

    What the training configuration has in its section `model` is a field of that name here, a dataclass that both share.
    """

    migration: ClassVar[Migration] = Migration("model's config.json", key=MODEL_FORMAT_KEY)
    model_options: ClassVar[Any] = None
    """Type of the field `model`: a dataclass, or a union of variants."""

    def __post_init__(self, **kwargs: Any) -> None:
        known = type(self).__dataclass_fields__
        for key in kwargs:
            if key not in TRANSFORMERS_KEYS and not key.startswith("_"):
                own = [name for name in known if name not in PreTrainedConfig.__dataclass_fields__]
                own += field_names(self.model_options)  # those may be given by themselves, as in format 1
                raise ConfigError(f"unknown field '{key}' in a {type(self).__name__}; {suggest_nearest(key, own)}")
        super().__post_init__(**kwargs)

    @classmethod
    def migrate_values(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Keyword arguments or the content of a config.json, in whatever format, as the present fields."""
        found = cls.migration.migrate(values)
        if isinstance(found.get("model"), Mapping):
            found["model"] = build_section(cls.model_options, found["model"], "model")
        return found

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        plain = {name: to_mapping(value) for name, value in values.items() if dataclasses.is_dataclass(value)}
        return self.migration.add_format_number(values | plain)


@dataclass_transform(kw_only_default=True, field_specifiers=(dataclasses.field,))
def strict_config(cls: type[Configuration]) -> type[Configuration]:
    """Makes a `StrictConfig` check its fields' types, and take the names of earlier formats too."""
    checked: Any = strict(cls)
    initialize = checked.__init__

    @wraps(initialize)
    def __init__(self: Configuration, **values: Any) -> None:  # noqa: N807 - it takes the place of the class's own
        initialize(self, **cls.migrate_values(values))

    checked.__init__ = __init__
    return checked


class StrictModel(PreTrainedModel):
    """A `PreTrainedModel` whose weights are safetensors and match by name and shape, or are refused."""

    if TYPE_CHECKING:

        def to(self, *args: Any, **kwargs: Any) -> Self: ...  # type: ignore[override]

    def get_input_embeddings(self) -> nn.Module | None:  # type: ignore[override]
        """None: no layer of ours is tied to another, or a unit of its own under FSDP."""
        return None

    get_output_embeddings = get_input_embeddings

    def enable_gradient_checkpointing(self) -> None:
        """Gradient checkpointing: a block's activations are computed again in the backward pass."""
        for module in self.modules():
            if isinstance(module, GradientCheckpointingLayer):
                module._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)  # type: ignore[assignment]
                module.gradient_checkpointing = True

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: each module draws its weights where it is built, and loading leaves none to draw."""

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Writes config.json and model.safetensors into a folder."""
        with hide_progress_bars():
            super().save_pretrained(Path(save_directory).expanduser(), **kwargs)

    @classmethod
    def from_pretrained(cls, source: str | Path, **kwargs: Any) -> Self:  # type: ignore[override]
        """Loads a model folder or Hub repository; raises UserError when a file is missing, cut short or does not fit."""
        source = Path(source).expanduser() if str(source).startswith("~") else source
        try:
            with hide_progress_bars():
                loaded: Any = super().from_pretrained(source, output_loading_info=True, use_safetensors=True, **kwargs)
        except ConfigError as error:
            raise ConfigError(f"{source} holds another kind of model: {error}") from error
        except UserError:
            raise
        except (OSError, SafetensorError, StrictDataclassError, RuntimeError, ValueError, TypeError, KeyError) as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"no {cls.__name__} could be loaded from {source} ({reason[:200]}); expected config.json and an intact "
                "model.safetensors; copy or save the folder again"
            ) from error
        model, found = loaded
        wrong = {kind: sorted(map(str, found[kind])) for kind in found if found[kind]}
        if wrong:
            listed = "; ".join(f"{kind.replace('_', ' ')}: {', '.join(names[:3])}" for kind, names in wrong.items())
            raise UserError(
                f"the weights in {source} are not those of a {cls.__name__} ({listed}); save the model again"
            )
        return model.eval()


class WeightlessModel(StrictModel):
    """A model that has nothing to learn. transformers finds device and type of a model in its weights, so it has one."""

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__(config)
        self.place = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.post_init()


def count_parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def parameter_device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
