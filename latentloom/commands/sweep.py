"""latentloom sweep: searches for better settings of a stage with short trials, and writes the best as a recipe."""

import math
from dataclasses import dataclass
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
from latentloom.search.space import Training, default_expressions, parse_space
from latentloom.search.study import SearchPlan, require_optuna
from latentloom.search.sweep import build_prior_trainer, build_tokenizer_trainer, format_results, run_sweep
from stage1_tokenizer.codes.reader import CodeCache
from stage1_tokenizer.training_config import TokenizerTraining
from stage2_prior.training_config import parse_prior_training
from training_harness.configuration import from_mapping
from training_harness.errors import UserError
from training_harness.processes import print_once

RECIPES = "; ".join(f"a {stage}'s {', '.join(recipe_names(stage))}" for stage in METRICS)


@dataclass(frozen=True, kw_only=True)
class Arguments:
    codes: Path | None = None
    """Searches a prior's settings, on this code cache."""
    data: str | None = None
    """Searches a tokenizer's settings, on these images."""
    output: Path
    """Folder of the search; the same command again goes on with it."""
    recipe: Annotated[str | None, tyro.conf.arg(help=f"Configuration to start from: {RECIPES}.")] = None
    config: Path | None = None
    """YAML file whose fields replace those of --recipe where given."""
    search: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """Words FIELD=LOW..HIGH or 'FIELD=ONE|TWO', such as optimizer.learning_rate=1e-4..1e-2 'model.num_layers=2|4|6'; by default
    the rates, a factor of 4 either side, and some more."""
    trials: int = 20
    max_steps: int | None = None
    """Steps of each trial, by default a quarter of the recipe's. Short trials favour high rates, large batches and small models."""
    minutes: float | None = None
    """Bounds the whole search; the trial that it ends is done again by the next run."""
    seed: int | None = None
    """Of what is drawn and of every trial, by default the recipe's."""
    resolution: int | str | None = None
    """Of a tokenizer: height and width of the images, 64 or 64x96."""

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


def main(words: list[str]) -> None:
    a = parse(Arguments, "sweep", words)
    require_optuna()
    if a.codes is not None:
        sweep_prior(a, a.codes)
    else:
        sweep_tokenizer(a, str(a.data), words)


def sweep_prior(a: Arguments, folder: Path) -> None:
    recipe = a.recipe or (None if a.config else train_prior.DEFAULT_RECIPE)
    values = training_values("prior", recipe, a.config, {"codes": str(folder)} | common(a))
    base, codes = parse_prior_training(values), CodeCache(folder)
    plan = plan_of(a, base, codes.spec.tokenizer_id)
    done = run_sweep(plan, lambda: build_prior_trainer(base, codes))
    print_once(f"{format_results(plan, done)}\n{next_step(a, f'train-prior --codes {folder}')}")


def sweep_tokenizer(a: Arguments, data: str, words: list[str]) -> None:
    values = training_values("tokenizer", a.recipe, a.config)
    if "resolution" not in values:
        values = select_for_images(words, values, a.recipe, a.config)
    size = {} if a.resolution is None else {"resolution": a.resolution}
    base = from_mapping(TokenizerTraining, values | {"data": data} | common(a) | size)
    plan = plan_of(a, base)
    done = run_sweep(plan, lambda: build_tokenizer_trainer(base, load_source(data)))
    print_once(f"{format_results(plan, done)}\n{next_step(a, f'train-tokenizer --data {data}')}")


def common(a: Arguments) -> dict[str, object]:
    return {"output": str(a.output)} | ({} if a.seed is None else {"seed": a.seed})


def plan_of(a: Arguments, base: Training, trained_on: str = "") -> SearchPlan:
    stage = "tokenizer" if isinstance(base, TokenizerTraining) else base.prior
    space = parse_space(list(chain(*a.search)) or default_expressions(base), base)
    steps = a.max_steps or math.ceil(base.max_steps / 4)
    return SearchPlan(
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
