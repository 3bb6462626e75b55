"""latentloom train-tokenizer: stage one."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from latentloom.checks import check_apart, check_dry_run
from latentloom.commands.arguments import (
    TRAINING_GROUPS,
    defaults_note,
    parse,
    peek,
    recipe_and_config,
    recipe_help,
    training_values,
)
from latentloom.commands.option_help import WITHOUT_PREFIX
from latentloom.commands.variants import explained, starting_point
from latentloom.jobs.stages import load_source, print_classes, run_tokenizer
from latentloom.planning.dry_run import closing, dry_run
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


@dataclass(frozen=True)
class Arguments:
    training: Annotated[TokenizerTraining, WITHOUT_PREFIX]
    recipe: str | None = field(
        default=None, metadata=recipe_help("Recipe to start from", "tokenizer", "from the size of the images")
    )
    config: Path | None = None
    """YAML file with values that replace those of the recipe; the config.yaml of a run repeats that run. (default: none)"""
    minutes: float | None = None
    """Time limit: sets --max-steps once, at the start, to what fits on this machine. (default: no limit)"""
    dry_run: bool = False
    """Print the time and the memory that the run would take, and write nothing."""
    overfit_batch: bool = False
    """Check the set-up: train on one batch alone, in a folder beside --output, and print whether the loss fell."""


GROUPS = {"data": ("data", "resolution", "image_channels", "padding")} | TRAINING_GROUPS


def main(words: list[str]) -> None:
    recipe, config = recipe_and_config(words)
    values = training_values("tokenizer", recipe, config)
    data: Any = peek(words, "--data").get("--data", values.get("data"))
    source = statistics = None
    if data is not None and "resolution" not in values:
        source = load_source(data)
        statistics = dataset_statistics(source.train)
        recipe, values = select_for_images(words, source, statistics, recipe, config)
    elif data is None and recipe is None and config is None:  # --help, or an error that the parser reports
        recipe, values = HELP_RECIPE, training_values("tokenizer", HELP_RECIPE, None)
    training, words = starting_point(TokenizerTraining, values, words)
    arguments = parse(
        Arguments,
        "train-tokenizer",
        words,
        GROUPS,
        default=Arguments(training),
        explain=partial(explained, training),
        note=defaults_note(recipe, config),
    )
    check_dry_run(arguments.dry_run, arguments.minutes)
    check_apart(arguments.training.output, arguments.training.data)
    inputs = tokenizer_inputs(arguments.training, source or load_source(arguments.training.data), statistics)
    training = inputs.config
    print_classes(inputs.source)
    if arguments.dry_run:
        title, images = f"tokenizer {recipe or ''}".rstrip(), len(inputs.source.train)
        text, seconds = dry_run(title, training, images, lambda config: time_tokenizer_step(config, inputs.model))
        print_once(f"{text}\n{closing([seconds])}")
        return
    if arguments.overfit_batch:
        print_once(overfit_tokenizer(inputs))
        return
    model = run_tokenizer(inputs, arguments.minutes)
    print_once(
        f"tokenizer: {model}\nnext: latentloom tokenize --tokenizer {training.output} --data {training.data} --output codes"
    )


def select_for_images(
    words: list[str], source: ImageSource, statistics: DatasetStatistics, recipe: str | None, config: Path | None
) -> tuple[str | None, dict[str, Any]]:
    """Select a size, and a recipe if neither --recipe nor --config is given, and print the reasons.

    Returns: The recipe, if there is one, and the values of the configuration.
    """
    resolution = peek(words, "--resolution").get("--resolution")
    size = None if resolution is None else parse_size(resolution)
    device_type = accelerated_device().type
    choice = select_recipes(statistics, len(source.train), device_type, size=size, tokenizer=recipe)
    size_line, recipe_line, _ = choice.reasons
    print_once(f"{size_line}\n{recipe_line}" if config is None else size_line)
    recipe = choice.tokenizer if config is None else recipe
    height, width = choice.size
    return recipe, training_values("tokenizer", recipe, config, {"resolution": f"{height}x{width}"})
