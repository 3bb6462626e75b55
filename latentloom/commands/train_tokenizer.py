"""latentloom train-tokenizer: stage one."""

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import tyro

from latentloom.checks import check_apart, check_dry_run
from latentloom.commands.arguments import (
    parse,
    peek,
    recipe_and_config,
    recipe_help,
    training_values,
)
from latentloom.commands.variants import explained, starting_point
from latentloom.jobs.stages import load_source, print_classes, run_tokenizer
from latentloom.planning.dry_run import dry_run, format_total_time
from latentloom.planning.overfit_batch import overfit_tokenizer
from latentloom.planning.recipe_selection import select_recipes
from latentloom.planning.step_timing import time_tokenizer_step
from latentloom.planning.tokenizer_inputs import tokenizer_inputs
from stage1_tokenizer.data.statistics import dataset_statistics
from stage1_tokenizer.training_config import TokenizerTraining, parse_size
from training_harness.processes import accelerated_device, print_once


@dataclass(frozen=True)
class Arguments:
    training: Annotated[TokenizerTraining, tyro.conf.arg(name="")]
    recipe: Annotated[
        str | None, recipe_help("Configuration to start from, by default chosen from the images' size", "tokenizer")
    ] = None
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
    values = training_values("tokenizer", recipe, config)
    if "resolution" not in values:
        values = select_for_images(words, values, recipe, config)
    training, words = starting_point(TokenizerTraining, values, words)
    explain = partial(explained, training)
    arguments = parse(Arguments, "train-tokenizer", words, Arguments(training), explain)
    check_dry_run(arguments.dry_run, arguments.minutes)
    check_apart(arguments.training.output, arguments.training.data)
    inputs = tokenizer_inputs(arguments.training, load_source(arguments.training.data))
    training = inputs.config
    print_classes(inputs.source)
    if arguments.dry_run:
        title, images = f"tokenizer {recipe or ''}".rstrip(), len(inputs.source.train)
        text, seconds = dry_run(title, training, images, lambda config: time_tokenizer_step(config, inputs.model))
        print_once(f"{text}\n{format_total_time([seconds])}")
        return
    if arguments.overfit_batch:
        print_once(overfit_tokenizer(inputs))
        return
    model = run_tokenizer(inputs, arguments.minutes)
    print_once(
        f"tokenizer: {model}\nnext: latentloom tokenize --tokenizer {training.output} --data {training.data} --output codes"
    )


def select_for_images(
    words: list[str], values: dict[str, Any], recipe: str | None, config: Path | None
) -> dict[str, Any]:
    """`values` with a size, and a recipe where none was given, that suit the images of --data."""
    given = peek(words, "--data", "--resolution")
    data = given.get("--data", values.get("data"))
    if data is None:  # --help, or an error that the parser words better
        return values
    source = load_source(data)
    size = parse_size(given["--resolution"]) if "--resolution" in given else None
    choice = select_recipes(
        dataset_statistics(source.train), len(source.train), accelerated_device().type, size=size, tokenizer=recipe
    )
    if recipe is None and config is None:
        values = training_values("tokenizer", choice.tokenizer, None)
    size_line, recipe_line, _ = choice.reasons
    print_once(f"{size_line}\n{recipe_line}" if config is None else size_line)
    return values | {"resolution": f"{choice.size[0]}x{choice.size[1]}"}
