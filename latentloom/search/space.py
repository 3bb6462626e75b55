"""What a search draws from: words FIELD=SPEC, each checked against the stage's configuration before anything trains.

    optimizer.learning_rate=1e-4..1e-2    floats: by their logarithm where HIGH / LOW is 10 or more, else uniformly
    model.num_layers=2..6                 whole numbers
    model.num_layers=2|4|6                choices, each written as in YAML

A word is read with the field's own type: 0..1 means floats for a field of floats.
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
WIDE = 10  # HIGH / LOW from which on floats are drawn by their logarithm

# What no trial may have for itself, and why.
LOGGED = ("log_every", "sample_every", "checkpoint_every", "keep_checkpoints", "report_to", "resume")
MEASURED = ("resolution", "image_channels", "padding", "validation_images")
ONE_FOR_ALL = dict.fromkeys(("output", "codes", "data", "seed", "perceptual", *LOGGED), "is the same for all trials")
ONE_FOR_ALL |= dict.fromkeys(MEASURED, "decides what the figure is measured on, so that trials could not be compared")
ONE_FOR_ALL |= {"max_steps": "--max-steps sets for all trials"}
UNSEEN = "sampling."


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included and of one type."""

    field: str
    low: int | float
    high: int | float

    @property
    def logarithmic(self) -> bool:
        return isinstance(self.low, float) and self.low > 0 and self.high / self.low >= WIDE

    @property
    def spec(self) -> str:
        return f"{self.low}..{self.high}"

    def suggest(self, trial: "optuna.Trial", name: str) -> Any:
        if isinstance(self.low, int):
            return trial.suggest_int(name, self.low, int(self.high))
        return trial.suggest_float(name, self.low, self.high, log=self.logarithmic)

    def value_of(self, drawn: Any) -> Any:
        """With six digits, which say enough and read well in a recipe."""
        return drawn if isinstance(drawn, int) else min(max(float(f"{drawn:.6g}"), self.low), self.high)

    def drawn_as(self, value: Any) -> Any:
        """`value` itself, or None outside the range."""
        return value if type(value) is type(self.low) and self.low <= value <= self.high else None


@dataclass(frozen=True)
class Choices:
    """Some values, which Optuna knows by their texts: it stores no lists."""

    field: str
    texts: tuple[str, ...]
    values: tuple[Any, ...]

    @property
    def spec(self) -> str:
        return "|".join(self.texts)

    def suggest(self, trial: "optuna.Trial", name: str) -> Any:
        return trial.suggest_categorical(name, self.texts)

    def value_of(self, drawn: Any) -> Any:
        return self.values[self.texts.index(drawn)]

    def drawn_as(self, value: Any) -> Any:
        """The text of `value`, or None where it is no choice."""
        return self.texts[self.values.index(value)] if value in self.values else None


Parameter = Range | Choices
Space = tuple[Parameter, ...]


def parse_space(words: Sequence[str], base: Training) -> Space:
    """The parameters in the order of their names; raises ConfigError for the first word that does not fit `base`."""
    found: dict[str, Parameter] = {}
    for word in words:
        name, _, spec = word.partition("=")
        field = name.strip().replace("-", "_")  # options are written with hyphens
        if not field or not spec.strip():
            raise unreadable(word)
        check_field(field, base)
        if field in found:
            raise ConfigError(f"--search has {field} twice; expected each field once; leave one out")
        try:
            found[field] = parse_spec(word, field, spec.strip(), base)
        except yaml.YAMLError:
            raise unreadable(word) from None
    return tuple(found[field] for field in sorted(found))


def parse_spec(word: str, field: str, spec: str, base: Training) -> Parameter:
    if ends := re.fullmatch(f"({NUMBER})\\.\\.({NUMBER})", spec):
        whole = all(re.fullmatch(r"[+-]?\d+", end) for end in ends.groups())
        low, high = (checked(word, field, int(end) if whole else float(end), base) for end in ends.groups())
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ConfigError(f"--search has {word!r}; expected a finite range whose first end is the lower one")
        return Range(field, low, high)
    texts = tuple(text.strip() for text in spec.split("|"))
    if len(texts) < 2 or "" in texts:
        raise unreadable(word)
    values = tuple(checked(word, field, yaml.safe_load(text), base) for text in texts)
    if any(value in values[:i] for i, value in enumerate(values)):
        raise ConfigError(f"--search has {word!r}; expected each choice once; leave one out")
    return Choices(field, texts, values)


def unreadable(word: str) -> ConfigError:
    return ConfigError(
        f"--search has {word!r}; expected FIELD=LOW..HIGH or FIELD=ONE|TWO; write it as in 'optimizer.learning_rate=1e-4..1e-2' "
        "or 'model.num_layers=2|4'"
    )


def check_field(field: str, base: Training) -> None:
    names = [name for name in flatten(to_mapping(base)) if name not in ONE_FOR_ALL and not name.startswith(UNSEEN)]
    why = "has no part in the validation figure" if field.startswith(UNSEEN) else ONE_FOR_ALL.get(field)
    if why:
        raise ConfigError(
            f"--search has {field}, which {why}; expected a setting of the training, such as optimizer.learning_rate"
        )
    if field not in names and (new := base.migration.renamed_fields.get(field)):
        raise ConfigError(f"--search has {field}, which has another name; expected {new}")
    if field not in names:
        raise ConfigError(f"--search has the unknown field '{field}'; {suggest_nearest(field, names)}")


def checked(word: str, field: str, value: Any, base: Training) -> Any:
    """`value` as the configuration holds it; raises ConfigError where it does not fit."""
    try:
        return functools.reduce(getattr, field.split("."), with_values(base, {field: value}))
    except ConfigError as error:
        raise ConfigError(f"--search has {word!r}: {error}") from None


def with_values(base: Training, values: Mapping[str, Any]) -> Any:
    """`base` with other values of some fields, given by their whole names."""
    mapping = to_mapping(base)
    for field, value in values.items():
        for name in reversed(field.split(".")):
            value = {name: value}
        mapping = merge_mappings(mapping, value, type(base))
    return from_mapping(type(base), mapping)


def own_values(space: Space, base: Training) -> dict[str, Any]:
    """What Optuna would have to draw for `base` itself, where the space holds its values."""
    held = {p.field: p.drawn_as(functools.reduce(getattr, p.field.split("."), base)) for p in space}
    return {field: drawn for field, drawn in held.items() if drawn is not None}


def bottleneck_words(base: TokenizerTraining) -> list[str]:
    """How strongly the latents are held, a factor of 4 either side, and the decay of a codebook that has one."""
    model, weights = base.model, base.reconstruction
    quantizer = model.quantizer if isinstance(model, VQGANModel) else None
    name = "kl" if model.name == "kl" else "commitment"
    weight = getattr(weights, name)
    held = weight > 0 and (model.name == "kl" or not (quantizer is None or quantizer.name == "fsq"))
    words = [f"reconstruction.{name}={weight / 4:.6g}..{weight * 4:.6g}"] if held else []
    return [*words, "model.quantizer.usage_decay=0.9|0.95|0.99"] if hasattr(quantizer, "usage_decay") else words


def default_words(base: Training) -> list[str]:
    """The search that is made where none was asked for: rates a factor of 4 either side, and what else often matters."""
    optimizer, size = base.optimizer, base.batch_size
    rates = {"learning_rate": optimizer.learning_rate}
    if optimizer.name == "muon":
        rates["matrix_learning_rate"] = optimizer.matrix_learning_rate
    words = [f"optimizer.{name}={rate / 4:.6g}..{rate * 4:.6g}" for name, rate in rates.items()]
    if isinstance(base, TokenizerTraining):
        return [*words, *bottleneck_words(base)]
    sizes = sorted({max(1, size // 2), size, 2 * size})
    dropout = ["model.dropout=0..0.3"] if base.prior == "autoregressive" else []
    return [*words, *dropout, f"batch_size={'|'.join(map(str, sizes))}"]
