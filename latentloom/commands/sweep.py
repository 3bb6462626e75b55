"""latentloom sweep: search for better settings of a stage with short trials, and write the best ones as a recipe."""

import math
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Annotated

import tyro

from latentloom.checks import check_count, check_minutes, check_seed
from latentloom.commands import train_prior
from latentloom.commands.arguments import parse, training_values
from latentloom.commands.option_help import ONE_REQUIRED
from latentloom.commands.train_tokenizer import select_values_for_images
from latentloom.jobs.stages import load_source
from latentloom.recipes import recipe_names
from latentloom.search.results import METRICS
from latentloom.search.space import Training, default_expressions, parse_space
from latentloom.search.study import SearchPlan, require_optuna
from latentloom.search.sweep import build_prior_trainer, build_tokenizer_trainer, format_results, run_sweep
from stage1_tokenizer.codes.reader import CodeCache
from stage1_tokenizer.data.statistics import dataset_statistics
from stage1_tokenizer.training_config import TokenizerTraining
from stage2_prior.training_config import parse_prior_training
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
            state = "missing" if self.codes is None else "given"
            raise UserError(
                f"--codes and --data are both {state}; expected --codes to search a prior's settings, or --data to search a "
                "tokenizer's"
            )
        if self.codes is not None and self.resolution is not None:
            raise UserError(
                f"--resolution is {self.resolution} with --codes; expected it with --data only; leave it out"
            )
        check_count("--trials", self.trials)
        check_minutes(self.minutes)
        if self.max_steps is not None:
            check_count("--max-steps", self.max_steps)
        if self.seed is not None:
            check_seed(self.seed)


GROUPS = {
    ONE_REQUIRED: ("codes", "data"),
    "configuration": ("recipe", "config", "resolution"),
    "search": ("search", "trials", "max_steps", "minutes", "seed"),
}


def main(argv: list[str]) -> None:
    arguments = parse(Arguments, "sweep", argv, GROUPS)
    require_optuna()
    if arguments.codes is not None:
        sweep_prior(arguments, arguments.codes)
    else:
        sweep_tokenizer(arguments, str(arguments.data), argv)


def sweep_prior(arguments: Arguments, folder: Path) -> None:
    recipe = arguments.recipe or (None if arguments.config else train_prior.DEFAULT_RECIPE)
    values = training_values("prior", recipe, arguments.config, {"codes": str(folder)} | common_values(arguments))
    base, codes = parse_prior_training(values), CodeCache(folder)
    plan = make_plan(arguments, base, codes.spec.tokenizer_id)
    results = run_sweep(plan, lambda: build_prior_trainer(base, codes))
    print_once(f"{format_results(plan, results)}\n{format_next_steps(arguments, f'train-prior --codes {folder}')}")


def sweep_tokenizer(arguments: Arguments, data: str, argv: list[str]) -> None:
    values = training_values("tokenizer", arguments.recipe, arguments.config)
    if "resolution" not in values:
        source = load_source(data)
        _, values = select_values_for_images(
            argv, source, dataset_statistics(source.train), arguments.recipe, arguments.config
        )
    size = {} if arguments.resolution is None else {"resolution": arguments.resolution}
    base = from_mapping(TokenizerTraining, values | {"data": data} | common_values(arguments) | size)
    plan = make_plan(arguments, base)
    results = run_sweep(plan, lambda: build_tokenizer_trainer(base, load_source(data)))
    print_once(f"{format_results(plan, results)}\n{format_next_steps(arguments, f'train-tokenizer --data {data}')}")


def common_values(arguments: Arguments) -> dict[str, object]:
    return {"output": str(arguments.output)} | ({} if arguments.seed is None else {"seed": arguments.seed})


def make_plan(arguments: Arguments, base: Training, trained_on: str = "") -> SearchPlan:
    stage = "tokenizer" if isinstance(base, TokenizerTraining) else base.prior
    space = parse_space(list(chain(*arguments.search)) or default_expressions(base), base)
    steps = arguments.max_steps or math.ceil(base.max_steps / 4)
    return SearchPlan(
        base=base,
        space=space,
        metric=METRICS[stage],
        steps=steps,
        trials=arguments.trials,
        minutes=arguments.minutes,
        trained_on=trained_on,
    )


def format_next_steps(arguments: Arguments, verb: str) -> str:
    best = arguments.output / "best.yaml"
    return f"recipe: {best}\nnext: latentloom {verb} --config {best} --output {arguments.output / 'best'}"
