"""latentloom sweep: searches for better settings of a stage with short trials, and writes the best as a recipe."""

import math
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated

import tyro

from latentloom.checks import check_count, check_minutes, check_seed
from latentloom.commands import train_prior
from latentloom.commands.arguments import parse, training_values
from latentloom.commands.train_tokenizer import select_for_images
from latentloom.jobs.stages import load_source
from latentloom.recipes import recipe_names
from latentloom.search.results import METRICS
from latentloom.search.space import Training, default_words, parse_space
from latentloom.search.study import Plan, require_optuna
from latentloom.search.sweep import closing, prior_trainer, run_sweep, tokenizer_trainer
from stage1_tokenizer.codes.reader import CodeCache
from stage1_tokenizer.data.statistics import dataset_statistics
from stage1_tokenizer.training_config import TokenizerTraining
from stage2_prior.training_config import prior_training
from training_harness.configuration import from_mapping
from training_harness.errors import UserError
from training_harness.processes import print_once


@dataclass(frozen=True, kw_only=True)
class Arguments:
    codes: Path | None = None
    """Code cache: search for the settings of a prior."""
    data: str | None = None
    """Images: search for the settings of a tokenizer."""
    output: Path
    """Folder of the search. The same command continues a search."""
    recipe: str | None = field(
        default=None,
        metadata={
            "help": f"Recipe to start from. Of a prior: {', '.join(recipe_names('prior'))}. "
            f"Of a tokenizer: {', '.join(recipe_names('tokenizer'))}. "
            f"(default: {train_prior.DEFAULT_RECIPE}; of a tokenizer: from the size of the images)"
        },
    )
    config: Path | None = None
    """YAML file with values that replace those of the recipe. (default: none)"""
    search: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """Fields to search, as FIELD=LOW..HIGH or 'FIELD=ONE|TWO', such as optimizer.learning_rate=1e-4..1e-2 or
    'model.num_layers=2|4|6'. (default: the learning rates, from a quarter to four times the recipe's, and some others)"""
    trials: int = 20
    """Number of trials."""
    max_steps: int | None = None
    """Steps of each trial. Short trials favour high rates, large batches and small models. (default: a quarter of the recipe's)"""
    minutes: float | None = None
    """Time limit of the whole search; the next run repeats the trial that it ends. (default: no limit)"""
    seed: int | None = None
    """Random seed of the search and of every trial. (default: the recipe's)"""
    resolution: int | str | None = None
    """Height and width of the images, for a tokenizer: 64, or 64x96. (default: the most common size in the data, at most 256)"""

    def __post_init__(self) -> None:
        if (self.codes is None) == (self.data is None):
            found = "missing" if self.codes is None else "given"
            raise UserError(
                f"--codes and --data are both {found}; expected --codes to search a prior's settings, or --data to search a "
                "tokenizer's"
            )
        if self.codes is not None and self.resolution is not None:
            raise UserError(
                f"--resolution is {self.resolution} and --codes given; expected it with --data; leave it out"
            )
        check_count("--trials", self.trials)
        check_minutes(self.minutes)
        if self.max_steps is not None:
            check_count("--max-steps", self.max_steps)
        if self.seed is not None:
            check_seed(self.seed)


GROUPS = {
    "required, one of": ("codes", "data"),
    "configuration": ("recipe", "config", "resolution"),
    "search": ("search", "trials", "max_steps", "minutes", "seed"),
}


def main(words: list[str]) -> None:
    a = parse(Arguments, "sweep", words, GROUPS)
    require_optuna()
    if a.codes is not None:
        sweep_prior(a, a.codes)
    else:
        sweep_tokenizer(a, str(a.data), words)


def sweep_prior(a: Arguments, folder: Path) -> None:
    recipe = a.recipe or (None if a.config else train_prior.DEFAULT_RECIPE)
    values = training_values("prior", recipe, a.config, {"codes": str(folder)} | common(a))
    base, codes = prior_training(values), CodeCache(folder)
    plan = plan_of(a, base, codes.spec.tokenizer_id)
    done = run_sweep(plan, lambda: prior_trainer(base, codes))
    print_once(f"{closing(plan, done)}\n{next_step(a, f'train-prior --codes {folder}')}")


def sweep_tokenizer(a: Arguments, data: str, words: list[str]) -> None:
    values = training_values("tokenizer", a.recipe, a.config)
    if "resolution" not in values:
        source = load_source(data)
        _, values = select_for_images(words, source, dataset_statistics(source.train), a.recipe, a.config)
    size = {} if a.resolution is None else {"resolution": a.resolution}
    base = from_mapping(TokenizerTraining, values | {"data": data} | common(a) | size)
    plan = plan_of(a, base)
    done = run_sweep(plan, lambda: tokenizer_trainer(base, load_source(data)))
    print_once(f"{closing(plan, done)}\n{next_step(a, f'train-tokenizer --data {data}')}")


def common(a: Arguments) -> dict[str, object]:
    return {"output": str(a.output)} | ({} if a.seed is None else {"seed": a.seed})


def plan_of(a: Arguments, base: Training, trained_on: str = "") -> Plan:
    stage = "tokenizer" if isinstance(base, TokenizerTraining) else base.prior
    space = parse_space(list(chain(*a.search)) or default_words(base), base)
    steps = a.max_steps or math.ceil(base.max_steps / 4)
    return Plan(
        base=base,
        space=space,
        metric=METRICS[stage],
        steps=steps,
        trials=a.trials,
        minutes=a.minutes,
        trained_on=trained_on,
    )


def next_step(a: Arguments, verb: str) -> str:
    best = a.output / "best.yaml"
    return f"recipe: {best}\nnext: latentloom {verb} --config {best} --output {a.output / 'best'}"
