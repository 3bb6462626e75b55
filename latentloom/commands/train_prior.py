"""latentloom train-prior: stage two."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from latentloom.arguments import parse, recipe_and_config, recipe_help, training_values, with_required_missing
from latentloom.stages import run_prior, say
from stage2_prior.training_config import PriorTraining


@dataclass(frozen=True)
class Arguments:
    training: Annotated[PriorTraining, tyro.conf.arg(name="")]
    recipe: Annotated[str, recipe_help("Configuration to start from", "prior")] = "ar-tiny"
    config: Path | None = None
    """YAML file whose fields replace those of --recipe where given; a run folder's config.yaml repeats that run."""
    minutes: float | None = None
    """Sets --max-steps once, at the start, to what fits into this time on this machine."""


def main(words: list[str]) -> None:
    recipe, config = recipe_and_config(words)
    values = training_values("prior", recipe or (None if config else Arguments.recipe), config)
    training = with_required_missing(PriorTraining, values, ("codes", "output"))
    arguments = parse(Arguments, "train-prior", words, Arguments(training))
    pipeline = run_prior(arguments.training, arguments.minutes)
    say(f"pipeline: {pipeline}\nnext: latentloom sample --pipeline {arguments.training.output} --num-images 16")
