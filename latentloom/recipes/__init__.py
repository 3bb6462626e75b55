"""Recipes: YAML files of training configurations, one a stage, shipped with the package.

`base: NAME` in one stands for the fields of another, beneath its own.
"""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from training_harness.configuration import merge_mappings, read_yaml, suggest_nearest
from training_harness.errors import ConfigError

PRIOR_PREFIXES = ("ar-", "diffusion-")


def recipe_names(stage: str) -> list[str]:
    """Names of the recipes of a stage, 'tokenizer' or 'prior'."""
    names = sorted(Path(str(path)).stem for path in files(__name__).iterdir() if path.name.endswith(".yaml"))
    return [name for name in names if name.startswith(PRIOR_PREFIXES) == (stage == "prior")]


def recipe_values(name: str, stage: str) -> dict[str, Any]:
    """The fields of a recipe; raises ConfigError when the stage has none of that name."""
    names = recipe_names(stage)
    if name not in names:
        other = "prior" if stage == "tokenizer" else "tokenizer"
        if name in recipe_names(other):
            raise ConfigError(
                f"{name} is a recipe of the {other}; expected one of the {stage}: {', '.join(names)}; latentloom train takes it "
                f"as {'--tokenizer-recipe' if other == 'tokenizer' else '--recipe'}, latentloom train-{other} as --recipe"
            )
        raise ConfigError(f"no {stage} recipe '{name}'; {suggest_nearest(name, names)}")
    values = read_yaml(Path(str(files(__name__) / f"{name}.yaml")))
    base = values.pop("base", None)
    return values if base is None else overlaid(stage, recipe_values(base, stage), values)


def overlaid(stage: str, base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """A stage's configuration with other values of some fields; see `merged` for another variant of a section."""
    return merge_mappings(base, values, training_type(stage, {**base, **values}))


def training_type(stage: str, values: Mapping[str, Any]) -> Any:
    """The dataclass of a stage's training configuration."""
    # Imported here: the names of the recipes are asked for where no model is.
    if stage == "tokenizer":
        from stage1_tokenizer.training_config import TokenizerTraining

        return TokenizerTraining
    from stage2_prior.training_config import training_class

    return training_class(values)
