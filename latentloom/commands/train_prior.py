"""latentloom train-prior: train a prior on codes (stage two)."""

from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Generic, TypeVar, cast

from latentloom.checks import check_dry_run
from latentloom.commands.arguments import (
    describe_defaults,
    describe_recipes,
    parse,
    peek_recipe_and_config,
    training_values,
)
from latentloom.commands.option_help import WITHOUT_PREFIX
from latentloom.commands.training_arguments import TRAINING_GROUPS, TrainingArguments
from latentloom.commands.variants import draft_training, explain_unknown_option
from latentloom.jobs.stages import run_prior
from latentloom.planning.dry_run import dry_run, format_total_time
from latentloom.planning.overfit_batch import overfit_prior
from latentloom.planning.step_timing import time_prior_step
from stage1_tokenizer.codes.reader import CodeCache
from stage2_prior.training_config import PriorTraining, select_training_class
from training_harness.processes import print_once

Training = TypeVar("Training", bound=PriorTraining)
DEFAULT_RECIPE = "ar-tiny"


@dataclass(frozen=True, kw_only=True)
class Arguments(TrainingArguments, Generic[Training]):
    training: Annotated[Training, WITHOUT_PREFIX]
    recipe: str = field(
        default=DEFAULT_RECIPE, metadata=describe_recipes("Recipe to start from", "prior", DEFAULT_RECIPE)
    )


GROUPS = {"data": ("codes", "validation_images")} | TRAINING_GROUPS


def main(argv: list[str]) -> None:
    recipe, config = peek_recipe_and_config(argv)
    recipe = recipe or (None if config else DEFAULT_RECIPE)
    values = training_values("prior", recipe, config)
    prior_class = select_training_class(values)
    training, argv = draft_training(prior_class, values, argv)
    arguments = parse(
        cast("type[Arguments[PriorTraining]]", Arguments[prior_class]),  # type: ignore[valid-type]
        "train-prior",
        argv,
        GROUPS,
        default=Arguments(training=training),
        explain=partial(explain_unknown_option, training),
        note=describe_defaults(recipe, config),
    )
    check_dry_run(arguments.dry_run, arguments.minutes)
    if arguments.dry_run:
        codes = CodeCache(arguments.training.codes)
        num_classes = len(codes.label_names or ())
        title = f"prior {recipe or ''}".rstrip()
        text, seconds = dry_run(
            title,
            arguments.training,
            len(codes.train),
            lambda config: time_prior_step(config, codes.spec, num_classes),
        )
        print_once(f"{text}\n{format_total_time([seconds])}")
        return
    if arguments.overfit_batch:
        print_once(overfit_prior(arguments.training))
        return
    pipeline = run_prior(arguments.training, arguments.minutes)
    print_once(f"pipeline: {pipeline}\nnext: latentloom sample --pipeline {arguments.training.output} --num-images 16")
