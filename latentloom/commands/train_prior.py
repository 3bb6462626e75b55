"""latentloom train-prior: stage two."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Generic, TypeVar, cast

import tyro

from latentloom.checks import check_dry_run
from latentloom.commands.arguments import parse, recipe_and_config, recipe_help, training_values
from latentloom.commands.variants import explained, starting_point
from latentloom.jobs.stages import run_prior
from latentloom.planning.dry_run import dry_run, format_total_time
from latentloom.planning.overfit_batch import overfit_prior
from latentloom.planning.step_timing import time_prior_step
from stage1_tokenizer.codes.reader import CodeCache
from stage2_prior.training_config import PriorTraining, select_training_class
from training_harness.processes import print_once

Training = TypeVar("Training", bound=PriorTraining)
DEFAULT_RECIPE = "ar-tiny"


@dataclass(frozen=True)
class Arguments(Generic[Training]):
    training: Annotated[Training, tyro.conf.arg(name="")]
    recipe: Annotated[str, recipe_help("Configuration to start from", "prior")] = DEFAULT_RECIPE
    config: Path | None = None
    """YAML file whose fields replace those of --recipe where given; a run folder's config.yaml repeats that run."""
    minutes: float | None = None
    """Sets --max-steps once, at the start, to what fits into this time on this machine."""
    dry_run: bool = False
    """Says what the run would take, and writes nothing."""
    overfit_batch: bool = False
    """Checks the set-up: trains on one batch alone, in a folder beside --output, and says whether it was learnt."""


def main(words: list[str]) -> None:
    recipe, config = recipe_and_config(words)
    values = training_values("prior", recipe or (None if config else DEFAULT_RECIPE), config)
    kind = select_training_class(values)
    training, words = starting_point(kind, values, words)
    shown = cast("type[Arguments[PriorTraining]]", Arguments[kind])  # type: ignore[valid-type]
    explain = partial(explained, training)
    arguments = parse(shown, "train-prior", words, Arguments(training), explain)
    check_dry_run(arguments.dry_run, arguments.minutes)
    if arguments.dry_run:
        codes = CodeCache(arguments.training.codes)
        classes = len(codes.label_names or ())
        title = f"prior {recipe or ('' if config else DEFAULT_RECIPE)}".rstrip()
        text, seconds = dry_run(
            title,
            arguments.training,
            len(codes.train),
            lambda changed: time_prior_step(changed, codes.spec, classes),
        )
        print_once(f"{text}\n{format_total_time([seconds])}")
        return
    if arguments.overfit_batch:
        print_once(overfit_prior(arguments.training))
        return
    pipeline = run_prior(arguments.training, arguments.minutes)
    print_once(f"pipeline: {pipeline}\nnext: latentloom sample --pipeline {arguments.training.output} --num-images 16")
