"""latentloom train-tokenizer: stage one."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from latentloom.arguments import parse, peek, recipe_help, training_values, with_required_missing
from latentloom.stages import load_source, run_tokenizer, say
from stage1_tokenizer.training_config import TokenizerTraining


@dataclass(frozen=True)
class Arguments:
    training: Annotated[TokenizerTraining, tyro.conf.arg(name="")]
    recipe: Annotated[str, recipe_help("Configuration to start from", "tokenizer")] = "vqgan-f4"
    config: Path | None = None
    """YAML file whose fields replace those of --recipe where given; a run folder's config.yaml repeats that run."""
    minutes: float | None = None
    """Sets --max-steps once, at the start, to what fits into this time on this machine."""


def main(words: list[str]) -> None:
    given = peek(words, "--recipe", "--config")
    recipe = given.get("--recipe", None if "--config" in given else Arguments.recipe)
    config = Path(given["--config"]) if "--config" in given else None
    training = with_required_missing(
        TokenizerTraining, training_values("tokenizer", recipe, config), ("data", "output")
    )
    arguments = parse(Arguments, "train-tokenizer", words, Arguments(training))
    model = run_tokenizer(arguments.training, load_source(arguments.training.data), arguments.minutes)
    say(
        f"tokenizer: {model}\nnext: latentloom tokenize --tokenizer {arguments.training.output} "
        f"--data {arguments.training.data} --output codes"
    )
