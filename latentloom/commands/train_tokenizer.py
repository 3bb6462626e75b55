"""latentloom train-tokenizer: train a tokenizer on images (stage one)."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from latentloom.checks import check_dry_run, check_output_outside_data
from latentloom.commands.arguments import (
    describe_defaults,
    describe_recipes,
    parse,
    peek_options,
    peek_recipe_and_config,
    training_values,
)
from latentloom.commands.option_help import WITHOUT_PREFIX
from latentloom.commands.training_arguments import TRAINING_GROUPS, TrainingArguments
from latentloom.commands.variants import draft_training, explain_unknown_option
from latentloom.jobs.stages import load_source, print_classes, run_tokenizer
from latentloom.planning.dry_run import dry_run, format_total_time
from latentloom.planning.overfit_batch import overfit_tokenizer
from latentloom.planning.recipe_selection import select_recipes
from latentloom.planning.step_timing import time_tokenizer_step
from latentloom.planning.tokenizer_inputs import tokenizer_inputs
from stage1_tokenizer.data.sources import ImageSource
from stage1_tokenizer.data.statistics import DatasetStatistics, dataset_statistics
from stage1_tokenizer.training_config import TokenizerTraining, parse_size
from training_harness.processes import accelerated_device, print_once

HELP_RECIPE = "vqgan-f4"
"""Its values are the defaults in `--help` when there are no images to choose a recipe for."""


@dataclass(frozen=True, kw_only=True)
class Arguments(TrainingArguments):
    training: Annotated[TokenizerTraining, WITHOUT_PREFIX]
    recipe: str | None = field(
        default=None, metadata=describe_recipes("Recipe to start from", "tokenizer", "from the size of the images")
    )


GROUPS = {"data": ("data", "resolution", "image_channels", "padding")} | TRAINING_GROUPS


def main(argv: list[str]) -> None:
    recipe, config = peek_recipe_and_config(argv)
    values = training_values("tokenizer", recipe, config)
    data: Any = peek_options(argv, "--data").get("--data", values.get("data"))
    source = statistics = None
    if data is not None and "resolution" not in values:
        source = load_source(data)
        statistics = dataset_statistics(source.train)
        recipe, values = select_values_for_images(argv, source, statistics, recipe, config)
    elif data is None and recipe is None and config is None:  # --help, or an error that the parser reports
        recipe, values = HELP_RECIPE, training_values("tokenizer", HELP_RECIPE, None)
    training, argv = draft_training(TokenizerTraining, values, argv)
    arguments = parse(
        Arguments,
        "train-tokenizer",
        argv,
        GROUPS,
        default=Arguments(training=training),
        explain=partial(explain_unknown_option, training),
        note=describe_defaults(recipe, config),
    )
    check_dry_run(arguments.dry_run, arguments.minutes)
    check_output_outside_data(arguments.training.output, arguments.training.data)
    inputs = tokenizer_inputs(arguments.training, source or load_source(arguments.training.data), statistics)
    training = inputs.config
    print_classes(inputs.source)
    if arguments.dry_run:
        title, num_images = f"tokenizer {recipe or ''}".rstrip(), len(inputs.source.train)
        text, seconds = dry_run(title, training, num_images, lambda config: time_tokenizer_step(config, inputs.model))
        print_once(f"{text}\n{format_total_time([seconds])}")
        return
    if arguments.overfit_batch:
        print_once(overfit_tokenizer(inputs))
        return
    model = run_tokenizer(inputs, arguments.minutes)
    print_once(
        f"tokenizer: {model}\nnext: latentloom tokenize --tokenizer {training.output} --data {training.data} --output codes"
    )


def select_values_for_images(
    argv: list[str], source: ImageSource, statistics: DatasetStatistics, recipe: str | None, config: Path | None
) -> tuple[str | None, dict[str, Any]]:
    """Select a size, and a recipe if neither --recipe nor --config is given, and print the reasons.

    Returns: The recipe, if there is one, and the values of the configuration.
    """
    resolution = peek_options(argv, "--resolution").get("--resolution")
    size = None if resolution is None else parse_size(resolution)
    device_type = accelerated_device().type
    selection = select_recipes(statistics, len(source.train), device_type, size=size, tokenizer=recipe)
    size_line, recipe_line, _ = selection.reasons
    print_once(f"{size_line}\n{recipe_line}" if config is None else size_line)
    recipe = selection.tokenizer if config is None else recipe
    height, width = selection.size
    return recipe, training_values("tokenizer", recipe, config, {"resolution": f"{height}x{width}"})
