"""The search space: expressions FIELD=SPEC, each checked against the stage's configuration before anything is trained.

    optimizer.learning_rate=1e-4..1e-2    floats; on a logarithmic scale when HIGH / LOW is 10 or more, else uniform
    model.num_layers=2..6                 integers
    model.num_layers=2|4|6                choices, each written as in YAML

The type of the field decides how an expression is read: 0..1 means floats for a field of floats.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from stage1_tokenizer.training_config import TokenizerTraining
from stage1_tokenizer.vqgan import VQGANModel
from stage2_prior.training_config import PriorTraining
from training_harness.configuration import flatten, from_mapping, merge_mappings, suggest_nearest, to_mapping
from training_harness.errors import ConfigError

if TYPE_CHECKING:
    import optuna

Training = PriorTraining | TokenizerTraining

NUMBER = r"[+-]?(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d+)?"
LOG_SCALE_RATIO = 10  # HIGH / LOW from which floats are sampled on a logarithmic scale

# Fields that cannot be searched, with the reason for the error message.
RUN_FIELDS = ("log_every", "sample_every", "checkpoint_every", "keep_checkpoints", "report_to", "resume")
MEASUREMENT_FIELDS = ("resolution", "image_channels", "padding", "validation_images")
FIXED_FIELDS = dict.fromkeys(
    ("output", "codes", "data", "seed", "perceptual", *RUN_FIELDS), "is the same for all trials"
)
FIXED_FIELDS |= dict.fromkeys(MEASUREMENT_FIELDS, "decides the validation data, so that trials could not be compared")
FIXED_FIELDS |= {"max_steps": "--max-steps sets for all trials"}
SAMPLING_PREFIX = "sampling."


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included and of the same type, int or float."""

    field: str
    low: int | float
    high: int | float

    @property
    def is_logarithmic(self) -> bool:
        return isinstance(self.low, float) and self.low > 0 and self.high / self.low >= LOG_SCALE_RATIO

    @property
    def spec(self) -> str:
        return f"{self.low}..{self.high}"

    def suggest(self, trial: "optuna.Trial", name: str) -> Any:
        if isinstance(self.low, int):
            return trial.suggest_int(name, self.low, int(self.high))
        return trial.suggest_float(name, self.low, self.high, log=self.is_logarithmic)

    def to_config_value(self, optuna_value: Any) -> Any:
        """Round a float to six digits, which are precise enough and easy to read in a recipe."""
        if isinstance(optuna_value, int):
            return optuna_value
        return min(max(float(f"{optuna_value:.6g}"), self.low), self.high)

    def to_optuna_value(self, value: Any) -> Any:
        """Return `value`, or None when it lies outside the range."""
        return value if type(value) is type(self.low) and self.low <= value <= self.high else None


@dataclass(frozen=True)
class Choices:
    """A few values. Optuna stores their texts, because it cannot store lists."""

    field: str
    texts: tuple[str, ...]
    values: tuple[Any, ...]

    @property
    def spec(self) -> str:
        return "|".join(self.texts)

    def suggest(self, trial: "optuna.Trial", name: str) -> Any:
        return trial.suggest_categorical(name, self.texts)

    def to_config_value(self, optuna_value: Any) -> Any:
        return self.values[self.texts.index(optuna_value)]

    def to_optuna_value(self, value: Any) -> Any:
        """Return the text of `value`, or None when it is not one of the choices."""
        return self.texts[self.values.index(value)] if value in self.values else None


Parameter = Range | Choices
Space = tuple[Parameter, ...]


def parse_space(expressions: Sequence[str], base: Training) -> Space:
    """Parse the expressions of `--search` into parameters sorted by field.

    Raises:
        ConfigError: an expression does not fit the configuration `base`.
    """
    parameters: dict[str, Parameter] = {}
    for expression in expressions:
        name, _, spec = expression.partition("=")
        field = name.strip().replace("-", "_")  # options are written with hyphens
        if not field or not spec.strip():
            raise expression_error(expression)
        check_field(field, base)
        if field in parameters:
            raise ConfigError(f"--search has {field} twice; expected each field once. Leave one out")
        try:
            parameters[field] = parse_spec(expression, field, spec.strip(), base)
        except yaml.YAMLError:
            raise expression_error(expression) from None
    return tuple(parameters[field] for field in sorted(parameters))


def parse_spec(expression: str, field: str, spec: str, base: Training) -> Parameter:
    """Parse the part of an expression after the equals sign."""
    if ends := re.fullmatch(f"({NUMBER})\\.\\.({NUMBER})", spec):
        is_integer = all(re.fullmatch(r"[+-]?\d+", end) for end in ends.groups())
        low, high = (
            validate_value(expression, field, int(end) if is_integer else float(end), base) for end in ends.groups()
        )
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ConfigError(f"--search has {expression!r}; expected a finite range with the lower end first")
        return Range(field, low, high)
    texts = tuple(text.strip() for text in spec.split("|"))
    if len(texts) < 2 or "" in texts:
        raise expression_error(expression)
    values = tuple(validate_value(expression, field, yaml.safe_load(text), base) for text in texts)
    if any(value in values[:i] for i, value in enumerate(values)):
        raise ConfigError(f"--search has {expression!r}; expected each choice once. Leave one out")
    return Choices(field, texts, values)


def expression_error(expression: str) -> ConfigError:
    """Build the error for an expression that cannot be parsed."""
    return ConfigError(
        f"--search has {expression!r}; expected FIELD=LOW..HIGH or FIELD=ONE|TWO. "
        "Write it as in 'optimizer.learning_rate=1e-4..1e-2' or 'model.num_layers=2|4'"
    )


def check_field(field: str, base: Training) -> None:
    """Raise ConfigError when `field` is not a setting of `base` that can be searched."""
    names = [
        name for name in flatten(to_mapping(base)) if name not in FIXED_FIELDS and not name.startswith(SAMPLING_PREFIX)
    ]
    is_sampling_field = field.startswith(SAMPLING_PREFIX)
    reason = "does not change the validation metric" if is_sampling_field else FIXED_FIELDS.get(field)
    if reason:
        raise ConfigError(
            f"--search has {field}, which {reason}; expected a setting of the training, such as optimizer.learning_rate"
        )
    if field not in names and (new_name := base.migration.renamed_fields.get(field)):
        raise ConfigError(f"--search has {field}, which has a new name; expected {new_name}")
    if field not in names:
        raise ConfigError(f"--search has the unknown field '{field}'; {suggest_nearest(field, names)}")


def validate_value(expression: str, field: str, value: Any, base: Training) -> Any:
    """Return `value` converted as in the configuration.

    Raises:
        ConfigError: the value does not fit the field.
    """
    try:
        return functools.reduce(getattr, field.split("."), replace_values(base, {field: value}))
    except ConfigError as error:
        raise ConfigError(f"--search has {expression!r}: {error}") from None


def replace_values(base: Training, values: Mapping[str, Any]) -> Any:
    """Return `base` with new values of some fields, which are named with their section: `optimizer.learning_rate`."""
    mapping = to_mapping(base)
    for field, value in values.items():
        for name in reversed(field.split(".")):
            value = {name: value}
        mapping = merge_mappings(mapping, value, type(base))
    return from_mapping(type(base), mapping)


def base_optuna_values(space: Space, base: Training) -> dict[str, Any]:
    """Return the Optuna values that give the settings of `base`, for each parameter that contains them."""
    values = {p.field: p.to_optuna_value(functools.reduce(getattr, p.field.split("."), base)) for p in space}
    return {field: value for field, value in values.items() if value is not None}


def bottleneck_expressions(base: TokenizerTraining) -> list[str]:
    """Return expressions for the KL or commitment weight, within a factor of 4, and for the codebook's usage decay."""
    model, weights = base.model, base.reconstruction
    quantizer = model.quantizer if isinstance(model, VQGANModel) else None
    name = "kl" if model.name == "kl" else "commitment"
    weight = getattr(weights, name)
    has_weight = weight > 0 and (model.name == "kl" or not (quantizer is None or quantizer.name == "fsq"))
    expressions = [f"reconstruction.{name}={weight / 4:.6g}..{weight * 4:.6g}"] if has_weight else []
    if hasattr(quantizer, "usage_decay"):
        expressions.append("model.quantizer.usage_decay=0.9|0.95|0.99")
    return expressions


def default_expressions(base: Training) -> list[str]:
    """Return the expressions of a search without `--search`.

    They are the learning rates within a factor of 4; for a prior also dropout and batch size, and for a tokenizer the settings
    of its bottleneck.
    """
    optimizer, size = base.optimizer, base.batch_size
    rates = {"learning_rate": optimizer.learning_rate}
    if optimizer.name == "muon":
        rates["matrix_learning_rate"] = optimizer.matrix_learning_rate
    expressions = [f"optimizer.{name}={rate / 4:.6g}..{rate * 4:.6g}" for name, rate in rates.items()]
    if isinstance(base, TokenizerTraining):
        return [*expressions, *bottleneck_expressions(base)]
    sizes = sorted({max(1, size // 2), size, 2 * size})
    dropout = ["model.dropout=0..0.3"] if base.prior == "autoregressive" else []
    return [*expressions, *dropout, f"batch_size={'|'.join(map(str, sizes))}"]
