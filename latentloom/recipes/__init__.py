"""Recipes: YAML files of training configurations that are part of the package. A recipe configures one stage.

A recipe with `base: NAME` starts from the fields of the recipe NAME and overrides some of them.
"""

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from training_harness.configuration import merge_mappings, read_yaml, suggest_nearest
from training_harness.errors import ConfigError

PRIOR_PREFIXES = ("ar-", "diffusion-")


def recipe_names(stage: str) -> list[str]:
    """Return the names of the recipes of a stage, 'tokenizer' or 'prior', in alphabetical order."""
    names = sorted(Path(str(path)).stem for path in files(__name__).iterdir() if path.name.endswith(".yaml"))
    return [name for name in names if name.startswith(PRIOR_PREFIXES) == (stage == "prior")]


def recipe_values(name: str, stage: str) -> dict[str, Any]:
    """Read the fields of a recipe, with the fields of its base.

    Raises:
        ConfigError: the stage has no recipe of this name.
    """
    names = recipe_names(stage)
    if name not in names:
        other_stage = "prior" if stage == "tokenizer" else "tokenizer"
        if name in recipe_names(other_stage):
            option = "--tokenizer-recipe" if other_stage == "tokenizer" else "--recipe"
            raise ConfigError(
                f"{name} is a recipe of the {other_stage}; expected one of the {stage}: {', '.join(names)}. latentloom train "
                f"takes it as {option}, latentloom train-{other_stage} takes it as --recipe"
            )
        raise ConfigError(f"no {stage} recipe '{name}'; {suggest_nearest(name, names)}")
    values = read_yaml(Path(str(files(__name__) / f"{name}.yaml")))
    base = values.pop("base", None)
    return values if base is None else override_values(stage, recipe_values(base, stage), values)


def override_values(stage: str, base: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the configuration `base` of a stage with new values of some fields; see `merged`."""
    return merge_mappings(base, values, training_type(stage, {**base, **values}))


def training_type(stage: str, values: Mapping[str, Any]) -> Any:
    """Return the dataclass of a stage's training configuration."""
    # Imported here, because the names of the recipes are needed where no model is imported.
    if stage == "tokenizer":
        from stage1_tokenizer.training_config import TokenizerTraining

        return TokenizerTraining
    from stage2_prior.training_config import select_training_class

    return select_training_class(values)
